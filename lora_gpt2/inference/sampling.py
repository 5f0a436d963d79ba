"""From logits to the next token: pure functions, in the order and with the meaning of transformers' processors.

Repetition penalty (Keskar et al. 2019, arXiv:1909.05858, section 4.1), presence and frequency penalty (OpenAI's API),
no repeated n-grams (Paulus et al. 2017, arXiv:1705.04304, section 2.5), temperature, top-k (Fan et al. 2018,
arXiv:1805.04833), top-p (Holtzman et al. 2019, arXiv:1904.09751), min-p (Nguyen et al. 2024, arXiv:2407.01082).
The watermark is transformers' own processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lora_gpt2.recipe import GenerateSettings


def penalise_repetition(
    logits: Float[Tensor, " vocab"], seen: Int[Tensor, " tokens"], penalty: float
) -> Float[Tensor, " vocab"]:
    """Returns logits with tokens in `seen` made less likely: positive ones divided, negative ones multiplied."""
    if penalty == 1 or not len(seen):
        return logits
    scores = logits[seen]
    return logits.scatter(0, seen, torch.where(scores > 0, scores / penalty, scores * penalty))


def penalise_counts(
    logits: Float[Tensor, " vocab"], written: Int[Tensor, " tokens"], presence: float, frequency: float
) -> Float[Tensor, " vocab"]:
    """Returns logits with tokens of the continuation made less likely: once, and once for each time."""
    if not (presence or frequency) or not len(written):
        return logits
    counts = torch.bincount(written, minlength=len(logits)).to(logits)
    return logits - presence * (counts > 0) - frequency * counts


def forbid_ngrams(logits: Float[Tensor, " vocab"], seen: Int[Tensor, " tokens"], size: int) -> Float[Tensor, " vocab"]:
    """Returns logits in which every token that would repeat a run of `size` tokens is -inf."""
    if not size or len(seen) < size:
        return logits
    runs = seen.unfold(0, size, 1)
    tail = seen[len(seen) - size + 1 :]
    return logits.index_fill(0, runs[(runs[:, :-1] == tail).all(1), -1], -torch.inf)


def forbid_tokens(logits: Float[Tensor, " vocab"], tokens: Sequence[int]) -> Float[Tensor, " vocab"]:
    """Returns logits in which some tokens are -inf."""
    return logits.index_fill(0, torch.tensor(tokens), -torch.inf) if tokens else logits


def adjust_logits(
    logits: Float[Tensor, " vocab"], seen: Int[Tensor, " tokens"], num_prompt: int, settings: GenerateSettings
) -> Float[Tensor, " vocab"]:
    """Returns logits after bias and penalties; `seen` is the prompt's `num_prompt` tokens and the continuation."""
    if settings.logit_bias:
        ids = [token for token in settings.logit_bias if 0 <= token < len(logits)]
        bias = torch.tensor([settings.logit_bias[token] for token in ids])
        logits = logits.index_add(0, torch.tensor(ids, dtype=torch.long), bias)
    logits = penalise_repetition(logits, seen, settings.repetition_penalty)
    logits = penalise_counts(logits, seen[num_prompt:], settings.presence_penalty, settings.frequency_penalty)
    return forbid_ngrams(logits, seen, settings.no_repeat_ngram_size)


LARGEST = 1e30  # what a division by the smallest temperature leaves finite


@lru_cache(maxsize=4)
def _build_watermark(vocab_size: int, key: int) -> Any:
    from transformers.generation.logits_process import WatermarkLogitsProcessor

    return WatermarkLogitsProcessor(vocab_size, "cpu", hashing_key=key)


def mark_logits(
    logits: Float[Tensor, " vocab"], seen: Int[Tensor, " tokens"], settings: GenerateSettings
) -> Float[Tensor, " vocab"]:
    """Returns logits in which a quarter of the vocabulary, chosen by the token before and the key, is likelier."""
    if not settings.watermark or not len(seen):
        return logits
    marked: Tensor = _build_watermark(len(logits), settings.watermark_key)(seen[None], logits[None].clone())
    return marked[0]


def shape_logits(logits: Float[Tensor, " vocab"], settings: GenerateSettings) -> Float[Tensor, " vocab"]:
    """Returns logits after temperature, top-k, top-p and min-p; excluded tokens are -inf. Temperature is positive."""
    logits = logits / settings.temperature
    if 0 < settings.top_k < len(logits):
        smallest = torch.topk(logits, settings.top_k).values[-1]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if settings.top_p < 1:
        ordered, order = logits.sort(descending=True)
        likelier = ordered.softmax(0).cumsum(0).roll(1)
        likelier[0] = 0
        is_sectioned = likelier >= settings.top_p
        is_sectioned[0] = False  # the likeliest stays, also where top_p is less than any float32
        logits = logits.scatter(0, order, ordered.masked_fill(is_sectioned, -torch.inf))
    if settings.min_p:
        probabilities = logits.softmax(0)
        logits = logits.masked_fill(probabilities < settings.min_p * probabilities.max(), -torch.inf)
    return logits


def choose_token(
    logits: Float[Tensor, " vocab"],
    seen: Int[Tensor, " tokens"],
    settings: GenerateSettings,
    generator: torch.Generator,
    num_prompt: int = 0,
    forbidden: Sequence[int] = (),
) -> int:
    """Returns the next token: the likeliest at temperature 0, else one drawn with `generator`.

    Where everything was forbidden, the likeliest of the untouched logits.
    """
    adjusted = mark_logits(adjust_logits(logits.float(), seen, num_prompt, settings), seen, settings)
    adjusted = forbid_tokens(adjusted, forbidden)
    if not torch.isfinite(adjusted).any():
        adjusted = logits.float()
    if settings.temperature == 0:
        return int(adjusted.argmax())
    if (largest := adjusted.max()) < -LARGEST:
        adjusted = adjusted - largest
    adjusted = adjusted.clamp(max=LARGEST)
    probabilities = shape_logits(adjusted, settings).softmax(0)
    return int(torch.multinomial(probabilities, 1, generator=generator))
