"""Lines that most documents of a set begin or end with: menus, mastheads, cookie notices.

A line is boilerplate if it stands in at least half of a sample of the documents, and it is removed only at the edges
of a document, where nothing but boilerplate stands before or after it; a heading that every recipe has stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

MIN_DOCUMENTS = 10
MIN_SHARE = 0.5
EDGE_LINES = 30


def find_boilerplate(texts: Iterable[str]) -> frozenset[str]:
    """Returns the lines, stripped, that stand near an edge of at least half of the documents."""
    seen: Counter[str] = Counter()
    count = 0
    for text in texts:
        lines = [line.strip() for line in text.replace("\r\n", "\n").split("\n")]
        lines = [line for line in lines if line]
        seen.update({*lines[:EDGE_LINES], *lines[-EDGE_LINES:]})
        count += 1
    least = max(MIN_DOCUMENTS, MIN_SHARE * count)
    return frozenset(line for line, times in seen.items() if times >= least)


def drop_edges(text: str, boilerplate: frozenset[str]) -> str:
    """Returns the text without the boilerplate at its beginning and end; a text of nothing else stays as it is."""
    if not boilerplate:
        return text
    lines = text.split("\n")
    begin, end = 0, len(lines)
    while begin < end and _goes(lines[begin], boilerplate):
        begin += 1
    while end > begin and _goes(lines[end - 1], boilerplate):
        end -= 1
    return "\n".join(lines[begin:end]) if begin < end else text


def _goes(line: str, boilerplate: frozenset[str]) -> bool:
    stripped = line.strip()
    return not stripped or stripped in boilerplate
