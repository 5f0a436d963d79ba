"""One base, one store, and the adapters in use, each in a slot of a bank.

An adapter is checked and loaded the first time it is named; from then on choosing or mixing adapters is a row of
weights. The base is never written, so any adapter can be left again without a trace.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lora_gpt2.core.errors import CorruptError, NotFoundError, UsageError
from lora_gpt2.model.bank import AdapterBank, InferenceAdapters
from lora_gpt2.model.base import Base
from lora_gpt2.model.config import HEAD
from lora_gpt2.model.gpt2 import Linear
from lora_gpt2.model.lora import Adapter, merge_ranks
from lora_gpt2.model.merge import to_delta
from lora_gpt2.model.prepacked import PrepackedLinear
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.files import load_adapter

BASE = "base"
MAX_WEIGHT = 16.0
DIGEST_DIGITS = 16
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
            raise UsageError(f"adapter {spec}: expected name:weight, weight within ±{MAX_WEIGHT:g}", "such as law:0.6")
        if "#" in name:
            raise UsageError(f"'{name}' is not an adapter", "write name or name@version")
        if name in (other for other, _ in parts):
            raise UsageError(f"adapter {name} is given twice", "give each once, with its weight")
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


def show_name(reference: str) -> str:
    """Returns a resolved name without its digest."""
    return reference.partition("#")[0]


def check_logits(logits: Float[Tensor, "*shape vocab"], mix: Mix) -> None:
    """Raises `CorruptError`, which names the mix, if logits that it gave are not finite."""
    smallest, largest = logits.aminmax()  # both are NaN if one value is
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        name = describe_mix(tuple((show_name(reference), weight) for reference, weight in mix))
        hint = "see 'lora-gpt2 adapters verify', or use smaller weights" if mix else "copy the base again"
        raise CorruptError(f"{name}: the logits after this text are not finite", hint)


@dataclass(frozen=True)
class Loaded:
    """An adapter in memory, and the sha256 of the weights it was read from (none if it never was on disk)."""

    adapter: Adapter
    digest: str = ""


@dataclass
class _Slot:
    loaded: Loaded
    place: int


class Session:
    """Holds a base and the adapters of a store that were asked for, the least recently used of which make room.

    Args:
        base: the loaded base.
        store: where adapters are found; None if only the base is used.
        max_slots: adapters to keep loaded; a batch that needs more gets them.

    One thread uses a session; `resolve` and `read` may be called from others.
    """

    def __init__(self, base: Base, store: Store | None = None, max_slots: int = 64) -> None:
        self.base, self.store, self.max_slots = base, store, max_slots
        self._slots: dict[str, _Slot] = {}
        self._bank: AdapterBank | None = None
        self._holds: Counter[str] = Counter()
        self.num_loads = 0

    @property
    def loaded(self) -> list[str]:
        """The adapters in slots, the least recently used first."""
        return list(self._slots)

    def resolve(self, mix: Mix) -> Mix:
        """Returns a mix in which every name is `name@version#digest`, which stays what it is whatever is published.

        The digest matters where an adapter was removed and another one published under its name and number. Raises
        what `Store.read_manifest` does for a name without adapter.
        """
        return tuple((self._pin(name), weight) for name, weight in mix)

    def _pin(self, name: str) -> str:
        if name in self._slots or "#" in name or self.store is None:
            return name
        manifest = self.store.read_manifest(name)
        return f"{manifest.reference}#{manifest.digest[:DIGEST_DIGITS]}"

    @property
    def bank(self) -> AdapterBank:
        """The slots; empty before the first adapter came."""
        if self._bank is None:
            self._bank = self._build_bank(1)
        return self._bank

    def read(self, reference: str) -> Loaded:
        """Returns an adapter, from its slot or from the store; see `load_adapter` for what it raises."""
        if slot := self._slots.get(reference):
            return slot.loaded
        if self.store is None:
            raise UsageError("this session has no store", "open it with one")
        version, _, digest = reference.partition("#")
        manifest, adapter = load_adapter(self.store, version, self.base)
        if not manifest.digest.startswith(digest):
            raise NotFoundError(f"{version} was replaced by another adapter", "ask again")
        return Loaded(adapter, manifest.digest)

    def open(self, references: Sequence[str]) -> None:
        """Brings adapters into slots, all checked before any is used; see `load_adapter` for what it raises."""
        self.put({reference: self.read(reference) for reference in references})

    def add(self, adapters: Mapping[str, Adapter]) -> None:
        """Puts adapters that were never on disk into slots; a name that is taken gets the new one."""
        self.put({name: Loaded(adapter) for name, adapter in adapters.items()})

    def put(self, adapters: Mapping[str, Loaded]) -> None:
        """Brings adapters that were read into slots.

        Where slots are short, the least recently used make room, but none of these and none that is held.
        """
        fresh = {}
        for name, loaded in adapters.items():
            slot = self._slots.pop(name, None)
            if slot is None or not (slot.loaded is loaded or (loaded.digest and slot.loaded.digest == loaded.digest)):
                fresh[name] = loaded.adapter
                slot = _Slot(loaded, slot.place if slot else self._find_place(adapters))
            self._slots[name] = slot  # the most recently used comes last
        try:
            self._fill(fresh)
        except BaseException:
            for name in fresh:  # their places hold something else, or half of it
                self._slots.pop(name, None)
            raise

    def _fill(self, fresh: Mapping[str, Adapter]) -> None:
        """Copies adapters into the bank at their slots' places; a bank without room for them is built anew."""
        self.num_loads += len(fresh)
        size = max((slot.place + 1 for slot in self._slots.values()), default=0)
        bank = self._bank
        if (
            bank is None
            or size > bank.num_slots
            or any(bank.ranks.get(site, 0) < rank for adapter in fresh.values() for site, rank in adapter.ranks.items())
        ):
            self._bank = self._build_bank(size) if fresh or bank is None else bank
        else:
            for name, adapter in fresh.items():
                bank.load(self._slots[name].place, adapter)

    def drop(self, name: str) -> bool:
        """Frees a slot; returns False, and does nothing, if the adapter is in use or not loaded."""
        if name not in self._slots or self._holds[name] > 0:
            return False
        slot = self._slots.pop(name)
        if self._bank is not None:
            self._bank.clear(slot.place)
        return True

    def hold(self, mix: Mix) -> None:
        """Keeps the adapters of a mix in their slots until it is released as often as it was held."""
        self._holds.update(name for name, _ in mix)

    def release(self, mix: Mix) -> None:
        """Ends one hold."""
        self._holds.subtract(name for name, _ in mix)
        self._holds += Counter()  # drops those at zero

    def release_all(self) -> None:
        """Ends every hold."""
        self._holds.clear()

    def describe_origin(self, mix: Mix, loaded: Mapping[str, Loaded]) -> list[dict[str, Any]]:
        """Returns what a mix is made of, so that a text can be traced: name, weight, sha256 of the weights."""
        found = {name: loaded.get(name) or self.read(name) for name, _ in mix}
        return [{"adapter": show_name(name), "weight": weight, "sha256": found[name].digest} for name, weight in mix]

    def _find_place(self, keep: Collection[str]) -> int:
        """Returns a place for one more adapter: an empty one, that of the oldest, or a new one."""
        taken = {slot.place for slot in self._slots.values()}
        idle = (name for name in self._slots if name not in keep and self._holds[name] <= 0)
        if len(taken) >= self.max_slots and (victim := next(idle, None)):
            return self._slots.pop(victim).place
        return next(place for place in range(len(taken) + 1) if place not in taken)

    def _build_bank(self, size: int) -> AdapterBank:
        ranks = merge_ranks(slot.loaded.adapter.ranks for slot in self._slots.values())
        room = size if self._bank is None else max(size, min(2 * size, self.max_slots))
        bank = AdapterBank(self.base.config, ranks, room, "inference", self.base.model.wte.weight)
        for slot in self._slots.values():
            bank.load(slot.place, slot.loaded.adapter)
        return bank

    def fold(self, mix: Mix) -> Session:
        """Returns a session over the base with a mix written into its weights, so that a token costs no more than it.

        The adapted projections are new tensors, made from the pristine ones; the rest is shared, and nothing of this
        session changes. Raises `UsageError` for a quantised base.
        """
        base = self.base
        self.open([name for name, _ in mix])
        if any(type(linear) not in (Linear, PrepackedLinear) for linear in base.model.iter_linears()):
            raise UsageError("a quantised base is not merged into", "leave generate.merge_into_base out")
        shared = {id(module): module for module in base.model.modules() if not list(module.children())}
        model = copy.deepcopy(base.model, shared)
        deltas: dict[str, Tensor] = {}
        for name, weight in mix:
            for site, update in self._slots[name].loaded.adapter.updates.items():
                deltas[site] = deltas.get(site, torch.zeros(())) + weight * to_delta(update)
        if (delta := deltas.pop(HEAD, None)) is not None:
            model.add_to_head(delta)
        for site, delta in deltas.items():
            linear = model.get_submodule(site)
            assert isinstance(linear, Linear)
            model.set_submodule(site, linear.with_weight(linear.dense(torch.float32) + delta.to(base.runtime.device)))
        return Session(replace(base, model=model))

    def for_rows(self, mix: Mix) -> Callable[[int], InferenceAdapters | None]:
        """Returns a function from a number of rows to the adapters of a batch in which every row has this mix."""
        return lambda num_rows: self.rows([mix] * num_rows)

    def rows(self, mixes: Sequence[Mix]) -> InferenceAdapters | None:
        """Returns what the network adds in each row of a batch, one mix per row; None if all are the plain base."""
        return InferenceAdapters(self.bank, weights) if (weights := self.weigh(mixes)).any() else None

    def weigh(self, mixes: Sequence[Mix]) -> Float[Tensor, "rows slots"]:
        """Returns how much of each slot's adapter a row gets; what is not loaded is loaded."""
        self.open([name for mix in mixes for name, _ in mix])
        weights = torch.zeros(len(mixes), self.bank.num_slots)
        for row, mix in enumerate(mixes):
            for name, weight in mix:
                weights[row, self._slots[name].place] += weight
        return weights
