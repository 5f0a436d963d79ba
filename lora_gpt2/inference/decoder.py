"""Forward passes for running sequences over one KV cache: the prefill of prompts, and decode steps of a token each.

Running sequences occupy the first rows of the cache, so a step computes no idle ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lora_gpt2.inference.device_penalties import NONE, adjust_logits, build_adjustments, forbid_tokens, is_adjusted
from lora_gpt2.inference.device_sampling import FORBIDDEN, UNDECIDED, build_columns, choose_tokens
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.sampling import SamplingParams
from lora_gpt2.inference.sequence import SequenceState
from lora_gpt2.inference.session import Session
from lora_gpt2.model.batch_adapters import BatchAdapters
from lora_gpt2.model.kv_cache import KVCache
from lora_gpt2.model.scoring import next_logits

SCORED_TOKENS = 128
"""Prompt tokens whose logits exist at the same time: 26 MB in float32 for GPT-2's vocabulary."""


@dataclass(frozen=True, kw_only=True)
class NextTokens:
    """What follows each sequence of a batch: `logits` `[batch, vocab]` on the device, and what was chosen there.

    `tokens` holds a token, `UNDECIDED` or `NOT_FINITE` of each. Valid until the next step.
    """

    logits: Float[Tensor, "batch vocab"]
    tokens: Sequence[int]

    def read(self, rows: Sequence[int]) -> Float[Tensor, "rows vocab"]:
        """Returns the logits of some rows on the CPU."""
        wanted = self.logits if len(rows) == len(self.logits) else self.logits[list(rows)]
        return wanted.cpu()


def build_sampling_columns(sequences: Sequence[SequenceState], padding: int = 0, ahead: int = 0) -> Tensor:
    """Returns the sampling columns of sequences, followed by rows of padding; see `device_sampling`."""
    params = [sequence.params for sequence in sequences] + [SamplingParams()] * padding
    return build_columns(params, [sequence.draw_uniform(ahead) for sequence in sequences] + [0.0] * padding)


def build_sampling_adjustments(
    sequences: Sequence[SequenceState], capacity: int, lengths: Sequence[int | None], padding: int = 0
) -> list[Tensor]:
    """Returns what changes the logits of sequences, each with the tokens up to a length, followed by rows of padding.

    None where no sequence has any; see `device_penalties`.
    """
    params = [sequence.params for sequence in sequences] + [SamplingParams()] * padding
    if not any(map(is_adjusted, params)):
        return []
    known = [(sequence.prompt_ids + sequence.new_ids)[:end] for sequence, end in zip(sequences, lengths, strict=True)]
    prompt_lengths = [len(sequence.prompt_ids) for sequence in sequences] + [0] * padding
    return build_adjustments(params, [*known, *[[]] * padding], prompt_lengths, capacity)


def build_sampling_masks(sequences: Sequence[SequenceState], padding: int = 0) -> list[Tensor]:
    """Returns the words of the constraints of sequences, `[batch, words]`, all bits set where there is none.

    Padding follows; no tensor where no sequence has a constraint.
    """
    found = [sequence.find_words() for sequence in sequences]
    size = next((len(words) for words in found if words is not None), 0)
    if not size:
        return []
    free = torch.full((size,), -1, dtype=torch.int32)
    return [torch.stack([free if words is None else words for words in [*found, *[None] * padding]])]


class Decoder:
    """Computes what follows sequences; the caller decides which rows they occupy."""

    def __init__(self, session: Session, cache: KVCache) -> None:
        self.session, self.cache = session, cache
        self._adapters: tuple[object, BatchAdapters | None] = (None, None)
        self._prompt_hidden: Tensor | None = None

    def step(self, sequences: Sequence[SequenceState]) -> NextTokens:
        """Decodes one more token in each of the first rows, which are those of `sequences`."""
        view = self.cache.view(0, len(sequences))
        newest = [sequence.new_ids[-1] for sequence in sequences]
        batch = torch.tensor(newest, device=self.cache.buffer.device)[:, None]
        adapters = self._reuse_adapters([sequence.mix for sequence in sequences])
        return self._choose(sequences, next_logits(self.session.base.model, batch, adapters, view)[0])

    def check_drafts(self, sequences: Sequence[SequenceState], drafts: Sequence[Sequence[int]]) -> Tensor:
        """Decodes in each of the first rows its newest token and a draft; returns the logits `[batch, time, vocab]`.

        The logits at a position are those behind it; what lies behind a row's draft is padding. The rows hold their
        whole drafts afterwards, until `cache.truncate`.
        """
        eos, lengths = self.session.base.tokenizer.eos_id, [1 + len(draft) for draft in drafts]
        pairs = zip(sequences, drafts, strict=True)
        rows = [[s.new_ids[-1], *draft, *[eos] * (max(lengths) - 1 - len(draft))] for s, draft in pairs]
        view, tokens = self.cache.view(0, len(rows)), torch.tensor(rows, device=self.cache.buffer.device)
        adapters = self._reuse_adapters([sequence.mix for sequence in sequences])
        model = self.session.base.model
        return model.logits(model(tokens, adapters, view, num_tokens=lengths), adapters).float()

    def _choose(self, sequences: Sequence[SequenceState], logits: Tensor) -> NextTokens:
        """Chooses tokens on a GPU; a CPU samples faster where it need not take every case into account."""
        if logits.device.type != "cuda":
            return NextTokens(logits=logits, tokens=[UNDECIDED] * len(logits))
        device = logits.device
        own = logits[:, : self.session.base.tokenizer.vocab_size]
        if adjustments := build_sampling_adjustments(sequences, self.cache.capacity + 1, [None] * len(sequences)):
            newest = torch.full((len(sequences), 1), NONE, device=device)
            own = adjust_logits(own, newest, *(part.to(device) for part in adjustments))
        for words in build_sampling_masks(sequences):
            own = forbid_tokens(own, words.to(device), FORBIDDEN)
        tokens = choose_tokens(own, build_sampling_columns(sequences).to(device))
        return NextTokens(logits=logits, tokens=tokens.tolist())

    def _reuse_adapters(self, mixes: Sequence[Mix]) -> BatchAdapters | None:
        """Returns the adapters of a batch; one with the same mixes as before keeps its own."""
        key = (list(mixes), self.session.slots.num_loads)
        if self._adapters[0] != key:
            self._adapters = (key, self.session.adapters_for(mixes))
        return self._adapters[1]

    def prefill(
        self, sequences: Sequence[SequenceState], first: int, prefixes: Sequence[Sequence[Tensor]] | None = None
    ) -> NextTokens:
        """Puts prompts, and what followed them already, into the cache, from row `first` on; returns what follows each.

        `prefixes` are the keys and values that each of them begins with, in blocks, which are copied instead of being
        computed. The hidden states are kept where a prompt wants its log-probabilities; see `iter_prompt_logits`.
        """
        eos = self.session.base.tokenizer.eos_id
        known = [sum(block.shape[3] for block in blocks) for blocks in prefixes or [()] * len(sequences)]
        rest = [sequence.ids[start:] for sequence, start in zip(sequences, known, strict=True)]
        lengths = [len(ids) for ids in rest]
        padded = [ids + [eos] * (max(lengths) - len(ids)) for ids in rest]
        for row, blocks in enumerate(prefixes or ()):
            if blocks:
                self.cache.fill(first + row, blocks)
        view = self.cache.view(first, first + len(sequences))
        adapters = self.session.adapters_for([sequence.mix for sequence in sequences])
        tokens = torch.tensor(padded, device=self.cache.buffer.device)
        logits, hidden = next_logits(self.session.base.model, tokens, adapters, view, lengths)
        self._prompt_hidden = hidden if any(sequence.scores_prompt for sequence in sequences) else None
        return self._choose(sequences, logits)

    def iter_prompt_logits(self, row: int, sequence: SequenceState) -> Iterator[tuple[list[int], Tensor]]:
        """Yields the tokens of a prompt, the first excepted, with the logits that they were predicted by.

        `row` is the sequence's index in the last prefill. Some tokens at a time, `[tokens, rows]`, on the CPU.
        """
        adapters = self.session.adapters_for([sequence.mix])
        assert self._prompt_hidden is not None, "the prefill has a sequence that scores its prompt"
        states = self._prompt_hidden[row : row + 1]
        for start in range(0, len(sequence.prompt_ids) - 1, SCORED_TOKENS):
            targets = sequence.prompt_ids[start + 1 : start + 1 + SCORED_TOKENS]
            logits = self.session.base.model.logits(states[:, start : start + len(targets)], adapters)
            yield targets, logits[0].float().cpu()

    def reset(self) -> None:
        """Frees every row and forgets the adapters of the last batch."""
        self._adapters, self._prompt_hidden = (None, None), None
        for row in range(self.cache.batch_size):
            self.cache.free(row)
