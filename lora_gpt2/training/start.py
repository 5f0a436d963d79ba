"""The adapter that training continues from: found, given the wanted shape, and remembered as the new one's parent.

`lora.init_from` names a version of the store, or what `adapters import` takes. `auto` is the mix of the store's
adapters under which a sample of the training text is most likely, found by `evaluation/weight_search.py` among the best
`MAX_PARENTS` of them, and then truncated to the new adapter's rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import NotFoundError, RecipeError, UsageError
from lora_gpt2.core.names import AUTO
from lora_gpt2.data.blocks import BlockBatch
from lora_gpt2.data.inspect import list_documents
from lora_gpt2.data.prepared import SPLITS
from lora_gpt2.data.text_sketch import TextSketch
from lora_gpt2.data.tokenizer import Tokenizer
from lora_gpt2.evaluation.held_out import read_sketch
from lora_gpt2.evaluation.weight_search import search_weights_of
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.session import Session
from lora_gpt2.model.base import Base
from lora_gpt2.model.checkpoint import Checkpoint
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.gpt2 import ActiveAdapters
from lora_gpt2.model.lora import Adapter, list_sites
from lora_gpt2.model.merge import MergeRule, combine_adapters
from lora_gpt2.model.reshape import SHAPE, build_pissa, describe_shape, reshape_adapter
from lora_gpt2.model.runtime import as_float64
from lora_gpt2.model.scoring import token_nll
from lora_gpt2.recipe import LoraSettings, Recipe
from lora_gpt2.renamed_settings import upgrade_section
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.exchange import parse_adapter
from lora_gpt2.store.fetch import FetchedAdapter, fetch_adapter, is_foreign
from lora_gpt2.store.files import load_adapter
from lora_gpt2.store.lineage import find_parent
from lora_gpt2.store.manifest import PEFT_CONFIG, WEIGHTS, Manifest, Parent
from lora_gpt2.store.peft.config import parse_peft_config
from lora_gpt2.store.peft.convert import DORA_RANK, weight_of
from lora_gpt2.store.references import AdapterRef, name_of
from lora_gpt2.store.version import Version
from lora_gpt2.training.slot import TrainingSlot

MAX_PARENTS = 4
LEAST_TOKENS, MOST_TOKENS, SAMPLE_SHARE = 1024, 8192, 100
"""The sample is one in so many training tokens, within these bounds, so that the search costs a tenth of training."""
SEARCH_STEPS = 24
LEAST_GAIN = 0.01  # nats per token, below which a mix is not worth its memory of other texts
BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Start:
    """The adapter that a slot starts from.

    Args:
        adapter: in the shape of the slot's recipe.
        parents: the versions that it was made from, with their weights.
        source: the folder, archive or hub id that it was made from, if it is not from the store.
        relative_error: norm of the part of the parents' update that was lost, over that of the whole.
    """

    adapter: Adapter
    parents: tuple[Parent, ...] = ()
    source: str = ""
    relative_error: float = 0.0


def inherit_shape(recipe: Recipe, store: Store) -> Recipe:
    """Returns the recipe with a parent that has a version, and with its rank, alpha and targets where none are set.

    A rank that is set does away with the parent's alpha and rank pattern. Recipes without a parent, or with `auto`,
    come back as they are, and so does one that has been here before.

    Raises:
        NotFoundError: there is no such adapter; see `fetch_adapter` for the other errors.
    """
    lora = recipe.lora
    if lora.init_from in ("", AUTO):
        return recipe
    config = Checkpoint.open(recipe.base).config
    if is_foreign(lora.init_from):
        reference, shape = lora.init_from, _read_foreign_shape(fetch_adapter(lora.init_from), config)
    else:
        with _open_version(store, lora.init_from) as version:
            reference = version.manifest.reference
            shape = _parse_shape(version.read_file(PEFT_CONFIG), reference, config)
            trained = upgrade_section("lora", version.manifest.recipe.get("lora", {}))
        if any(target.startswith("c_attn.") for target in trained.get("targets", ())):
            shape = {key: trained[key] for key in SHAPE if key in trained}
    own = lora.model_dump(include=lora.model_fields_set)
    if "rank" in own:
        shape = {key: value for key, value in shape.items() if key not in ("alpha", "rank_pattern")}
    if "targets" in own:
        pattern = shape.get("rank_pattern", {})
        shape["rank_pattern"] = {target: rank for target, rank in pattern.items() if target in own["targets"]}
    if "rank_pattern" in own and "rank" not in own:
        own["rank_pattern"] = {**shape.get("rank_pattern", {}), **own["rank_pattern"]}
    try:
        settings = LoraSettings.model_validate({**shape, **own, "init_from": reference})
    except ValidationError as error:
        reason = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise RecipeError(
            f"these settings do not fit {reference}: {reason}", "set lora.targets or lora.rank too"
        ) from error
    return recipe.model_copy(update={"lora": settings})


def pin_parent(recipe: Recipe, then: str) -> Recipe:
    """Returns the recipe with the version that an interrupted run continues from, where it names no version itself."""
    if not then or name_of(then) != recipe.lora.init_from:
        return recipe
    lora = recipe.lora.model_copy(update={"init_from": then})
    return recipe.model_copy(update={"lora": lora})


@contextmanager
def _open_version(store: Store, reference: str) -> Iterator[Version]:
    """Yields a version of the store; a folder that is named like a missing one is pointed out."""
    try:
        with store.open(AdapterRef.parse(reference).label) as version:
            yield version
    except NotFoundError as error:
        if not Path(reference).exists():
            raise
        raise NotFoundError(error.message, f"a folder is named with its path: --from ./{reference}") from error


def _read_foreign_shape(source: FetchedAdapter, config: GPT2Config) -> dict[str, Any]:
    if source.loralib is not None:
        raise UsageError(f"{source.where} does not say its alpha", "import it first: lora-gpt2 adapters import")
    return _parse_shape(source.files[PEFT_CONFIG], source.where, config, source.files.get(WEIGHTS, b""))


def _parse_shape(content: bytes, where: str, config: GPT2Config, weights: bytes = b"") -> dict[str, Any]:
    """Returns the shape that PEFT's configuration describes; of DoRA and PiSSA, that of what they are converted to."""
    spec = parse_peft_config(content, where, weights)
    ranks = {site: spec.rank_of(site) for site in list_sites(config) if spec.is_target(site)}
    if not ranks:
        raise UsageError(f"{where} adapts nothing of '{config.n_layer}' blocks", "use an adapter of this base")
    lowest = min(ranks, key=ranks.__getitem__)
    alpha = spec.alpha_of(lowest)
    if spec.pissa:
        ranks, alpha = {site: 2 * rank for site, rank in ranks.items()}, 2 * alpha
    if spec.dora:
        ranks = {site: max(DORA_RANK, rank) for site, rank in ranks.items()}
    return describe_shape(ranks, alpha, spec.use_rslora)


def build_start(slot: TrainingSlot, store: Store, base: Base, reporter: Reporter) -> Start | None:
    """Returns the adapter that a slot starts from; None for a fresh one.

    Raises:
        UsageError: nothing of the parent's update is among the targets.
        NotFoundError, CorruptError, MismatchError: see `load_adapter` and `parse_adapter`.
    """
    lora = slot.recipe.lora
    if lora.init == "pissa":
        return Start(adapter=build_pissa(base.config, lora, lambda site: weight_of(base, site)))
    if not lora.init_from:
        return None
    if lora.init_from == AUTO:
        return _mix_store(slot, store, base, reporter)
    if is_foreign(lora.init_from):
        source = fetch_adapter(lora.init_from)
        parents = (_to_parent(source.manifest),) if source.manifest else ()
        return _reshape(slot, base, parse_adapter(source, base, reporter), parents, source.where)
    manifest, adapter = load_adapter(store, lora.init_from, base)
    return _reshape(slot, base, adapter, (_to_parent(manifest),))


def _to_parent(manifest: Manifest, weight: float = 1.0) -> Parent:
    return Parent(reference=manifest.reference, digest=manifest.digest, weight=weight)


def _reshape(slot: TrainingSlot, base: Base, parent: Adapter, parents: tuple[Parent, ...], source: str = "") -> Start:
    return reshape_parent(slot.recipe, base, parent, parents, source)


def reshape_parent(recipe: Recipe, base: Base, parent: Adapter, parents: tuple[Parent, ...], source: str = "") -> Start:
    """Returns a parent in the shape of a recipe; raises `UsageError` if nothing of its update is left in it."""
    adapter, error = reshape_adapter(parent, base.config, recipe.lora, recipe.train.seed)
    if error >= 1:
        raise UsageError(
            f"{recipe.lora.init_from} changes none of the targets {', '.join(recipe.lora.targets)}",
            "name its targets in lora.targets, or leave them out",
        )
    return Start(adapter=adapter, parents=parents, source=source, relative_error=error)


@torch.no_grad()
def _mix_store(slot: TrainingSlot, store: Store, base: Base, reporter: Reporter) -> Start | None:
    """Returns the mix of the store's adapters under which the text is most likely; None if that is the plain base."""
    manifests = store.list_for_base(base.fingerprint)
    if not manifests:
        reporter.message(f"{slot.name}: the store has no adapter of '{base.name}' to start from")
        return None
    session, sample = Session(base, store, max_slots=max(BATCH, len(manifests))), _read_sample(slot)
    with reporter.task("choosing a start", len(manifests) + SEARCH_STEPS, "mixes") as task:

        def measure(mix: Mix, batch: BlockBatch = sample) -> float:
            task.advance(1)
            return _measure_nll(base, batch, session.adapters_for([mix]))

        first = sample.take(range(max(1, len(sample.inputs) // 2)))
        losses = {m.reference: measure(Mix.single(m.reference), first) for m in manifests}
        chosen = [m for m in sorted(manifests, key=lambda m: losses[m.reference]) if np.isfinite(losses[m.reference])]
        chosen = chosen[:MAX_PARENTS]
        known = {(0.0,) * len(chosen): measure(Mix())}

        def measure_weights(weights: tuple[float, ...]) -> float:
            pairs = zip(chosen, weights, strict=True)
            known[weights] = measure(Mix((m.reference, weight) for m, weight in pairs if weight))
            return known[weights]

        if chosen:
            search_weights_of(len(chosen), measure_weights, [], SEARCH_STEPS)
    best = min(known, key=known.__getitem__)
    if known[(0.0,) * len(chosen)] - known[best] < LEAST_GAIN:
        best = (0.0,) * len(chosen)
    taken = [(manifest, weight) for manifest, weight in zip(chosen, best, strict=True) if weight]
    if not taken:
        reporter.message(f"{slot.name}: no adapter of the store makes the text more likely; a fresh one")
        return None
    adapters = [load_adapter(store, manifest.reference, base)[1] for manifest, _ in taken]
    mixed = combine_adapters(adapters, [weight for _, weight in taken], MergeRule()).adapter
    return _reshape(slot, base, mixed, tuple(_to_parent(manifest, weight) for manifest, weight in taken))


def _read_sample(slot: TrainingSlot) -> BlockBatch:
    """Returns the first blocks that training will see."""
    tokens = min(MOST_TOKENS, max(LEAST_TOKENS, slot.num_steps * slot.tokens_per_step // SAMPLE_SHARE))
    count = max(1, tokens // slot.recipe.data.block_size)
    steps = range(-(-count // slot.order.batch_size))
    return slot.data.train.read([index for step in steps for index in slot.order.indices(step)][:count])


def _measure_nll(base: Base, batch: BlockBatch, adapters: ActiveAdapters | None) -> float:
    """Returns the mean NLL of a batch in nats per target."""
    total, device = 0.0, base.runtime.device
    for start in range(0, len(batch.inputs), BATCH):
        part = batch.take(range(start, min(start + BATCH, len(batch.inputs))))
        positions = None if part.positions is None else torch.from_numpy(part.positions).to(device)
        inputs, targets = (torch.from_numpy(side).to(device) for side in (part.inputs, part.targets))
        nll = token_nll(base.model, inputs, targets.flatten(), adapters, positions=positions)
        total += float(as_float64(nll).sum())
    return total / max(1, int((batch.targets >= 0).sum()))


def describe_start(start: Start, name: str) -> str:
    """Returns one line on what a slot starts from."""
    mixed = len(start.parents) > 1
    named = [f"{p.reference}:{p.weight:g}" if mixed or p.weight != 1 else p.reference for p in start.parents]
    shown = "+".join(named) or start.source
    lost = f", with a relative error of {start.relative_error:.3f} in this shape" if start.relative_error else ""
    return f"{name}: continues from {shown}{lost}" if shown else f"{name}: starts as PiSSA"


def digest_parent(recipe: Recipe, store: Store) -> str:
    """Returns the sha256 of the weights that a recipe continues from; "" where it names no single adapter."""
    reference = recipe.lora.init_from
    if reference in ("", AUTO):
        return ""
    if is_foreign(reference):
        return hashlib.sha256(fetch_adapter(reference).files[WEIGHTS]).hexdigest()
    return store.read_manifest(reference).digest


def count_seen_by_parents(slot: TrainingSlot, store: Store, tokenizer: Tokenizer) -> dict[str, tuple[int, int]]:
    """Returns, by parent, how many of the slot's held-out documents it was trained on, of how many; where some were."""
    held_out = (document for split in SPLITS[1:] for document in list_documents(slot.data, split, tokenizer))
    texts = [document.prompt + document.text for document in held_out]
    found = {}
    for parent in slot.parents:
        known = find_parent(store, parent, ())
        sketch = read_sketch(store, known.reference) if known else None
        if sketch is not None and (seen := sketch.count_seen(texts)):
            found[parent.reference] = (seen, len(texts))
    return found


def join_sketches(slot: TrainingSlot, store: Store) -> TextSketch:
    """Returns the sketch of everything that an adapter was trained on, its parents' texts included."""
    sketches: list[TextSketch | None] = [slot.data.sketch, *([None] if slot.source else [])]
    for parent in slot.parents:
        known = find_parent(store, parent, ())
        sketches.append(read_sketch(store, known.reference) if known else None)
    return TextSketch.join(sketches)
