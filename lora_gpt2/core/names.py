"""Names of adapters, which are allowed on every system, and words that stand for others."""

from __future__ import annotations

import os
import re
import unicodedata

from lora_gpt2.core.errors import UsageError

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
ALL, AUTO = "all", "auto"
HUB, STDIN = "hf:", "-"
"""What begins the name of a data set of the hub, and the name of what is piped in, among sources of text."""
RESERVED_NAMES = frozenset({"base", ALL, AUTO})
WINDOWS_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?|.*\.")  # and names that Windows shortens


SPELT = str.maketrans({"ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "ı": "i"})
"""Letters that have no plain one inside them."""


def make_name(stem: str) -> str:
    """Returns the name of an adapter for the name of a file or folder, without its ending; "" if there is none."""
    plain = unicodedata.normalize("NFKD", stem.lower().translate(SPELT)).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9._-]+", "-", plain).strip("-._")[:64]


def is_name(name: str) -> bool:
    """True if `name` can name an adapter."""
    if os.name == "nt" and WINDOWS_DEVICES.fullmatch(name):
        return False
    return NAME_PATTERN.fullmatch(name) is not None and name not in RESERVED_NAMES


def check_name(name: str) -> str:
    """Returns `name` if it can name an adapter; raises `UsageError` otherwise."""
    if not is_name(name):
        raise UsageError(
            f"'{name[:80]}' is not a name for an adapter",
            "use 1 to 64 of a-z 0-9 . _ - beginning with a letter or digit, and not 'base', 'all' or 'auto'"
            + (", on Windows not a device such as 'con', and no dot at the end" if os.name == "nt" else ""),
        )
    return name
