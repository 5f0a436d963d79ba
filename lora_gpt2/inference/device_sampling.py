"""Sampling as tensor operations alone, which a GPU runs behind the logits and a CUDA graph captures with them.

The logits stay on the device; a token of each row comes back. What is chosen is what `sampling.sample_tokens` chooses:
the same candidates in the same order, the same arithmetic in float64, the same random number. Rows that this cannot
decide say so and are sampled on the host: those with a watermark or without repeated n-grams, those without top-k or
with a large one, and those of which more tokens than there are candidates are equally likely.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lora_gpt2.inference.device_penalties import MOST_BIASES
from lora_gpt2.inference.sampling import (
    Candidates,
    SamplingParams,
    draw_tokens,
    keep_nucleus,
    take_top_k,
    weigh_logits,
)
from lora_gpt2.model.kernels import has_triton

CANDIDATES = 128
LARGEST_TOP_K = 64
NOT_FINITE, UNDECIDED = -1, -2
TOKEN_BITS = 2**32
FORBIDDEN = -1e30
"""The logit of a token that a constraint forbids: finite, so that -inf is an error here too."""


def can_choose(params: SamplingParams) -> bool:
    """True if `choose_tokens` implements these parameters, after `device_penalties.adjust_logits`."""
    if params.no_repeat_ngram_size or params.watermark_key is not None or len(params.logit_bias) > MOST_BIASES:
        return False
    return params.temperature == 0 or 0 < params.top_k <= LARGEST_TOP_K


def build_columns(params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Float[Tensor, "batch 5"]:
    """Returns `choose_tokens`' columns on the host; for parameters that it does not implement it gives any token."""
    sizes = [own.top_k if 0 < own.top_k <= LARGEST_TOP_K and own.temperature else 1 for own in params]
    rows = [
        (own.temperature, size, own.top_p, own.min_p, uniform)
        for own, size, uniform in zip(params, sizes, uniforms, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def choose_tokens(logits: Float[Tensor, "batch vocab"], columns: Float[Tensor, "batch 5"]) -> Int[Tensor, " batch"]:
    """Returns the next token of each row, `UNDECIDED`, or `NOT_FINITE` if one of its logits is not.

    `columns` are temperature, top-k, top-p, min-p and random number of each row, in float64.
    """
    if logits.device.type == "cuda" and has_triton():
        from lora_gpt2.model.sampling_kernel import draw_from_logits

        return draw_from_logits(logits, columns, CANDIDATES, not_finite=NOT_FINITE, undecided=UNDECIDED)
    temperature, top_k, top_p, min_p, uniforms = (columns[:, index : index + 1] for index in range(5))
    exact = logits.float() + 0.0  # which makes -0 the same as 0
    count = min(CANDIDATES, exact.shape[1])
    keys, _ = take_top_k(_build_keys(exact), count)
    tokens = TOKEN_BITS - 1 - keys % TOKEN_BITS
    values = exact.gather(1, tokens)
    smallest = values.gather(1, top_k.long().clamp(max=count) - 1)
    found = Candidates(logits=values.masked_fill(values < smallest, -torch.inf), tokens=tokens)
    is_greedy = temperature == 0
    weights = weigh_logits(found.logits, torch.where(is_greedy, 1.0, temperature))
    weights = keep_nucleus(weights, top_p, None)
    weights = weights.masked_fill(weights < min_p, 0.0)
    chosen = torch.where(is_greedy[:, 0], tokens[:, 0], draw_tokens(found, weights, uniforms))
    if count < exact.shape[1]:
        is_decided = is_greedy | (values[:, -1:] < smallest)  # all that are as likely as the last are candidates
        is_decided |= smallest <= FORBIDDEN  # fewer than top-k are allowed
        chosen = torch.where(is_decided[:, 0], chosen, UNDECIDED)
    return torch.where(exact.isfinite().all(1), chosen, NOT_FINITE)


def _build_keys(logits: Float[Tensor, "batch vocab"]) -> Int[Tensor, "batch vocab"]:
    """Returns integers in the order of the logits; of equal logits the smaller token's is larger."""
    bits = logits.view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    tokens = torch.arange(logits.shape[1], device=logits.device)
    return ordered * TOKEN_BITS + (TOKEN_BITS - 1 - tokens)
