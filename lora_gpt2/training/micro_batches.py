"""From the blocks of several slots to micro-batches: each slot with the same number of sequences."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_gpt2.data.blocks import IGNORE, BlockBatch
from lora_gpt2.training.process_group import ProcessGroup
from lora_gpt2.training.replay import Replay
from lora_gpt2.training.slot import TrainingSlot, group_recipes
from lora_gpt2.training.step import MicroBatch

_Array = np.ndarray[Any, Any]


class MicroBatchBuilder:
    """Splits the batches of each step over the processes of `process_group`, then into micro-batches.

    Every sequence has a seed of its own, a function of the recipe's seed, the step and its index in the batch, and
    nothing else that is random about it. The tensors are on the host.
    """

    def __init__(
        self, slots: Sequence[TrainingSlot], process_group: ProcessGroup, replay: Replay | None = None
    ) -> None:
        self.slots, self.process_group, self.replay = slots, process_group, replay
        self.block_size = slots[0].recipe.data.block_size

    def read(self, slot_ids: Sequence[int]) -> tuple[dict[int, BlockBatch], list[int]]:
        """Returns the whole batches of the next step of some slots, and the number of targets in each slot's."""
        batches = {slot_id: self.slots[slot_id].order.read(self.slots[slot_id].last_step) for slot_id in slot_ids}
        counts = [int((batches[k].targets != IGNORE).sum()) if k in batches else 0 for k in range(len(self.slots))]
        return batches, counts

    def build(self, slot_ids: Sequence[int]) -> tuple[list[MicroBatch], list[int]]:
        """Returns this process's share of the next step, and the number of targets of each slot in the whole of it.

        Slots with different `PER_MICRO_BATCH` settings do not share a micro-batch.
        """
        batches, counts = self.read(slot_ids)
        micro_batches = [self._build_one(parts, batches, counts) for parts in self._split(batches)]
        if self.replay is not None:
            micro_batches += self._build_replayed(self.replay, slot_ids)
        return micro_batches, counts

    def _split(self, batches: Mapping[int, BlockBatch]) -> Iterator[dict[int, list[int]]]:
        """Yields the sequences of each micro-batch of this process: indices into the batch of each slot."""
        for indices in group_recipes([self.slots[slot_id].recipe for slot_id in batches]):
            group = [list(batches)[index] for index in indices]
            shares = {slot_id: list(self.process_group.share(len(batches[slot_id].inputs))) for slot_id in group}
            limit = min(self.slots[slot_id].recipe.train.micro_batch_tokens for slot_id in group)
            size = max(1, limit // self.block_size // len(group))
            for start in range(0, max(len(shares[slot_id]) for slot_id in group), size):
                yield {k: shares[k][start : start + size] for k in group if len(shares[k]) > start}

    def _build_replayed(self, replay: Replay, slot_ids: Sequence[int]) -> Iterator[MicroBatch]:
        """Yields this process's share of the text that a step replays; without NEFTune's noise."""
        slots = {k: self.slots[k] for k in slot_ids if self.slots[k].recipe.replayed_per_step}
        chosen = {
            k: replay.indices(slot.last_step, slot.recipe.replayed_per_step, slot.recipe.train.seed)
            for k, slot in slots.items()
        }
        batches = {k: replay.batch.take(indices) for k, indices in chosen.items()}
        counts = [int((batches[k].targets != IGNORE).sum()) if k in batches else 0 for k in range(len(self.slots))]
        for parts in self._split(batches):
            micro_batch = self._build_one(parts, batches, counts, "replay ")
            reference = replay.hidden.new_zeros(*micro_batch.inputs.shape, replay.hidden.shape[-1])
            rows = reference.view(len(parts), -1, *reference.shape[1:])
            for row, (slot_id, indices) in zip(rows, parts.items(), strict=True):
                row[: len(indices)] = replay.hidden[[chosen[slot_id][index] for index in indices]]
            penalties = torch.tensor([self.slots[slot_id].penalty for slot_id in parts])
            yield dataclasses.replace(
                micro_batch, reference=reference, penalties=penalties, noise_alpha=0.0, positions=None
            )

    def _build_one(
        self,
        parts: dict[int, list[int]],
        batches: Mapping[int, BlockBatch],
        counts: Sequence[int],
        label: str = "",
    ) -> MicroBatch:
        """Puts sequences of several slots together; a slot with fewer of them gets empty ones."""
        slot_ids, size = list(parts), max(map(len, parts.values()))
        inputs = np.zeros((len(slot_ids), size, self.block_size), dtype=np.int64)
        targets, positions = np.full_like(inputs, IGNORE), np.zeros_like(inputs)
        seeds = [0] * (len(slot_ids) * size)
        for row, (slot_id, indices) in enumerate(parts.items()):
            taken = batches[slot_id].take(indices)
            inputs[row, : len(indices)], targets[row, : len(indices)] = taken.inputs, taken.targets
            if taken.positions is not None:
                positions[row, : len(indices)] = taken.positions
            for column, index in enumerate(indices):
                slot = self.slots[slot_id]
                seed = f"{label}{slot.recipe.train.seed} {slot.last_step} {index}"
                seeds[row * size + column] = zlib.crc32(seed.encode())
        settings = self.slots[slot_ids[0]].recipe
        weights = torch.tensor([1 / max(1, counts[k]) for k in slot_ids]).repeat_interleave(size * self.block_size)
        return MicroBatch(
            slots=slot_ids,
            slot_ids=torch.tensor(slot_ids),
            inputs=_join_rows(inputs),
            targets=_join_rows(targets),
            loss_weights=weights,
            dropout=settings.lora.dropout,
            label_smoothing=settings.train.label_smoothing,
            seeds=torch.tensor(seeds),
            noise_alpha=settings.train.neftune_noise_alpha,
            gradient_checkpointing=settings.train.gradient_checkpointing,
            positions=_join_rows(positions) if settings.data.layout == "packed" else None,
        )


def _join_rows(array: _Array) -> Tensor:
    return torch.from_numpy(array).flatten(0, -2)
