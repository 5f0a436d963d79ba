"""How deep a page nests, found out before a parser works on it, and the text of those that nest too deeply.

The parser's time grows with the square of the depth (`<a><div><a><div>…`), and nothing can stop it on the way. Both
functions here take linear time, whatever the page is.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterator

TAG = re.compile(r"<(/?)([a-z][a-z0-9:-]{0,40})([^<>]*)>?", re.I)
VOID = frozenset(
    ("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track", "wbr")
)
FLAT = VOID | {
    "html",
    "head",
    "body",
    "p",
    "li",
    "dt",
    "dd",
    "tr",
    "td",
    "th",
    "thead",
    "tbody",
    "tfoot",
    "caption",
    "colgroup",
    "option",
    "optgroup",
    "rt",
    "rp",
}
"""Elements that end each other, so that their end tags may be left out."""
INLINE = frozenset(("a", "abbr", "b", "code", "em", "font", "i", "mark", "q", "s", "small", "span", "strong", "u"))
HIDDEN = frozenset(("script", "style"))
FOREIGN = ("svg", "math")
HTML_IN_FOREIGN = (VOID - {"link", "param", "source"}) | FLAT | (INLINE - {"a"}) | {"div", "table", "ul", "ol", "pre"}
"""What ends a drawing or a formula, where `<path/>` has no end tag."""


def measure_depth(page: str) -> int:
    """Returns how deep the elements of a page nest, at most; an end tag ends elements of its own name only."""
    open_tags = Counter[str]()
    depth = deepest = 0
    for match, name in _iter_tags(page):
        if name in HTML_IN_FOREIGN:
            depth -= sum(open_tags.pop(outer, 0) for outer in FOREIGN)
        is_closed = match[3].endswith("/") and any(open_tags[outer] for outer in FOREIGN)
        if name in FLAT or is_closed:
            continue
        if not match[1]:
            open_tags[name] += 1
            depth += 1
            deepest = max(deepest, depth)
        elif open_tags[name]:
            open_tags[name] -= 1
            depth -= 1
    return deepest


def strip_tags(page: str) -> str:
    """Returns the text between the tags, without that of scripts and styles; blocks stand on lines of their own."""
    parts, offset = list[str](), 0
    for match, name in _iter_tags(page):
        is_end_of_hidden = name in HIDDEN and match[1]
        parts.append("" if is_end_of_hidden else page[offset : match.start()])
        parts.append("" if name in INLINE else "\n")
        offset = match.end()
    parts.append(page[offset:])
    text = html.unescape("".join(parts))
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def _iter_tags(page: str) -> Iterator[tuple[re.Match[str], str]]:
    """Yields the tags and their names, but not what looks like tags inside scripts and styles."""
    hidden = ""
    for match in TAG.finditer(page):
        name = match[2].lower()
        if not hidden or (name == hidden and match[1]):
            yield match, name
            hidden = name if name in HIDDEN and not match[1] else ""
