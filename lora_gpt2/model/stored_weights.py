"""The tensors of a checkpoint's files, one at a time: read, hashed and let go, so that they are never all in memory.

Only safetensors are read, never pickles. The fingerprint covers the shape and every stored tensor's bytes, so an
adapter is never applied to another base of the same shape; it is computed once per file (kept beside size, time and
inode) at about 1 GB/s.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_gpt2.core.dirs import find_cache_dir
from lora_gpt2.core.errors import CorruptError
from lora_gpt2.core.files import write_atomic
from lora_gpt2.core.fingerprint import FINGERPRINT_DIGITS, canonical_json, fingerprint_json
from lora_gpt2.core.memory import is_out_of_memory
from lora_gpt2.model.checkpoint import Checkpoint
from lora_gpt2.model.weight_files import HEAD, list_weight_files

FINGERPRINT = re.compile(rb"[0-9a-f]{%d}" % FINGERPRINT_DIGITS)
BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
MAPPED_BYTES = 2**25
"""How much is read of a file before it is mapped anew: what was read of a mapping counts as this process's memory."""


class _Entry(NamedTuple):
    name: str
    path: Path
    key: str


class StoredWeights:
    """The tensors of a checkpoint by name, without buffers and without the copy of tied embeddings.

    Iterating yields names and tensors in the order of the names; each lies in the file's pages, so copy what is kept
    and let it go. Raises `CorruptError` if a file cannot be read.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.files = list_weight_files(checkpoint.folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        is_tied, entries = checkpoint.config.tie_word_embeddings, []
        for path in self.files:
            with _open(path) as file:
                for key in file.keys():  # noqa: SIM118
                    name = key.removeprefix("transformer.")
                    if not BUFFERS.fullmatch(name) and not (is_tied and name == HEAD):
                        entries.append(_Entry(name, path, key))
                        self.shapes[name] = tuple(file.get_slice(key).get_shape())
        self._entries = sorted(entries)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yields names and tensors."""
        remaining = list(self._entries)
        while remaining:
            read = 0
            with _open(remaining[0].path) as file:
                path = remaining[0].path
                while remaining and remaining[0].path == path and read < MAPPED_BYTES:
                    entry = remaining.pop(0)
                    tensor: Tensor = file.get_tensor(entry.key)
                    read += tensor.nbytes
                    yield entry.name, tensor
                    del tensor

    def read_dtype(self, name: str) -> torch.dtype:
        """Returns the dtype in which a tensor is stored."""
        entry = next(entry for entry in self._entries if entry.name == name)
        with _open(entry.path) as file:
            tensor: Tensor = file.get_tensor(entry.key)
            return tensor.dtype


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise CorruptError(f"{path} cannot be read: {error}", "copy the checkpoint again") from error


class Fingerprint:
    """The fingerprint of a base: its shape and its tensors' names, dtypes and bytes, in the order of their names.

    `value` is "" until every tensor has been added, unless it was computed before and the files are the same.
    """

    def __init__(self, checkpoint: Checkpoint, files: list[Path]) -> None:
        config = checkpoint.config.to_fingerprint()
        stats = [(str(f.resolve()), s.st_size, s.st_mtime_ns, s.st_ino) for f in files for s in [f.stat()]]
        self._cached = find_cache_dir() / "fingerprints" / fingerprint_json([config, stats])
        self._digest = hashlib.sha256(canonical_json(config))
        self.value = ""
        try:
            remembered = self._cached.read_bytes()
        except OSError:
            return
        if FINGERPRINT.fullmatch(remembered):
            self.value = remembered.decode("ascii")

    def add(self, name: str, tensor: Tensor) -> None:
        """Adds the next tensor, unless the fingerprint is known."""
        if not self.value:
            self._digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            self._digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)

    def finish(self) -> str:
        """Returns the fingerprint and remembers it."""
        if not self.value:
            self.value = self._digest.hexdigest()[:FINGERPRINT_DIGITS]
            try:
                self._cached.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(self._cached, self.value.encode())
            except OSError:
                pass  # a cache that cannot be written only costs time
        return self.value


def fingerprint_base(checkpoint: Checkpoint) -> str:
    """Returns the fingerprint of a base."""
    weights = StoredWeights(checkpoint)
    fingerprint = Fingerprint(checkpoint, weights.files)
    if not fingerprint.value:
        for name, tensor in weights:
            fingerprint.add(name, tensor)
    return fingerprint.finish()
