"""The Triton kernel in Triton's interpreter, which needs no GPU, beside float64."""

import json
import os
import subprocess
import sys

import pytest
import torch

from lora_gpt2.data.blocks import IGNORE

SCRIPT = """
import json, sys, torch
from lora_gpt2.model.loss_kernel import score_rows
spec = json.loads(sys.argv[1])
torch.manual_seed(spec["seed"])
logits = (torch.randn(spec["tokens"], spec["padded"]) * spec["scale"]).to(getattr(torch, spec["dtype"]))
logits[:, spec["vocab"]:] = spec["beyond"]
given = logits.clone()
targets, factors = torch.tensor(spec["targets"]), torch.tensor(spec["factors"])
nll, uniform = score_rows(logits, spec["vocab"], targets, factors if spec["gradient"] else None, spec["smoothing"])
torch.save({"given": given, "left": logits, "nll": nll, "uniform": uniform}, sys.argv[2])
"""


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("vocab", "padded", "scale"), [(5000, 5056, 3.0), (128, 128, 40.0)])
def test_the_kernel_is_softmax_cross_entropy_and_its_gradient(tmp_path, dtype, smoothing, vocab, padded, scale):
    pytest.importorskip("triton")
    targets, factors = [3, IGNORE, vocab - 1, 0], [0.5, 0.25, 1.0, 2.0]
    spec = {"tokens": 4, "vocab": vocab, "padded": padded, "scale": scale, "dtype": dtype, "smoothing": smoothing}
    spec |= {"targets": targets, "factors": factors, "gradient": True, "seed": 0, "beyond": 1e4}
    found = run_in_interpreter(spec, tmp_path)
    logits = found["given"][:, :vocab].double().requires_grad_()
    logprobs, is_target = logits.log_softmax(1), torch.tensor(targets) != IGNORE
    nll = -logprobs.gather(1, torch.tensor(targets).clamp_min(0)[:, None])[:, 0] * is_target
    uniform = -logprobs.mean(1) * is_target
    (((1 - smoothing) * nll + smoothing * uniform) * torch.tensor(factors).double()).sum().backward()
    assert torch.allclose(found["nll"].double(), nll, rtol=1e-5, atol=1e-5)
    if smoothing:
        assert torch.allclose(found["uniform"].double(), uniform, rtol=1e-5, atol=1e-5)
    wanted = logits.grad.to(found["left"].dtype)
    resolution = torch.finfo(wanted.dtype).eps
    assert torch.allclose(found["left"][:, :vocab], wanted, rtol=2 * resolution, atol=1e-6)
    assert not found["left"][:, vocab:].any(), "whatever the padding held"


def test_without_a_gradient_the_logits_stay_and_values_that_are_not_finite_show(tmp_path):
    pytest.importorskip("triton")
    spec = {"tokens": 2, "vocab": 100, "padded": 128, "scale": 1.0, "dtype": "bfloat16", "smoothing": 0.0}
    spec |= {"targets": [1, 2], "factors": [1.0, 1.0], "gradient": False, "seed": 1, "beyond": float("nan")}
    found = run_in_interpreter(spec, tmp_path)
    assert torch.equal(found["left"][:, :100], found["given"][:, :100])
    assert torch.isfinite(found["nll"]).all(), "the padding is not read"


def run_in_interpreter(spec, tmp_path):
    """Runs the kernel in a process of its own: the interpreter is chosen when triton is imported."""
    path = tmp_path / "found.pt"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(spec), str(path)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(path, weights_only=True)
