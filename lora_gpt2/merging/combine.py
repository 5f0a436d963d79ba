"""Several adapters into one new adapter: combined, verified, and only then published."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import CheckFailed, CorruptError, UsageError
from lora_gpt2.core.names import check_name
from lora_gpt2.data.prepared import SKETCH
from lora_gpt2.data.text_sketch import TextSketch
from lora_gpt2.evaluation.general import add_general
from lora_gpt2.evaluation.held_out import read_sketches
from lora_gpt2.evaluation.matrix import Cell, EvaluationText, measure_matrix
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.session import Session
from lora_gpt2.merging.checks import check_effect, check_exact
from lora_gpt2.model.lora import Adapter, merge_ranks
from lora_gpt2.model.merge import CombinedAdapter, DeltaAdapters, MergeRule, combine_adapters, to_delta
from lora_gpt2.model.probe import AdapterSelector, compute_logits, measure_difference
from lora_gpt2.recipe import EvaluateSettings, MergeSettings
from lora_gpt2.store.files import Origin, load_adapter, publish_adapter
from lora_gpt2.store.manifest import Manifest, Parent
from lora_gpt2.store.references import BASE

MERGED = "(merge)"  # not a name, so no adapter is called so


@dataclass(frozen=True, kw_only=True)
class Parents:
    """The adapters of a merge, verified, with their weights."""

    mix: Mix
    manifests: list[Manifest]
    adapters: list[Adapter]

    @property
    def weights(self) -> list[float]:
        """The weight of each."""
        return [weight for _, weight in self.mix]

    def to_lineage(self, factors: Sequence[float]) -> tuple[Parent, ...]:
        """Returns the parents as the merge's manifest records them."""
        return tuple(
            Parent(reference=manifest.reference, digest=manifest.digest, weight=factor)
            for manifest, factor in zip(self.manifests, factors, strict=True)
        )


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """A published merge and its verification.

    Args:
        name, version: the new adapter.
        method: the merge method.
        num_parameters, largest_rank: its size.
        relative_error: norm of what truncation cut off, over that of the whole update.
        max_logit_difference: maximum difference of its logits from the unmerged computation.
        effect: the same from the base.
        cells: parents, merge and base on each text.
    """

    name: str
    version: int
    method: str
    num_parameters: int
    largest_rank: int
    relative_error: float
    max_logit_difference: float
    effect: float
    cells: list[Cell]

    def __str__(self) -> str:
        """Returns the reference of the version, such as `both@1`."""
        return f"{self.name}@{self.version}"

    def to_json(self) -> dict[str, Any]:
        """Returns the report with the keys of `merge --json`."""
        return vars(self) | {"cells": [cell.to_json() for cell in self.cells]}


def open_parents(session: Session, mix: Mix) -> Parents:
    """Returns the adapters of a mix, loaded with every check.

    Raises:
        UsageError: none is named, or the same weights come twice.
        NotFoundError, CorruptError, MismatchError: see `load_adapter`.
    """
    if not mix:
        raise UsageError("a merge needs an adapter", "such as: lora-gpt2 merge law:0.6 code:0.4 --as both")
    assert session.store is not None
    loaded = [load_adapter(session.store, reference, session.base) for reference, _ in mix]
    seen: dict[str, str] = {}
    for manifest, _ in loaded:
        if other := seen.get(manifest.pin):
            raise UsageError(f"{manifest.reference} and {other} are the same weights", "give one, with its weight")
        seen[manifest.pin] = manifest.reference
    session.load_in_memory({reference: adapter for (reference, _), (_, adapter) in zip(mix, loaded, strict=True)})
    return Parents(mix=mix, manifests=[manifest for manifest, _ in loaded], adapters=[adapter for _, adapter in loaded])


def build_rule(settings: MergeSettings) -> MergeRule:
    """Returns the merge rule in a recipe's section."""
    return MergeRule(method=settings.method, density=settings.density, seed=settings.seed)


def merge_adapters(
    session: Session,
    mix: Mix,
    name: str,
    settings: MergeSettings,
    texts: Sequence[EvaluationText],
    *,
    evaluate: EvaluateSettings,
    reporter: Reporter,
    searched_on: Sequence[str] = (),
) -> MergeReport:
    """Combines a mix into a new version of `name` and returns what was measured.

    `searched_on` are the labels of the texts that weights and method were chosen on, which is recorded.

    Raises:
        UsageError: see `open_parents`; or the weights cancel, so that nothing would change.
        CheckFailed: the result is not what the method promises; nothing is published.
    """
    assert session.store is not None
    check_name(name)
    session.store.check_writable()
    parents, rule = open_parents(session, mix), build_rule(settings)
    check_deltas(parents, rule)
    combined = combine_adapters(
        parents.adapters, parents.weights, rule, rank=settings.rank, max_error=settings.max_error
    )
    session.load_in_memory({MERGED: combined.adapter})
    select_merged = session.select(Mix.single(MERGED))
    difference, effect = _verify(session, parents, combined, rule)
    singles = {reference: session.select(Mix.single(reference)) for reference, _ in mix}
    rows = {BASE: session.select(Mix()), **singles, MERGED: select_merged}
    references = [manifest.reference for manifest in parents.manifests]
    singles_known = {name: [exact] for name, exact in zip(mix.references, references, strict=True)}
    known = read_sketches(session.store, {**singles_known, MERGED: references})
    cells = measure_matrix(session.base, rows, add_general(texts), evaluate, reporter, sketches=known)
    provenance = {"by": "merge", "relative_error": combined.relative_error, "max_logit_difference": difference}
    provenance |= {"method": rule.method} | ({"searched_on": ", ".join(searched_on)} if searched_on else {})
    origin = _describe_origin(parents, rule, provenance, cells, known.get(MERGED))
    manifest = publish_adapter(session.store, name, combined.adapter, session.base, origin)
    return MergeReport(
        name=name,
        version=manifest.version,
        method=rule.method,
        num_parameters=manifest.num_parameters,
        largest_rank=max(combined.adapter.ranks.values()),
        relative_error=combined.relative_error,
        max_logit_difference=difference,
        effect=effect,
        cells=cells,
    )


def _verify(session: Session, parents: Parents, combined: CombinedAdapter, rule: MergeRule) -> tuple[float, float]:
    """Returns how far the merge's logits are from the unmerged computation and from the base; raises `CheckFailed`."""
    base, label = session.base, f"the merge by {rule.method}"
    reference = compute_logits(base, select_unmerged(session, parents, rule))
    merged, plain = compute_logits(base, session.select(Mix.single(MERGED))), compute_logits(base)
    difference, effect = measure_difference(reference, merged), measure_difference(plain, merged)
    check_effect(difference, effect, plain, label)
    if not combined.relative_error:
        check_exact(difference, reference, label)
    check_error(parents, combined, rule)
    return difference, effect


def _describe_origin(
    parents: Parents, rule: MergeRule, provenance: dict[str, Any], cells: Sequence[Cell], sketch: TextSketch | None
) -> Origin:
    """Returns what the manifest records: the parents, how they were merged, and the perplexities."""
    if not rule.steps.is_sum:
        provenance |= {"density": rule.density, "seed": rule.seed}
    seen = {cell.source: cell.trained_on for cell in cells if cell.adapter == MERGED and cell.trained_on}
    data = {"sources": sorted({s for m in parents.manifests for s in m.data.get("sources", [])})}
    return Origin(
        data=data if sketch is None or sketch.is_whole else data | {"sketch_is_whole": False},
        recipe={"description": f"Merged from {' and '.join(m.reference for m in parents.manifests)} by {rule.method}."},
        figures={
            "perplexity": {cell.source: cell.score.perplexity for cell in cells if cell.adapter == MERGED},
            "base_perplexities": {cell.source: cell.score.perplexity for cell in cells if cell.adapter == BASE},
            **({"documents_trained_on": seen} if seen else {}),
        },
        parents=parents.to_lineage(rule.scale_weights(parents.weights)),
        provenance=provenance,
        pages={} if sketch is None else {SKETCH: sketch.to_bytes()},
    )


def check_deltas(parents: Parents, rule: MergeRule) -> None:
    """Raises `UsageError` if a mix changes nothing, `CorruptError` if its update of a projection is not finite."""
    weights = rule.scale_weights(parents.weights)
    has_effect = False
    for site in dict.fromkeys(site for adapter in parents.adapters for site in adapter.updates):
        delta = rule.combine_site(parents.adapters, weights, site)
        if not torch.isfinite(delta).all():
            raise CorruptError(f"the merge is not finite at {site}", "use smaller weights, or another --method")
        has_effect = has_effect or bool(delta.any())
    if not has_effect:
        raise UsageError("the merge changes nothing: its weights are zero", "use other weights")


def check_error(parents: Parents, combined: CombinedAdapter, rule: MergeRule) -> None:
    """Raises `CheckFailed` unless the error that a merge reports is the one found by comparing dense matrices.

    But for rounding, which grows with the updates that are added up, however little is left of them.
    """
    weights = rule.scale_weights(parents.weights)
    lost = whole = added = 0.0
    for site, update in combined.adapter.updates.items():
        delta = rule.combine_site(parents.adapters, weights, site).double()
        lost += float((delta - to_delta(update).double()).square().sum())
        whole += float(delta.square().sum())
        own = [(adapter.updates.get(site), weight) for adapter, weight in zip(parents.adapters, weights, strict=True)]
        added += sum(abs(weight) * float(to_delta(each).double().norm()) for each, weight in own if each) ** 2
    found, rounding = math.sqrt(lost / whole), 1e-5 * max(1.0, math.sqrt(added / whole))
    if not abs(found - combined.relative_error) <= rounding + 0.01 * combined.relative_error:
        raise CheckFailed(
            f"the merge by {rule.method} reports a relative error of {combined.relative_error:.2e}, "
            f"but it is {found:.2e}",
            "nothing was written; please report it, with the adapters if you can",
        )


def select_unmerged(session: Session, parents: Parents, rule: MergeRule) -> AdapterSelector:
    """Returns the computation that a merge must reproduce: a mix in the bank if the method is a sum, else dense ΔW."""
    weights = rule.scale_weights(parents.weights)
    if rule.steps.is_sum:
        return session.select(
            Mix((reference, weight) for (reference, _), weight in zip(parents.mix, weights, strict=True))
        )
    adapted = merge_ranks(adapter.ranks for adapter in parents.adapters)
    return lambda choices: DeltaAdapters(
        lambda site: rule.combine_site(parents.adapters, weights, site) if site in adapted else None
    )
