"""Beam search: the most likely whole continuation instead of the most likely next token.

The procedure is transformers' (`early_stopping=False`): of twice as many candidates as beams, those that end among the
first `num_beams`, by EOS or by a stop string, are scored by log-probability over length to the power of
`length_penalty` (Wu et al. 2016, arXiv:1609.08144, section 7, without coverage), and the search ends when no running
beam can beat the worst finished hypothesis. The LoRA paper's E2E setting is 10 beams, length penalty 0.8, no repeated
4-grams (Hu et al. 2021, table 11).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_gpt2.inference.constraint import Constraint, ends_text, start_constraint
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.sampling import SamplingParams, adjust_logits
from lora_gpt2.inference.session import Session, check_logits
from lora_gpt2.model.kv_cache import KVCache
from lora_gpt2.model.scoring import next_logits
from lora_gpt2.recipe import GenerateSettings


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """A finished continuation; `score` is its log-probability over length to the power of the penalty."""

    ids: tuple[int, ...]
    score: float
    finish_reason: str


class BeamSearch:
    """A search for one continuation of up to `max_new_tokens` tokens, advanced by one token at a time.

    `hypotheses` are up to `settings.num_beams` finished continuations, best first.
    """

    def __init__(
        self, session: Session, prompt_ids: Sequence[int], mix: Mix, max_new_tokens: int, settings: GenerateSettings
    ) -> None:
        base = session.base
        self.constraints = [start_constraint(settings, base.tokenizer)]
        self.session, self.prompt_ids, self.mix, self.settings = session, prompt_ids, mix, settings
        self.max_new_tokens, self.params = max_new_tokens, SamplingParams.from_settings(settings)
        self.stop_strings = [text.encode() for text in settings.stop]
        capacity = min(len(prompt_ids) + max_new_tokens, base.config.n_positions)
        self.cache = KVCache(base.config, 1, capacity, base.model.wte.weight)
        self.tokens = torch.tensor([list(prompt_ids)], device=base.runtime.device)
        self.beams: list[tuple[int, ...]] = [()]
        self.scores = torch.zeros(1)
        self.hypotheses: list[Hypothesis] = []
        self.length = 0
        self.is_done = False

    @torch.inference_mode()
    def advance(self) -> None:
        """Extends every beam by a token; sets `is_done` when the search has ended."""
        num_beams, tokenizer = self.settings.num_beams, self.session.base.tokenizer
        self.length += 1
        totals = self.scores[:, None] + self._adjust(self._compute_logprobs())
        values, indices = totals.flatten().topk(min(2 * num_beams, totals.numel()))
        rows, tokens = indices // totals.shape[1], indices % totals.shape[1]
        running, constraints = list[int](), list[Constraint | None]()
        for rank, (value, row, token) in enumerate(zip(values.tolist(), rows.tolist(), tokens.tolist(), strict=True)):
            if value == -torch.inf:
                break
            is_end = ends_text(token, tokenizer, self.constraints[row])
            constraints.append(_follow(self.constraints[row], token))
            is_finished = bool((last := constraints[-1]) and last.is_finished)
            stops = is_end or is_finished or self._meets_stop_string(self.beams[row], token)
            ends = stops or self.length == self.max_new_tokens
            if ends and rank < num_beams:
                ids = self.beams[row] if is_end else (*self.beams[row], token)
                reason = "stop" if stops else "length"
                self.hypotheses.append(Hypothesis(ids=ids, score=self._normalise(value), finish_reason=reason))
            elif not ends and len(running) < num_beams:
                running.append(rank)
        self.hypotheses = sorted(self.hypotheses, key=lambda hypothesis: -hypothesis.score)[:num_beams]
        is_full = len(self.hypotheses) == num_beams
        if not running or (is_full and self._normalise(float(values[running[0]])) <= self.hypotheses[-1].score):
            self.is_done = True
            return
        index = torch.tensor(running)
        pairs = zip(rows[index].tolist(), tokens[index].tolist(), strict=True)
        self.beams = [(*self.beams[row], token) for row, token in pairs]
        self.scores, self.constraints = values[index], [constraints[rank] for rank in running]
        self.cache.select(rows[index].to(self.tokens.device))
        self.tokens = tokens[index].to(self.tokens.device)[:, None]

    def _meets_stop_string(self, beam: Sequence[int], token: int) -> bool:
        """True if the newest token completes a stop string, whose text is cut off later."""
        if not self.stop_strings:
            return False
        table, longest = self.session.base.tokenizer.token_bytes, max(map(len, self.stop_strings))
        tail = b"".join(table[each] for each in (*beam, token)[-longest:])
        return any(stop in tail for stop in self.stop_strings)

    def _normalise(self, logprob: float) -> float:
        return float(logprob / self.length**self.settings.length_penalty)

    def _compute_logprobs(self) -> Tensor:
        """Returns the log-probabilities `[beams, vocab]` after the newest tokens `[beams, time]`, on the CPU."""
        base = self.session.base
        adapters = self.session.adapters_for([self.mix] * len(self.tokens))
        logits, _ = next_logits(base.model, self.tokens, adapters, self.cache)
        logits, vocab_size = logits.cpu(), base.tokenizer.vocab_size
        check_logits(logits[:, :vocab_size], self.mix)
        return logits.log_softmax(-1)[:, :vocab_size]

    def _adjust(self, logprobs: Tensor) -> Tensor:
        """Returns log-probabilities `[beams, vocab]` after bias and penalties, -inf for what a constraint forbids."""
        rows = []
        for row, beam, constraint in zip(logprobs, self.beams, self.constraints, strict=True):
            allowed = row if constraint is None else row.masked_fill(~constraint.find_allowed(), -torch.inf)
            ids = torch.tensor([*self.prompt_ids, *beam], dtype=torch.long)
            adjusted = adjust_logits(allowed, ids, len(self.prompt_ids), self.params)
            rows.append(adjusted if adjusted.isfinite().any() else allowed)  # as in sampling
        return torch.stack(rows)


def _follow(constraint: Constraint | None, token: int) -> Constraint | None:
    """Returns the constraint after one more token."""
    if constraint is None:
        return None
    following = constraint.copy()
    following.accept(token)
    return following
