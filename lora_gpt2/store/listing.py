"""What a list says of each adapter, remembered so that a thousand of them take half a second; never imports torch.

A row is remembered in the cache folder beside size, time and inode of CURRENT and of the manifest that it was made
from; where one of them differs the manifest is read, with every check. A list is for looking: what is used is read.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

from lora_gpt2.core.dirs import find_cache_dir
from lora_gpt2.core.errors import LoraGpt2Error
from lora_gpt2.core.files import write_atomic
from lora_gpt2.core.fingerprint import fingerprint_json
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.manifest import MANIFEST, Manifest

FORMAT = 2
FIGURES = ("train_tokens", "base_perplexity", "validation_perplexity", "base_test_perplexity", "test_perplexity")


def summarise(manifest: Manifest) -> dict[str, Any]:
    """Returns what a list says of a version."""
    return {
        "name": manifest.name,
        "version": manifest.version,
        "base": manifest.base.name,
        "base_fingerprint": manifest.base.fingerprint,
        "description": str(manifest.recipe.get("description") or ""),
        "size_bytes": manifest.size_bytes,
        "num_parameters": manifest.num_parameters,
        **{key: manifest.figures.get(key) for key in FIGURES},
        "created": manifest.created.isoformat(),
    }


def list_current(store: Store) -> tuple[list[dict[str, Any]], list[LoraGpt2Error]]:
    """Returns the row of each adapter's version in use, and the errors of those that are damaged."""
    path = find_cache_dir() / "lists" / fingerprint_json([FORMAT, str(store.root.absolute())])
    known = _read_rows(path)
    rows: dict[str, Any] = {}
    errors: list[LoraGpt2Error] = []
    for name in store.list_names():
        entry = known.get(name)
        if entry is not None and entry[0] == _stat(store, name, entry[1]["version"]):
            rows[name] = entry
            continue
        try:
            row = summarise(store.read_manifest(name))
        except LoraGpt2Error as error:
            errors.append(error)
        else:
            rows[name] = [_stat(store, name, row["version"]), row]
    if rows != known:
        with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(rows).encode())
    return [row for _, row in rows.values()], errors


def _read_rows(path: os.PathLike[str]) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            rows = json.load(file)
        return rows if isinstance(rows, dict) and all(map(_is_entry, rows.values())) else {}
    except (OSError, ValueError, TypeError):
        return {}


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], dict) and "version" in entry[1]


def _stat(store: Store, name: str, version: int) -> list[int]:
    """Returns what changes when a file is replaced or written to; [] if one of the two is not there."""
    values = []
    for path in (f"{store.root}/{name}/CURRENT", f"{store.root}/{name}/{version}/{MANIFEST}"):
        try:
            found = os.stat(path)
        except OSError:
            return []
        values += [found.st_mtime_ns, found.st_size, found.st_ino]
    return values
