"""Which documents are for training, validation and testing: by a hash of their content, so it is stable.

Adding text moves no document to another split, and no document is in two. Where there are only a few documents (one
book in one file), they are first cut into sections, because one document cannot be split.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

FEW_DOCUMENTS = 20
WANTED_SECTIONS = 40
SECTION_CHARACTERS = (256, 8_192)
CUTS = (
    re.compile(r"\n\n"),
    re.compile(r"\n"),
    re.compile(r"(?<=[.!?…][\"')\]”’»])\s+|(?<=[.!?…])\s+|(?<=[。！？｡])"),
    re.compile(r"\s+"),
)
"""Where a text may be cut, the best place first: paragraphs, lines, sentences (also CJK), words."""


def choose_section_length(num_characters: int) -> int:
    """Returns how long sections of a text should be: a power of two, so that more text seldom changes it."""
    smallest, largest = SECTION_CHARACTERS
    size = smallest
    while size * 2 * WANTED_SECTIONS <= num_characters and size < largest:
        size *= 2
    return size


def iter_sections(text: str, size: int) -> Iterator[str]:
    """Yields a text as runs of at least `size` characters of whole paragraphs.

    Paragraphs longer than four sections are cut at line ends, such lines at sentence ends, such sentences between
    words, and text without any of these (unspaced scripts, sequences) anywhere. Joined with what was between them, the
    sections are the text.
    """
    run, length = [], 0
    for piece, separator in _iter_pieces(text, size, CUTS):
        run.append(piece)
        length += len(piece) + len(separator)
        if length >= size:
            yield "".join(run)
            run, length = [], 0
        else:
            run.append(separator)
    if run:
        yield "".join(run[:-1])  # without the separator that nothing follows


def _iter_pieces(text: str, size: int, cuts: Sequence[re.Pattern[str]]) -> Iterator[tuple[str, str]]:
    """Yields pieces and what follows each; those longer than four sections are cut by the next of `cuts`."""
    offset = 0
    while offset < len(text) or not offset:
        match = cuts[0].search(text, offset)
        if match and match.end() == offset:  # an empty match, behind the sentence before
            match = cuts[0].search(text, offset + 1)
        end, after = match.span() if match else (len(text), len(text))
        piece = text[offset:end]
        if len(piece) <= 4 * size:
            yield piece, text[end:after]
        elif len(cuts) > 1:
            *inner, (last, _) = _iter_pieces(piece, size, cuts[1:])
            yield from inner
            yield last, text[end:after]
        else:
            for start in range(0, len(piece), size):
                yield piece[start : start + size], text[end:after] if start + size >= len(piece) else ""
        offset = max(after, 1)


def split_keys(keys: Sequence[bytes], validation_fraction: float, test_fraction: float) -> list[str]:
    """Returns `train`, `validation` or `test` for each document, given by a hash of its content.

    Each split is an interval of the hash space as wide as its fraction, so equal keys are in one split. A held-out
    split with a positive fraction that would be empty gets the nearest key, if there are at least three.
    """
    draws = {key: int.from_bytes(key[:8]) / 2**64 for key in keys}
    splits = {}
    for key, draw in draws.items():
        is_test = draw < test_fraction
        is_validation = not is_test and draw < test_fraction + validation_fraction
        splits[key] = "test" if is_test else "validation" if is_validation else "train"
    order = sorted(draws, key=lambda key: draws[key])
    for split, share in (("validation", validation_fraction), ("test", test_fraction)):
        if share and split not in splits.values() and len(splits) >= 3:
            nearest = next((key for key in order if splits[key] == "train"), None)
            if nearest is not None:
                splits[nearest] = split
    return [splits[key] for key in keys]
