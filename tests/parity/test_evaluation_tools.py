"""The same perplexity as lm-evaluation-harness on the same base and text; installed for the test, so a slow one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_gpt2.evaluation.perplexity import measure_perplexity
from lora_gpt2.model.base import load_base
from lora_gpt2.model.runtime import choose_runtime
from lora_gpt2.recipe import EvaluateSettings

TEXTS = [
    "The king is dead, and nobody in the town knows who will follow him.",
    "Take two eggs and beat them well. " * 90,
]


ROLLING = """
import json, logging, sys
logging.disable(logging.WARNING)
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
folder, texts = json.load(sys.stdin)
model = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=1)
requests = [Instance(request_type="loglikelihood_rolling", doc={}, arguments=(t,), idx=i) for i, t in enumerate(texts)]
print(json.dumps(model.loglikelihood_rolling(requests, disable_tqdm=True)))
"""
PACKAGES = [
    "lm_eval==0.4.13",
    "jsonlines",
    "sqlitedict",
    "pytablewriter",
    "more_itertools",
    "word2number",
    "scikit-learn",
]


@pytest.mark.slow
def test_the_document_protocol_equals_lm_evaluation_harness(tmp_path):
    from lora_gpt2.model.locate import find_base

    install = [sys.executable, "-m", "pip", "install", "--no-deps", "-q", "--target", str(tmp_path), *PACKAGES]
    subprocess.run(install, check=True, timeout=300)
    folder = find_base("nano")
    base = load_base("nano", choose_runtime("float32"))
    done = subprocess.run(
        [sys.executable, "-c", ROLLING], input=json.dumps([str(folder), TEXTS]), capture_output=True, text=True,
        check=True, timeout=300, env={**os.environ, "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    theirs = json.loads(done.stdout.strip().splitlines()[-1])
    context = base.config.context
    for text, total in zip(TEXTS, theirs, strict=True):
        score = measure_perplexity(base, [text], EvaluateSettings(window=context, stride=context))
        assert score.nll_nats_per_token == pytest.approx(-total / score.tokens, abs=1e-4)
    assert len(base.tokenizer.encode(TEXTS[1])) > context, "more than one window"
    assert Path(folder).is_dir()
