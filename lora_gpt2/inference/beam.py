"""Beam search: the likeliest whole continuation, not the likeliest next token.

The procedure is transformers' (`early_stopping=False`): of twice as many candidates as beams, those that end among the
first are scored by log-probability over length to the power of `length_penalty` (Wu et al. 2016, arXiv:1609.08144,
section 7, without coverage), and the search ends when no running beam could still beat the worst that is kept. The
LoRA paper's E2E setting is beams 10, length penalty 0.8, no repeated 4-grams (Hu et al. 2021, table 11).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_gpt2.inference.sampling import adjust_logits
from lora_gpt2.inference.session import Mix, Session
from lora_gpt2.model.gpt2 import KVCache
from lora_gpt2.recipe import GenerateSettings


@dataclass(frozen=True)
class Hypothesis:
    """A finished continuation; `score` is its log-probability over length to the power of the penalty."""

    ids: tuple[int, ...]
    score: float
    finish_reason: str


@torch.inference_mode()
def search_beams(
    session: Session, prompt_ids: Sequence[int], mix: Mix, budget: int, settings: GenerateSettings
) -> list[Hypothesis]:
    """Returns up to `settings.beams` continuations of at most `budget` tokens, best first."""
    base, width, eos = session.base, settings.beams, session.base.tokenizer.eos_id
    cache = KVCache(base.config, 1, min(len(prompt_ids) + budget, base.config.context), base.model.wte.weight)
    tokens = torch.tensor([list(prompt_ids)], device=base.runtime.device)
    beams: list[tuple[int, ...]] = [()]
    scores = torch.zeros(1)
    kept: list[Hypothesis] = []
    for length in range(1, budget + 1):
        logits = _advance(session, tokens, mix, cache)
        totals = scores[:, None] + _adjust(logits.log_softmax(-1), prompt_ids, beams, settings)
        values, places = totals.flatten().topk(min(2 * width, totals.numel()))
        rows, chosen = places // totals.shape[1], places % totals.shape[1]
        running: list[int] = []
        for rank, (value, row, token) in enumerate(zip(values.tolist(), rows.tolist(), chosen.tolist(), strict=True)):
            if value == -torch.inf:
                break
            ends = token == eos or length == budget
            if ends and rank < width:
                ids = beams[row] if token == eos else (*beams[row], token)
                kept.append(
                    Hypothesis(ids, value / length**settings.length_penalty, "stop" if token == eos else "length")
                )
            elif not ends and len(running) < width:
                running.append(rank)
        kept = sorted(kept, key=lambda hypothesis: -hypothesis.score)[:width]
        if not running or (
            len(kept) == width and float(values[running[0]]) / length**settings.length_penalty <= kept[-1].score
        ):
            break
        index = torch.tensor(running)
        beams = [(*beams[row], token) for row, token in zip(rows[index].tolist(), chosen[index].tolist(), strict=True)]
        scores = values[index]
        cache.keep_rows(rows[index].to(tokens.device))
        tokens = chosen[index].to(tokens.device)[:, None]
    return kept


def _advance(session: Session, tokens: Tensor, mix: Mix, cache: KVCache) -> Tensor:
    """Returns the logits `[beams, vocab]` after the newest tokens `[beams, time]`, on the CPU."""
    model = session.base.model
    hidden = model(tokens, session.rows([mix] * len(tokens)), cache)
    cache.lengths += tokens.shape[1]
    return model.logits(hidden[:, -1]).float().cpu()


def _adjust(
    logprobs: Tensor, prompt_ids: Sequence[int], beams: Sequence[tuple[int, ...]], settings: GenerateSettings
) -> Tensor:
    rows = [
        adjust_logits(row, torch.tensor([*prompt_ids, *beam], dtype=torch.long), len(prompt_ids), settings)
        for row, beam in zip(logprobs, beams, strict=True)
    ]
    return torch.stack(rows)
