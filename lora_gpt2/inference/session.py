"""One base, one store, and the adapters in use, each in a slot of a bank.

An adapter is checked and loaded the first time it is named; from then on choosing or mixing adapters is a row of
weights. The base is never written, so any adapter can be left again without a trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
    reference: str
    adapter: Adapter


class Session:
    """Holds a base and the adapters of a store that were asked for.

    Args:
        base: the loaded base.
        store: where adapters are found; None if only the base is used.
    """

    def __init__(self, base: Base, store: Store | None = None) -> None:
        self.base, self.store = base, store
        self._slots: list[_Slot] = []
        self._bank: AdapterBank | None = None

    def open(self, references: Sequence[str]) -> None:
        """Loads adapters, all checked before any is used; see `load_adapter` for what it raises."""
        known = {slot.reference for slot in self._slots}
        fresh = []
        for reference in dict.fromkeys(references):
            if reference not in known:
                if self.store is None:
                    raise UsageError("this session has no store", "open it with one")
                fresh.append(_Slot(reference, load_adapter(self.store, reference, self.base)[1]))
        self.add({slot.reference: slot.adapter for slot in fresh})

    def add(self, adapters: dict[str, Adapter]) -> None:
        """Puts adapters that are in memory into slots, under these names; a name that is taken gets the new one."""
        if not adapters:
            return
        if taken := [slot for slot in self._slots if slot.reference in adapters]:
            self._slots = [slot for slot in self._slots if slot not in taken]
            self._bank = None
        self._slots += [_Slot(name, adapter) for name, adapter in adapters.items()]
        bank = self._bank
        if bank is not None and len(self._slots) <= bank.num_slots and all(
            bank.ranks.get(site, 0) >= rank for a in adapters.values() for site, rank in a.ranks.items()
        ):  # fmt: skip
            first = len(self._slots) - len(adapters)
        else:
            bank, first = self._build_bank(), 0
        for place in range(first, len(self._slots)):
            bank.load(place, self._slots[place].adapter)
        self._bank = bank

    def _build_bank(self) -> AdapterBank:
        ranks = merge_ranks(slot.adapter.ranks for slot in self._slots)
        room = len(self._slots) if self._bank is None else 2 * len(self._slots)
        return AdapterBank(self.base.config, ranks, room, "inference", self.base.model.wte.weight)

    def for_rows(self, mix: Mix) -> Callable[[int], InferenceRows | None]:
        """Returns a function from a number of rows to the adapters of a batch in which every row has this mix."""
        return lambda num_rows: self.rows([mix] * num_rows)

    def rows(self, mixes: Sequence[Mix]) -> InferenceRows | None:
        """Returns what the network adds in each row of a batch, one mix per row; None if all are the plain base."""
        self.open([name for mix in mixes for name, _ in mix])
        if not any(mixes):
            return None
        assert self._bank is not None
        places = {slot.reference: place for place, slot in enumerate(self._slots)}
        weights = torch.zeros(len(mixes), self._bank.num_slots)
        for row, mix in enumerate(mixes):
            for name, weight in mix:
                weights[row, places[name]] = weight
        return InferenceRows(self._bank, weights)
