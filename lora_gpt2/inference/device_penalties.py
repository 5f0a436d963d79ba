"""Penalties, biases and constraints as tensor operations alone, in front of `device_sampling.choose_tokens`.

They do, to the bit, what `sampling.adjust_logits` does for a row: bias, repetition penalty, presence and frequency
penalty. The newest token is an input of its own, so that a step that was launched before it is known can follow.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lora_gpt2.inference.constraint import unpack_words
from lora_gpt2.inference.sampling import SamplingParams

MOST_BIASES = 1024
FEWEST_COLUMNS = 8
NONE = -1


def is_adjusted(params: SamplingParams) -> bool:
    """True if these parameters change logits before a token is chosen."""
    return bool(
        params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty or params.logit_bias
    )


def build_adjustments(
    params: Sequence[SamplingParams], histories: Sequence[Sequence[int]], prompt_lengths: Sequence[int], capacity: int
) -> list[Tensor]:
    """Returns `adjust_logits`' inputs on the host, of which only the sizes decide a shape; none if no row has any.

    Args:
        params: of each row.
        histories: the tokens of each row, prompt first, as far as they are known; at most `capacity` are.
        prompt_lengths: how many of them are the prompt's.
        capacity: columns of the history.
    """
    if not any(map(is_adjusted, params)):
        return []
    history = torch.full((len(params), capacity), NONE)
    most = max(len(own.logit_bias) for own in params)
    columns = max(FEWEST_COLUMNS, 1 << (most - 1).bit_length() if most else 0)
    tokens, biases = torch.full((len(params), columns), NONE), torch.zeros(len(params), columns)
    for row, (own, known) in enumerate(zip(params, histories, strict=True)):
        if is_adjusted(own):
            history[row, : len(known)] = torch.tensor(known)
        if own.logit_bias:
            tokens[row, : len(own.logit_bias)] = torch.tensor(list(own.logit_bias))
            biases[row, : len(own.logit_bias)] = torch.tensor(list(own.logit_bias.values()))
    pairs = zip(params, prompt_lengths, strict=True)
    factors = [[p.repetition_penalty, p.presence_penalty, p.frequency_penalty, float(count)] for p, count in pairs]
    return [history, torch.tensor(factors), tokens, biases]


def forbid_tokens(
    logits: Float[Tensor, "batch vocab"], words: Int[Tensor, "batch words"], forbidden: float
) -> Float[Tensor, "batch vocab"]:
    """Returns the logits with those of tokens whose bit is not set replaced; see `Constraint.find_words`.

    What is not finite stays, so that it is found.
    """
    is_kept = unpack_words(words, logits.shape[1]) | ~logits.isfinite()
    return torch.where(is_kept, logits, forbidden)


def adjust_logits(
    logits: Float[Tensor, "batch vocab"],
    newest: Int[Tensor, "batch 1"],
    history: Int[Tensor, "batch capacity"],
    factors: Float[Tensor, "batch 4"],
    bias_tokens: Int[Tensor, "batch biases"],
    biases: Float[Tensor, "batch biases"],
) -> Float[Tensor, "batch vocab"]:
    """Returns the logits after bias and penalties; those of a row in which nothing is left as they are.

    Args:
        logits: in float32.
        newest: the last token of each row, -1 where it is in the history already.
        history: the tokens before it, -1 behind them.
        factors: repetition, presence and frequency penalty of each row, and how many of its tokens are the prompt's.
        bias_tokens: tokens whose logits are changed, -1 for none; those beyond the vocabulary are ignored.
        biases: what is added to them.
    """
    is_known = (bias_tokens >= 0) & (bias_tokens < logits.shape[1])
    biased = logits.scatter_add(1, torch.where(is_known, bias_tokens, 0), torch.where(is_known, biases, 0.0))
    ids = torch.cat([history, newest], dim=1)
    repetition, presence, frequency, prompt_lengths = (factors[:, index : index + 1] for index in range(4))
    is_written = torch.arange(ids.shape[1], device=ids.device) >= prompt_lengths
    counts = torch.zeros(logits.shape, dtype=torch.int32, device=logits.device)
    places, is_token = ids.clamp(min=0), ids >= 0
    is_seen = counts.scatter_add(1, places, is_token.int()) > 0
    counts = counts.scatter_add(1, places, (is_token & is_written).int())
    penalised = torch.where(biased > 0, biased / repetition, biased * repetition)
    adjusted = torch.where(is_seen & (repetition != 1), penalised, biased)
    counted = adjusted - presence * (counts > 0) - frequency * counts
    adjusted = torch.where((presence != 0) | (frequency != 0), counted, adjusted)
    return torch.where(adjusted.isfinite().any(1, keepdim=True), adjusted, logits)
