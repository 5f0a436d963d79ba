"""The KV cache: keys and values of a batch of sequences, in memory that is allocated once.

The cache keeps its own count. One forward pass calls `begin` once, `append` in every layer, and `advance` at its end;
nobody else writes a length. Sequences may have different lengths: prompts are padded on the right, and whatever lies
behind the length of a sequence is zero, because a mask hides finite values only (0 * NaN is NaN). So a row that is
freed leaves nothing to the sequence that gets it next. Lengths are known on the host as well, where they say how many
keys a step looks at without asking the device.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lora_gpt2.model.config import GPT2Config


class KVCache:
    """Keys and values of up to `batch_size` sequences of up to `max_tokens` tokens each.

    Args:
        config: the base's shape.
        batch_size: number of sequences.
        max_tokens: capacity of each sequence in tokens.
        like: a weight of the base, for device and dtype.
    """

    def __init__(self, config: GPT2Config, batch_size: int, max_tokens: int, like: Tensor) -> None:
        shape = (config.n_layer, 2, batch_size, config.n_head, max_tokens, config.head_dim)
        self.buffer = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=like.device)
        self._row_ids = torch.arange(batch_size, device=like.device)[:, None]
        self._num_tokens, self._num_written = [0] * batch_size, [0] * batch_size  # on the host, shared with views
        self._first, self._num_keys = 0, 0
        self._fixed_keys = 0

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.buffer.shape[2]

    @property
    def capacity(self) -> int:
        """Tokens for which a row has room."""
        return self.buffer.shape[4]

    def view(self, begin: int, end: int, fixed_keys: int = 0) -> KVCache:
        """Returns rows `begin` to `end` in the same memory.

        With `fixed_keys` a step attends to so many keys, behind a mask, so that its shapes do not change.
        """
        part = copy.copy(self)
        part.buffer, part.lengths = self.buffer[:, :, begin:end], self.lengths[begin:end]
        part._row_ids, part._first = self._row_ids[: end - begin], self._first + begin
        part._fixed_keys = fixed_keys
        return part

    def begin(self, time: int) -> tuple[Int[Tensor, "batch time"], Bool[Tensor, "batch time keys"] | None]:
        """Makes room for `time` tokens in each row.

        Returns their positions, and which cached keys each may attend to; None where nothing is cached yet, so that
        plain causal attention over the new tokens is enough. Raises `IndexError` beyond the capacity.
        """
        rows = range(self._first, self._first + self.batch_size)
        longest = max(self._num_tokens[row] for row in rows)
        self._num_keys = self._fixed_keys or longest + time
        if self._num_keys > self.capacity:
            raise IndexError(f"{self._num_keys} tokens exceed the cache of {self.capacity}")
        for row in rows:
            self._num_written[row] = max(self._num_written[row], self._num_tokens[row] + time)
        positions = self.lengths[:, None] + torch.arange(time, device=self.lengths.device)
        if not longest and not self._fixed_keys:
            return positions, None
        keys = torch.arange(self._num_keys, device=self.lengths.device)
        return positions, keys <= positions[:, :, None]

    def append(
        self, layer: int, positions: Int[Tensor, "batch time"], fresh: Float[Tensor, "batch time 2 heads head_dim"]
    ) -> Float[Tensor, "2 batch heads keys head_dim"]:
        """Stores a layer's keys and values at `positions`; returns all keys and values up to now."""
        stored = self.buffer[layer]
        stored[:, self._row_ids, :, positions] = fresh
        return stored[:, :, :, : self._num_keys]

    def advance(self, num_tokens: int | Sequence[int]) -> None:
        """Counts the tokens of the pass that ends: as many in each row, or a number per row where some are padding."""
        if isinstance(num_tokens, int):
            self.lengths += num_tokens
            num_tokens = [num_tokens] * self.batch_size
        else:
            self.lengths += torch.tensor(num_tokens, device=self.lengths.device)
        for index, count in enumerate(num_tokens):
            self._num_tokens[self._first + index] += count
            if not self._fixed_keys:
                self._clear_behind(index)

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Makes these rows, in this order and perhaps more than once, the cache."""
        kept = rows.tolist()
        self.buffer, self.lengths = self.buffer[:, :, rows], self.lengths[rows]
        self._row_ids = torch.arange(len(kept), device=rows.device)[:, None]
        self._num_tokens = [self._num_tokens[row] for row in kept]
        self._num_written = [self._num_written[row] for row in kept]

    def truncate(self, row: int, length: int) -> None:
        """Shortens a row's sequence and zeroes what lies behind."""
        self.lengths[row] = length
        self._num_tokens[self._first + row] = length
        self._clear_behind(row)

    def free(self, row: int) -> None:
        """Ends a row's sequence and zeroes what it wrote."""
        self.truncate(row, 0)

    def fill(self, row: int, blocks: Sequence[Float[Tensor, "layers 2 heads tokens head_dim"]]) -> None:
        """Begins a free row with keys and values that were computed before, block after block."""
        length = sum(block.shape[3] for block in blocks)
        if length:
            self.buffer[:, :, row, :, :length] = torch.cat(list(blocks), dim=3)
        self.lengths[row] = length
        self._num_tokens[self._first + row] = self._num_written[self._first + row] = length

    def move(self, source: int, target: int) -> None:
        """Moves a row's sequence to a row that is free; the source is free afterwards."""
        length = self._num_tokens[self._first + source]
        self.buffer[:, :, target, :, :length] = self.buffer[:, :, source, :, :length]
        self.lengths[target] = self.lengths[source]
        self._num_tokens[self._first + target] = self._num_written[self._first + target] = length
        self.free(source)

    def clear_key(self, num_rows: int, position: int) -> None:
        """Zeroes what the first rows hold at a position."""
        self.buffer[:, :, :num_rows, :, position] = 0

    def clear_padding(self, first: int, end: int) -> None:
        """Zeroes what the padding rows of a step, `first` to `end`, wrote to their first position."""
        if first < end:
            self.buffer[:, :, first:end, :, 0] = 0

    def record_replay(self, num_tokens: Sequence[int], num_rows: int) -> None:
        """Takes over the lengths after a replayed step over the first `num_rows` rows, in which no Python ran.

        `num_tokens` has the lengths of the first rows; the others were padding. A token more may have been written
        behind each, by a step that was launched ahead.
        """
        for row in range(num_rows):
            self._num_tokens[row] = num_tokens[row] if row < len(num_tokens) else 0
            self._num_written[row] = self._num_tokens[row] + 1

    def _clear_behind(self, row: int) -> None:
        """Zeroes what a row wrote behind its length."""
        length, written = self._num_tokens[self._first + row], self._num_written[self._first + row]
        if written > length:
            self.buffer[:, :, row, :, length:written] = 0
        self._num_written[self._first + row] = length
