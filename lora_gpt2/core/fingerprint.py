"""Names for content: sha256 over bytes, files and canonical JSON.

A fingerprint is the first 32 hexadecimal digits (128 bits) where people read it, and all 64 where it guards a file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

FINGERPRINT_DIGITS = 32


def hash_file(path: Path) -> str:
    """Returns the full sha256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> bytes:
    """Returns one byte string for one JSON value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def fingerprint_json(value: Any) -> str:
    """Returns the fingerprint of a JSON value."""
    return hashlib.sha256(canonical_json(value)).hexdigest()[:FINGERPRINT_DIGITS]


def flatten_json(value: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of a JSON value under dotted keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {prefix.rstrip("."): value}
    return {k: v for key, item in items for k, v in flatten_json(item, f"{prefix}{key}.").items()}
