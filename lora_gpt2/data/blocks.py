"""Blocks of tokens: documents joined by EOS, cut into rows, read from a memory map.

A stream is EOS, document, EOS, document, EOS: every token, and every document's end, is a target exactly once per
pass, and the first token of a document is predicted from EOS as in GPT-2's pre-training. The last block may be
partial; its missing targets are `IGNORE`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

IGNORE = -100


@dataclass(frozen=True)
class TokenBlocks:
    """A stream of tokens `[num_tokens + 1]`, the first of which is never a target, seen as blocks."""

    stream: NDArray[np.unsignedinteger]
    block_size: int

    @property
    def num_tokens(self) -> int:
        """Targets: what is trained on or scored in one pass."""
        return max(0, len(self.stream) - 1)

    @property
    def num_blocks(self) -> int:
        """Rows, the last of which may be partial."""
        return math.ceil(self.num_tokens / self.block_size)

    def read(self, indices: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns inputs and targets `[len(indices), block_size]`; targets past the end are `IGNORE`."""
        inputs = np.zeros((len(indices), self.block_size), dtype=np.int64)
        targets = np.full((len(indices), self.block_size), IGNORE, dtype=np.int64)
        for row, index in enumerate(indices):
            start = index * self.block_size
            piece = np.asarray(self.stream[start : start + self.block_size + 1], dtype=np.int64)
            inputs[row, : len(piece) - 1] = piece[:-1]
            targets[row, : len(piece) - 1] = piece[1:]
        return inputs, targets


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """Returns the smallest unsigned type that holds every token id."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def write_stream(path: Path, documents: Iterable[Sequence[int]], eos_id: int, vocab_size: int) -> int:
    """Writes a stream of tokenised documents; returns the number of targets in it (0 if there is no document)."""
    dtype = token_dtype(vocab_size)
    written = 0
    with path.open("wb") as file:
        for ids in documents:
            if not written:
                file.write(np.array([eos_id], dtype=dtype).tobytes())
            file.write(np.array([*ids, eos_id], dtype=dtype).tobytes())
            written += len(ids) + 1
    return written


def open_stream(path: Path, vocab_size: int) -> NDArray[np.unsignedinteger]:
    """Returns a stream as a read-only memory map."""
    dtype = token_dtype(vocab_size)
    if path.stat().st_size == 0:
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")
