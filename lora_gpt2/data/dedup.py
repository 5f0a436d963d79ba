"""Exact and near copies: MinHash signatures, banded, candidates checked by their signatures (Broder 1997).

Documents are sets of word 5-grams without case and spacing (Lee et al. 2022, arXiv:2107.06499); of two that share at
least the threshold of them (Jaccard), the later goes. Bands are sorted arrays, so a million documents take 0.6 GB and
no dictionary of strings. Estimates from 128 hashes deviate by about 0.035 at the threshold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

WORDS = 5
NUM_HASHES = 128
SEED = 1
MISSED = 0.005  # of the pairs at the threshold, how many no band may bring together
MAX_ROUNDS = 64
Signatures = NDArray[np.uint32]


def content_key(text: str) -> bytes:
    """Returns a document's identity, blind to case and spacing: 16 bytes of a sha256."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).digest()[:16]


def sign(texts: Sequence[str]) -> Signatures:
    """Returns the MinHash signatures `[texts, NUM_HASHES]` of some texts."""
    from rensa import RMinHash

    rows = []
    for text in texts:
        words = text.lower().split()
        grams = [" ".join(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))]
        minhash = RMinHash(num_perm=NUM_HASHES, seed=SEED)
        minhash.update(grams)
        rows.append(minhash.digest())
    return np.array(rows, dtype=np.uint32).reshape(len(texts), NUM_HASHES)


def choose_band_width(threshold: float) -> int:
    """Returns how many hashes make a band: the most that miss at most `MISSED` of the pairs at the threshold."""
    widths = [w for w in range(1, 17) if (1 - threshold**w) ** (NUM_HASHES // w) <= MISSED]
    return max(widths, default=1)


def find_near_copies(signatures: Signatures, threshold: float) -> dict[int, tuple[int, float]]:
    """Returns, for each document that is a near copy, the earlier one that stays and their estimated likeness.

    Signatures are in order of precedence; a document is a copy only of one that is not a copy itself.
    """
    neighbours: dict[int, dict[int, float]] = {}
    for first, second, likeness in _iter_pairs(signatures, threshold):
        neighbours.setdefault(second, {})[first] = likeness
    copies: dict[int, tuple[int, float]] = {}
    for index in sorted(neighbours):
        kept = {first: likeness for first, likeness in neighbours[index].items() if first not in copies}
        if kept:
            copies[index] = max(kept.items(), key=lambda item: (item[1], -item[0]))
    return copies


def _iter_pairs(signatures: Signatures, threshold: float) -> list[tuple[int, int, float]]:
    width = choose_band_width(threshold)
    pairs: dict[tuple[int, int], float] = {}
    for start in range(0, NUM_HASHES - width + 1, width):
        band = np.ascontiguousarray(signatures[:, start : start + width])
        _, inverse = np.unique(band.view([("", band.dtype)] * width).ravel(), return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        cuts = np.flatnonzero(np.diff(inverse[order])) + 1
        for begin, end in pairwise([0, *cuts.tolist(), len(order)]):
            if end - begin > 1:
                _compare(order[begin:end], signatures, threshold, pairs)
    return [(first, second, likeness) for (first, second), likeness in pairs.items()]


def _compare(
    members: NDArray[np.int64], signatures: Signatures, threshold: float, pairs: dict[tuple[int, int], float]
) -> None:
    """Takes note of the pairs in a bucket: each with its first member, then each of the others with the next one."""
    for _ in range(MAX_ROUNDS):
        if len(members) < 2:
            return
        first, others = members[0], members[1:]
        likeness = (signatures[others] == signatures[first]).mean(axis=1)
        near = likeness >= threshold
        for other, value in zip(others[near].tolist(), likeness[near].tolist(), strict=True):
            pairs[int(first), other] = value
        members = others[~near]


def count_copies(of: Signatures, among: Signatures, threshold: float) -> int:
    """Returns how many documents are near copies of one of `of`; each of these is itself unlike the others."""
    copies = find_near_copies(np.concatenate([of, among]), threshold)
    return sum(index >= len(of) > first for index, (first, _) in copies.items())
