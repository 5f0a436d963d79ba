"""Which token followed which few in a text: a table that drafts the text of an adapter (`inference/drafting.py`).

For runs of 2 to 4 tokens, the token that followed most often, if at least twice and often enough to be worth a guess; a
longer run only where it says something else than the shorter one at its end. The most frequent runs are kept, six bytes
each: 32 bits of a hash of the run, and the token. A wrong guess costs time, never a wrong text. Nobody can read a run
in the table, but whoever knows its tokens can find out what followed it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_gpt2.core.errors import CorruptError
from lora_gpt2.data.ngram_index import FACTOR, MIX_FACTOR, MIX_SHIFT, hash_windows

DRAFTER = "drafter.bin"
"""The file of a version that has its table."""
SHORTEST, LONGEST = 2, 4
FEWEST, SMALLEST_SHARE = 2, 0.6
ENTRY_BYTES, MOST_BYTES = 6, 1_000_000
MOST_TOKENS, NUM_PIECES = 2**22, 64
MASK = 2**64 - 1
POWERS = [pow(int(FACTOR), power, 2**64) for power in range(LONGEST)]


@dataclass(frozen=True)
class SuccessorTable:
    """`keys` of runs, sorted, and the successor of each."""

    keys: NDArray[np.uint32]
    successors: NDArray[np.uint16]

    @classmethod
    def build(cls, stream: NDArray[np.integer], most_bytes: int = MOST_BYTES) -> SuccessorTable:
        """Returns the table of a text's tokens; of a long text of pieces that are spread evenly over it.

        Counting takes some 80 bytes per token, and the table holds no more runs for it.
        """
        if len(stream) > MOST_TOKENS:
            size = MOST_TOKENS // NUM_PIECES
            starts = np.linspace(0, len(stream) - size, NUM_PIECES).astype(int)
            stream = np.concatenate([stream[start : start + size] for start in starts])
        known, counted = cls(np.zeros(0, np.uint32), np.zeros(0, np.uint16)), np.zeros(0, np.int64)
        for size in range(SHORTEST, LONGEST + 1):
            keys, tokens, counts, positions = _count_successors(stream, size)
            said = np.full(len(keys), -1)
            for shorter in range(SHORTEST, size):  # the longest that is known has the last word
                answer = known._look_up(_find_keys(stream, shorter)[positions + size - shorter])
                said = np.where(answer < 0, said, answer)
            says_more = said != tokens
            counted = np.concatenate([counted, counts[says_more]])
            keys, tokens = (
                np.concatenate(pair) for pair in ((known.keys, keys[says_more]), (known.successors, tokens[says_more]))
            )
            order = np.argsort(keys, kind="stable")
            known, counted = cls(keys[order], tokens[order]), counted[order]
        keys, tokens, counts = known.keys, known.successors, counted
        kept = np.argsort(-counts, kind="stable")[: most_bytes // ENTRY_BYTES]
        keys, first = np.unique(keys[kept], return_index=True)  # of two runs with one key, the more frequent
        return cls(keys, tokens[kept][first])

    @classmethod
    def from_bytes(cls, content: bytes, vocab_size: int) -> SuccessorTable:
        """Reads what `to_bytes` wrote; raises `CorruptError` for anything else, and for what is no token."""
        count, rest = divmod(len(content), ENTRY_BYTES)
        keys = np.frombuffer(content, "<u4", count) if not rest else np.zeros(2, np.uint32)
        successors = np.frombuffer(content, "<u2", count, 4 * count)
        if (keys[1:] <= keys[:-1]).any() or (successors >= vocab_size).any():
            raise CorruptError("the drafter is no table of successors", "train the adapter again")
        return cls(keys.astype(np.uint32), successors.astype(np.uint16))

    def to_bytes(self) -> bytes:
        """Returns the keys as little-endian 32-bit numbers, then the successors as 16-bit ones."""
        return self.keys.astype("<u4").tobytes() + self.successors.astype("<u2").tobytes()

    def __len__(self) -> int:
        return len(self.keys)

    def draft(self, ids: Sequence[int], most: int) -> list[int]:
        """Returns up to `most` tokens, each of which followed those before it; none where nothing is known."""
        known = list(ids[-LONGEST:])
        given = len(known)
        while len(known) - given < most and (token := self.find(known)) is not None:
            known.append(token)
        return known[given:]

    def find(self, ids: Sequence[int]) -> int | None:
        """Returns the token that followed the longest known run at the end of `ids`; None if none is known."""
        for size in range(min(LONGEST, len(ids)), SHORTEST - 1, -1):
            key = _hash_run(ids[-size:])
            index = int(self.keys.searchsorted(key))
            if index < len(self.keys) and self.keys[index] == key:
                return int(self.successors[index])
        return None

    def _look_up(self, keys: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Returns the successor of each key, -1 where there is none."""
        if not len(self.keys):
            return np.full(len(keys), -1)
        index = np.minimum(self.keys.searchsorted(keys), len(self.keys) - 1)
        return np.where(self.keys[index] == keys, self.successors[index].astype(np.int64), -1)


def _find_keys(stream: NDArray[np.integer], size: int) -> NDArray[np.uint32]:
    """Returns the key of each run of `size` tokens; the same as `_hash_run`."""
    hashes = (hash_windows(stream, size) + np.uint64(size)) * FACTOR
    keys: NDArray[np.uint32] = (hashes >> np.uint64(32)).astype(np.uint32)
    return keys


def _hash_run(ids: Sequence[int]) -> np.uint32:
    total = len(ids)
    for token, power in zip(ids, POWERS, strict=False):
        mixed = (token + 1) * MIX_FACTOR & MASK
        total += (mixed ^ mixed >> MIX_SHIFT) * power
    return np.uint32((total * POWERS[1] & MASK) >> 32)


def _count_successors(
    stream: NDArray[np.integer], size: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint16], NDArray[np.int64], NDArray[np.int64]]:
    """Returns, for runs of `size` tokens: key, likeliest successor, how often it followed, and where the run begins."""
    keys, successors = _find_keys(stream[:-1], size), np.asarray(stream[size:], dtype=np.uint16)
    order = np.lexsort((successors, keys))
    keys, successors = keys[order], successors[order]
    if not len(keys):
        return keys, successors, np.zeros(0, np.int64), np.zeros(0, np.int64)
    is_first = np.append(True, (keys[1:] != keys[:-1]) | (successors[1:] != successors[:-1]))
    pairs = np.flatnonzero(is_first)
    counts = np.diff(np.append(pairs, len(keys)))
    runs = np.flatnonzero(np.append(True, keys[pairs[1:]] != keys[pairs[:-1]]))
    totals, best = np.add.reduceat(counts, runs), np.maximum.reduceat(counts, runs)
    # of each run the first pair with the most successors
    number = np.repeat(np.arange(len(runs)), np.diff(np.append(runs, len(pairs))))
    is_best = np.flatnonzero(counts == best[number])
    chosen = is_best[np.unique(number[is_best], return_index=True)[1]]
    enough = (best >= FEWEST) & (best >= SMALLEST_SHARE * totals)
    at = pairs[chosen[enough]]
    return keys[at], successors[at], best[enough], order[at]
