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
from lora_gpt2.inference.session import Mix, Session, check_logits
from lora_gpt2.model.gpt2 import KVCache
from lora_gpt2.recipe import GenerateSettings


@dataclass(frozen=True)
class Hypothesis:
    """A finished continuation; `score` is its log-probability over length to the power of the penalty."""

    ids: tuple[int, ...]
    score: float
    finish_reason: str


class BeamSearch:
    """The search of one continuation of at most `budget` tokens, one token at a time.

    `kept` has up to `settings.num_beams` finished continuations, best first.
    """

    def __init__(
        self, session: Session, prompt_ids: Sequence[int], mix: Mix, budget: int, settings: GenerateSettings
    ) -> None:
        base = session.base
        self.session, self.prompt_ids, self.mix, self.budget, self.settings = session, prompt_ids, mix, budget, settings
        self.cache = KVCache(base.config, 1, min(len(prompt_ids) + budget, base.config.context), base.model.wte.weight)
        self.tokens = torch.tensor([list(prompt_ids)], device=base.runtime.device)
        self.beams: list[tuple[int, ...]] = [()]
        self.scores = torch.zeros(1)
        self.kept: list[Hypothesis] = []
        self.length = 0
        self.is_done = False

    @torch.inference_mode()
    def advance(self) -> None:
        """Makes every beam a token longer; `is_done` says whether that was the last time."""
        width, eos = self.settings.num_beams, self.session.base.tokenizer.eos_id
        self.length += 1
        totals = self.scores[:, None] + self._adjust(self._read_logits().log_softmax(-1))
        values, places = totals.flatten().topk(min(2 * width, totals.numel()))
        rows, chosen = places // totals.shape[1], places % totals.shape[1]
        running: list[int] = []
        for rank, (value, row, token) in enumerate(zip(values.tolist(), rows.tolist(), chosen.tolist(), strict=True)):
            if value == -torch.inf:
                break
            ends = token == eos or self.length == self.budget
            if ends and rank < width:
                ids = self.beams[row] if token == eos else (*self.beams[row], token)
                self.kept.append(Hypothesis(ids, self._normalise(value), "stop" if token == eos else "length"))
            elif not ends and len(running) < width:
                running.append(rank)
        self.kept = sorted(self.kept, key=lambda hypothesis: -hypothesis.score)[:width]
        is_full = len(self.kept) == width
        if not running or (is_full and self._normalise(float(values[running[0]])) <= self.kept[-1].score):
            self.is_done = True
            return
        index = torch.tensor(running)
        pairs = zip(rows[index].tolist(), chosen[index].tolist(), strict=True)
        self.beams = [(*self.beams[row], token) for row, token in pairs]
        self.scores = values[index]
        self.cache.keep_rows(rows[index].to(self.tokens.device))
        self.tokens = chosen[index].to(self.tokens.device)[:, None]

    def _normalise(self, logprob: float) -> float:
        return float(logprob / self.length**self.settings.length_penalty)

    def _read_logits(self) -> Tensor:
        """Returns the logits `[beams, vocab]` after the newest tokens `[beams, time]`, on the CPU."""
        model = self.session.base.model
        adapters = self.session.rows([self.mix] * len(self.tokens))
        hidden = model(self.tokens, adapters, self.cache)
        self.cache.lengths += self.tokens.shape[1]
        logits = model.logits(hidden[:, -1:], adapters)[:, 0, : self.session.base.tokenizer.vocab_size].float().cpu()
        check_logits(logits, self.mix)
        return logits

    def _adjust(self, logprobs: Tensor) -> Tensor:
        rows = [
            adjust_logits(
                row, torch.tensor([*self.prompt_ids, *beam], dtype=torch.long), len(self.prompt_ids), self.settings
            )
            for row, beam in zip(logprobs, self.beams, strict=True)
        ]
        return torch.stack(rows)


def search_beams(
    session: Session, prompt_ids: Sequence[int], mix: Mix, budget: int, settings: GenerateSettings
) -> list[Hypothesis]:
    """Returns up to `settings.num_beams` continuations of at most `budget` tokens, best first."""
    search = BeamSearch(session, prompt_ids, mix, budget, settings)
    while not search.is_done:
        search.advance()
    return search.kept
