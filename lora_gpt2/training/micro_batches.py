"""From the blocks of several domains to passes through the network: each slot with the same number of rows."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_gpt2.data.blocks import IGNORE, Rows
from lora_gpt2.training.process_group import ProcessGroup
from lora_gpt2.training.slot import Domain, group_recipes
from lora_gpt2.training.step import MicroBatch

_Array = np.ndarray[Any, Any]


class MicroBatchBuilder:
    """Deals the rows of each step out: to the processes of `world`, then to passes of `micro_batch_tokens`.

    Every row has a seed of its own, a function of the recipe's seed, the step and its place in the batch: what is
    random about it depends on nothing else.
    """

    def __init__(self, domains: Sequence[Domain], device: torch.device, world: ProcessGroup) -> None:
        self.domains, self.device, self.world = domains, device, world
        self.block_size = domains[0].recipe.data.block_size

    def read(self, active: Sequence[int], step: int) -> tuple[dict[int, Rows], list[int]]:
        """Returns the rows of a step's whole batches, and the number of targets per slot."""
        batches = {slot: self.domains[slot].order.read(step) for slot in active}
        counts = [int((batches[k].targets != IGNORE).sum()) if k in batches else 0 for k in range(len(self.domains))]
        return batches, counts

    def build(self, active: Sequence[int], step: int) -> tuple[list[MicroBatch], list[int]]:
        """Returns this process's share of a step, and the number of targets of each slot in the whole of it.

        Slots with different `SHARED_SETTINGS` do not share a pass.
        """
        batches, counts = self.read(active, step)
        passes, slots = [], list(batches)
        for places in group_recipes([self.domains[slot].recipe for slot in slots]):
            group = [slots[place] for place in places]
            shares = {slot: list(self.world.share(len(batches[slot].inputs))) for slot in group}
            limit = min(self.domains[slot].recipe.train.micro_batch_tokens for slot in group)
            width = max(1, limit // self.block_size // len(group))
            for start in range(0, max(len(shares[slot]) for slot in group), width):
                pieces = {slot: shares[slot][start : start + width] for slot in group if len(shares[slot]) > start}
                passes.append(self._build_pass(pieces, batches, counts, step))
        return passes, counts

    def _build_pass(
        self,
        pieces: dict[int, list[int]],
        batches: dict[int, Rows],
        counts: Sequence[int],
        step: int,
    ) -> MicroBatch:
        """Puts rows of several slots together; a slot with fewer rows gets empty ones."""
        slots, rows = list(pieces), max(map(len, pieces.values()))
        inputs = np.zeros((len(slots), rows, self.block_size), dtype=np.int64)
        targets, positions = np.full_like(inputs, IGNORE), np.zeros_like(inputs)
        seeds = [0] * (len(slots) * rows)
        for place, (slot, indices) in enumerate(pieces.items()):
            taken = batches[slot].take(indices)
            inputs[place, : len(indices)], targets[place, : len(indices)] = taken.inputs, taken.targets
            if taken.positions is not None:
                positions[place, : len(indices)] = taken.positions
            for row, index in enumerate(indices):
                seed = f"{self.domains[slot].recipe.train.seed} {step} {index}"
                seeds[place * rows + row] = zlib.crc32(seed.encode())
        settings = self.domains[slots[0]].recipe
        weights = torch.tensor([1 / max(1, counts[slot]) for slot in slots]).repeat_interleave(rows * self.block_size)
        return MicroBatch(
            slots,
            torch.tensor(slots).to(self.device),
            self._to_device(inputs),
            self._to_device(targets),
            weights.to(self.device),
            settings.lora.dropout,
            settings.train.label_smoothing,
            seeds,
            settings.train.neftune_noise_alpha,
            settings.train.gradient_checkpointing,
            self._to_device(positions) if settings.data.layout == "packed" else None,
        )

    def _to_device(self, array: _Array) -> Tensor:
        return torch.from_numpy(array).flatten(0, -2).to(self.device)
