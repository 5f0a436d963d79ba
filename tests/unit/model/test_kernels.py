"""The Triton kernels in Triton's interpreter, which needs no GPU, beside plain tensor operations in float64.

They run in one process of their own: the interpreter is chosen when triton is imported.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_gpt2.data.blocks import IGNORE
from lora_gpt2.inference.device_sampling import FORBIDDEN, build_columns, choose_tokens
from lora_gpt2.inference.sampling import SamplingParams
from lora_gpt2.model.counter_random import draw_dropout_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TARGETS, FACTORS = [3, IGNORE, 99, 0], [0.5, 0.25, 1.0, 2.0]
LOSS_CASES = [
    (vocab, padded, scale, dtype, smoothing)
    for vocab, padded, scale in ((2100, 2112, 3.0), (128, 128, 40.0))
    for dtype in DTYPES
    for smoothing in (0.0, 0.1)
]
UPDATE_CASES = [
    (inputs, outputs, rank, dtype) for inputs, outputs, rank in ((48, 80, 3), (600, 300, 16)) for dtype in DTYPES
]
SEEDS = torch.tensor([3, 2**32 - 1])
DRAW_CASES = ["many tokens", "some tokens", "few tokens", "ties", "zeros", "not finite", "sliced", "constrained"]
MASK_CASES = [(rate, dtype) for rate in (0.0, 0.1, 0.5, 1 - 2**-20) for dtype in DTYPES]
SCRIPT = """
import sys, torch
from lora_gpt2.model.decode_kernel import add_updates
from lora_gpt2.model.counter_random import offset_of
from lora_gpt2.model import dropout_kernel, kernels
from lora_gpt2.model.dropout_kernel import fill_dropout_mask
from lora_gpt2.model.loss_kernel import score_rows
from lora_gpt2.model.sampling_kernel import draw_from_logits
given, found = torch.load(sys.argv[1], weights_only=True), {}
found["right"] = kernels._are_right(torch.device("cpu"))
dropout_kernel.FIRST += 2
found["wrong"] = kernels._are_right(torch.device("cpu"))
dropout_kernel.FIRST -= 2
for name, (logits, vocab, targets, factors, smoothing) in given["loss"].items():
    found[name] = (*score_rows(logits, vocab, targets, factors, smoothing), logits)
for name, (x, a, b_t, weights, y) in given["updates"].items():
    add_updates(x, a, b_t, weights, y)
    found[name] = y
for name, (mask, seeds, stream, rate) in given["masks"].items():
    found[name] = fill_dropout_mask(mask, offset_of(seeds, stream), rate)
for name, (logits, columns) in given["draws"].items():
    found[name] = draw_from_logits(logits, columns, 128, not_finite=-1, undecided=-2)
torch.save(found, sys.argv[2])
"""


def make_logits(vocab, padded, scale, dtype, beyond):
    logits = torch.randn(4, padded, generator=torch.Generator().manual_seed(0)).mul(scale).to(dtype)
    logits[:, vocab:] = beyond
    return logits


def make_update(inputs, outputs, rank, dtype):
    draw = torch.Generator().manual_seed(1)
    x, a, b_t, y = (
        torch.randn(shape, generator=draw).to(dtype)
        for shape in ((3, inputs), (4, rank, inputs), (4, rank, outputs), (3, outputs))
    )
    a[3], b_t[3] = torch.inf, torch.nan  # which no row uses
    weights = torch.tensor([[1.0, 0, 0, 0], [0, 0.25, -0.5, 0], [0, 0, 0, 0]])
    return x, a, b_t, weights, y


def make_draw(name):
    """Logits and sampling columns of 24 rows, every kind of parameter among them."""
    draw = torch.Generator().manual_seed(2)
    logits = torch.randn(24, {"few tokens": 100, "some tokens": 300}.get(name, 5001), generator=draw) * 2
    uniforms = [0.0, *torch.rand(22, generator=draw, dtype=torch.float64).tolist(), 1 - 2.0**-53]
    params = [
        SamplingParams(temperature=(0.0, 0.7, 1.3)[k % 3], top_k=(1, 5, 50, 64)[k % 4], top_p=p, min_p=m)
        for k, (p, m) in enumerate(itertools.product((1.0, 0.95, 0.5, 0.01), (0.0, 0.05, 0.9, 0.0, 0.1, 0.0)))
    ]
    if name == "ties":
        logits = logits.div(4).round()
    if name == "zeros":
        logits = torch.where(logits > 5, logits, torch.where(logits > 0, 0.0, -0.0))[:, :90]
    if name == "not finite":
        logits[3, 4999], logits[5, 0], logits[7, 70], logits[8:16] = (
            torch.nan,
            torch.inf,
            -torch.inf,
            logits[8:16] * 1e37,
        )
    if name == "sliced":  # a head that is padded
        logits = torch.cat([logits.round(), torch.full((24, 55), 1e9)], 1)[:, :5001]
    if name == "constrained":  # two to 48 tokens are allowed
        allowed = torch.stack([torch.randperm(5001, generator=draw).argsort() < 2 * k + 2 for k in range(24)])
        logits = logits.masked_fill(~allowed, FORBIDDEN)
    return logits, build_columns(params, uniforms)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    pytest.importorskip("triton")
    folder: Path = tmp_path_factory.mktemp("kernels")
    loss = {
        str(case): (make_logits(*case[:4], 1e4), case[0], torch.tensor(TARGETS), torch.tensor(FACTORS), case[4])
        for case in LOSS_CASES
    }
    loss["no gradient"] = (make_logits(100, 128, 1.0, torch.bfloat16, torch.nan), 100, torch.tensor(TARGETS), None, 0.0)
    updates = {str(case): make_update(*case) for case in UPDATE_CASES}
    draws = {name: make_draw(name) for name in DRAW_CASES}
    masks = {str(case): (torch.empty(2, 70, 30, dtype=case[1]), SEEDS, 2**31 + 5, case[0]) for case in MASK_CASES}
    torch.save({"loss": loss, "updates": updates, "masks": masks, "draws": draws}, folder / "given.pt")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder / "given.pt"), str(folder / "found.pt")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.parametrize("case", LOSS_CASES, ids=str)
def test_the_loss_is_softmax_cross_entropy_and_its_gradient(found, case):
    vocab, padded, scale, dtype, smoothing = case
    nll, uniform, left = found[str(case)]
    logits = make_logits(vocab, padded, scale, dtype, 0)[:, :vocab].double().requires_grad_()
    logprobs, is_target = logits.log_softmax(1), torch.tensor(TARGETS) != IGNORE
    expected = -logprobs.gather(1, torch.tensor(TARGETS).clamp_min(0)[:, None])[:, 0] * is_target
    even = -logprobs.mean(1) * is_target
    (((1 - smoothing) * expected + smoothing * even) * torch.tensor(FACTORS).double()).sum().backward()
    assert torch.allclose(nll.double(), expected, rtol=1e-5, atol=1e-5)
    assert (uniform is None) == (smoothing == 0)
    if smoothing:
        assert torch.allclose(uniform.double(), even, rtol=1e-5, atol=1e-5)
    resolution = torch.finfo(dtype).eps
    assert torch.allclose(left[:, :vocab], logits.grad.to(dtype), rtol=2 * resolution, atol=1e-6)
    assert not left[:, vocab:].any(), "whatever the padding held"


def test_without_a_gradient_the_logits_stay_and_the_padding_is_not_read(found):
    nll, _, left = found["no gradient"]
    assert torch.equal(left[:, :100], make_logits(100, 128, 1.0, torch.bfloat16, torch.nan)[:, :100])
    assert torch.isfinite(nll).all()


@pytest.mark.parametrize("case", UPDATE_CASES, ids=str)
def test_each_rows_updates_are_those_of_its_own_adapters(found, case):
    x, a, b_t, weights, y = (part.double() for part in make_update(*case))
    expected = y.clone()
    for row in range(3):
        for slot in range(3):
            expected[row] += weights[row, slot] * (x[row] @ a[slot].T @ b_t[slot])
    resolution = max(torch.finfo(case[3]).eps, 1e-6)
    assert torch.allclose(found[str(case)].double(), expected, rtol=resolution, atol=1e-4)
    assert torch.equal(found[str(case)][2], make_update(*case)[4][2]), "a row without adapters keeps its output"


@pytest.mark.parametrize("case", MASK_CASES, ids=str)
def test_dropout_masks_are_the_same_bit_for_bit(found, case):
    rate, dtype = case
    expected = draw_dropout_mask(SEEDS, 2**31 + 5, torch.empty(2, 70, 30, dtype=dtype), rate)
    assert torch.equal(found[str(case)], expected)
    assert rate or expected.eq(1).all()


@pytest.mark.parametrize("name", DRAW_CASES)
def test_the_tokens_drawn_are_those_of_tensor_operations(found, name):
    logits, columns = make_draw(name)
    expected = choose_tokens(logits, columns)
    assert found[name].tolist() == expected.tolist()
    assert (expected < 0).any() == (name in ("not finite", "ties", "sliced"))
    assert len(set(expected.tolist())) > 3


def test_kernels_that_compute_other_numbers_are_not_used(found):
    assert found["right"]
    assert not found["wrong"]


COMPILE = """
import inspect
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lora_gpt2.model import decode_kernel, dropout_kernel, layer_kernels, loss_kernel, sampling_kernel

NUMBERS = {"smoothing": "fp32", "scale": "fp32", "nll": "*fp32", "uniform": "*fp32", "factors": "*fp32"}
NUMBERS |= {"weights": "*fp32", "targets": "*i64", "offsets": "*i32"}
NUMBERS |= {"keys": "*i64", "maxima": "*i64", "flags": "*i32", "columns": "*fp64", "chosen": "*i64"}
VALUES = {"ignore": -100, "lowest": -1e38, "has_smoothing": True, "has_gradient": True, "block": 1024, "block_in": 256}
VALUES |= {"block_out": 128, "block_rank": 16, "block_slots": 8, "group": 16, "block_flags": 64}
VALUES |= {"golden": dropout_kernel.GOLDEN, "first": dropout_kernel.FIRST, "second": dropout_kernel.SECOND}
VALUES |= {"kind": 1, "block_row": 1024, "block_rows": 16, "block_keys": 64, "block_width": 64, "stages": 3}
NUMBERS |= {"z": "*fp32", "lengths": "*i64", "epsilon": "fp32"}
POINTERS = ("logits", "x", "a", "b_t", "y", "mask", "norm_weight", "norm_bias", "h", "weight", "bias", "residual")
POINTERS += ("qkv", "stored_keys", "stored_values", "attended")
BOTH, NONE = (80, 90), dict.fromkeys(("a", "b_t", "z", "weights", "residual", "norm_weight", "norm_bias"))
CALLS = [(kernel, "fp32", BOTH, {}) for kernel in (sampling_kernel._build_keys, sampling_kernel._draw)]
for kernel in (loss_kernel._score_rows, decode_kernel._add_updates, dropout_kernel._fill_mask):
    CALLS += [(kernel, "bf16", (90,), {}), (kernel, "fp16", (80,), {}), (kernel, "fp32", (90,), {})]
for kernel in (layer_kernels._prepare, layer_kernels._project, layer_kernels._attend):
    CALLS += [(kernel, "bf16", (90,), {})]
CALLS += [(layer_kernels._prepare, "fp16", (80,), NONE | {"kind": kind}) for kind in (2, 3)]
CALLS += [(layer_kernels._project, "bf16", (90,), NONE)]
NO_NORM = {"norm_weight": None, "norm_bias": None, "kind": 0}
CALLS += [(layer_kernels._prepare, "bf16", (90,), NO_NORM)]
for kernel, dtype, capabilities, changed in CALLS:
    names, values = kernel.arg_names, VALUES | changed
    constants = {name: values[name] for name in names if name in values}
    own = NUMBERS | dict.fromkeys(POINTERS, "*" + dtype)
    signature = {n: "constexpr" if n in constants else own.get(n, "i32") for n in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    for capability in capabilities:
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        print(kernel.__name__, dtype, capability, len(made.asm["cubin"]))
"""


def test_the_kernels_compile_for_real_gpus(tmp_path):
    """The interpreter accepts what the compiler refuses: on the first GPU that was the annotation `Any`."""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 20
