"""Where runs of tokens of a text occur in another: an index of all its windows by a rolling hash.

Karp and Rabin 1987. A window's hash is the sum of mixed token ids times powers of an odd number, modulo 2^64, from
differences of a prefix sum; whatever agrees is then compared token by token, so an answer is never a collision. Five
million tokens take 60 MB. A copy that is tokenised in another way is not found.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FACTOR = np.uint64(0x9E3779B97F4A7C15)
MIX_FACTOR, MIX_SHIFT = 0xBF58476D1CE4E5B9, 31
INVERSE = np.uint64(pow(int(FACTOR), -1, 2**64))
Tokens = NDArray[np.integer]


def hash_windows(tokens: Tokens | Sequence[int], size: int) -> NDArray[np.uint64]:
    """Returns the hash of each window of `size` tokens, `[tokens - size + 1]`; empty if there are fewer."""
    ids = np.asarray(tokens, dtype=np.uint64)
    if len(ids) < size:
        return np.zeros(0, dtype=np.uint64)
    mixed = (ids + np.uint64(1)) * np.uint64(MIX_FACTOR)
    mixed ^= mixed >> np.uint64(MIX_SHIFT)
    powers = np.full(len(ids), FACTOR, dtype=np.uint64)
    powers[0] = 1
    powers = np.multiply.accumulate(powers)
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.add.accumulate(mixed * powers)])
    back = np.full(len(ids) - size + 1, INVERSE, dtype=np.uint64)
    back[0] = 1
    hashes: NDArray[np.uint64] = (sums[size:] - sums[:-size]) * np.multiply.accumulate(back)
    return hashes


class NgramIndex:
    """The windows of `size` tokens of a stream, to be looked up."""

    def __init__(self, stream: Tokens, size: int) -> None:
        self.stream, self.size = stream, size
        hashes = hash_windows(stream, size)
        self._order = np.argsort(hashes, kind="stable").astype(np.uint32 if len(hashes) < 2**32 else np.int64)
        self._hashes = hashes[self._order]

    def find(self, tokens: Tokens | Sequence[int]) -> NDArray[np.int64]:
        """Returns where in the stream each window of some tokens first occurs, `[tokens - size + 1]`; -1 if nowhere."""
        hashes, ids = hash_windows(tokens, self.size), np.asarray(tokens)
        found = np.full(len(hashes), -1, dtype=np.int64)
        first = np.searchsorted(self._hashes, hashes)
        for window in np.flatnonzero(first < len(self._hashes)):
            for position in self._iter_positions(int(first[window]), hashes[window]):
                if np.array_equal(self.stream[position : position + self.size], ids[window : window + self.size]):
                    found[window] = position
                    break
        return found

    def find_longest(self, tokens: Tokens | Sequence[int], among: NDArray[np.bool_] | None = None) -> tuple[int, int]:
        """Returns the longest run of some tokens that stands in the stream, and where; (0, -1) if below `size`.

        With `among` `[tokens - size + 1]` it is one that holds a window which is marked there.
        """
        ids, hashes = np.asarray(tokens), hash_windows(tokens, self.size)
        first = np.searchsorted(self._hashes, hashes)
        best, window = (0, -1), 0
        while window < len(hashes):
            if among is not None and not among[window]:
                window += 1
                continue
            end = window
            for position in self._iter_positions(int(first[window]), hashes[window]):
                forward = _count_equal(self.stream[position:], ids[window:])
                if forward >= self.size:  # else another window has this hash
                    back = _count_equal(self.stream[:position][::-1], ids[:window][::-1])
                    best = max(best, (forward + back, position - back), key=lambda run: run[0])
                    end = max(end, window + forward)
            window = max(window + 1, end - self.size + 1)  # whatever is longer ends behind `end`
        return best

    def find_followers(self, tokens: Sequence[int]) -> list[int]:
        """Returns the tokens that follow the last `size` of some tokens anywhere in the stream, each once."""
        if len(tokens) < self.size:
            return []
        tail = np.asarray(tokens[-self.size :])
        hashed = hash_windows(tail, self.size)[0]
        followers = {
            int(self.stream[position + self.size])
            for position in self._iter_positions(int(np.searchsorted(self._hashes, hashed)), hashed)
            if position + self.size < len(self.stream)
            and np.array_equal(self.stream[position : position + self.size], tail)
        }
        return sorted(followers)

    def _iter_positions(self, first: int, hashed: np.uint64) -> list[int]:
        last = int(np.searchsorted(self._hashes, hashed, side="right"))
        return [int(position) for position in self._order[first:last]]


def _count_equal(one: Tokens, other: Tokens) -> int:
    """Returns how many tokens two runs have in common from their beginnings."""
    length = min(len(one), len(other))
    differs = np.flatnonzero(one[:length] != other[:length])
    return int(differs[0]) if len(differs) else length
