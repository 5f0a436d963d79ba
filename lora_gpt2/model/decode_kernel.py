"""The adapters' updates of a decode step as one Triton kernel for each projection.

A program has one row and some of its outputs, and reads only the adapters that the row uses: `x Aᵀ` is computed anew by
each program (it is small, and comes from the cache), so that one launch takes the place of three, and a row's result
does not depend on what else is in the batch. Cf. Punica's kernels (Chen et al. 2023, arXiv:2310.18547, section 4).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK_IN, BLOCK_OUT = 512, 256


@triton.jit  # type: ignore[untyped-decorator]
def _add_updates(  # type: ignore[no-untyped-def]
    x,
    a,
    b_t,
    weights,
    y,
    inputs,
    outputs,
    rank,
    num_slots,
    block_in: tl.constexpr,
    block_out: tl.constexpr,
    block_rank: tl.constexpr,
    block_slots: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.program_id(1) * block_out + tl.arange(0, block_out)
    ranks, slots = tl.arange(0, block_rank), tl.arange(0, block_slots)
    total = tl.load(y + row * outputs + columns, mask=columns < outputs, other=0.0).to(tl.float32)
    own = tl.load(weights + row * num_slots + slots, mask=slots < num_slots, other=0.0)
    is_inside_b = (ranks < rank)[:, None] & (columns < outputs)[None, :]
    slot = -1
    for _ in range(tl.sum((own != 0.0).to(tl.int32))):
        slot = tl.min(tl.where((own != 0.0) & (slots > slot), slots, block_slots))
        weight = tl.sum(tl.where(slots == slot, own, 0.0))
        first = (slot * rank + ranks).to(tl.int64)[:, None]
        factor_b = tl.load(b_t + first * outputs + columns[None, :], mask=is_inside_b, other=0.0).to(tl.float32)
        products = tl.zeros([block_rank, block_in], tl.float32)
        for start in range(0, inputs, block_in):
            lanes = start + tl.arange(0, block_in)
            h = tl.load(x + row * inputs + lanes, mask=lanes < inputs, other=0.0).to(tl.float32)
            is_inside = (ranks < rank)[:, None] & (lanes < inputs)[None, :]
            factor = tl.load(a + first * inputs + lanes[None, :], mask=is_inside, other=0.0).to(tl.float32)
            products += factor * h[None, :]
        total += tl.sum(factor_b * (tl.sum(products, 1) * weight)[:, None], 0)
    tl.store(y + row * outputs + columns, total.to(y.dtype.element_ty), mask=columns < outputs)


def add_updates(x: Tensor, lora_a: Tensor, lora_b_t: Tensor, weights: Tensor, y: Tensor) -> None:
    """Adds each row's updates to `y`, in float32: sum_k weight_k · B_k A_k x, over the slots whose weight is not 0.

    Args:
        x: `[batch, in]`, contiguous.
        lora_a: `[slots, rank, in]`, contiguous.
        lora_b_t: `[slots, rank, out]`, contiguous.
        weights: `[batch, slots]` in float32, contiguous.
        y: `[batch, out]`, contiguous.
    """
    num_slots, rank, inputs = lora_a.shape
    outputs = y.shape[1]
    block_rank = max(2, triton.next_power_of_2(rank))
    _add_updates[(len(x), triton.cdiv(outputs, BLOCK_OUT))](
        x,
        lora_a,
        lora_b_t,
        weights,
        y,
        inputs,
        outputs,
        rank,
        num_slots,
        block_in=max(16, min(BLOCK_IN, 8192 // block_rank)),
        block_out=BLOCK_OUT,
        block_rank=block_rank,
        block_slots=triton.next_power_of_2(num_slots),
        num_warps=4,
    )
