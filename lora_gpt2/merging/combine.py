"""Several adapters into one new adapter: combined, proved, and only then published."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import CheckFailed, CorruptError, UsageError
from lora_gpt2.core.names import check_name
from lora_gpt2.data.prepared import SKETCH
from lora_gpt2.data.text_sketch import TextSketch
from lora_gpt2.evaluation.general import add_general
from lora_gpt2.evaluation.held_out import read_sketches
from lora_gpt2.evaluation.matrix import Cell, Source, measure_matrix
from lora_gpt2.inference.session import BASE, Mix, Session
from lora_gpt2.merging.checks import check_effect, check_exact
from lora_gpt2.model.lora import Adapter, merge_ranks
from lora_gpt2.model.merge import (
    SUMS,
    CombinedAdapter,
    DeltaAdapters,
    combine_adapters,
    combine_site,
    scale_weights,
    to_delta,
)
from lora_gpt2.model.probe import AdaptersForRows, compute_logits, measure_difference
from lora_gpt2.recipe import EvaluateSettings, MergeSettings
from lora_gpt2.store.files import Origin, load_adapter, publish_adapter
from lora_gpt2.store.manifest import Manifest, Parent

MERGED = "(merge)"  # not a name, so no adapter is called so


@dataclass(frozen=True)
class Parents:
    """The adapters of a merge, checked, with their weights."""

    mix: Mix
    manifests: list[Manifest]
    adapters: list[Adapter]

    @property
    def weights(self) -> list[float]:
        """How much of each."""
        return [weight for _, weight in self.mix]

    def to_lineage(self, factors: Sequence[float]) -> tuple[Parent, ...]:
        """Returns what the merge's manifest says of them."""
        return tuple(
            Parent(reference=manifest.reference, digest=manifest.digest, weight=factor)
            for manifest, factor in zip(self.manifests, factors, strict=True)
        )


@dataclass(frozen=True)
class MergeReport:
    """A published merge and its proof; `cells` has the parents, the merge and the base on each text.

    `max_logit_difference` is from the unmerged computation, `effect` the same from the base.
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
        if other := seen.get(manifest.digest):
            raise UsageError(f"{manifest.reference} and {other} are the same weights", "give one, with its weight")
        seen[manifest.digest] = manifest.reference
    session.add({reference: adapter for (reference, _), (_, adapter) in zip(mix, loaded, strict=True)})
    return Parents(mix, [manifest for manifest, _ in loaded], [adapter for _, adapter in loaded])


def merge_adapters(
    session: Session,
    mix: Mix,
    name: str,
    how: MergeSettings,
    sources: Sequence[Source],
    settings: EvaluateSettings,
    reporter: Reporter,
) -> MergeReport:
    """Combines a mix into a new version of `name` and returns what was measured.

    Raises:
        UsageError: see `open_parents`; or the weights cancel, so that nothing would change.
        CheckFailed: the result is not what the method says; nothing is published.
    """
    assert session.store is not None
    check_name(name)
    session.store.check_writable()
    parents = open_parents(session, mix)
    check_deltas(parents, how)
    combined = combine_adapters(parents.adapters, parents.weights, how)
    base = session.base
    session.add({MERGED: combined.adapter})
    reference = compute_logits(base, unmerged_rows(session, parents, how))
    merged_rows = session.for_rows(((MERGED, 1.0),))
    difference = measure_difference(reference, compute_logits(base, merged_rows))
    what, plain = f"the merge by {how.method}", compute_logits(base)
    effect = measure_difference(plain, compute_logits(base, merged_rows))
    check_effect(difference, effect, plain, what)
    if not combined.relative_error:
        check_exact(difference, reference, what)
    check_error(parents, combined, how)
    singles = {reference: session.for_rows(((reference, 1.0),)) for reference, _ in mix}
    rows = {BASE: session.for_rows(()), **singles, MERGED: merged_rows}
    known = read_sketches(session.store, [reference for reference, _ in mix])
    cells = measure_matrix(base, rows, add_general(sources), settings, reporter, sketches=known)
    factors = scale_weights(parents.weights, how)
    made = {"by": "merge", "relative_error": combined.relative_error, "max_logit_difference": difference}
    made |= how.model_dump(include={"method", *(set() if how.method in SUMS else {"density", "seed"})})
    figures = {"perplexity": {cell.source: cell.score.perplexity for cell in cells if cell.adapter == MERGED}}
    figures |= {"base_perplexities": {cell.source: cell.score.perplexity for cell in cells if cell.adapter == BASE}}
    pages = _join_sketches(session, parents)
    origin = Origin(
        {"sources": sorted({s for m in parents.manifests for s in m.data.get("sources", [])})},
        {"description": f"Merged from {' and '.join(m.reference for m in parents.manifests)} by {how.method}."},
        figures,
        parents.to_lineage(factors),
        made,
        pages=pages,
    )
    manifest = publish_adapter(session.store, name, combined.adapter, base, origin)
    largest = max(combined.adapter.ranks.values())
    return MergeReport(
        name,
        manifest.version,
        how.method,
        manifest.num_parameters,
        largest,
        combined.relative_error,
        difference,
        effect,
        cells,
    )


def _join_sketches(session: Session, parents: Parents) -> dict[str, bytes]:
    """Returns the file that tells whether a text was trained on by one of the parents; none where that is not known."""
    references = [manifest.reference for manifest in parents.manifests]
    found = read_sketches(session.store, references)
    if len(found) < len(references):
        return {}
    return {SKETCH: TextSketch.build([sketch.runs for sketch in found.values()]).to_bytes()}


def check_deltas(parents: Parents, how: MergeSettings) -> None:
    """Raises `UsageError` if a mix changes nothing, `CorruptError` if its change of a projection is not finite."""
    factors = scale_weights(parents.weights, how)
    has_effect = False
    for site in dict.fromkeys(site for adapter in parents.adapters for site in adapter.updates):
        delta = combine_site(parents.adapters, factors, how, site)
        if not torch.isfinite(delta).all():
            raise CorruptError(f"the merge is not finite at {site}", "use smaller weights, or another --method")
        has_effect = has_effect or bool(delta.any())
    if not has_effect:
        raise UsageError("the merge changes nothing: its weights are zero", "use other weights")


def check_error(parents: Parents, combined: CombinedAdapter, how: MergeSettings) -> None:
    """Raises `CheckFailed` unless the error that a merge states is the one that is found by comparing matrices."""
    factors = scale_weights(parents.weights, how)
    lost = whole = 0.0
    for site, update in combined.adapter.updates.items():
        delta = combine_site(parents.adapters, factors, how, site).double()
        lost += float((delta - to_delta(update).double()).square().sum())
        whole += float(delta.square().sum())
    found = math.sqrt(lost / whole)
    if not abs(found - combined.relative_error) <= 1e-5 + 0.01 * combined.relative_error:
        raise CheckFailed(
            f"the merge by {how.method} says that it lost {combined.relative_error:.2e} and lost {found:.2e}",
            "nothing was written; please report it, with the adapters if you can",
        )


def unmerged_rows(session: Session, parents: Parents, how: MergeSettings) -> AdaptersForRows:
    """Returns the computation that a merge must reproduce: a soft mix in the bank where the method is a sum."""
    if how.method not in SUMS:
        weights, adapted = parents.weights, merge_ranks(adapter.ranks for adapter in parents.adapters)
        return lambda rows: DeltaAdapters(
            lambda site: combine_site(parents.adapters, weights, how, site) if site in adapted else None
        )
    factors = scale_weights(parents.weights, how)
    mix = tuple((reference, factor) for (reference, _), factor in zip(parents.mix, factors, strict=True))
    return session.for_rows(mix)
