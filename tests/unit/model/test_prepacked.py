"""Packed weights give nearly the same numbers, in less memory, and what is said of them is true."""

import pytest
import torch

from lora_gpt2.core.errors import ResourceError
from lora_gpt2.inference.generate import Request, generate
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.open import load_for_inference
from lora_gpt2.inference.session import Session
from lora_gpt2.model.prepacked import PrepackedLinear, prepack_weights
from lora_gpt2.model.probe import compute_logits, measure_difference
from lora_gpt2.recipe import GenerateSettings
from tests.builders import make_adapter

LARGEST = 2e-3  # of the largest value


def test_logits_and_adapters_are_nearly_those_of_float32(base, base_folder):
    packed = load_for_inference(str(base_folder), "float16")
    adapter = make_adapter(base.config)
    found = []
    for each in (base, packed):
        session = Session(each)
        session.load_in_memory({"law": adapter})
        found.append([compute_logits(each), compute_logits(each, session.select(Mix.single("law")))])
    for exact, rough in zip(*found, strict=True):
        error = measure_difference(exact, rough) / float(exact.abs().max())
        assert 0 < error < LARGEST
    assert measure_difference(*found[1]) > 0.1, "the adapter still has its effect"
    assert packed.fingerprint == base.fingerprint


def test_what_is_packed_can_be_read_back():
    weight, bias = torch.randn(24, 16), torch.randn(24)
    packed = PrepackedLinear(weight, bias)
    error = (packed.dense(torch.float32) - weight).abs().max() / weight.abs().max()
    assert 0 < error < LARGEST
    x = torch.randn(2, 3, 16)
    wanted = torch.nn.functional.linear(x, weight, bias)
    assert packed(x).shape == wanted.shape
    assert (packed(x) - wanted).abs().max() / wanted.abs().max() < LARGEST


def test_a_batch_writes_what_each_row_writes_alone(base_folder):
    session = Session(load_for_inference(str(base_folder), "float16"))
    session.load_in_memory({"law": make_adapter(session.base.config)})
    settings = GenerateSettings(temperature=0, max_new_tokens=8)
    requests = [Request("the cat", Mix.single("law")), Request("a"), Request("the")]
    together = [output.text for output in generate(session, requests, settings)]
    assert together == [generate(session, [request], settings)[0].text for request in requests]


def test_without_fbgemm_it_says_what_to_use(base, monkeypatch):
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", ["qnnpack"])
    with pytest.raises(ResourceError, match="x86") as caught:
        prepack_weights(base.model)
    assert "dtype=float32" in caught.value.hint


def test_auto_packs_on_a_cpu_unless_a_dtype_is_named_for_it(base_folder, monkeypatch):
    monkeypatch.delenv("LORA_GPT2_CPU_DTYPE")
    packed = load_for_inference(str(base_folder), "auto")
    assert packed.model.prepacked_head is not None
    (output,) = generate(Session(packed), [Request("the cat")], GenerateSettings(max_new_tokens=2))
    assert output.provenance["dtype"] == "float16"
    monkeypatch.setenv("LORA_GPT2_CPU_DTYPE", "float32")
    assert load_for_inference(str(base_folder), "auto").model.prepacked_head is None
    monkeypatch.delenv("LORA_GPT2_CPU_DTYPE")
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", ["qnnpack"])
    assert load_for_inference(str(base_folder), "auto").model.prepacked_head is None


def test_weights_that_float16_cannot_hold_are_not_packed(base, base_folder, monkeypatch):
    with torch.no_grad():
        base.model.h[1].mlp.c_fc.weight[0, 0] = 1e5
    with pytest.raises(ResourceError, match="too large for float16"):
        prepack_weights(base.model)
    assert base.model.prepacked_head is None
    assert not isinstance(base.model.h[0].attn.c_attn, PrepackedLinear)
    monkeypatch.delenv("LORA_GPT2_CPU_DTYPE")
    monkeypatch.setattr("lora_gpt2.inference.open.load_base", lambda name, runtime: base)
    assert load_for_inference("any", "auto").model.prepacked_head is None
