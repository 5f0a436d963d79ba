"""GELU by a logistic function is PyTorch's GELU, in pieces of any length, with its derivative."""

import pytest
import torch
import torch.nn.functional as F

from lora_gpt2.model import gelu


@pytest.fixture
def values():
    torch.manual_seed(0)
    spread = torch.randn(3, 700, 11) * 4
    return torch.cat([spread.flatten(), torch.tensor([0.0, -0.0, 1e-30, 60.0, -60.0, 1e4, -1e4, 3e38, -3e38])])


@pytest.mark.parametrize("piece", [1000, 23109, 10**6])
def test_it_is_pytorchs_gelu_and_gradient(values, piece, monkeypatch):
    monkeypatch.setattr(gelu, "PIECE", piece)
    expected = F.gelu(values, approximate="tanh")
    slope = torch.ops.aten.gelu_backward(torch.ones_like(values), values, approximate="tanh")
    finite = values.abs() < 1e10
    result, derivative = gelu.compute_gelu_and_derivative(values)
    assert torch.equal(result, gelu.compute_gelu(values))
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(derivative[finite], slope[finite], atol=2e-6, rtol=1e-5)


def test_in_bfloat16_it_is_within_one_rounding(values):
    values = values[values.abs() < 1e10].bfloat16()
    exact = F.gelu(values.double(), approximate="tanh")
    result, derivative = gelu.compute_gelu_and_derivative(values)
    assert result.dtype == derivative.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), exact, atol=1e-6, rtol=2**-8)


def test_what_is_not_contiguous_is_read_as_it_is(values):
    grid = values[:2000].view(40, 50).T
    assert torch.equal(gelu.compute_gelu(grid), gelu.compute_gelu(grid.contiguous()))


def test_it_is_for_the_tanh_form_on_a_cpu(values):
    assert gelu.applies(torch.nn.GELU(approximate="tanh"), values)
    assert not gelu.applies(torch.nn.GELU(), values)
    assert not gelu.applies(torch.nn.GELU(approximate="tanh"), values.to("meta"))
    assert not gelu.applies(None, values)
