"""From logits to the next tokens: pure functions, in the order and with the meaning of transformers' processors.

Repetition penalty (Keskar et al. 2019, arXiv:1909.05858, section 4.1), presence and frequency penalty (OpenAI's API),
no repeated n-grams (Paulus et al. 2017, arXiv:1705.04304, section 2.5), temperature, top-k (Fan et al. 2018,
arXiv:1805.04833), top-p (Holtzman et al. 2019, arXiv:1904.09751), min-p (Nguyen et al. 2024, arXiv:2407.01082).
They are written here because transformers' processors cost a second of imports before the first token; tests compare
with them. The watermark is transformers' own processor.

A batch is sampled at once: the most likely tokens of each row first, everything after that on these candidates. What a
row gets is a function of its own logits, parameters and random number alone, to the bit: sums are cumulative, in
float64, and in an order of the row's own. Random numbers are counted, not drawn (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3"): a number for each seed and step, on any device and in any batch.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from lora_gpt2.recipe import GenerateSettings

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
GROUP = 64  # tokens of which the maximum is taken first
FIRST_CANDIDATES = 1024  # in which a nucleus is looked for, before the whole vocabulary is sorted


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

    @property
    def looks_back(self) -> bool:
        """True if logits change by what the sequence holds, by a bias, or by a watermark."""
        penalties = (self.repetition_penalty != 1, self.presence_penalty, self.frequency_penalty)
        return any((*penalties, self.no_repeat_ngram_size, self.logit_bias, self.watermark_key is not None))


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


def adjust_row(
    logits: Float[Tensor, " vocab"],
    ids: Sequence[int],
    params: SamplingParams,
    *,
    num_prompt_tokens: int = 0,
    banned: Sequence[int] = (),
    allowed: Bool[Tensor, " vocab"] | None = None,
) -> Float[Tensor, " vocab"]:
    """Returns a row's logits in float32 after everything that looks at its own tokens; they are not changed in place.

    If every token was excluded, returns the original logits, of the allowed ones.

    Args:
        logits: of the next token.
        ids: the prompt's tokens and then the generated ones.
        params: sampling parameters.
        num_prompt_tokens: number of prompt tokens in `ids`.
        banned: tokens that must not be chosen.
        allowed: tokens that may be chosen, of which there is one at least; None for all.
    """
    logits = logits.float() if allowed is None else logits.float().masked_fill(~allowed, -torch.inf)
    if not (banned or params.looks_back):
        return logits
    seen = torch.tensor(ids, dtype=torch.long)
    adjusted = adjust_logits(logits, seen, num_prompt_tokens, params)
    if params.watermark_key is not None:
        adjusted = watermark_logits(adjusted, seen, params.watermark_key)
    adjusted = forbid_tokens(adjusted, banned)
    return adjusted if torch.isfinite(adjusted).any() else logits


def draw_uniform(seed: int, step: int) -> float:
    """Returns the random number in [0, 1) of a seed and a step: splitmix64 (Steele et al. 2014), 53 bits of it."""
    return (_mix(_mix((seed + GOLDEN) & MASK) + step * GOLDEN & MASK) >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def sample_tokens(
    logits: Float[Tensor, "batch vocab"], params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> list[int]:
    """Returns the next token of each row: the most likely one at temperature 0, else where its random number falls.

    Args:
        logits: in float32, at least one of each row above -inf.
        params: of each row.
        uniforms: the random number of each row; see `draw_uniform`.
    """
    vocab_size, tokens = logits.shape[1], dict[int, int]()
    greedy = [row for row, own in enumerate(params) if own.temperature == 0]
    few = [row for row, own in enumerate(params) if own.temperature and 0 < own.top_k < vocab_size]
    if greedy:
        tokens |= zip(greedy, _take(logits, greedy).argmax(1).tolist(), strict=True)
    if few:
        own = [params[row] for row in few]
        candidates = find_top_k(_take(logits, few), [each.top_k for each in own])
        drawn = draw_tokens(candidates, weigh_candidates(candidates, own), as_column([uniforms[row] for row in few]))
        tokens |= zip(few, drawn.tolist(), strict=True)
    for row in set(range(len(params))).difference(tokens):
        candidates = find_nucleus(logits[row], params[row])
        weights = weigh_candidates(candidates, [params[row]])
        tokens[row] = int(draw_tokens(candidates, weights, as_column([uniforms[row]])))
    return [tokens[row] for row in range(len(params))]


def _take(logits: Tensor, rows: Sequence[int]) -> Tensor:
    return logits if len(rows) == len(logits) else logits[list(rows)]


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Tokens that may be chosen: `logits` and `tokens` `[batch, candidates]`, most likely first; -inf is no candidate.

    `totals` `[batch, 1]` is what top-p is a part of, in units of `weigh_logits`; None for the candidates alone.
    """

    logits: Tensor
    tokens: Tensor
    totals: Tensor | None = None


def find_top_k(logits: Float[Tensor, "batch vocab"], sizes: Sequence[int]) -> Candidates:
    """Returns the most likely tokens of each row, as many as its size, and all that are as likely as the last of them.

    Among equally likely ones, smaller tokens come first.
    """
    size = torch.tensor(sizes, device=logits.device)[:, None]
    values, tokens = take_top_k(logits, min(max(sizes) + 1, logits.shape[1]))
    smallest = values.gather(1, size - 1)
    if bool(((values[:, -1:] == smallest) & (smallest > -torch.inf)).any()):  # more may be as likely
        values, tokens = logits.topk(int((logits >= smallest).sum(1).max()), dim=1)
    if bool((values[:, 1:] == values[:, :-1]).any()):
        by_token = tokens.argsort(1)
        values, tokens = values.gather(1, by_token), tokens.gather(1, by_token)
        order = values.argsort(dim=1, descending=True, stable=True)
        values, tokens = values.gather(1, order), tokens.gather(1, order)
    return Candidates(logits=values.masked_fill(values < smallest, -torch.inf), tokens=tokens)


def take_top_k(logits: Shaped[Tensor, "batch vocab"], k: int) -> tuple[Tensor, Tensor]:
    """Returns what `torch.topk` does along the vocabulary, in half the time: first by the maxima of groups."""
    count = logits.shape[1] // GROUP
    if count < 4 * k:
        values, tokens = logits.topk(k, dim=1)
        return values, tokens
    groups = logits[:, : count * GROUP].reshape(len(logits), count, GROUP)
    chosen = groups.amax(2).topk(k, dim=1).indices  # what is among the k largest is in a group that is
    places = (chosen[:, :, None] * GROUP + torch.arange(GROUP, device=logits.device)).flatten(1)
    rest = torch.arange(count * GROUP, logits.shape[1], device=logits.device).expand(len(logits), -1)
    places = torch.cat([places, rest], dim=1)
    values, order = logits.gather(1, places).topk(k, dim=1)
    return values, places.gather(1, order)


def find_nucleus(logits: Float[Tensor, " vocab"], params: SamplingParams) -> Candidates:
    """Returns the candidates of a row that has no top-k: the whole vocabulary, or a part that holds the nucleus."""
    row, vocab_size = logits[None], len(logits)
    if params.top_p == 1:  # in any order
        return Candidates(logits=row, tokens=torch.arange(vocab_size, device=logits.device)[None])
    totals = weigh_logits(row, as_column([params.temperature])).sum(1, keepdim=True)
    if vocab_size > 2 * FIRST_CANDIDATES:
        found = find_top_k(row, [FIRST_CANDIDATES])
        weights = weigh_logits(found.logits, as_column([params.temperature]))
        if bool(weights[:, :-1].sum() > params.top_p * totals):
            return replace(found, totals=totals)
    order = logits.argsort(descending=True, stable=True)
    return Candidates(logits=logits[order][None], tokens=order[None], totals=totals)


def weigh_logits(
    logits: Float[Tensor, "batch tokens"], temperature: Float[Tensor, "batch 1"]
) -> Float[Tensor, "batch tokens"]:
    """Returns the probability of each token over that of the most likely one, in float64; for logits of any size."""
    exact = logits.double()
    largest = exact.amax(1, keepdim=True).clamp(-sys.float_info.max, sys.float_info.max)
    return torch.where(exact == torch.inf, 1.0, ((exact - largest) / temperature).exp())


def weigh_candidates(candidates: Candidates, params: Sequence[SamplingParams]) -> Float[Tensor, "batch candidates"]:
    """Returns the weights of candidates after temperature, top-p and min-p: 0 for what is excluded."""
    weights = weigh_logits(candidates.logits, as_column([own.temperature for own in params]))
    if any(own.top_p < 1 for own in params):
        weights = keep_nucleus(weights, as_column([own.top_p for own in params]), candidates.totals)
    if any(own.min_p for own in params):
        weights = weights.masked_fill(weights < as_column([own.min_p for own in params]), 0.0)
    return weights


def as_column(values: Sequence[float]) -> Float[Tensor, "batch 1"]:
    """Returns a number of each row in float64."""
    return torch.tensor(values, dtype=torch.float64)[:, None]


def keep_nucleus(
    weights: Float[Tensor, "batch candidates"], top_p: Float[Tensor, "batch 1"], totals: Tensor | None
) -> Float[Tensor, "batch candidates"]:
    """Returns the weights with those behind each row's nucleus set to 0; `totals` as in `Candidates`."""
    sums = weights.cumsum(1)
    totals = sums[:, -1:] if totals is None else totals
    is_outside = (sums[:, :-1] >= top_p * totals) & (top_p < 1)  # what is more likely is enough
    return torch.cat([weights[:, :1], weights[:, 1:].masked_fill(is_outside, 0.0)], dim=1)


def draw_tokens(
    candidates: Candidates, weights: Float[Tensor, "batch candidates"], uniforms: Float[Tensor, "batch 1"]
) -> Int[Tensor, " batch"]:
    """Returns the token of each row in whose share of the weights the row's random number falls."""
    sums = weights.cumsum(1)
    drawn = uniforms * sums[:, -1:]
    drawn = drawn.minimum(sums[:, -1:].nextafter(torch.zeros_like(drawn)))  # rounding must not reach the end
    places = (sums <= drawn).sum(1, keepdim=True)
    return candidates.tokens.gather(1, places)[:, 0]
