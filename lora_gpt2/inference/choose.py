"""Which adapter a text belongs to: the one under which it is most likely, if that is clear.

One mixed batch scores the text under every adapter and under the base. Taken as equally likely beforehand, Bayes' rule
turns the likelihoods of the whole text into probabilities; below `SURE` nothing is claimed and the base is taken.
Adapters of one family (one continues the other, or is a merge of it) know the same text and would share what is
probable, so theirs is added up, and its most likely member is taken.
A language model's confidence is no guarantee: it compares these adapters with each other, nothing else.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from lora_gpt2.core.errors import LoraGpt2Error
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.session import Session
from lora_gpt2.model.runtime import as_float64
from lora_gpt2.model.scoring import token_nll
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.lineage import MOST_GENERATIONS
from lora_gpt2.store.manifest import Parent
from lora_gpt2.store.references import BASE

SURE = 0.8
BATCH = 16


@dataclass(frozen=True, kw_only=True)
class AdapterChoice:
    """The adapter chosen (or `base`), how probable its family is, and NLL in nats per token under each candidate."""

    adapter: str
    probability: float
    nll_nats_per_token: dict[str, float]

    def __str__(self) -> str:
        """Returns the choice and how sure it is."""
        sure = f"{self.probability:.0%} sure" if self.adapter != BASE else "no adapter is clearly the one"
        return f"adapter {self.adapter}: {sure}"


def _leave_copies_out(session: Session, names: Sequence[str]) -> list[str]:
    """Returns the names without those of the same adapter under another one: copies would share its probability."""
    found: dict[Hashable, str] = {}
    for name in names:
        mix = session.resolve(Mix.parse([name]))
        session.load(mix.references)
        found.setdefault(session.identify(mix) or name, name)
    return list(found.values())


@torch.inference_mode()
def choose_adapter(session: Session, text: str, names: Sequence[str], *, abstains: bool = True) -> AdapterChoice:
    """Returns the adapter of `names` under which the text is most likely; the base where none is clearly so.

    Of copies of one adapter the first is taken.

    If it never `abstains`, the most likely adapter is taken, whatever the base says. The text is scored after EOS; of a
    text that is longer than the context, what fits at its end.
    """
    base = session.base
    ids = base.tokenizer.encode(text)[-base.config.n_positions + 1 :]
    candidates = _leave_copies_out(session, [name for name in names if name != BASE])
    if not candidates or (abstains and not ids):
        return AdapterChoice(adapter=BASE, probability=0.0, nll_nats_per_token={})
    if not ids:
        return AdapterChoice(adapter=candidates[0], probability=1 / len(candidates), nll_nats_per_token={})
    candidates += [BASE] if abstains else []
    tokens = torch.tensor([base.tokenizer.eos_id, *ids], device=base.runtime.device)
    totals: list[float] = []
    for start in range(0, len(candidates), BATCH):
        mixes = [session.resolve(Mix.parse([name])) for name in candidates[start : start + BATCH]]
        inputs, targets = tokens[:-1].expand(len(mixes), -1), tokens[1:].repeat(len(mixes))
        nll = token_nll(base.model, inputs, targets, session.adapters_for(mixes))
        sums = as_float64(nll).view(len(mixes), -1).sum(1)
        totals += sums.where(sums.isfinite(), torch.inf).tolist()  # an adapter that fails here is not likely at all
    probabilities = torch.tensor(totals, dtype=torch.float64).neg().softmax(0).tolist()
    families = _find_families(session, candidates, probabilities)
    together = dict.fromkeys(families, 0.0)
    for family, probability in zip(families, probabilities, strict=True):
        together[family] += probability
    best = max(range(len(candidates)), key=lambda index: (together[families[index]], probabilities[index]))
    probability = together[families[best]]
    per_token = {name: total / len(ids) for name, total in zip(candidates, totals, strict=True)}
    adapter = candidates[best] if probability >= SURE or not abstains else BASE
    return AdapterChoice(adapter=adapter, probability=probability, nll_nats_per_token=per_token)


def _find_families(session: Session, names: Sequence[str], probabilities: Sequence[float]) -> list[Hashable]:
    """Returns what names the family of each adapter: its first ancestor; a merge is of its most likely parent's."""
    store, found = session.store, [session.find_manifests(session.resolve(Mix.parse([name]))) for name in names]
    manifests = [each[0] if each else None for each in found]
    families: list[Hashable] = []
    for index, manifest in enumerate(manifests):
        if manifest is not None and len(manifest.parents) == 1 and store is not None:
            families.append(_find_root(store, manifest.parents[0]))
        else:
            families.append(manifest.digest if manifest is not None else index)
    for index, manifest in enumerate(manifests):
        if manifest is not None and len(manifest.parents) > 1 and store is not None:
            roots = {_find_root(store, parent) for parent in manifest.parents}
            known = [each for each, family in enumerate(families) if family in roots and each != index]
            families[index] = families[max(known, key=probabilities.__getitem__)] if known else families[index]
    return families


@lru_cache(maxsize=1024)
def _find_root(store: Store, parent: Parent) -> str:
    """Returns the digest of the first of those that each continues the one before, as far as the store has them."""
    for _ in range(MOST_GENERATIONS):
        try:
            manifest = store.read_manifest(f"{parent.reference}#{parent.digest}")
        except LoraGpt2Error:
            break
        if len(manifest.parents) != 1:
            break
        parent = manifest.parents[0]
    return parent.digest
