"""From logits to the next token: pure functions, in the order and with the meaning of transformers' processors.

Repetition penalty (Keskar et al. 2019, arXiv:1909.05858, section 4.1), presence and frequency penalty (OpenAI's API),
no repeated n-grams (Paulus et al. 2017, arXiv:1705.04304, section 2.5), temperature, top-k (Fan et al. 2018,
arXiv:1805.04833), top-p (Holtzman et al. 2019, arXiv:1904.09751), min-p (Nguyen et al. 2024, arXiv:2407.01082).
They are written here because transformers' processors cost 2 s of imports before the first token; tests compare with
them. The watermark is transformers' own processor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lora_gpt2.recipe import GenerateSettings

MAX_LOGIT = 1e30  # remains finite when it is divided by the smallest temperature


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen; names, meaning and defaults without effect are those of vLLM."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    watermark_key: int | None = None

    @classmethod
    def from_settings(cls, settings: GenerateSettings) -> SamplingParams:
        """Returns the parameters in a recipe's section."""
        names = set(cls.__dataclass_fields__) - {"watermark_key"}
        key = settings.watermark_key if settings.watermark else None
        return cls(**{name: getattr(settings, name) for name in names}, watermark_key=key)


def penalise_repetition(
    logits: Float[Tensor, " vocab"], seen: Int[Tensor, " tokens"], penalty: float
) -> Float[Tensor, " vocab"]:
    """Returns logits with tokens in `seen` made less likely: positive logits are divided, negative ones multiplied."""
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
    logits: Float[Tensor, " vocab"], ids: Int[Tensor, " tokens"], num_prompt_tokens: int, params: SamplingParams
) -> Float[Tensor, " vocab"]:
    """Returns logits after bias and penalties; `ids` are the prompt's tokens and then the generated ones."""
    if params.logit_bias:
        biased = [token for token in params.logit_bias if 0 <= token < len(logits)]
        bias = torch.tensor([params.logit_bias[token] for token in biased])
        logits = logits.index_add(0, torch.tensor(biased, dtype=torch.long), bias)
    logits = penalise_repetition(logits, ids, params.repetition_penalty)
    logits = penalise_counts(logits, ids[num_prompt_tokens:], params.presence_penalty, params.frequency_penalty)
    return forbid_ngrams(logits, ids, params.no_repeat_ngram_size)


@lru_cache(maxsize=4)
def _build_watermark(vocab_size: int, key: int) -> Any:
    from transformers.generation.logits_process import WatermarkLogitsProcessor

    return WatermarkLogitsProcessor(vocab_size, "cpu", hashing_key=key)


def watermark_logits(logits: Float[Tensor, " vocab"], ids: Int[Tensor, " tokens"], key: int) -> Float[Tensor, " vocab"]:
    """Returns logits in which a quarter of the vocabulary, chosen by the previous token and the key, is more likely."""
    if not len(ids):
        return logits
    marked: Tensor = _build_watermark(len(logits), key)(ids[None], logits[None].clone())
    return marked[0]


def warp_logits(
    logits: Float[Tensor, " vocab"], temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Float[Tensor, " vocab"]:
    """Returns logits after temperature, top-k, top-p and min-p; excluded tokens are -inf. Temperature is positive."""
    logits = logits / temperature
    if 0 < top_k < len(logits):
        smallest = torch.topk(logits, top_k).values[-1]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        more_likely = ordered.softmax(0).cumsum(0).roll(1)
        more_likely[0] = 0
        is_cut = more_likely >= top_p
        is_cut[0] = False  # the most likely token stays, also where top_p is less than any float32
        logits = logits.scatter(0, order, ordered.masked_fill(is_cut, -torch.inf))
    if min_p:
        probabilities = logits.softmax(0)
        logits = logits.masked_fill(probabilities < min_p * probabilities.max(), -torch.inf)
    return logits


def choose_token(
    logits: Float[Tensor, " vocab"],
    ids: Int[Tensor, " tokens"],
    params: SamplingParams,
    generator: torch.Generator,
    *,
    num_prompt_tokens: int = 0,
    banned: Sequence[int] = (),
) -> int:
    """Returns the next token: the most likely one at temperature 0, else one sampled with `generator`.

    If every token was excluded, returns the most likely one of the original logits.

    Args:
        logits: of the next token.
        ids: the prompt's tokens and then the generated ones.
        params: sampling parameters.
        generator: source of randomness.
        num_prompt_tokens: number of prompt tokens in `ids`.
        banned: tokens that must not be chosen.
    """
    adjusted = adjust_logits(logits.float(), ids, num_prompt_tokens, params)
    if params.watermark_key is not None:
        adjusted = watermark_logits(adjusted, ids, params.watermark_key)
    adjusted = forbid_tokens(adjusted, banned)
    if not torch.isfinite(adjusted).any():
        adjusted = logits.float()
    if params.temperature == 0:
        return int(adjusted.argmax())
    if (maximum := adjusted.max()) < -MAX_LOGIT:
        adjusted = adjusted - maximum
    adjusted = adjusted.clamp(max=MAX_LOGIT)
    warped = warp_logits(adjusted, params.temperature, params.top_k, params.top_p, params.min_p)
    return int(torch.multinomial(warped.softmax(0), 1, generator=generator))
