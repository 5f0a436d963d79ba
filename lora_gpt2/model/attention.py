"""Causal attention for training on a CPU, by blocks of queries (the recomputation is Dao et al. 2022, section 3.1).

PyTorch's attention on a CPU multiplies small tiles, a third as fast as the matrix products of whole blocks. Here each
block of queries meets all keys that it may see in one product per row of the batch, and nothing above the diagonal is
computed but for the block on it. Neither scores nor probabilities are stored: the backward pass computes them again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 128


def attend_by_blocks(
    qkv: Float[Tensor, "batch time 3 heads head_width"], scale: float, mask: Float[Tensor, "batch 1 time time"] | None
) -> Float[Tensor, "batch time heads head_width"]:
    """Returns causal attention, differentiable; `mask` is additive and says more than "causal", None for no more."""
    result: Tensor = _BlockedAttention.apply(qkv, scale, mask)  # type: ignore[no-untyped-call]
    return result


class _BlockedAttention(torch.autograd.Function):
    """Attention P V with P = softmax(scale · Q Kᵀ + mask).

    Backward, for upstream dO: dV = Pᵀ dO, dP = dO Vᵀ, dS = P (dP - rowsum(P dP)), dQ = scale · dS K and
    dK = scale · dSᵀ Q.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        """Returns `[batch, time, heads, head_width]`."""
        ctx.scale, ctx.mask = scale, mask
        ctx.save_for_backward(qkv)
        out = torch.empty_like(qkv[:, :, 0], memory_format=torch.contiguous_format)
        rows, limit = _split_rows(qkv, scale), _build_limit(qkv)
        for row, (q, k, v) in enumerate(rows):
            for first in range(0, q.shape[1], BLOCK):
                probs = _compute_probs(q, k, first, limit, None if mask is None else mask[row])
                out[row, first : first + BLOCK] = torch.bmm(probs, v[:, : probs.shape[2]]).transpose(0, 1)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradient of `qkv`."""
        (qkv,), (d_out,), scale, mask = ctx.saved_tensors, upstream, ctx.scale, ctx.mask
        gradient, limit = torch.empty_like(qkv), _build_limit(qkv)
        for row, (q, k, v) in enumerate(_split_rows(qkv, scale)):
            d_row = d_out[row].transpose(0, 1).contiguous()
            dk, dv = k.new_zeros(2, *k.shape, dtype=torch.float32)
            for first in range(0, q.shape[1], BLOCK):
                block = slice(first, first + BLOCK)
                probs = _compute_probs(q, k, first, limit, None if mask is None else mask[row])
                seen = slice(probs.shape[2])
                d_probs = torch.bmm(d_row[:, block], v[:, seen].mT)
                d_scores = torch.ops.aten._softmax_backward_data(d_probs, probs, -1, probs.dtype)
                del d_probs
                gradient[row, block, 0] = torch.bmm(d_scores, k[:, seen]).mul_(scale).transpose(0, 1)
                dk[:, seen] += torch.bmm(d_scores.mT, q[:, block])  # `q` has the scale
                dv[:, seen] += torch.bmm(probs.mT, d_row[:, block])
            gradient[row, :, 1], gradient[row, :, 2] = dk.transpose(0, 1), dv.transpose(0, 1)
        return gradient, None, None


def _split_rows(qkv: Tensor, scale: float) -> list[Tensor]:
    """Returns scaled queries, keys and values of each row, `[3, heads, time, head_width]`."""
    rows = qkv.permute(0, 2, 3, 1, 4).clone(memory_format=torch.contiguous_format)
    rows[:, 0] *= scale
    return list(rows)


def _build_limit(qkv: Tensor) -> Tensor:
    """Returns what is added to the scores on the diagonal, `[BLOCK, BLOCK]`: -inf where a key comes later."""
    return torch.full((BLOCK, BLOCK), -math.inf, dtype=qkv.dtype, device=qkv.device).triu_(1)


def _compute_probs(q: Tensor, k: Tensor, first: int, limit: Tensor, mask: Tensor | None) -> Tensor:
    """Returns the attention of a block of queries to the keys up to its end, `[heads, queries, keys]`."""
    end = min(first + BLOCK, q.shape[1])
    scores = torch.bmm(q[:, first:end], k[:, :end].mT)
    if mask is None:
        scores[:, :, first:] += limit[: end - first, : end - first]
    else:
        scores += mask[:, first:end, :end]
    return torch.softmax(scores, -1)
