"""JSON from strangers: what Python's parser lets through and no other tool can write again is refused."""

from __future__ import annotations

import json
from typing import Any


def load_json(content: str | bytes) -> Any:
    """Returns the value of a JSON document.

    Raises:
        ValueError: it is not JSON, not UTF-8, or a text in it is half of a surrogate pair, which is no Unicode.
        RecursionError: it is nested too deeply.
    """
    values = json.loads(content)
    if "\\ud" in (content if isinstance(content, str) else content.decode("utf-8", "replace")).lower():
        json.dumps(values, ensure_ascii=False).encode()  # a UnicodeEncodeError is a ValueError
    return values
