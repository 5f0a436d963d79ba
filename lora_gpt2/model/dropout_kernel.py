"""Dropout masks as one Triton kernel; the numbers are those of `counter_random.py`, bit for bit."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lora_gpt2.model.counter_random import FIRST, GOLDEN, SECOND, threshold_of

BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _fill_mask(  # type: ignore[no-untyped-def]
    mask,
    offsets,
    count,
    threshold,
    scale,
    golden: tl.constexpr,
    first: tl.constexpr,
    second: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0)
    index = tl.program_id(1) * block + tl.arange(0, block)
    offset = tl.load(offsets + row).to(tl.uint32, bitcast=True)
    x = index.to(tl.uint32) * tl.full([block], golden, tl.uint32) + offset
    x = (x ^ (x >> 16)) * tl.full([block], first, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full([block], second, tl.uint32)
    x = x ^ (x >> 16)
    kept = tl.where(x.to(tl.int32, bitcast=True) >= threshold, scale, 0.0)
    tl.store(mask + row.to(tl.int64) * count + index, kept.to(mask.dtype.element_ty), mask=index < count)


def fill_dropout_mask(mask: Tensor, offsets: Tensor, rate: float) -> Tensor:
    """Fills `mask` `[rows, time, width]`, whose rows' numbers begin at `offsets`, and returns it."""
    count = mask[0].numel()
    _fill_mask[(len(mask), triton.cdiv(count, BLOCK))](
        mask,
        offsets,
        count,
        threshold_of(rate),
        1 / (1 - rate),
        golden=GOLDEN,
        first=FIRST,
        second=SECOND,
        block=BLOCK,
    )
    return mask
