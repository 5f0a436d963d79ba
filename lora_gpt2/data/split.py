"""Which documents are for training, validation and testing: by a hash of their content, so it is stable.

Adding text moves no document to another part, and no document is in two. Where there are only a few documents (one
book in one file), they are first cut into sections, because one document cannot be split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

FEW_DOCUMENTS = 20
WANTED_SECTIONS = 40
SECTION_CHARACTERS = (256, 8_192)


def choose_section_size(num_characters: int) -> int:
    """Returns how long sections of a text should be: a power of two, so that more text seldom changes it."""
    smallest, largest = SECTION_CHARACTERS
    size = smallest
    while size * 2 * WANTED_SECTIONS <= num_characters and size < largest:
        size *= 2
    return size


def iter_sections(text: str, size: int) -> Iterator[str]:
    """Yields a text as runs of whole paragraphs of at least `size` characters; very long paragraphs, by lines."""
    run, length = [], 0
    for part, separator in _iter_parts(text, size):
        run.append(part)
        length += len(part) + len(separator)
        if length >= size:
            yield "".join(run)
            run, length = [], 0
        else:
            run.append(separator)
    if run:
        yield "".join(run[:-1])  # without the separator that nothing follows


def _iter_parts(text: str, size: int) -> Iterator[tuple[str, str]]:
    """Yields paragraphs, or the lines of those longer than four sections, each with what follows it."""
    for paragraph in text.split("\n\n"):
        lines = paragraph.split("\n") if len(paragraph) > 4 * size else [paragraph]
        for line in lines[:-1]:
            yield line, "\n"
        yield lines[-1], "\n\n"


def split_keys(keys: Sequence[bytes], validation_share: float, test_share: float) -> list[str]:
    """Returns `train`, `validation` or `test` for each document, given by a hash of its content.

    A share is the part of the hash space, so the parts have about that size, and equal keys have one part. A part with
    a positive share that came out empty gets the key that lies nearest to it, if there are at least three.
    """
    places = {key: int.from_bytes(key[:8]) / 2**64 for key in keys}
    parts = {}
    for key, place in places.items():
        is_test = place < test_share
        is_validation = not is_test and place < test_share + validation_share
        parts[key] = "test" if is_test else "validation" if is_validation else "train"
    order = sorted(places, key=lambda key: places[key])
    for part, share in (("validation", validation_share), ("test", test_share)):
        if share and part not in parts.values() and len(parts) >= 3:
            nearest = next((key for key in order if parts[key] == "train"), None)
            if nearest is not None:
                parts[nearest] = part
    return [parts[key] for key in keys]
