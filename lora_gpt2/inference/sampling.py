"""From logits to the next token: pure functions, in the order and with the meaning of transformers' processors.

Repetition penalty (Keskar et al. 2019, arXiv:1909.05858, section 4.1), temperature, top-k (Fan et al. 2018,
arXiv:1805.04833), top-p (Holtzman et al. 2019, arXiv:1904.09751).
"""

from __future__ import annotations

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


def shape_logits(logits: Float[Tensor, " vocab"], settings: GenerateSettings) -> Float[Tensor, " vocab"]:
    """Returns logits after temperature, top-k and top-p; excluded tokens are -inf. Temperature must be positive."""
    logits = logits / settings.temperature
    if 0 < settings.top_k < len(logits):
        smallest = torch.topk(logits, settings.top_k).values[-1]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if settings.top_p < 1:
        ordered, order = logits.sort(descending=True)
        likelier = ordered.softmax(0).cumsum(0).roll(1)
        likelier[0] = 0
        logits = logits.scatter(0, order, ordered.masked_fill(likelier >= settings.top_p, -torch.inf))
    return logits


def choose_token(
    logits: Float[Tensor, " vocab"],
    seen: Int[Tensor, " tokens"],
    settings: GenerateSettings,
    generator: torch.Generator,
) -> int:
    """Returns the next token: the likeliest at temperature 0, else one drawn with `generator`."""
    logits = penalise_repetition(logits.float(), seen, settings.repetition_penalty)
    if settings.temperature == 0:
        return int(logits.argmax())
    probabilities = shape_logits(logits, settings).softmax(0)
    return int(torch.multinomial(probabilities, 1, generator=generator))
