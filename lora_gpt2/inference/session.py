"""One base, one store, and the adapters in use, each in a slot of a bank.

An adapter is checked and loaded the first time it is named; from then on choosing or mixing adapters is a row of
weights. The base is never written, so any adapter can be left again without a trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from lora_gpt2.core.errors import UsageError
from lora_gpt2.model.bank import AdapterBank, InferenceRows
from lora_gpt2.model.base import Base
from lora_gpt2.model.lora import Adapter, merge_ranks
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.files import load_adapter

BASE = "base"
MAX_WEIGHT = 16.0
Mix = tuple[tuple[str, float], ...]


def parse_mix(specs: Sequence[str]) -> Mix:
    """Returns the mix named by `name`, `name@version` or `name:weight` items; `base` is the empty mix.

    Raises `UsageError` for a weight that is not a number within ±16, or a name given twice.
    """
    parts: list[tuple[str, float]] = []
    for spec in specs:
        name, separator, text = spec.partition(":")
        try:
            weight = float(text) if separator else 1.0
        except ValueError:
            weight = math.nan
        if not abs(weight) <= MAX_WEIGHT:
            raise UsageError(
                f"--adapter {spec}: expected name:weight, weight within ±{MAX_WEIGHT:g}", "such as law:0.6"
            )
        if name in (other for other, _ in parts):
            raise UsageError(f"--adapter {name} is given twice", "give each once, with its weight")
        if name == BASE and (separator or len(specs) > 1):
            raise UsageError("'base' is the model without adapters and cannot be mixed", "leave it out")
        if name != BASE:
            parts.append((name, weight))
    return tuple(parts)


def describe_mix(mix: Mix) -> str:
    """Returns a mix as people write it: `base`, `law`, or `law:0.6+code:0.4`."""
    if not mix:
        return BASE
    if len(mix) == 1 and mix[0][1] == 1:
        return mix[0][0]
    return "+".join(f"{name}:{weight:g}" for name, weight in mix)


@dataclass
class _Slot:
    adapter: Adapter
    place: int


class Session:
    """Holds a base and the adapters of a store that were asked for, the least recently used of which make room.

    Args:
        base: the loaded base.
        store: where adapters are found; None if only the base is used.
        max_slots: adapters to keep loaded; a batch that needs more gets them.
    """

    def __init__(self, base: Base, store: Store | None = None, max_slots: int = 64) -> None:
        self.base, self.store, self.max_slots = base, store, max_slots
        self._slots: dict[str, _Slot] = {}
        self._bank: AdapterBank | None = None

    @property
    def loaded(self) -> list[str]:
        """The adapters in slots, the least recently used first."""
        return list(self._slots)

    def resolve(self, mix: Mix) -> Mix:
        """Returns a mix in which every name is a version, so that it stays what it is when a newer one is published.

        Raises `NotFoundError` for a name without adapter.
        """
        return tuple((self._name_version(name), weight) for name, weight in mix)

    def _name_version(self, name: str) -> str:
        if name in self._slots or "@" in name or self.store is None:
            return name
        return f"{name}@{self.store.read_current(name)}"

    def open(self, references: Sequence[str]) -> None:
        """Loads adapters, all checked before any is used; see `load_adapter` for what it raises."""
        wanted = dict.fromkeys(references)
        fresh = {}
        for reference in wanted:
            if reference in self._slots:
                self._slots[reference] = self._slots.pop(reference)  # the most recently used comes last
                continue
            if self.store is None:
                raise UsageError("this session has no store", "open it with one")
            fresh[reference] = load_adapter(self.store, reference, self.base)[1]
        self.add(fresh, keep=wanted)

    def add(self, adapters: Mapping[str, Adapter], keep: Collection[str] = ()) -> None:
        """Puts adapters that are in memory into slots, under these names; a name that is taken gets the new one.

        Where slots are short, the least recently used that are not in `keep` make room.
        """
        for name, adapter in adapters.items():
            slot = self._slots.pop(name, None)
            place = slot.place if slot else self._find_place({*keep, *adapters})
            self._slots[name] = _Slot(adapter, place)
        bank = self._bank
        size = max((slot.place + 1 for slot in self._slots.values()), default=0)
        if bank is None or size > bank.num_slots or any(
            bank.ranks.get(site, 0) < rank for adapter in adapters.values() for site, rank in adapter.ranks.items()
        ):  # fmt: skip
            self._bank = self._build_bank(size) if adapters or bank is None else bank
        elif bank is not None:
            for name, adapter in adapters.items():
                bank.load(self._slots[name].place, adapter)

    def _find_place(self, keep: Collection[str]) -> int:
        """Returns a place for one more adapter: an empty one, that of the oldest, or a new one."""
        taken = {slot.place for slot in self._slots.values()}
        if len(taken) >= self.max_slots and (victim := next((name for name in self._slots if name not in keep), None)):
            return self._slots.pop(victim).place
        return next(place for place in range(len(taken) + 1) if place not in taken)

    def _build_bank(self, size: int) -> AdapterBank:
        ranks = merge_ranks(slot.adapter.ranks for slot in self._slots.values())
        room = size if self._bank is None else max(size, min(2 * size, self.max_slots))
        bank = AdapterBank(self.base.config, ranks, room, "inference", self.base.model.wte.weight)
        for slot in self._slots.values():
            bank.load(slot.place, slot.adapter)
        return bank

    def for_rows(self, mix: Mix) -> Callable[[int], InferenceRows | None]:
        """Returns a function from a number of rows to the adapters of a batch in which every row has this mix."""
        return lambda num_rows: self.rows([mix] * num_rows)

    def rows(self, mixes: Sequence[Mix]) -> InferenceRows | None:
        """Returns what the network adds in each row of a batch, one mix per row; None if all are the plain base."""
        if not any(mixes):
            return None
        self.open([name for mix in mixes for name, _ in mix])
        assert self._bank is not None
        weights = torch.zeros(len(mixes), self._bank.num_slots)
        for row, mix in enumerate(mixes):
            for name, weight in mix:
                weights[row, self._slots[name].place] += weight
        return InferenceRows(self._bank, weights)
