"""What was set aside, each with its place and reason; of many that are the same, the first few and their number."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from lora_gpt2.core.errors import DataError

MAX_SAME = 100
MAX_KINDS = 100_000
UNREADABLE = "unreadable"
DIGITS = re.compile(r"\d+")


class UnreadableRows(DataError):
    """Several rows one after another that hold no value."""

    def __init__(self, message: str, hint: str, count: int = 1) -> None:
        super().__init__(message, hint)
        self.count = count


class Rejections:
    """Entries with `origin`, `reason` and `text`, in order; the last of a kind has the `count` of those left out."""

    def __init__(self, entries: Iterable[dict[str, Any]] = ()) -> None:
        self.entries: list[dict[str, Any]] = []
        self._kinds: dict[tuple[str, str], tuple[int, dict[str, Any]]] = {}
        for entry in entries:
            self.add(entry)

    def __len__(self) -> int:
        """How many were set aside, those left out included."""
        return sum(entry.get("count", 1) for entry in self.entries)

    def add(self, entry: dict[str, Any]) -> None:
        """Keeps an entry, or counts it with the others of its kind: the same reason and text, whatever the place."""
        text = DIGITS.sub("", entry["text"]) if entry["reason"] == UNREADABLE else entry["text"]
        kind = (entry["reason"], text)
        if kind not in self._kinds and len(self._kinds) >= MAX_KINDS:
            kind = (entry["reason"], "")
        number, last = self._kinds.get(kind, (0, entry))
        if number < MAX_SAME:
            self.entries.append(entry)
            last = entry
        else:
            last["count"] = last.get("count", 1) + entry.get("count", 1)
        self._kinds[kind] = (number + 1, last)
