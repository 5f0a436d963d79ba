"""Loaded adapters, each in a slot of a bank; where slots are short, the least recently used one is evicted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lora_gpt2.data.successors import SuccessorTable
from lora_gpt2.inference.mix import Mix
from lora_gpt2.model.bank import AdapterBank, check_fits
from lora_gpt2.model.base import Base
from lora_gpt2.model.lora import Adapter, merge_ranks


@dataclass(frozen=True, kw_only=True)
class VerifiedAdapter:
    """An adapter in memory, and the sha256 of the files it was read from ("" if it never was on disk).

    `successors` is what drafts its text, None where it has none or nothing is drafted.
    """

    adapter: Adapter
    digest: str = ""
    config_digest: str = ""
    successors: SuccessorTable | None = None

    @property
    def identity(self) -> tuple[str, str] | None:
        """What only an equal adapter has too: the sha256 of its weights and of its scaling; None for one in memory."""
        return (self.digest, self.config_digest) if self.digest else None

    def is_same(self, other: VerifiedAdapter) -> bool:
        """True if the other one need not take this one's slot."""
        return self is other or (self.identity is not None and self.identity == other.identity)


@dataclass
class _Slot:
    loaded: VerifiedAdapter
    index: int


class AdapterSlots:
    """The slots of a base.

    Args:
        base: the loaded base.
        max_slots: number of adapters to keep; a batch that needs more gets them.
    """

    def __init__(self, base: Base, max_slots: int) -> None:
        self.base, self.max_slots = base, max_slots
        self._slots: dict[str, _Slot] = {}  # the least recently used first
        self._bank: AdapterBank | None = None
        self._pins: Counter[str] = Counter()
        self.num_loads = 0

    @property
    def references(self) -> list[str]:
        """The adapters in slots, the least recently used first."""
        return list(self._slots)

    @property
    def bank(self) -> AdapterBank:
        """The bank; empty before the first adapter is loaded."""
        if self._bank is None:
            self._bank = self._build_bank(1)
        return self._bank

    def find(self, reference: str) -> VerifiedAdapter | None:
        """Returns an adapter that is in a slot, or None."""
        slot = self._slots.get(reference)
        return slot.loaded if slot else None

    def load(self, adapters: Mapping[str, VerifiedAdapter]) -> None:
        """Copies adapters into slots; those that are there already only become the most recently used.

        Eviction spares these and the pinned ones.

        Raises `MismatchError` or `CorruptError` for one that does not fit the base or is not finite; nothing changes.
        """
        for loaded in adapters.values():
            if loaded.identity is None:  # those from the store were checked when they were read
                check_fits(loaded.adapter, self.base.config, self.base.model.wte.weight.dtype)
        fresh = {}
        for reference, loaded in adapters.items():
            slot = self._slots.pop(reference, None)
            if slot is None or not slot.loaded.is_same(loaded):
                fresh[reference] = loaded.adapter
                slot = _Slot(loaded, slot.index if slot else self._allocate(adapters))
            self._slots[reference] = slot  # the most recently used comes last
        try:
            self._fill(fresh)
        except BaseException:
            for reference in fresh:  # their slots hold something else, or half of it
                self._slots.pop(reference, None)
            raise

    def _fill(self, fresh: Mapping[str, Adapter]) -> None:
        """Copies adapters into the bank; one without room for them is rebuilt."""
        self.num_loads += len(fresh)
        size = max((slot.index + 1 for slot in self._slots.values()), default=0)
        bank = self._bank
        if bank is None or size > bank.num_slots or not all(_fits(bank, adapter) for adapter in fresh.values()):
            self._bank = self._build_bank(size) if fresh or bank is None else bank
        else:
            for reference, adapter in fresh.items():
                bank.load(self._slots[reference].index, adapter)

    def evict(self, reference: str) -> bool:
        """Frees a slot; returns False, and does nothing, if the adapter is pinned or not loaded."""
        if reference not in self._slots or self._pins[reference] > 0:
            return False
        slot = self._slots.pop(reference)
        if self._bank is not None:
            self._bank.clear(slot.index)
        return True

    def pin(self, mix: Mix) -> None:
        """Keeps the adapters of a mix in their slots until it is unpinned as often as it was pinned."""
        self._pins.update(reference for reference, _ in mix)

    def unpin(self, mix: Mix) -> None:
        """Ends one pin."""
        self._pins.subtract(reference for reference, _ in mix)
        self._pins += Counter()  # drops those at zero

    def count_pins(self, reference: str) -> int:
        """Returns how often an adapter is pinned."""
        return self._pins[reference]

    @property
    def pinned(self) -> list[str]:
        """The pinned adapters."""
        return list(self._pins)

    def weights(self, mixes: Sequence[Mix]) -> Float[Tensor, "batch slots"]:
        """Returns the weight of each slot in each sequence of a batch; all adapters must be loaded."""
        weights = torch.zeros(len(mixes), self.bank.num_slots)
        for row, mix in enumerate(mixes):
            for reference, weight in mix:
                weights[row, self._slots[reference].index] += weight
        return weights

    def _allocate(self, spared: Collection[str]) -> int:
        """Returns the index for one more adapter: a free one, that of the least recently used one, or a new one."""
        taken = {slot.index for slot in self._slots.values()}
        idle = (name for name in self._slots if name not in spared and self._pins[name] <= 0)
        if len(taken) >= self.max_slots and (victim := next(idle, None)):
            return self._slots.pop(victim).index
        return next(index for index in range(len(taken) + 1) if index not in taken)

    def _build_bank(self, size: int) -> AdapterBank:
        ranks = merge_ranks(slot.loaded.adapter.ranks for slot in self._slots.values())
        room = size if self._bank is None else max(size, min(2 * size, self.max_slots))
        bank = AdapterBank(self.base.config, ranks, room, "inference", self.base.model.wte.weight)
        for slot in self._slots.values():
            bank.load(slot.index, slot.loaded.adapter)
        return bank


def _fits(bank: AdapterBank, adapter: Adapter) -> bool:
    return all(bank.ranks.get(site, 0) >= rank for site, rank in adapter.ranks.items())
