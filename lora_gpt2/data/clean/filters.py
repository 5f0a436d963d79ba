"""Which cleaned documents are not worth training on, and why: too short, too repetitive, in another language."""

from __future__ import annotations

import zlib
from typing import Any

from lora_gpt2.core.errors import ResourceError
from lora_gpt2.recipe import DataSettings

MIN_BYTES = 200  # shorter texts hardly compress, whatever they say
LANGUAGE_CHARACTERS = 4000
_identifier: Any = None


def find_reason(text: str, settings: DataSettings) -> str | None:
    """Returns why a document is rejected, or None: `empty`, `too short`, `repetitive` or `language: xx`."""
    if not text.strip():
        return "empty"
    if len(text) < settings.min_characters:
        return "too short"
    if settings.max_repetition < 1 and measure_repetition(text) > settings.max_repetition:
        return "repetitive"
    if settings.languages and (language := find_language(text)) not in settings.languages:
        return f"language: {language}"
    return None


def measure_repetition(text: str) -> float:
    """Returns the share of a text's bytes that DEFLATE saves: 0.5 to 0.7 for prose, nearly 1 for one line repeated."""
    content = text.encode()
    return 0.0 if len(content) < MIN_BYTES else 1 - len(zlib.compress(content, 1)) / len(content)


def find_language(text: str) -> str:
    """Returns the likeliest language of a text's beginning (ISO 639-1), by letter n-grams (Lui and Baldwin 2012).

    Raises `ResourceError` if py3langid is not installed.
    """
    global _identifier  # noqa: PLW0603 - the model takes half a second to load
    if _identifier is None:
        try:
            import py3langid
        except ImportError as error:
            raise ResourceError("data.languages needs the package py3langid", "pip install py3langid") from error
        _identifier = py3langid
    return str(_identifier.classify(text[:LANGUAGE_CHARACTERS])[0])
