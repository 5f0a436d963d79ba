"""Frozen projections for inference on a CPU, packed in half dtype (FBGEMM, through PyTorch).

Writing one token reads every weight once, so on a CPU the bytes are the time. Weights are kept in float16 and the
arithmetic is float32: results differ by the weights' rounding alone, 2e-4 of the largest value. Gives up: gradients,
and processors other than x86. (8-bit weights with FBGEMM's 8-bit inputs raised nano's perplexity by 0.65 %.)
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_gpt2.core.errors import ResourceError
from lora_gpt2.model.gpt2 import GPT2, Linear

NAMES = {"attn": ("c_attn", "c_proj"), "mlp": ("c_fc", "c_proj")}
LARGEST = torch.finfo(torch.float16).max


class PrepackedLinear(Linear):
    """A projection whose weight `[out, in]` is in FBGEMM's own form."""

    def __init__(self, weight: Float[Tensor, "outputs inputs"], bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), bias)

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "outputs inputs"]:
        """Returns the weight that is packed."""
        weight: Tensor = torch.ops.quantized.linear_unpack_fp16(self.packed)[0]
        return weight.to(dtype)

    def with_weight(self, weight: Float[Tensor, "outputs inputs"]) -> PrepackedLinear:
        """Returns a packed projection with this weight and the same bias."""
        return PrepackedLinear(weight, torch.ops.quantized.linear_unpack_fp16(self.packed)[1])

    def forward(self, x: Float[Tensor, "*shape inputs"]) -> Float[Tensor, "*shape outputs"]:
        """Returns the projection of `x`, in float32."""
        result: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
        return result


def prepack_weights(model: GPT2) -> None:
    """Replaces the projections and the head of a base on a CPU; the embeddings stay for looking tokens up.

    Raises `ResourceError` where PyTorch has no FBGEMM, or a weight is too large for float16; the base is as it was.
    """
    if not can_prepack():
        raise ResourceError("float16 weights need an x86 processor", "use --set generate.dtype=float32")
    parts = [(getattr(block, part), name) for block in model.h for part in ("attn", "mlp") for name in NAMES[part]]
    weights = [model.head, *(getattr(part, name).weight for part, name in parts)]
    if any(max(map(abs, map(float, weight.aminmax()))) > LARGEST for weight in weights):
        raise ResourceError("a weight of the base is too large for float16", "use --set generate.dtype=float32")
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:  # PyTorch packs on one core
        head = pool.submit(PrepackedLinear, model.head, None)  # the largest begins

        def pack(part: nn.Module, name: str) -> None:
            linear = getattr(part, name)
            setattr(part, name, PrepackedLinear(linear.weight, linear.bias))

        for done in [pool.submit(pack, *part) for part in parts]:
            done.result()
        model.prepacked_head = head.result()


def can_prepack() -> bool:
    """True if PyTorch has FBGEMM for this processor."""
    return bool({"fbgemm", "x86"} & set(torch.backends.quantized.supported_engines))
