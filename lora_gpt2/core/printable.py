"""Text from elsewhere as a terminal may show it: nothing in it moves the cursor, changes colours or hides letters.

File names, recipe keys, tensor names, JSON fields and manifests come from strangers. An escape sequence in one of them
could rewrite what stands on the screen or fill the clipboard, and a bidirectional control could show another order of
letters than the one that is there. What a user generates is the user's own result, and is never passed through here.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from typing import Any

_BIDI = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_LINES = "\u2028\u2029"
_TAGS = "\U000e0000-\U000e007f"
_UNPRINTABLE = re.compile(f"[\x00-\x1f\x7f-\x9f{_BIDI}{_LINES}{_TAGS}\ud800-\udfff]")
_UNPRINTABLE_IN_LINES = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f{_BIDI}{_LINES}{_TAGS}\ud800-\udfff]")
PATH = re.compile(r"(?<![\w.:/\\])(?:[A-Za-z]:)?(?:[/\\][^\s'\";,()]+)+")
"""An absolute path inside a message."""
MAX_SHOWN = 80
MOST_NAMED = 8

_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxstring, _repr.maxother, _repr.maxlong = 3, 60, 60, 40


def printable(text: str, keep_lines: bool = False) -> str:
    r"""Returns `text` with control characters, line ends and bidirectional controls written out, such as `\x1b`.

    With `keep_lines`, line ends and tabs stay as they are: for text whose lines are our own.
    """
    pattern = _UNPRINTABLE_IN_LINES if keep_lines else _UNPRINTABLE
    return pattern.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def shorten(text: str, limit: int = MAX_SHOWN) -> str:
    """Returns `text` on one line of at most `limit` characters, as a message shows it."""
    shown = printable(text[: limit + 1])
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def show_value(value: Any, limit: int = MAX_SHOWN) -> str:
    """Returns a short `repr` of a value of any size and depth, as a message shows it."""
    try:
        return shorten(_repr.repr(value), limit)
    except (ValueError, RecursionError):  # a whole number of more than 4,300 digits
        return f"a {type(value).__name__} that is too large to show"


def is_unicode(text: str) -> bool:
    """True for a text that can be written as UTF-8; names of files can be any bytes."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def count_of(count: int, noun: str) -> str:
    """Returns a number with its noun: 1 document, 2,000 documents."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def join_names(names: Sequence[str]) -> str:
    """Returns some names in one line; of many, the first and how many more there are."""
    shown = ", ".join(names[:MOST_NAMED])
    return shown if len(names) <= MOST_NAMED else f"{shown} and {len(names) - MOST_NAMED} more"


def hide_paths(text: str) -> str:
    """Returns a message with the last part alone of each absolute path."""
    return PATH.sub(lambda match: re.split(r"[/\\]", match[0])[-1], text)
