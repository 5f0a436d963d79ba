"""Which blocks a step trains on: a pure function of the seed and the step, so a resumed run sees what it would have."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lora_gpt2.data.blocks import Rows, TokenBlocks


class BlockOrder:
    """Shuffles the blocks anew in every epoch and deals them out `rows` at a time, across epoch boundaries."""

    def __init__(self, blocks: TokenBlocks, rows: int, seed: int) -> None:
        self.blocks, self.rows, self.seed = blocks, rows, seed
        self._permutation = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed, epoch]).permutation(self.blocks.num_blocks)

    def indices(self, step: int) -> list[int]:
        """Returns the blocks of one step."""
        places = range(step * self.rows, (step + 1) * self.rows)
        count = self.blocks.num_blocks
        return [int(self._permutation(place // count)[place % count]) for place in places]

    def read(self, step: int) -> Rows:
        """Returns the rows of one step."""
        return self.blocks.read(self.indices(step))

    def num_steps(self, epochs: float) -> int:
        """Steps in so many passes, at least one."""
        return max(1, round(epochs * self.blocks.num_blocks / self.rows))
