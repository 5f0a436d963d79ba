"""Which blocks a step trains on: a pure function of the seed and the step, so a resumed run sees what it would have."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lora_gpt2.data.blocks import BlockBatch, TokenBlocks


class BlockOrder:
    """Shuffles the blocks in each epoch and takes `batch_size` at a time, across epoch boundaries.

    A text of fewer blocks is seen once in a step.
    """

    def __init__(self, blocks: TokenBlocks, batch_size: int, seed: int) -> None:
        self.blocks, self.batch_size, self.seed = blocks, min(batch_size, max(1, blocks.num_blocks)), seed
        self._permutation = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed, epoch]).permutation(self.blocks.num_blocks)

    def indices(self, step: int) -> list[int]:
        """Returns the indices of the blocks of one step."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        count = self.blocks.num_blocks
        return [int(self._permutation(position // count)[position % count]) for position in positions]

    def read(self, step: int) -> BlockBatch:
        """Returns the batch of one step."""
        return self.blocks.read(self.indices(step))

    def num_steps(self, epochs: float) -> int:
        """Returns the number of steps in so many epochs, at least one."""
        return max(1, round(epochs * self.blocks.num_blocks / self.batch_size))
