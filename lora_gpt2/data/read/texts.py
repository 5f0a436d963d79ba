"""Texts that a Python program holds, made into a source like any file: kept in the cache under the hash of their bytes.

They stay there, so that the text of an adapter can be measured and audited after the program has ended.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_gpt2.core.dirs import find_cache_dir
from lora_gpt2.core.errors import DataError
from lora_gpt2.core.files import replace_file, wrap_os_errors

Texts = Iterable[str | Mapping[str, Any]]
"""Texts, each a document, or records: mappings, rows of a `datasets.Dataset` or of a `pandas.DataFrame`."""


def keep_texts(texts: Texts) -> Path:
    """Writes texts or records to a `.jsonl` file in the cache, and returns its path.

    Raises:
        DataError: one is neither a text nor a mapping of values that JSON has (arrays become lists, dates texts); its
            number, from 1, is named.
        ResourceError: the cache cannot be written.
    """
    folder = find_cache_dir() / "texts"
    with wrap_os_errors(f"keep texts in {folder} (see LORA_GPT2_CACHE)"):
        folder.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".partial", delete=False) as file:
            partial = Path(file.name)
            try:
                for line in _iter_lines(texts):
                    digest.update(line)
                    file.write(line)
            except BaseException:
                file.close()
                partial.unlink()
                raise
        path = folder / f"{digest.hexdigest()[:16]}.jsonl"
        replace_file(partial, path)
    return path


def _iter_lines(texts: Texts) -> Iterator[bytes]:
    if hasattr(texts, "columns") and hasattr(texts, "to_dict"):  # a DataFrame, which iterates over names of columns
        texts = texts.to_dict("records")
    if hasattr(texts, "with_format"):  # a Dataset, whose rows may be set to come as tensors
        texts = texts.with_format(None)
    for number, item in enumerate(texts, start=1):
        if not isinstance(item, str | Mapping):
            raise DataError(f"text {number}: expected a str or a dict, found {type(item).__name__}", "pass texts")
        try:
            values = {"text": item} if isinstance(item, str) else dict(item)
            yield json.dumps(values, default=_to_json).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise DataError(f"text {number}: {error}", "pass records of texts, numbers and lists") from error


def _to_json(value: Any) -> Any:
    """Returns an array or number of numpy, pandas or torch, or a date, as JSON has it."""
    for method in ("tolist", "isoformat"):
        if hasattr(value, method):
            return getattr(value, method)()
    raise TypeError(f"{type(value).__name__} is not a value that JSON has")
