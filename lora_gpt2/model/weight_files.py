"""The safetensors files of a checkpoint, and what their headers tell; never imports torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lora_gpt2.core.errors import CorruptError, NotFoundError
from lora_gpt2.core.strict_json import load_json

MAX_HEADER_BYTES = 10**8  # the format's own limit
CHUNK_BYTES = 2**24
EMBEDDINGS, HEAD = "wte.weight", "lm_head.weight"


def list_weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a checkpoint: one, or the shards of its index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickled = (
            " (pytorch_model.bin is a pickle, which may run code)" if (folder / "pytorch_model.bin").exists() else ""
        )
        raise NotFoundError(
            f"{folder} has no model.safetensors{pickled}",
            "save it again with transformers: model.save_pretrained(folder, safe_serialization=True)",
        )
    try:
        names = sorted(set(load_json(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CorruptError(f"{index} is not a list of shards", "copy the checkpoint again") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise CorruptError(f"{index} names the shard {name!r}, which is not in the folder", "copy it again")
    return [folder / name for name in names]


def has_own_head(folder: Path) -> bool:
    """True if a checkpoint has a head that differs from its token embeddings, whatever its configuration says of ties.

    transformers decides so too (`tie_weights` of its 5.23). False where files are missing or damaged, as loading says.
    """
    try:
        stats = [(path, path.stat()) for path in list_weight_files(folder)]
        return _compare_head(tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats))
    except (NotFoundError, CorruptError, OSError, ValueError, KeyError, TypeError, RecursionError, struct.error):
        return False


@lru_cache(maxsize=16)
def _compare_head(files: tuple[tuple[Path, int, int], ...]) -> bool:
    found: dict[str, tuple[Path, int, Mapping[str, Any]]] = {}
    for path, *_ in files:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, MAX_HEADER_BYTES)))
        found |= {key.removeprefix("transformer."): (path, 8 + length, entry) for key, entry in header.items()}
    if HEAD not in found or EMBEDDINGS not in found:
        return False
    if any(found[HEAD][2][key] != found[EMBEDDINGS][2][key] for key in ("dtype", "shape")):
        return True
    head, embeddings = (_map_bytes(*found[name]) for name in (HEAD, EMBEDDINGS))
    starts = range(0, len(head), CHUNK_BYTES)
    return any((head[at : at + CHUNK_BYTES] != embeddings[at : at + CHUNK_BYTES]).any() for at in starts)


def _map_bytes(path: Path, start: int, entry: Mapping[str, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    first, end = entry["data_offsets"]
    return np.memmap(path, np.uint8, "r", offset=start + first, shape=(end - first,))
