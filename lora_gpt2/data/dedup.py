"""Exact and near copies: MinHash signatures, banded, candidates checked by their signatures (Broder 1997).

Documents are sets of word 5-grams without case and spacing (Lee et al. 2022, arXiv:2107.06499); of two that share at
least the threshold of them (Jaccard), the later goes. Bands are sorted arrays, so a million documents take 0.6 GB and
no dictionary of strings. Estimates from 128 hashes deviate by about 0.035 at the threshold.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from lora_gpt2.data.text_sketch import UNSPACED

WORDS = 5
NUM_HASHES = 128
SEED = 1
FACTOR = np.uint64(0x9E3779B97F4A7C15)
IS_UNSPACED_CHARACTER = re.compile(f"[{UNSPACED}]")
IS_UNSPACED = re.compile(f"[{UNSPACED}]|[^\\s{UNSPACED}]+")
HALVES_APART = 0.2
"""How far estimates from either half of the hashes may be apart for one thing to be alike: they deviate by 0.07."""
MISSED = 0.005  # of the pairs at the threshold, how many no band may bring together
MAX_ROUNDS = 64
Signatures = NDArray[np.uint32]


def content_key(text: str) -> bytes:
    """Returns a document's identity, blind to case and spacing: 16 bytes of a sha256."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).digest()[:16]


def sign(texts: Sequence[str]) -> Signatures:
    """Returns the MinHash signatures `[texts, NUM_HASHES]` of some texts."""
    from rensa import RMinHash

    grams = [_hash_grams(split_words(text)) for text in texts]
    if not grams:
        return np.zeros((0, NUM_HASHES), dtype=np.uint32)
    ends = np.cumsum([0, *map(len, grams)], dtype=np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(grams), ends, NUM_HASHES, SEED)
    return np.array(matrix.to_rows(), dtype=np.uint32)


def split_words(text: str) -> list[str]:
    """Returns the words of a text in lower case; of a script without spaces each character is one."""
    lowered = text.lower()
    return IS_UNSPACED.findall(lowered) if IS_UNSPACED_CHARACTER.search(lowered) else lowered.split()


def sign_records(prompts: Sequence[str], texts: Sequence[str]) -> Signatures:
    """Returns signatures of texts with prompts: a half of the hashes is of each, and `find_near` wants both alike.

    So neither a long prompt that many records have in common makes copies of them, nor a short answer.
    """
    found = sign(texts)
    if rows := [row for row, prompt in enumerate(prompts) if prompt]:
        found[rows, ::2] = sign([prompts[row] for row in rows])[:, ::2]
    return found


def find_near(
    signatures: Signatures, other: Signatures, threshold: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns which of some documents are near copies of another one, and how alike those are.

    Where one half, of the prompt or of the text, is alike and the other is not, they are none.
    """
    equal = signatures == other
    halves = np.stack([equal[:, ::2].mean(axis=1), equal[:, 1::2].mean(axis=1)])
    similarity = halves.mean(axis=0)
    is_one = (np.abs(halves[0] - halves[1]) <= HALVES_APART) | (halves.min(axis=0) >= threshold)
    near = np.flatnonzero((similarity >= threshold) & is_one)
    return near, similarity[near]


def _hash_grams(words: list[str]) -> NDArray[np.uint64]:
    """Returns a hash of each run of `WORDS` words: a polynomial of the words' hashes, mixed (Steele et al. 2014)."""
    hashes = np.array([zlib.crc32(word.encode()) for word in words] or [0], dtype=np.uint64)
    count = max(1, len(hashes) - WORDS + 1)
    mixed = np.zeros(count, dtype=np.uint64)
    for offset in range(min(WORDS, len(hashes))):
        mixed = mixed * FACTOR + hashes[offset : offset + count]
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return mixed ^ (mixed >> np.uint64(27))


def choose_band_width(threshold: float) -> int:
    """Returns how many hashes make a band: the most that miss at most `MISSED` of the pairs at the threshold."""
    widths = [w for w in range(1, 17) if (1 - threshold**w) ** (NUM_HASHES // w) <= MISSED]
    return max(widths, default=1)


def find_near_duplicates(signatures: Signatures, threshold: float) -> dict[int, tuple[int, float]]:
    """Returns, for each document that is a near copy, the earlier one that stays and their estimated similarity.

    Signatures are in order of precedence; a document is a copy only of one that is not a copy itself.
    """
    if len(signatures) < 2:
        return {}
    neighbours: dict[int, dict[int, float]] = {}
    for first, second, similarity in _iter_pairs(signatures, threshold):
        neighbours.setdefault(second, {})[first] = similarity
    copies: dict[int, tuple[int, float]] = {}
    for index in sorted(neighbours):
        kept = {first: similarity for first, similarity in neighbours[index].items() if first not in copies}
        if kept:
            copies[index] = max(kept.items(), key=lambda item: (item[1], -item[0]))
    return copies


def _iter_pairs(signatures: Signatures, threshold: float) -> list[tuple[int, int, float]]:
    pairs: dict[tuple[int, int], float] = {}
    for members in _iter_buckets(signatures, threshold):
        _compare(members, signatures, threshold, pairs)
    return [(first, second, similarity) for (first, second), similarity in pairs.items()]


def _iter_buckets(signatures: Signatures, threshold: float) -> Iterator[NDArray[np.int64]]:
    """Yields the documents, in their order, that have a band in common: two at least, and candidates only."""
    width = choose_band_width(threshold)
    for start in range(0, NUM_HASHES - width + 1, width):
        band = np.ascontiguousarray(signatures[:, start : start + width])
        _, inverse = np.unique(band.view([("", band.dtype)] * width).ravel(), return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        cuts = np.flatnonzero(np.diff(inverse[order])) + 1
        for begin, end in pairwise([0, *cuts.tolist(), len(order)]):
            if end - begin > 1:
                yield order[begin:end]


def _compare(
    members: NDArray[np.int64], signatures: Signatures, threshold: float, pairs: dict[tuple[int, int], float]
) -> None:
    """Takes note of the pairs in a bucket: each with its first member, then each of the others with the next one."""
    for _ in range(MAX_ROUNDS):
        if len(members) < 2:
            return
        first, others = members[0], members[1:]
        near, similarity = find_near(signatures[others], signatures[first], threshold)
        for other, value in zip(others[near].tolist(), similarity.tolist(), strict=True):
            pairs[int(first), other] = value
        members = np.delete(others, near)


class NearCopyIndex:
    """Documents of which near copies are looked for, among any number of others."""

    def __init__(self, signatures: Signatures, threshold: float) -> None:
        self.signatures, self.threshold = signatures, threshold
        width = choose_band_width(threshold)
        self._bands = [slice(start, start + width) for start in range(0, NUM_HASHES - width + 1, width)]
        keys = [_hash_band(signatures[:, band]) for band in self._bands]
        self._orders = [np.argsort(each, kind="stable") for each in keys]
        self._sorted = [each[order] for each, order in zip(keys, self._orders, strict=True)]

    def find(self, among: Signatures) -> dict[int, dict[int, float]]:
        """Returns, for each of `among` that is a near copy, the documents that it is one of, with the similarities."""
        found: dict[int, dict[int, float]] = {}
        for band, order, known in zip(self._bands, self._orders, self._sorted, strict=True):
            keys = _hash_band(among[:, band])
            begins, ends = np.searchsorted(known, keys, "left"), np.searchsorted(known, keys, "right")
            for index in np.flatnonzero(ends > begins).tolist():
                candidates = order[begins[index] : ends[index]][:MAX_ROUNDS]
                near, similarity = find_near(self.signatures[candidates], among[index], self.threshold)
                if len(near):
                    found.setdefault(index, {}).update(zip(candidates[near].tolist(), similarity.tolist(), strict=True))
        return found


def _hash_band(columns: Signatures) -> NDArray[np.uint64]:
    """Returns a hash of each row `[rows]` of some columns of signatures."""
    keys = np.zeros(len(columns), dtype=np.uint64)
    for column in columns.T:
        keys = (keys ^ column) * FACTOR
        keys ^= keys >> np.uint64(29)
    return keys
