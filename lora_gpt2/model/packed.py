"""Frozen projections for inference on a CPU, packed in half or a quarter of the bytes (FBGEMM, through PyTorch).

Writing one token reads every weight once, so on a CPU the bytes are the time. `float16` keeps weights in half
precision and computes in float32: results differ by the weights' rounding, 2e-4 of the largest value. `int8` also
rounds what goes in, to 8 bits with one scale per call, and is for those who have measured that it does no harm.
Gives up: gradients, and processors other than x86.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_gpt2.core.errors import ResourceError
from lora_gpt2.model.gpt2 import GPT2, Linear

KINDS = ("float16", "int8")


class PackedLinear(Linear):
    """A projection whose weight `[out, in]` is in FBGEMM's own form."""

    def __init__(self, weight: Float[Tensor, "outputs inputs"], bias: Tensor | None, kind: str) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.kind = kind
        weight = weight.float()
        if kind == "float16":
            self.packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
        else:
            scale = weight.abs().amax(1).clamp(min=1e-12).double() / 127
            codes = torch.quantize_per_channel(weight, scale, torch.zeros_like(scale).long(), 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(codes, bias)

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "outputs inputs"]:
        """Returns the weight that is packed."""
        if self.kind == "float16":
            weight: Tensor = torch.ops.quantized.linear_unpack_fp16(self.packed)[0]
            return weight.to(dtype)
        codes: Tensor = torch.ops.quantized.linear_unpack(self.packed)[0]
        return codes.dequantize().to(dtype)

    def forward(self, x: Float[Tensor, "*shape inputs"]) -> Float[Tensor, "*shape outputs"]:
        """Returns the projection of `x`, in float32."""
        if self.kind == "float16":
            half: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
            return half
        result: Tensor = torch.ops.quantized.linear_dynamic(x, self.packed, True)
        return result


def pack_projections(model: GPT2, kind: str) -> None:
    """Replaces the projections and the head of a base on a CPU; the embeddings stay for looking tokens up.

    Raises `ResourceError` where PyTorch has no FBGEMM.
    """
    if not {"fbgemm", "x86"} & set(torch.backends.quantized.supported_engines):
        raise ResourceError(f"{kind} weights need an x86 processor", "use --set generate.precision=float32")
    for block in model.h:
        for part, name in ((block.attn, "c_attn"), (block.attn, "c_proj"), (block.mlp, "c_fc"), (block.mlp, "c_proj")):
            linear = getattr(part, name)
            setattr(part, name, PackedLinear(linear.weight, linear.bias, kind))
    model.packed_head = PackedLinear(model.head, None, kind)
