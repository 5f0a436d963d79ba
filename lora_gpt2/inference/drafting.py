"""Several tokens a step: what may follow is guessed from the text itself, and checked by one pass over the base.

Prompt look-up (Saxena 2023): where the last tokens stood before, what followed them then is a draft. Each drafted token
is compared with the one that is sampled from the logits in front of it, with the random number of its place, so the
text is the one that would be written without drafts, token by token, at any temperature; a draft that is a single token
is accepted as often as by speculative sampling (Leviathan et al. 2023, arXiv:2211.17192, algorithm 1).

A pass over a few tokens costs little more than over one where reading the weights is what takes the time: on a CPU
with packed weights, in small batches. How much is drafted depends on what was accepted before, never on a clock, so
that the same request is computed in the same steps.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_MATCH, SHORTEST_MATCH = 3, 2
MOST_DRAFTED = 5
BATCH_TOKENS = 16
"""Tokens of all rows in a pass up to which another one is cheap."""
FEWEST_ACCEPTED = 0.4
"""Tokens that a draft must bring on average; drafts that bring fewer stop, and are tried again every so many tokens."""
RETRY_AFTER = 24
MEMORY = 0.8


class Drafter:
    """Drafts for one text, whose tokens it sees in order."""

    def __init__(self) -> None:
        self._known: list[dict[tuple[int, ...], int]] = [{} for _ in range(LONGEST_MATCH + 1)]
        self._num_seen = 0
        self._mean_accepted, self._rest = 1.0, 0

    def draft(self, ids: Sequence[int], most: int) -> list[int]:
        """Returns up to `most` tokens that may follow; none where nothing was found, or drafts do not pay."""
        self._observe(ids)
        if self._rest > 0:
            self._rest -= 1
            return []
        for size in range(LONGEST_MATCH, SHORTEST_MATCH - 1, -1):
            if len(ids) >= size and (begin := self._known[size].get(tuple(ids[-size:]))) is not None:
                return list(ids[begin : begin + most])
        return []

    def record(self, num_accepted: int) -> None:
        """Says how many tokens of the last draft were right."""
        self._mean_accepted = MEMORY * self._mean_accepted + (1 - MEMORY) * num_accepted
        if self._mean_accepted < FEWEST_ACCEPTED:
            self._rest = RETRY_AFTER
            self._mean_accepted = FEWEST_ACCEPTED  # the next one decides

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
