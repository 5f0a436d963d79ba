"""Frozen projections in 8 or 4 bits, turned back into numbers to compute with each time they are used.

bitsandbytes quantises: int8 with a scale per output row (Dettmers et al. 2022, arXiv:2208.07339, without the outlier
path: activations stay as they are), nf4 in blocks of 64 with quantised scales (Dettmers et al. 2023,
arXiv:2305.14314). Only its functions are used, never its modules: those repack nf4 weights on a CPU at the first
evaluation and cannot be trained over afterwards. Embeddings, norms and the head keep their dtype.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lora_gpt2.core.errors import ResourceError
from lora_gpt2.model.gpt2 import Linear

LARGEST_ERROR = {"int8": 0.03, "nf4": 0.15}


class QuantizedLinear(Linear):
    """A projection whose weight `[out, in]` is kept as `codes` and whatever turns them back."""

    def __init__(self, weight: Float[Tensor, "outputs inputs"], bias: Tensor | None, kind: str) -> None:
        nn.Module.__init__(self)
        self.codes: Tensor
        self.scale: Tensor
        functional = _load_functional()
        self.out_features, self.in_features = weight.shape
        self.kind, self.state = kind, None
        if kind == "int8":
            codes, scale, _ = functional.int8_vectorwise_quant(weight.half())
            self.register_buffer("scale", scale.to(torch.float32)[:, None] / 127)
        else:
            codes, self.state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        self.register_buffer("codes", codes)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "outputs inputs"]:
        """Returns the weight that the codes stand for."""
        if self.state is not None:
            weight: Tensor = _load_functional().dequantize_4bit(self.codes, self.state)
            return weight.to(dtype)
        weight = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        return torch.mul(self.codes, self.scale, out=weight)  # in float32: a scale of 16 bits would be another one

    def forward(self, x: Float[Tensor, "*shape inputs"]) -> Float[Tensor, "*shape outputs"]:
        """Returns the projection of `x`."""
        return F.linear(x, self.dense(x.dtype), self.bias)


def bytes_per_weight(kind: str, item: int) -> float:
    """Returns the bytes that a weight takes: `item` unquantised; scales of rows are left out, those of blocks not."""
    return {"none": float(item), "int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}[kind]


def check_quantization(kind: str, device: torch.device) -> None:
    """Raises `ResourceError` unless bitsandbytes is there and really does this on the device."""
    functional_works = False
    try:
        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)
        back = QuantizedLinear(weight, None, kind).dense(torch.float32)
        functional_works = bool((back - weight).norm() <= LARGEST_ERROR[kind] * weight.norm())
        reason = "it returns other numbers"
    except (RuntimeError, NotImplementedError, AttributeError, AssertionError, TypeError) as error:
        reason = str(error).split("\n")[0]
    if not functional_works:
        raise ResourceError(
            f"the installed bitsandbytes cannot do {kind} on {device.type}: {reason}",
            "use --set train.quantize=none, with --set train.gradient_checkpointing=true where memory is short",
        )


def _load_functional() -> Any:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks of kernels that we do not use
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ResourceError(
            "quantised bases need bitsandbytes, which is not installed", "pip install bitsandbytes"
        ) from error
    return functional
