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
from lora_gpt2.training.slot import TrainingSlot
from lora_gpt2.training.trainer import Trainer
from lora_gpt2.training.validation import measure_blocks
from tests.builders import make_base_folder

RUNTIME = Runtime(torch.device("cpu"), torch.float32)
KINDS = ("int8", "nf4")


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    return make_base_folder(tmp_path_factory.mktemp("bases") / "wide", width=64, heads=4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_holds_its_projections_in_codes_and_all_else_as_it_was(wide_folder, kind):
    exact, near = load_base(str(wide_folder), RUNTIME), load_base(str(wide_folder), RUNTIME, kind)
    assert near.fingerprint == exact.fingerprint
    for name, module in near.model.named_modules():
        if isinstance(module, QuantizedLinear):
            wanted = exact.model.get_submodule(name)
            alone = QuantizedLinear(wanted.weight, wanted.bias, kind)
            assert torch.equal(module.dense(torch.float32), alone.dense(torch.float32))
            assert torch.equal(module.bias, wanted.bias)
    assert sum(isinstance(m, QuantizedLinear) for m in near.model.modules()) == 4 * exact.config.n_layer
    assert torch.equal(near.model.head, exact.model.head)


# Dettmers et al. 2023, appendix E
NF4 = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)


def draw_weight(outputs=256, inputs=128):
    """Returns a weight whose rows differ in size, as those of trained projections do."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(outputs, inputs, generator=generator) * torch.rand(outputs, 1, generator=generator)


def test_int8_rounds_each_weight_to_the_nearest_127th_of_its_rows_largest():
    weight = draw_weight()
    near = QuantizedLinear(weight, None, "int8")
    largest = weight.abs().amax(1, keepdim=True)
    # bitsandbytes takes the weight in float16, which rounds it, and the largest, by at most 2^-11
    error = (near.dense(torch.float32) - weight).abs()
    assert (error <= largest / 254 + weight.abs() * 2**-10).all()
    functional = pytest.importorskip("bitsandbytes.functional")
    _, stats, _ = functional.int8_vectorwise_quant(weight.half())
    theirs = functional.int8_vectorwise_dequant(near.codes, stats)
    torch.testing.assert_close(near.dense(torch.float32), theirs, rtol=1e-6, atol=0)


def test_nf4_rounds_each_weight_to_the_nearest_code_of_its_block():
    weight = draw_weight()
    blocks = weight.view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    wanted = NF4[((blocks / largest)[..., None] - NF4).abs().argmin(-1)] * largest
    found = QuantizedLinear(weight, None, "nf4").dense(torch.float32).view(-1, 64)
    # the largest of a block is itself kept in 8 bits, relative to the mean: an error of some 1 % of the spread
    assert ((found - wanted).abs() <= 0.02 * largest.max()).all()
    assert (found - wanted).norm() <= 1e-2 * wanted.norm()


@pytest.mark.parametrize(("kind", "slope"), [("int8", 1.0), ("nf4", 0.995)])
def test_quantising_neither_shrinks_nor_grows_the_weights(kind, slope):
    """The regression of the dequantised weights on the weights: 1 for int8; rounding to NF4 takes half a per cent."""
    weight = draw_weight()
    found = QuantizedLinear(weight, None, kind).dense(torch.float32)
    assert float((found * weight).sum() / weight.square().sum()) == pytest.approx(slope, abs=1e-3)
    assert abs(float((found - weight).mean())) <= 1e-3 * float(weight.std()), "and does not shift them"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_the_codes_can_hold_come_back_exactly(kind, dtype):
    generator = torch.Generator().manual_seed(0)
    if kind == "int8":
        weight = torch.randint(-127, 128, (256, 128), generator=generator) * 2.0**-10
        weight[:, 0] = 127 * 2.0**-10
    else:
        codes = torch.randint(0, 16, (256, 128), generator=generator)
        codes[:, ::64] = 15
        weight = NF4[codes] * 0.25
    near = QuantizedLinear(weight, None, kind)
    assert torch.equal(near.dense(dtype), weight.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_in_16_bits_are_those_in_32_rounded(kind, dtype):
    near = QuantizedLinear(draw_weight(), None, kind)
    exact, found = near.dense(torch.float32), near.dense(dtype)
    assert found.dtype == dtype
    # two roundings: of the row's scale and of the product
    assert ((found.float() - exact).abs() <= 1.01 * torch.finfo(dtype).eps * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_projection_computes_with_its_dense_weight(kind):
    generator = torch.Generator().manual_seed(1)
    bias, x = torch.randn(256, generator=generator), torch.randn(5, 128, generator=generator)
    near = QuantizedLinear(draw_weight(), bias, kind)
    torch.testing.assert_close(near(x), x @ near.dense(torch.float32).mT + bias, rtol=1e-5, atol=1e-5)


def test_the_bytes_of_a_weight_are_those_that_are_stored():
    weight = draw_weight()  # 512 blocks of 64, whose scales are two blocks of 256
    int8, nf4 = (QuantizedLinear(weight, None, kind) for kind in KINDS)
    assert bytes_per_weight("int8", 4) * weight.numel() == int8.codes.nbytes, "scales of rows are left out"
    stored = nf4.codes.nbytes + nf4.state.absmax.nbytes + nf4.state.state2.absmax.nbytes
    assert bytes_per_weight("nf4", 4) * weight.numel() == stored
    assert [bytes_per_weight("none", item) for item in (2, 4)] == [2, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_training_over_a_quantised_base_lowers_the_loss_also_after_an_evaluation(
    wide_folder, text_file, reporter, kind
):
    recipe = build_recipe(
        {
            "name": "one",
            "data": {"sources": [str(text_file)], "block_size": 16},
            "lora": {"rank": 2},
            "train": {"steps": 40, "batch_tokens": 64, "learning_rate": 1e-2, "quantize": kind},
        },
        "test",
    )
    base = load_base(str(wide_folder), RUNTIME, kind)
    before = [module.codes.clone() for module in base.model.modules() if isinstance(module, QuantizedLinear)]
    trainer = Trainer(
        base, [TrainingSlot(recipe=recipe, data=prepare_data(recipe.data, base.tokenizer, reporter))], reporter
    )
    first = measure_blocks(trainer.base, trainer.slots[0].data.validation, None)
    (trained,) = trainer.train(StopRequest())
    assert trained.validation_nll < first - 0.3
    after = [module.codes for module in base.model.modules() if isinstance(module, QuantizedLinear)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_without_bitsandbytes_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ResourceError, match="not installed") as caught:
        check_quantization("int8", torch.device("cpu"))
    assert caught.value.hint == "pip install bitsandbytes"


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


def test_an_int8_weight_is_rounded_once_in_16_bits():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    layer = QuantizedLinear(weight, None, "int8")
    exact = layer.codes.float() * layer.scale
    assert torch.equal(layer.dense(torch.bfloat16), exact.bfloat16()), "not with a scale that was rounded before"
