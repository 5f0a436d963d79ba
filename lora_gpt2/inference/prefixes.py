"""Prompts that begin alike are read once: keys and values of their beginnings, in blocks, for the next one that has it.

As in vLLM's automatic prefix caching, a block belongs to the mix that it was computed under and to all tokens before
it. Blocks are copies, so that a row of the KV cache is still one sequence's alone; the least recently used ones go.
Reading a beginning here or anew is the same but for rounding, since sums are taken in another order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

from jaxtyping import Float
from torch import Tensor

BLOCK = 16
"""Tokens of a block."""
WORTHWHILE = 64
"""The fewest tokens that are worth another pass, or a copy."""


class PrefixCache:
    """Blocks of keys and values, `[layers, 2, heads, BLOCK, head_dim]`, up to so many bytes; 0 keeps none."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._blocks: OrderedDict[Hashable, Tensor] = OrderedDict()  # the least recently used first

    def find(self, mix: Hashable, ids: Sequence[int]) -> list[Tensor]:
        """Returns the blocks that a text under a mix begins with; never all of it, since its last token is computed."""
        found = []
        for key in _list_keys(mix, ids[:-1]):
            if (block := self._blocks.get(key)) is None:
                break
            self._blocks.move_to_end(key)
            found.append(block)
        return found if len(found) * BLOCK >= WORTHWHILE else []

    def store(self, mix: Hashable, ids: Sequence[int], row: Float[Tensor, "layers 2 heads tokens head_dim"]) -> None:
        """Keeps the whole blocks of a text, whose keys and values a row of the KV cache holds."""
        keys = list(_list_keys(mix, ids))
        if len(keys) * BLOCK < WORTHWHILE:
            return
        for index, key in enumerate(keys):
            if key in self._blocks:
                self._blocks.move_to_end(key)
                continue
            block = row[:, :, :, index * BLOCK : (index + 1) * BLOCK]
            if self.num_bytes + block.nbytes > self.max_bytes and not self._make_room(block.nbytes, set(keys)):
                return
            self._blocks[key] = block.clone()
            self.num_bytes += block.nbytes

    def _make_room(self, size: int, spared: set[Hashable]) -> bool:
        """Drops the least recently used blocks but those of the text at hand; returns False if that is not enough."""
        for key in [key for key in self._blocks if key not in spared]:
            if self.num_bytes + size <= self.max_bytes:
                break
            self.num_bytes -= self._blocks.pop(key).nbytes
        return self.num_bytes + size <= self.max_bytes


def count_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns how many tokens of whole blocks two texts begin with alike."""
    shared = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    return shared // BLOCK * BLOCK


def _list_keys(mix: Hashable, ids: Sequence[int]) -> list[Hashable]:
    """Returns the key of each whole block: the mix, and all tokens up to its end."""
    return [(mix, tuple(ids[:end])) for end in range(BLOCK, len(ids) + 1, BLOCK)]
