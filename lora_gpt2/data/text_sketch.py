"""Was a text trained on? A sketch of the training text that is kept with the adapter, and small.

Shingles (runs of `WORDS` words, blind to case and punctuation) are hashed to 32 bits, and of each `WINDOW` neighbours
the smallest hash is kept ("winnowing", Schleimer et al. 2003, section 4). So a text of 40 words or more keeps the same
shingles wherever it stands, alone, in a section or in a book, and a document whose kept shingles are mostly in the
sketch was trained on. One that keeps few has them in common with many texts of its kind (of E2E's test sentences a
fifth, of which 0.5 % are in its training text): it was trained on if it was as a whole, whose hash is kept too, or if
it and its neighbours together were, as lines of a book.

It takes about a quarter of a byte per word, of short documents up to sixteen bytes each. Nobody can read the text in
it, but whoever guesses eight words in a row can find out whether they were there.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from numpy.typing import NDArray

WORDS, WINDOW = 8, 32
RUN_WORDS = 192  # of short documents that are looked for together: some eleven kept shingles
MARK = b"wholes 2"
WHOLE = 0x5EED  # begins the hash of a whole text
SEEN_SHARE = 0.5  # of a document's kept shingles
FEW_SHARE = 0.75  # of those of one that keeps few, or of a run of short ones
FEW, MANY = 4, 8
"""Kept shingles: below the first, a document is known by the hash of the whole alone; from the second on, by half."""
UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff"  # Thai, Lao, kana, ideographs: a character is a word here
WORD = re.compile(f"[{UNSPACED}]|[^\\W{UNSPACED}]+")
Shingles = NDArray[np.uint32]


def split_words(text: str) -> list[str]:
    """Returns the words of a text as they are compared."""
    return WORD.findall(text.lower())


def hash_shingles(text: str) -> Shingles:
    """Returns the hashes that are kept of a text: at least one, unless it holds no word; of a short one its own too."""
    words = split_words(text)
    kept = _winnow(words)
    if 0 < len(kept) < FEW:
        kept = np.unique(np.append(kept, np.uint32(_hash_whole(words))))
    return kept


def _winnow(words: Sequence[str]) -> Shingles:
    """Returns the shingles that are kept of some words."""
    if not words:
        return np.zeros(0, dtype=np.uint32)
    hashes = np.array([zlib.crc32(word.encode("utf-8", "replace")) for word in words], dtype=np.uint64)
    count = max(1, len(hashes) - WORDS + 1)
    mixed = np.zeros(count, dtype=np.uint64)
    for offset in range(min(WORDS, len(hashes))):
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + hashes[offset : offset + count]
    mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    shingles = (mixed >> np.uint64(32)).astype(np.uint32)
    if len(shingles) <= WINDOW:
        return np.array([shingles.min()], dtype=np.uint32)
    kept: Shingles = np.unique(np.lib.stride_tricks.sliding_window_view(shingles, WINDOW).min(axis=1))
    return kept


def _hash_whole(words: Sequence[str]) -> int:
    """Returns the hash of a short text, which none of its shingles has."""
    return zlib.crc32(" ".join(words).encode("utf-8", "replace"), WHOLE)


@dataclass(frozen=True)
class TextSketch:
    """The kept shingles of a training text, sorted.

    `is_whole` unless part of the training text is not known. Sketches of before have no hashes of whole documents that
    keep two or three shingles: where some are among them, not `knows_wholes`, and most of the shingles decide.
    """

    shingles: Shingles
    is_whole: bool = True
    knows_wholes: bool = True

    @classmethod
    def build(cls, shingles: Sequence[Shingles], is_whole: bool = True) -> TextSketch:
        """Returns the sketch of some documents, given by their `hash_shingles`."""
        return cls(np.unique(np.concatenate(shingles)) if shingles else np.zeros(0, dtype=np.uint32), is_whole)

    @classmethod
    def join(cls, sketches: Sequence[TextSketch | None]) -> TextSketch:
        """Returns the sketch of several training texts together; of one that is None nothing is known."""
        known = [sketch for sketch in sketches if sketch is not None]
        is_whole = len(known) == len(sketches) and all(sketch.is_whole for sketch in known)
        joined = cls.build([sketch.shingles for sketch in known], is_whole)
        return replace(joined, knows_wholes=all(sketch.knows_wholes for sketch in known))

    def to_bytes(self) -> bytes:
        """Returns the sketch as little-endian 32-bit numbers; one that knows whole documents has `MARK` at its end."""
        content = self.shingles.astype("<u4").tobytes()
        return content + (MARK if self.knows_wholes else b"")

    @classmethod
    def from_bytes(cls, content: bytes) -> TextSketch:
        """Returns the sketch that `to_bytes` wrote; what is no whole number at its end is left out."""
        knows_wholes, content = content.endswith(MARK), content.removesuffix(MARK)
        shingles = np.unique(np.frombuffer(content[: len(content) // 4 * 4], dtype="<u4").astype(np.uint32))
        return cls(shingles, knows_wholes=knows_wholes)

    def has_seen(self, text: str) -> bool:
        """True if a document was, for the most part, in the training text; a short one, as a document there."""
        return self._has_seen(split_words(text))

    def _has_seen(self, words: Sequence[str]) -> bool:
        kept = _winnow(words)
        if not self.knows_wholes and len(words) >= WORDS + WINDOW:
            return self._find_share(kept) > SEEN_SHARE
        if 0 < len(kept) < FEW:
            return self._find_share(np.array([_hash_whole(words)], dtype=np.uint32)) == 1
        return self._find_share(kept) > (SEEN_SHARE if len(kept) >= MANY else FEW_SHARE)

    def _find_share(self, kept: Shingles) -> float:
        """Returns the fraction of some shingles that are in the sketch."""
        if not len(kept) or not len(self.shingles):
            return 0.0
        at = np.searchsorted(self.shingles, kept).clip(max=len(self.shingles) - 1)
        return float((self.shingles[at] == kept).mean())

    def count_seen(self, texts: Sequence[str]) -> int | None:
        """Returns how many of some documents were in the training text, at least; None if that cannot be said."""
        seen, run = 0, list[list[str]]()
        for words in [*map(split_words, texts), []]:
            is_short = 0 < len(_winnow(words)) < FEW
            if is_short:
                run.append(words)
            elif words:
                seen += self._has_seen(words)
            if not is_short or sum(map(len, run)) >= RUN_WORDS:
                together = _winnow(list(chain.from_iterable(run)))
                share = self._find_share(together)
                is_seen = share > FEW_SHARE if len(together) >= MANY else share == 1 and len(together) >= FEW
                seen, run = seen + (len(run) if is_seen else sum(map(self._has_seen, run))), []
        return seen or (0 if self.is_whole else None)
