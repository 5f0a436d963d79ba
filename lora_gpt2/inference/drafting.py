"""Several tokens a step: what may follow is guessed, and checked by one pass over the base.

Prompt look-up (Saxena 2023): where the last tokens stood before, what followed them then is a draft; where they did
not, what followed them most often in the adapter's training text (`data/successors.py`). Each drafted token is compared
with the one that is sampled from the logits in front of it, with the random number of its place, so the text is the one
that would be written without drafts, token by token, at any temperature; a draft that is a single token is accepted as
often as by speculative sampling (Leviathan et al. 2023, arXiv:2211.17192, algorithm 1).

A pass over a few tokens costs little more than over one where reading the weights is what takes the time: on a CPU
with packed weights, in small batches. How much is drafted depends on what was accepted before, never on a clock, so
that the same request is computed in the same steps.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_gpt2.data.successors import SuccessorTable

LONGEST_MATCH, SHORTEST_MATCH = 3, 2
MOST_DRAFTED = 5
BATCH_TOKENS = 16
"""Tokens of all rows in a pass up to which another one is cheap."""
FEWEST_ACCEPTED = 0.4
"""Tokens that a draft must bring on average; drafts that bring fewer stop, and are tried again every so many tokens."""
RETRY_AFTER = 24
MEMORY = 0.8


class _Trust:
    """Whether a source of drafts is asked: not for a while, once it has brought too little."""

    def __init__(self) -> None:
        self._mean_accepted, self._rest = 1.0, 0

    def is_given(self) -> bool:
        """True if the source is to be asked for the next token."""
        self._rest -= 1
        return self._rest < 0

    def record(self, num_accepted: int) -> None:
        """Says how many tokens of its last draft were right."""
        self._mean_accepted = MEMORY * self._mean_accepted + (1 - MEMORY) * num_accepted
        if self._mean_accepted < FEWEST_ACCEPTED:
            self._rest = RETRY_AFTER
            self._mean_accepted = FEWEST_ACCEPTED  # the next one decides


class Drafter:
    """Drafts for one text, whose tokens it sees in order.

    Args:
        successors: of the adapter's training text, which is asked where the text itself has nothing to say.
    """

    def __init__(self, successors: SuccessorTable | None = None) -> None:
        self._known: list[dict[tuple[int, ...], int]] = [{} for _ in range(LONGEST_MATCH + 1)]
        self._num_seen = 0
        self._sources = [(self._look_up, _Trust())]
        if successors is not None:
            self._sources.append((successors.draft, _Trust()))
        self._used = self._sources[0][1]

    def draft(self, ids: Sequence[int], most: int) -> list[int]:
        """Returns up to `most` tokens that may follow; none where nothing was found, or drafts do not pay."""
        self._observe(ids)
        for source, trust in self._sources:
            if trust.is_given() and (found := source(ids, most)):
                self._used = trust
                return found
        return []

    def record(self, num_accepted: int) -> None:
        """Says how many tokens of the last draft were right."""
        self._used.record(num_accepted)

    def _look_up(self, ids: Sequence[int], most: int) -> list[int]:
        """Returns what followed in the text where its last tokens stood before."""
        for size in range(LONGEST_MATCH, SHORTEST_MATCH - 1, -1):
            if len(ids) >= size and (begin := self._known[size].get(tuple(ids[-size:]))) is not None:
                return list(ids[begin : begin + most])
        return []

    def _observe(self, ids: Sequence[int]) -> None:
        """Remembers what followed each run of tokens that is not at the end; the last time counts."""
        for end in range(max(1, self._num_seen), len(ids)):
            for size in range(SHORTEST_MATCH, LONGEST_MATCH + 1):
                if end >= size:
                    self._known[size][tuple(ids[end - size : end])] = end
        self._num_seen = len(ids)


def limit_drafts(num_rows: int) -> int:
    """Returns how many tokens each row of a batch may draft."""
    return min(MOST_DRAFTED, BATCH_TOKENS // num_rows - 1)
