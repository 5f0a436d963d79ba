"""Prompts that begin alike are read once: keys and values of their beginnings, in blocks, for the next one that has it.

As in vLLM's automatic prefix caching, a block belongs to the mix that it was computed under and to all tokens before
it. Blocks are copies, so that a row of the KV cache is still one sequence's alone; the least recently used ones go.
Reading a beginning here or anew is the same but for rounding, since sums are taken in another order.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from itertools import takewhile

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
        self._blocks: OrderedDict[bytes, Tensor] = OrderedDict()  # the least recently used first

    def find(self, mix: Hashable, ids: Sequence[int]) -> list[Tensor]:
        """Returns the blocks that a text under a mix begins with; never all of it, since its last token is computed."""
        if not self.max_bytes:
            return []
        found = list(takewhile(self._blocks.__contains__, _iter_keys(mix, ids[:-1])))
        self._touch(found)
        return [self._blocks[key] for key in found] if len(found) * BLOCK >= WORTHWHILE else []

    def store(self, mix: Hashable, ids: Sequence[int], row: Float[Tensor, "layers 2 heads tokens head_dim"]) -> None:
        """Keeps the whole blocks of a text, whose keys and values a row of the KV cache holds."""
        if len(ids) < WORTHWHILE or not self.max_bytes:
            return
        keys = list(_iter_keys(mix, ids))
        own = set(keys)
        self._touch(keys)
        for index, key in enumerate(keys):
            if key in self._blocks:
                continue
            block = row[:, :, :, index * BLOCK : (index + 1) * BLOCK]
            while self.num_bytes + block.nbytes > self.max_bytes:
                oldest = next(iter(self._blocks), None)
                if oldest is None or oldest in own:  # the text's own were touched: nothing else is left
                    return
                self.num_bytes -= self._blocks.pop(oldest).nbytes
            self._blocks[key] = block.clone()
            self.num_bytes += block.nbytes
        self._touch(keys)

    def _touch(self, keys: Sequence[bytes]) -> None:
        """Makes blocks the most recently used, the first of a text last: without it the others are of no use."""
        for key in reversed(keys):
            if key in self._blocks:
                self._blocks.move_to_end(key)


def count_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns how many tokens of whole blocks two texts begin with alike."""
    shared = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    return shared // BLOCK * BLOCK


def _iter_keys(mix: Hashable, ids: Sequence[int]) -> Iterator[bytes]:
    """Yields the key of each whole block: a digest of the mix and of all tokens up to its end."""
    key = repr(mix).encode()
    for start in range(0, len(ids) - BLOCK + 1, BLOCK):
        key = hashlib.blake2b(key + array("q", ids[start : start + BLOCK]).tobytes(), digest_size=16).digest()
        yield key
