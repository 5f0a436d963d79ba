"""Ours against transformers: logits, tokens and perplexity on the same weights."""

import math

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from lora_gpt2.evaluation.perplexity import measure_perplexity
from lora_gpt2.inference.generate import Request, generate
from lora_gpt2.inference.session import Session
from lora_gpt2.model.base import load_base
from lora_gpt2.model.checkpoint import find_base
from lora_gpt2.model.config import parse_config
from lora_gpt2.model.gpt2 import GPT2
from lora_gpt2.model.runtime import choose_runtime
from lora_gpt2.recipe import EvaluateSettings, GenerateSettings
from tests.builders import make_base_folder

FLOAT32 = choose_runtime("float32", torch.device("cpu"))
EXACT = {
    "distilgpt2": {"n_layer": 6},
}
LARGE = {
    "gpt2": {},
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
}


def copy_weights(theirs):
    """Returns our GPT-2 with the weights of a transformers model, without writing them to disk."""
    from lora_gpt2.model.base import TRANSPOSED
    from lora_gpt2.model.stored_weights import BUFFERS

    model = GPT2(parse_config(theirs.config.to_dict(), "theirs"))
    state = {}
    for name, tensor in theirs.state_dict().items():
        key = name.removeprefix("transformer.")
        if not BUFFERS.fullmatch(key) and key != "lm_head.weight":
            state[key] = tensor.t() if key.endswith(TRANSPOSED) else tensor
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("size", [*EXACT, *(pytest.param(size, marks=pytest.mark.slow) for size in LARGE)])
def test_logits_of_the_exact_configurations_agree_within_2e_5(size):
    torch.set_num_threads(2)
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(**(EXACT | LARGE)[size])).eval()
    tokens = torch.randint(0, 50257, (2, 160 if size == "distilgpt2" else 40))
    with torch.no_grad():
        wanted = theirs(tokens).logits
        ours = copy_weights(theirs)
        del theirs
        found = ours.logits(ours(tokens), None)
    difference = (found - wanted).abs().max().item()
    assert difference <= 2e-5
    assert wanted.std() > 0.1
    assert not torch.allclose(found, wanted.roll(1, 1), atol=0.1)


@pytest.mark.parametrize("options", [{}, {"tied": False}, {"shards": 2}, {"layers": 6}])
def test_a_saved_checkpoint_gives_the_same_logits(tmp_path, options):
    folder = make_base_folder(tmp_path / "base", **options)
    base = load_base(str(folder), FLOAT32)
    theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    tokens = torch.randint(0, base.config.vocab_size, (2, 30))
    with torch.no_grad():
        difference = (base.model.logits(base.model(tokens), None) - theirs(tokens).logits).abs().max()
    assert difference <= 2e-5


@pytest.fixture(scope="module")
def nano():
    folder = find_base("nano")
    return load_base("nano", FLOAT32), GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval(), folder


def test_nano_is_an_ordinary_gpt2_for_transformers(nano):
    base, theirs, folder = nano
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "It's a test: naïve café,\n\n  two spaces 😀."
    assert tokenizer(text).input_ids == base.tokenizer.encode(text)
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.eos_token_id, tokenizer.model_max_length) == (8191, 512)
    tokens = torch.randint(0, 8192, (2, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (base.model.logits(base.model(tokens), None) - theirs(tokens).logits).abs().max() <= 2e-5


def test_greedy_text_equals_transformers_generate(nano):
    base, theirs, _ = nano
    settings = GenerateSettings(max_new_tokens=40, temperature=0, repetition_penalty=1.3)
    for prompt in ("The history of", "She opened the door and"):
        ids = torch.tensor([base.tokenizer.encode(prompt)])
        wanted = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=40,
            repetition_penalty=1.3,
            pad_token_id=8191,
        )[0, ids.shape[1] :].tolist()
        (output,) = generate(Session(base), [Request(prompt)], settings)
        end = wanted.index(8191) if 8191 in wanted else 40
        assert output.text == base.tokenizer.decode(wanted[:end])


@pytest.mark.parametrize("stride", [pytest.param(512, marks=pytest.mark.slow), 256])
def test_the_stream_protocol_equals_the_documentations_loop(nano, stride):
    base, theirs, folder = nano
    text = (folder / "vocab.json").read_text(encoding="utf-8")[:6000]
    ids = torch.tensor([base.tokenizer.encode(text)])
    total, count, previous = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + 512, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : -(end - previous)] = -100
        scored = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            logits = theirs(ids[:, begin:end]).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum").item()
        count, previous = count + scored, end
        if end == ids.shape[1]:
            break
    score = measure_perplexity(base, [text], EvaluateSettings(protocol="stream", stride=stride))
    assert score.tokens == count > 1000
    assert score.nll_nats_per_token == pytest.approx(total / count, abs=1e-4)
    assert score.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)
