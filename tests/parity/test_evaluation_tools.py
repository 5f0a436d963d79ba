"""The same perplexity as lm-evaluation-harness, with and without an adapter; installed for the test, so a slow one."""

import json
import os
import subprocess
import sys

import pytest

from lora_gpt2.evaluation.perplexity import measure_perplexity
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.session import Session
from lora_gpt2.model.base import load_base
from lora_gpt2.model.checkpoint import find_base
from lora_gpt2.model.runtime import choose_runtime
from lora_gpt2.recipe import EvaluateSettings, LoraSettings
from lora_gpt2.store.files import Origin, publish_adapter
from tests.builders import make_adapter

TEXTS = [
    "The king is dead, and nobody in the town knows who will follow him.",
    "Take two eggs and beat them well. " * 90,
]


ROLLING = """
import json, logging, sys
logging.disable(logging.WARNING)
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
folder, peft, texts = json.load(sys.stdin)
model = HFLM(pretrained=folder, peft=peft, device="cpu", dtype="float32", batch_size=1)
requests = [Instance(request_type="loglikelihood_rolling", doc={}, arguments=(t,), idx=i) for i, t in enumerate(texts)]
print(json.dumps(model.loglikelihood_rolling(requests, disable_tqdm=True)))
"""


def measure_theirs(harness, folder, peft):
    """Returns the log likelihood in nats of each text under the `hf` model of lm-evaluation-harness."""
    done = subprocess.run(
        [sys.executable, "-c", ROLLING],
        input=json.dumps([str(folder), peft and str(peft), TEXTS]),
        text=True,
        capture_output=True,
        check=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(harness), "HF_HUB_OFFLINE": "1"},
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["nothing", "the default targets"])
def test_the_document_protocol_equals_lm_evaluation_harness(harness, store, trained):
    """The adapter's folder is the one in the store, unchanged."""
    folder, base = find_base("nano"), load_base("nano", choose_runtime("float32"))
    session, mix, peft = Session(base, store), Mix(), None
    if trained != "nothing":
        adapter = make_adapter(base.config, settings=LoraSettings())
        publish_adapter(store, "law", adapter, base, Origin())
        mix, peft = Mix.single("law"), store.resolve("law")
    context = base.config.n_positions
    settings = EvaluateSettings(window=context, stride=context)
    differences = []
    for text, total in zip(TEXTS, measure_theirs(harness, folder, peft), strict=True):
        score = measure_perplexity(base, [text], settings, session.select(mix))
        assert score.nll_nats_per_token == pytest.approx(-total / score.tokens, abs=1e-4)
        plain = measure_perplexity(base, [text], settings)
        differences.append(abs(score.nll_nats_per_token - plain.nll_nats_per_token))
    assert (min(differences) > 0.01) == (trained != "nothing"), "the adapter changes the figure"
    assert len(base.tokenizer.encode(TEXTS[1])) > context, "more than one window"
