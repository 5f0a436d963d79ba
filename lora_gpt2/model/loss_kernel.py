"""The loss of a chunk of logits as one Triton kernel: one pass for maximum, sum and target, one for the gradient.

A program has one row. It keeps a running maximum and sum in each lane (Milakov and Gimelshein 2018, arXiv:1805.02867,
algorithm 3), so 16-bit logits are read twice and written once, and no copy of them in float32 exists. `loss.py` has the
same computation in plain PyTorch, which is what runs where there is no Triton and what tests compare with.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_gpt2.data.blocks import IGNORE

BLOCK, WARPS = 4096, 8
LOWEST = -1e38  # in lanes that have seen nothing: finite, because inf - inf is NaN


@triton.jit  # type: ignore[untyped-decorator]
def _score_rows(  # type: ignore[no-untyped-def]
    logits,
    targets,
    factors,
    nll,
    uniform,
    stride,
    vocab_size,
    padded_size,
    smoothing,
    ignore: tl.constexpr,
    lowest: tl.constexpr,
    has_smoothing: tl.constexpr,
    has_gradient: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start_of_row = logits + row * stride
    lanes = tl.arange(0, block)
    biggest = tl.full([block], lowest, tl.float32)
    total = tl.zeros([block], tl.float32)
    plain = tl.zeros([block], tl.float32)
    for start in range(0, vocab_size, block):
        columns = start + lanes
        x = tl.load(start_of_row + columns, mask=columns < vocab_size, other=lowest).to(tl.float32)
        bigger = tl.maximum(biggest, x)
        total = total * tl.exp(biggest - bigger) + tl.exp(x - bigger)
        biggest = bigger
        if has_smoothing:
            plain += tl.where(columns < vocab_size, x, 0.0)
    largest = tl.max(biggest, 0)
    normaliser = largest + tl.log(tl.sum(total * tl.exp(biggest - largest), 0))
    target = tl.load(targets + row)
    is_target = target != ignore
    target_column = tl.where(is_target, target, 0)
    chosen = tl.load(start_of_row + target_column).to(tl.float32)
    tl.store(nll + row, tl.where(is_target, normaliser - chosen, 0.0))
    if has_smoothing:
        mean = tl.sum(plain, 0) / vocab_size
        tl.store(uniform + row, tl.where(is_target, normaliser - mean, 0.0))
    if has_gradient:
        factor = tl.where(is_target, tl.load(factors + row), 0.0)
        for start in range(0, padded_size, block):
            columns = start + lanes
            x = tl.load(start_of_row + columns, mask=columns < vocab_size, other=lowest).to(tl.float32)
            slope = tl.exp(x - normaliser) * factor
            slope -= tl.where(columns == target_column, (1 - smoothing) * factor, 0.0)
            if has_smoothing:
                slope -= tl.where(columns < vocab_size, smoothing * factor / vocab_size, 0.0)
            tl.store(start_of_row + columns, slope.to(logits.dtype.element_ty), mask=columns < padded_size)


def score_rows(
    logits: Tensor, vocab_size: int, targets: Tensor, factors: Tensor | None, smoothing: float
) -> tuple[Tensor, Tensor | None]:
    """Returns the NLL of each row's target and, with smoothing, the cross-entropy to the uniform distribution.

    Both are float32 and 0 where the target is `IGNORE`.

    Args:
        logits: `[tokens, padded]`; with `factors` they are overwritten by their gradient, the padding by zeros.
        vocab_size: how many of the columns are logits.
        targets: token ids.
        factors: what the loss of each row is multiplied by; None if no gradient is wanted.
        smoothing: label smoothing.
    """
    nll = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    uniform = torch.empty_like(nll) if smoothing else None
    _score_rows[(len(logits),)](
        logits,
        targets,
        nll if factors is None else factors,
        nll,
        nll if uniform is None else uniform,
        logits.stride(0),
        vocab_size,
        logits.shape[1],
        smoothing,
        ignore=IGNORE,
        lowest=LOWEST,
        has_smoothing=uniform is not None,
        has_gradient=factors is not None,
        block=BLOCK,
        num_warps=WARPS,
    )
    return nll, uniform
