"""Which sequences run, in which rows of the cache, and which wait: continuous batching (Yu et al. 2022, Orca).

Sequences are admitted at any step that has room, in the order of submission. When one finishes, the last running one
takes its row, so that the running ones are always the first rows.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

from lora_gpt2.core.errors import LoraGpt2Error
from lora_gpt2.inference.beam import BeamSearch
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.sequence import SequenceState
from lora_gpt2.inference.session import Session
from lora_gpt2.model.kv_cache import KVCache

SEQUENCE_ERRORS = (LoraGpt2Error, RuntimeError, ValueError, IndexError)
"""Errors that end one sequence; the others of its batch continue."""


@dataclass(kw_only=True)
class Admission:
    """Sequences that were admitted in a step, and those that failed because an adapter could not be loaded."""

    to_sample: list[SequenceState] = field(default_factory=list)
    to_search: list[SequenceState] = field(default_factory=list)
    failed: list[SequenceState] = field(default_factory=list)


class Scheduler:
    """Keeps the queue and the rows; the adapters of admitted sequences are loaded and pinned."""

    def __init__(self, session: Session, cache: KVCache, max_num_seqs: int) -> None:
        self.session, self.cache, self.max_num_seqs = session, cache, max_num_seqs
        self.waiting: deque[SequenceState] = deque()
        self.running: list[SequenceState] = []
        self.searches: list[tuple[SequenceState, BeamSearch]] = []
        self._pinned: dict[SequenceState, Mix] = {}

    @property
    def num_running(self) -> int:
        """Number of running sequences; a beam search counts once for each beam, whoever takes its texts."""
        widths = {search: sequence.settings.num_beams for sequence, search in self.searches}
        return len(self.running) + sum(widths.values())

    @property
    def sequences(self) -> list[SequenceState]:
        """All sequences, running or waiting."""
        return [*self.running, *(sequence for sequence, _ in self.searches), *self.waiting]

    def admit(self) -> Admission:
        """Takes sequences from the queue as long as there is room.

        A beam search that is wider than the batch is admitted when nothing else is running.
        """
        admission, num_running = Admission(), self.num_running
        searched = {sequence.shared_search for sequence, _ in self.searches}
        while self.waiting:
            sequence = self.waiting[0]
            width = sequence.settings.num_beams if sequence.searches else 1
            width = 0 if sequence.searches and sequence.shared_search in searched else width
            if num_running and num_running + width > self.max_num_seqs:
                break
            self.waiting.popleft()
            try:
                loaded = {name: sequence.loaded.get(name) or self.session.fetch(name) for name, _ in sequence.mix}
                self.session.slots.load(loaded)
            except SEQUENCE_ERRORS as error:
                sequence.fail(error)
                admission.failed.append(sequence)
                continue
            self._pin(sequence)
            num_running += width
            (admission.to_search if sequence.searches else admission.to_sample).append(sequence)
            searched.add(sequence.shared_search)
        return admission

    def withdraw(self, sequence: SequenceState) -> None:
        """Takes a sequence out of the queue, if it is there."""
        with suppress(ValueError):
            self.waiting.remove(sequence)

    def drop_finished(self) -> None:
        """Frees the rows and unpins the adapters of finished sequences."""
        for sequence in (*(sequence for sequence, _ in self.searches), *self.running):
            if sequence.finish_reason:
                self.unpin(sequence)
        self.searches = [(sequence, search) for sequence, search in self.searches if not sequence.finish_reason]
        for row in range(len(self.running) - 1, -1, -1):
            if self.running[row].finish_reason:
                self._free(row)

    def _free(self, row: int) -> None:
        """Takes a sequence out of its row, which the last one gets."""
        last = self.running.pop()
        self.cache.free(row)
        if row < len(self.running):
            self.running[row] = last
            self.cache.move(len(self.running), row)

    def readmit(self, sequence: SequenceState, mix: Mix) -> None:
        """Puts a running sequence back to the head of the queue, to go on with another mix."""
        row = self.running.index(sequence)
        self._free(row)
        self.unpin(sequence)
        sequence.mix, sequence.loaded = mix, {}
        self.waiting.appendleft(sequence)

    def _pin(self, sequence: SequenceState) -> None:
        self.session.slots.pin(sequence.mix)
        self._pinned[sequence] = sequence.mix

    def unpin(self, sequence: SequenceState) -> None:
        """Lets the adapters of an admitted sequence go."""
        self.session.slots.unpin(self._pinned.pop(sequence))

    def clear(self) -> None:
        """Forgets every sequence, and what it pinned; `Engine.reset` frees their rows."""
        for sequence in list(self._pinned):
            self.unpin(sequence)
        self.running, self.searches = [], []
        self.waiting.clear()
