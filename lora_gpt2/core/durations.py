"""Times as people write them: 90s, 10min, 1.5h."""

from __future__ import annotations

import re

from lora_gpt2.core.errors import UsageError

UNITS = {"": 1.0, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}
PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|)")


def parse_seconds(text: str, where: str) -> float:
    """Returns a time in seconds; raises `UsageError`, which names `where` it stands, if it is none or zero."""
    match = PATTERN.fullmatch(text.strip().lower())
    seconds = float(match[1]) * UNITS[match[2]] if match else 0.0
    if not seconds:
        raise UsageError(f"{where} {text[:40]}: expected a time", "such as 90s, 10min or 1.5h")
    return seconds
