"""Bases in 8 and 4 bits: near the base they came from, trained over, and refused where they cannot be."""

import sys

import pytest
import torch

from lora_gpt2.core.errors import ResourceError
from lora_gpt2.core.interrupt import StopRequest
from lora_gpt2.data.prepared import prepare_data
from lora_gpt2.model import quantize
from lora_gpt2.model.base import load_base
from lora_gpt2.model.quantize import QuantizedLinear, bytes_per_weight, check_quantization
from lora_gpt2.model.runtime import Runtime
from lora_gpt2.recipe import build_recipe
from lora_gpt2.training.domain import Domain
from lora_gpt2.training.trainer import Trainer
from tests.builders import make_base_folder

RUNTIME = Runtime(torch.device("cpu"), torch.float32)
KINDS = {"int8": 0.02, "nf4": 0.15}


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    return make_base_folder(tmp_path_factory.mktemp("bases") / "wide", width=64, heads=4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_is_near_and_smaller(wide_folder, kind):
    exact, near = load_base(str(wide_folder), RUNTIME), load_base(str(wide_folder), RUNTIME, kind)
    assert near.fingerprint == exact.fingerprint
    for name, module in near.model.named_modules():
        if isinstance(module, QuantizedLinear):
            wanted = exact.model.get_submodule(name).weight
            assert (module.dense(torch.float32) - wanted).norm() <= KINDS[kind] * wanted.norm()
            stored = module.codes.numel() * module.codes.element_size()
            assert stored <= bytes_per_weight(kind, 4) * wanted.numel()
            assert torch.equal(module.bias, exact.model.get_submodule(name).bias)
    assert sum(isinstance(m, QuantizedLinear) for m in near.model.modules()) == 4 * exact.config.layers
    assert torch.equal(near.model.head, exact.model.head)


@pytest.mark.parametrize("kind", KINDS)
def test_training_over_a_quantised_base_lowers_the_loss_also_after_an_evaluation(
    wide_folder, text_file, reporter, kind
):
    recipe = build_recipe(
        {"name": "one", "data": {"sources": [str(text_file)], "block_size": 16}, "lora": {"rank": 2},
         "train": {"steps": 40, "batch_tokens": 64, "learning_rate": 1e-2, "quantize": kind}}, "test",
    )  # fmt: skip
    base = load_base(str(wide_folder), RUNTIME, kind)
    before = [module.codes.clone() for module in base.model.modules() if isinstance(module, QuantizedLinear)]
    trainer = Trainer(base, [Domain("one", recipe, prepare_data(recipe.data, base.tokenizer, reporter))], reporter)
    first = trainer.measure_blocks(trainer.domains[0].data.validation, None)
    (trained,) = trainer.train(StopRequest())
    assert trained.validation_nll < first - 0.3
    after = [module.codes for module in base.model.modules() if isinstance(module, QuantizedLinear)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_without_bitsandbytes_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ResourceError, match="not installed") as caught:
        check_quantization("int8", torch.device("cpu"))
    assert "train-extras" in caught.value.hint


@pytest.mark.parametrize("kind", KINDS)
def test_a_bitsandbytes_that_returns_other_numbers_is_refused(monkeypatch, kind):
    check_quantization(kind, torch.device("cpu"))
    monkeypatch.setattr(QuantizedLinear, "dense", lambda self, dtype: torch.zeros(64, 64))
    with pytest.raises(ResourceError, match="other numbers") as caught:
        check_quantization(kind, torch.device("cpu"))
    assert "quantize=none" in caught.value.hint


def test_a_bitsandbytes_without_kernels_is_refused(monkeypatch):
    class Broken:
        def __getattr__(self, name):
            raise RuntimeError("no kernel for this device\nmore")

    monkeypatch.setattr(quantize, "_load_functional", Broken)
    with pytest.raises(ResourceError, match="cannot do nf4 on cpu: no kernel for this device"):
        check_quantization("nf4", torch.device("cpu"))
