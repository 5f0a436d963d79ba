"""The two ends of sampling as Triton kernels: sortable keys in front of `topk`, and behind it everything else.

A key is an int64 in the order of the logits, whose lower half is the token counted backwards, so that of equal logits
the smaller token comes first. What is chosen is what `inference.sampling.draw_tokens` chooses, in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 16  # tokens of which the maximum is taken first
BLOCK = 1024
LOWEST = tl.constexpr(-(2**63))
LAST_TOKEN = tl.constexpr(2**31 - 1)
FORBIDDEN = tl.constexpr(-1e30)  # see `inference.device_sampling`


@triton.jit  # type: ignore[untyped-decorator]
def _build_keys(  # type: ignore[no-untyped-def]
    logits,
    keys,
    maxima,
    flags,
    vocab,
    row_stride,
    num_groups,
    block: tl.constexpr,
    group: tl.constexpr,
):
    row, part = tl.program_id(0), tl.program_id(1)
    groups = part * (block // group) + tl.arange(0, block // group)
    tokens = groups[:, None] * group + tl.arange(0, group)[None, :]
    is_token = tokens < vocab
    value = tl.load(logits + row.to(tl.int64) * row_stride + tokens, mask=is_token, other=0.0)
    is_finite = tl.abs(value) < float("inf")  # False for NaN
    tl.store(flags + row * tl.num_programs(1) + part, tl.min(tl.min(is_finite.to(tl.int32), 1), 0))
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)  # -0 is 0
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    key = tl.where(is_token, (ordered << 32) + (LAST_TOKEN - tokens), LOWEST)
    tl.store(keys + row.to(tl.int64) * num_groups * group + tokens, key, mask=groups[:, None] < num_groups)
    tl.store(maxima + row * num_groups + groups, tl.max(key, 1), mask=groups < num_groups)


@triton.jit  # type: ignore[untyped-decorator]
def _draw(  # type: ignore[no-untyped-def]
    keys,
    columns,
    flags,
    chosen,
    num_candidates,
    num_flags,
    vocab,
    not_finite,
    undecided,
    block: tl.constexpr,
    block_flags: tl.constexpr,
):
    row, lanes = tl.program_id(0), tl.arange(0, block)
    temperature = tl.load(columns + row * 5)
    top_k = tl.minimum(tl.load(columns + row * 5 + 1).to(tl.int32), tl.minimum(num_candidates, vocab))
    top_p, min_p = tl.load(columns + row * 5 + 2), tl.load(columns + row * 5 + 3)
    uniform = tl.load(columns + row * 5 + 4)
    key = tl.load(keys + row * num_candidates + lanes, mask=lanes < num_candidates, other=LOWEST)
    tokens = LAST_TOKEN - (key & LAST_TOKEN)
    ordered = (key >> 32).to(tl.int32)
    value = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)
    smallest = tl.sum(tl.where(lanes == top_k - 1, value, 0.0))
    largest = tl.max(tl.where(lanes == 0, value, -float("inf"))).to(tl.float64)
    is_greedy = temperature == 0.0
    scaled = (value.to(tl.float64) - largest) / tl.where(is_greedy, 1.0, temperature)
    weights = tl.where((key != LOWEST) & (value >= smallest), tl.exp(scaled), 0.0)
    sums = tl.cumsum(weights, 0)
    total = tl.sum(tl.where(lanes == block - 1, sums, 0.0))
    limit = tl.where(top_p < 1.0, top_p * total, float("inf"))
    is_outside = (lanes > 0) & (sums - weights >= limit)  # what is more likely is enough
    weights = tl.where(is_outside | (weights < min_p), 0.0, weights)
    sums = tl.cumsum(weights, 0)
    total = tl.sum(tl.where(lanes == block - 1, sums, 0.0))
    below = (total.to(tl.int64, bitcast=True) - 1).to(tl.float64, bitcast=True)  # rounding must not reach the end
    position = tl.sum((sums <= tl.minimum(uniform * total, below)).to(tl.int32))
    token = tl.sum(tl.where(lanes == tl.where(is_greedy, 0, position), tokens, 0))
    last = tl.sum(tl.where(lanes == num_candidates - 1, value, 0.0))
    is_decided = is_greedy | (num_candidates >= vocab) | (last < smallest) | (smallest <= FORBIDDEN)
    flag_lanes = tl.arange(0, block_flags)
    is_finite = tl.min(tl.load(flags + row * num_flags + flag_lanes, mask=flag_lanes < num_flags, other=1)) == 1
    token = tl.where(is_decided, token, undecided)
    tl.store(chosen + row, tl.where(is_finite, token, not_finite))


def draw_from_logits(
    logits: Tensor, columns: Tensor, num_candidates: int, *, not_finite: int, undecided: int
) -> Tensor:
    """Returns the next token of each row; see `inference.device_sampling.choose_tokens`.

    Args:
        logits: `[batch, vocab]` in float32, contiguous along the vocabulary.
        columns: `[batch, 5]` in float64, contiguous.
        num_candidates: the most likely tokens that are looked at.
        not_finite: stands for a token where a logit is not finite.
        undecided: stands for a token where more tokens than candidates are equally likely.
    """
    batch, vocab = logits.shape
    num_groups = triton.cdiv(vocab, GROUP)
    num_parts = triton.cdiv(num_groups * GROUP, BLOCK)
    keys = torch.empty(batch, num_groups, GROUP, dtype=torch.long, device=logits.device)
    maxima = torch.empty(batch, num_groups, dtype=torch.long, device=logits.device)
    flags = torch.empty(batch, num_parts, dtype=torch.int32, device=logits.device)
    _build_keys[(batch, num_parts)](
        logits, keys, maxima, flags, vocab, logits.stride(0), num_groups, block=BLOCK, group=GROUP, num_warps=4
    )
    if num_groups > num_candidates:
        groups = maxima.topk(num_candidates, dim=1, sorted=False).indices
        keys = keys.gather(1, groups[:, :, None].expand(-1, -1, GROUP))
    keys = keys.flatten(1)
    count = min(num_candidates, keys.shape[1])
    candidates, chosen = keys.topk(count, dim=1).values, torch.empty(batch, dtype=torch.long, device=logits.device)
    _draw[(batch,)](
        candidates,
        columns,
        flags,
        chosen,
        count,
        num_parts,
        vocab,
        not_finite,
        undecided,
        block=triton.next_power_of_2(count),
        block_flags=triton.next_power_of_2(num_parts),
        num_warps=4,
    )
    return chosen
