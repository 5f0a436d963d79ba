"""One base, one store, and the adapters in use: the object that everything which generates or measures works on.

An adapter is verified and loaded the first time it is named; from then on selecting or mixing adapters is a row of
weights. The base is never written, so switching adapters leaves no trace.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from lora_gpt2.core.errors import CorruptError, UsageError
from lora_gpt2.data.successors import SuccessorTable
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.prefixes import PrefixCache
from lora_gpt2.inference.slots import AdapterSlots, VerifiedAdapter
from lora_gpt2.model.base import Base
from lora_gpt2.model.batch_adapters import BatchAdapters
from lora_gpt2.model.config import HEAD
from lora_gpt2.model.gpt2 import Linear
from lora_gpt2.model.lora import Adapter
from lora_gpt2.model.merge import to_delta
from lora_gpt2.model.prepacked import PrepackedLinear
from lora_gpt2.model.probe import AdapterSelector
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.files import load_adapter, read_drafter
from lora_gpt2.store.manifest import PEFT_CONFIG, Manifest
from lora_gpt2.store.references import AdapterRef, label_of

PREFIX_BYTES = 2**27
MOST_MANIFESTS = 1024


def check_logits(logits: Float[Tensor, "*shape vocab"], mix: Mix) -> None:
    """Raises `CorruptError`, which names the mix, if the logits under it are not finite."""
    smallest, largest = logits.aminmax()  # both are NaN if one value is
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        hint = "see 'lora-gpt2 adapters verify', or use smaller weights" if mix else "copy the base again"
        raise CorruptError(f"{Mix(mix)}: the logits after this text are not finite", hint)


class Session:
    """A base with adapters from a store; the least recently used ones are evicted.

    Args:
        base: the loaded base.
        store: where adapters are found; None if only the base, or adapters in memory, are used.
        max_slots: number of adapters to keep loaded; a batch that needs more gets them.
        prefix_bytes: memory for the beginnings of texts that were read; see `PrefixCache`.

    One thread uses a session; `resolve` and `fetch` may be called from others.
    """

    def __init__(
        self, base: Base, store: Store | None = None, max_slots: int = 64, prefix_bytes: int = PREFIX_BYTES
    ) -> None:
        self.base, self.store = base, store
        self.slots = AdapterSlots(base, max_slots)
        self.prefixes = PrefixCache(prefix_bytes)
        self._manifests: dict[str, Manifest] = {}
        self._remembering = Lock()
        self._fetched: WeakValueDictionary[str, VerifiedAdapter] = WeakValueDictionary()
        self._locks: WeakValueDictionary[str, Lock] = WeakValueDictionary()
        self.idle_engine: object | None = None  # see `engine.borrow_engine`

    def resolve(self, mix: Mix) -> Mix:
        """Returns a mix whose references have a version and a digest, so that publications do not change it.

        Raises what `Store.read_manifest` does for a name without adapter.
        """
        return Mix((self._resolve(reference), weight) for reference, weight in mix)

    def _resolve(self, reference: str) -> str:
        if self.slots.find(reference) is not None or "#" in reference or self.store is None:
            return reference
        manifest = self.store.read_manifest(reference)
        resolved = str(AdapterRef(manifest.name, manifest.version, manifest.pin))
        self._remember(resolved, manifest)
        return resolved

    def _remember(self, reference: str, manifest: Manifest) -> None:
        """Keeps the manifest of a resolved reference; of many, those that were named last."""
        with self._remembering:
            self._manifests.pop(reference, None)
            self._manifests[reference] = manifest
            while len(self._manifests) > MOST_MANIFESTS:
                del self._manifests[next(iter(self._manifests))]

    def identify(self, mix: Mix) -> Hashable | None:
        """Returns what a resolved mix, whose adapters are loaded, has in common with equal ones alone.

        None for adapters in memory, which others may replace under their name.
        """
        found = [self.slots.find(reference) for reference in mix.references]
        identities = [loaded.identity for loaded in found if loaded is not None and loaded.identity]
        if len(identities) < len(mix):
            return None
        return tuple(zip(identities, (weight for _, weight in mix), strict=True))

    def find_manifests(self, mix: Mix) -> list[Manifest | None]:
        """Returns the manifest of each adapter of a resolved mix, None for one in memory."""
        return [self._manifests.get(reference) for reference in mix.references]

    def fetch(self, reference: str) -> VerifiedAdapter:
        """Returns an adapter, from its slot or from the store; see `load_adapter` for the errors.

        Requests that wait for one version share one copy of it.
        """
        if "#" not in reference:
            return self.slots.find(reference) or self._read(reference)
        with self._locks.setdefault(reference, Lock()):
            found = self.slots.find(reference) or self._fetched.get(reference) or self._read(reference)
            self._fetched[reference] = found
            return found

    def _read(self, reference: str) -> VerifiedAdapter:
        if self.store is None:
            raise UsageError("this session has no store", "open it with one")
        manifest, adapter = load_adapter(self.store, reference, self.base)
        self._remember(reference, manifest)
        config_digest = manifest.files.get(PEFT_CONFIG, "")
        successors = None
        if self.can_draft:
            with self.store.open(manifest.reference) as version:
                successors = read_drafter(version, self.base.tokenizer.vocab_size)
        return VerifiedAdapter(
            adapter=adapter, digest=manifest.digest, config_digest=config_digest, successors=successors
        )

    @property
    def can_draft(self) -> bool:
        """True if a pass over several tokens costs little more than one over one: with packed weights."""
        return self.base.model.prepacked_head is not None

    def find_successors(self, mix: Mix) -> SuccessorTable | None:
        """Returns what drafts the text of a resolved mix, whose adapters are loaded: that of the heaviest of them."""
        found = [(abs(weight), self.slots.find(reference)) for reference, weight in mix]
        tables = [
            (weight, slot.successors) for weight, slot in found if slot is not None and slot.successors is not None
        ]
        return max(tables, key=lambda pair: pair[0])[1] if tables else None

    def load(self, references: Sequence[str]) -> None:
        """Loads adapters into slots, after all of them were verified; see `load_adapter` for the errors."""
        self.slots.load({reference: self.fetch(reference) for reference in references})

    def load_in_memory(self, adapters: Mapping[str, Adapter]) -> None:
        """Loads adapters that were never on disk; a name that is taken gets the new one."""
        self.slots.load({name: VerifiedAdapter(adapter=adapter) for name, adapter in adapters.items()})

    def load_slot_weights(self, mixes: Sequence[Mix]) -> Float[Tensor, "batch slots"]:
        """Returns the weight of each slot in each sequence of a batch; adapters that are not loaded are loaded."""
        self.load([reference for mix in mixes for reference, _ in mix])
        return self.slots.weights(mixes)

    def adapters_for(self, mixes: Sequence[Mix]) -> BatchAdapters | None:
        """Returns the adapters of a batch with one mix per sequence; None if all are the plain base."""
        weights = self.load_slot_weights(mixes)
        return BatchAdapters(self.slots.bank, weights) if weights.any() else None

    def select(self, *mixes: Mix) -> AdapterSelector:
        """Returns a selector of these mixes."""
        return lambda choices: self.adapters_for([mixes[choice] for choice in choices])

    def describe_adapters(self, mix: Mix, loaded: Mapping[str, VerifiedAdapter]) -> list[dict[str, Any]]:
        """Returns the adapters of a mix, so that a text can be traced: name, weight, hashes."""
        found = {name: loaded.get(name) or self.fetch(name) for name, _ in mix}
        return [
            {
                "adapter": label_of(name),
                "weight": weight,
                "sha256": found[name].digest,
                "config_sha256": found[name].config_digest,
            }
            for name, weight in mix
        ]

    def merge_into_base(self, mix: Mix) -> Session:
        """Returns a session over the base with a mix merged into its weights, so that a token costs no more than it.

        The adapted layers are new tensors, made from the original ones; the rest is shared, and this session does not
        change. Raises `UsageError` for a quantized base.
        """
        base = self.base
        self.load([reference for reference, _ in mix])
        if any(type(linear) not in (Linear, PrepackedLinear) for linear in base.model.iter_linears()):
            raise UsageError("adapters cannot be merged into a quantized base", "leave generate.merge_into_base out")
        shared = {id(module): module for module in base.model.modules() if not list(module.children())}
        model = copy.deepcopy(base.model, shared)  # the memo keeps leaf modules, and with them the weights, shared
        deltas: dict[str, Tensor] = {}
        for reference, weight in mix:
            for site, update in self.fetch(reference).adapter.updates.items():
                deltas[site] = deltas.get(site, torch.zeros(())) + weight * to_delta(update)
        if (delta := deltas.pop(HEAD, None)) is not None:
            model.add_to_head(delta)
        for site, delta in deltas.items():
            linear = model.get_submodule(site)
            assert isinstance(linear, Linear)
            model.set_submodule(site, linear.with_weight(linear.dense(torch.float32) + delta.to(base.runtime.device)))
        return Session(replace(base, model=model), prefix_bytes=self.prefixes.max_bytes)
