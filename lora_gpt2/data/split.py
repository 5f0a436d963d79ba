"""Which documents are for training, validation and testing: by a hash of their content, so it is stable.

Adding text moves no document to another part, and no document is in two. A long document (one book in one file) is
first cut at blank lines into sections, because one document cannot be split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

LONG_CHARACTERS = 32_768
SECTION_CHARACTERS = 8_192


def iter_sections(text: str) -> Iterator[str]:
    """Yields a short text whole, a long one as runs of whole paragraphs of at least `SECTION_CHARACTERS`."""
    if len(text) < LONG_CHARACTERS:
        yield text
        return
    run: list[str] = []
    size = 0
    for paragraph in text.split("\n\n"):
        run.append(paragraph)
        size += len(paragraph) + 2
        if size >= SECTION_CHARACTERS:
            yield "\n\n".join(run)
            run, size = [], 0
    if run:
        yield "\n\n".join(run)


def content_key(text: str) -> bytes:
    """Returns a document's identity: 16 bytes of its sha256."""
    return hashlib.sha256(text.encode()).digest()[:16]


def split_documents(texts: Sequence[str], validation_share: float, test_share: float) -> list[str]:
    """Returns `train`, `validation` or `test` for each text.

    A share is the part of the hash space, so the parts have about that size. A part with a positive share that came
    out empty gets the document whose hash lies nearest to it, if there are at least three documents.
    """
    places = [int.from_bytes(content_key(text)[:8]) / 2**64 for text in texts]
    parts = []
    for place in places:
        is_test = place < test_share
        is_validation = not is_test and place < test_share + validation_share
        parts.append("test" if is_test else "validation" if is_validation else "train")
    order = sorted(range(len(texts)), key=lambda i: places[i])
    for part, share in (("validation", validation_share), ("test", test_share)):
        if share and part not in parts and len(texts) >= 3:
            nearest = next((i for i in order if parts[i] == "train"), None)
            if nearest is not None:
                parts[nearest] = part
    return parts
