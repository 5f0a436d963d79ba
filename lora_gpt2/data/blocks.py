"""Blocks of tokens, read from memory maps, in two layouts.

`concat`: a stream is EOS, document, EOS, document, EOS, cut into blocks anywhere; documents see what stands before
them, as in GPT-2's pre-training. `packed`: a block holds whole documents, which do not see each other and whose
positions begin anew, so each is computed as if it were alone; only a document longer than a block is cut. In both,
every token and every document's end is a target exactly once per pass, the first token of a document is predicted from
EOS, and targets that are no text, or a prompt, are `IGNORE`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

IGNORE = -100
Tokens = NDArray[np.unsignedinteger]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class EncodedDocument:
    """One document as tokens, without EOS; the first `prompt` of them carry no loss."""

    ids: Sequence[int] | NDArray[Any]
    prompt: int = 0


@dataclass(frozen=True, kw_only=True)
class BlockBatch:
    """Some blocks: `inputs` and `targets` `[blocks, time]`; `positions` begin anew with each document, or are None."""

    inputs: Ints
    targets: Ints
    positions: Ints | None

    def take(self, indices: Sequence[int]) -> BlockBatch:
        """Returns some of the blocks."""
        taken = list(indices)
        positions = None if self.positions is None else self.positions[taken]
        return BlockBatch(inputs=self.inputs[taken], targets=self.targets[taken], positions=positions)


@dataclass(frozen=True, kw_only=True)
class TokenBlocks:
    """Tokens seen as blocks.

    `stream` holds sequences of tokens, of each of which the first is never a target; `loss`, as long, is 0 where a
    target carries none. In layout concat there is one sequence. In layout packed sequence i is
    `stream[sequence_offsets[i] : sequence_offsets[i + 1]]` (`[sequences + 1]`, the cumulative lengths of
    variable-length attention), and block j is sequences `block_offsets[j]` to `block_offsets[j + 1]` (`[blocks + 1]`).
    """

    stream: Tokens
    block_size: int
    loss: NDArray[np.uint8] | None = None
    sequence_offsets: Ints | None = None
    block_offsets: Ints | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens predicted in one pass, with or without loss."""
        return max(0, len(self.stream) - (1 if self.sequence_offsets is None else len(self.sequence_offsets) - 1))

    @property
    def num_targets(self) -> int:
        """Tokens predicted in one pass that carry loss."""
        return self.num_tokens if self.loss is None else int(np.count_nonzero(self.loss))

    @property
    def num_blocks(self) -> int:
        """Blocks, the last of which may be partial."""
        return (
            math.ceil(self.num_tokens / self.block_size) if self.block_offsets is None else len(self.block_offsets) - 1
        )

    def read(self, indices: Sequence[int]) -> BlockBatch:
        """Returns some blocks; what fills them up has the target `IGNORE`."""
        shape = (len(indices), self.block_size)
        inputs, targets = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORE, dtype=np.int64)
        positions = None if self.block_offsets is None else np.zeros(shape, dtype=np.int64)
        for row, index in enumerate(indices):
            column = 0
            for start, end in self._iter_runs(index):
                piece = np.asarray(self.stream[start:end], dtype=np.int64)
                here = slice(column, column + len(piece) - 1)
                inputs[row, here], targets[row, here] = piece[:-1], piece[1:]
                if self.loss is not None:
                    targets[row, here][np.asarray(self.loss[start + 1 : end]) == 0] = IGNORE
                if positions is not None:
                    positions[row, here] = np.arange(len(piece) - 1)
                column = here.stop
        return BlockBatch(inputs=inputs, targets=targets, positions=positions)

    def _iter_runs(self, index: int) -> Iterator[tuple[int, int]]:
        """Yields where the runs of a block begin and end in the stream."""
        if self.block_offsets is None or self.sequence_offsets is None:
            start = index * self.block_size
            yield start, min(start + self.block_size + 1, len(self.stream))
            return
        for run in range(int(self.block_offsets[index]), int(self.block_offsets[index + 1])):
            yield int(self.sequence_offsets[run]), int(self.sequence_offsets[run + 1])


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """Returns the smallest unsigned type that holds every token id."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def write_blocks(
    folder: Path,
    split: str,
    documents: Iterable[EncodedDocument],
    eos_id: int,
    vocab_size: int,
    has_prompts: bool = False,
) -> None:
    """Writes the stream of a split, `[EOS, document, EOS, document, EOS]`, and its loss where there are prompts."""
    dtype = token_dtype(vocab_size)
    eos, is_first = np.array([eos_id], dtype=dtype).tobytes(), True
    with (folder / f"{split}.bin").open("wb") as file, (folder / f"{split}.loss.bin").open("wb") as loss:
        for document in documents:
            file.write((eos if is_first else b"") + np.asarray(document.ids, dtype=dtype).tobytes() + eos)
            if has_prompts:  # nothing predicts the first EOS
                silent = document.prompt + is_first
                loss.write(b"\0" * silent + b"\1" * (len(document.ids) + 1 + is_first - silent))
            is_first = False
    if not has_prompts:
        (folder / f"{split}.loss.bin").unlink()


def pack_blocks(folder: Path, split: str, block_size: int, eos_id: int, vocab_size: int) -> None:
    """Turns a split's stream into whole documents, best-fit into blocks: `.starts.npy` and `.rows.npy` beside it.

    Each document gets the fullest block that still has room, longest first (best-fit decreasing; Ding et al. 2024,
    arXiv:2404.10830), in time linear in the number of documents.
    """
    concat = open_blocks(folder, split, block_size, vocab_size)
    ends = np.flatnonzero(np.asarray(concat.stream) == eos_id)
    runs = [
        (start, min(start + block_size, end))
        for begin, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
        for start in range(begin, end, block_size)
    ]
    order = sorted(range(len(runs)), key=lambda run: runs[run][0] - runs[run][1])
    bins = fit_best([runs[run][1] - runs[run][0] for run in order], block_size)
    dtype, starts, rows = token_dtype(vocab_size), [0], [0]
    with (folder / f"{split}.packed").open("wb") as file, (folder / f"{split}.packed_loss").open("wb") as loss:
        for members in bins:
            for member in members:
                begin, end = runs[order[member]]
                file.write(np.asarray(concat.stream[begin : end + 1], dtype=dtype).tobytes())
                if concat.loss is not None:
                    loss.write(b"\0" + np.asarray(concat.loss[begin + 1 : end + 1]).tobytes())
                starts.append(starts[-1] + end + 1 - begin)
            rows.append(len(starts) - 1)
    np.save(folder / f"{split}.starts.npy", np.array(starts, dtype=np.int64))
    np.save(folder / f"{split}.rows.npy", np.array(rows, dtype=np.int64))
    has_loss = concat.loss is not None
    del concat
    (folder / f"{split}.packed").replace(folder / f"{split}.bin")
    if has_loss:
        (folder / f"{split}.packed_loss").replace(folder / f"{split}.loss.bin")
    else:
        (folder / f"{split}.packed_loss").unlink()


def fit_best(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Returns bins of indices, each of at most `size` in all; `lengths` come longest first."""
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(size + 1)]
    rooms = 0  # bit r is set if a bin has room r
    for index, length in enumerate(lengths):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            bin_id = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            bin_id, room = len(bins), size
            bins.append([])
        bins[bin_id].append(index)
        if left := room - length:
            with_room[left].append(bin_id)
            rooms |= 1 << left
    return bins


def open_blocks(folder: Path, split: str, block_size: int, vocab_size: int) -> TokenBlocks:
    """Returns the blocks of a split as read-only memory maps."""
    loss, starts, rows = (folder / f"{split}.{name}" for name in ("loss.bin", "starts.npy", "rows.npy"))
    return TokenBlocks(
        stream=_open(folder / f"{split}.bin", token_dtype(vocab_size)),
        block_size=block_size,
        loss=_open(loss, np.uint8) if loss.exists() else None,
        sequence_offsets=np.load(starts) if starts.exists() else None,
        block_offsets=np.load(rows) if rows.exists() else None,
    )


def _open(path: Path, dtype: type[Any]) -> NDArray[Any]:
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype=dtype)
