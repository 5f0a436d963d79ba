"""Merging in one call: the search for weights, the merge and its verification, into an adapter or into the base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import ConflictError, UsageError
from lora_gpt2.core.names import check_name
from lora_gpt2.evaluation.matrix import LabelledSource, read_sources
from lora_gpt2.inference.mix import Mix, read_manifests
from lora_gpt2.inference.open import open_session
from lora_gpt2.merging.combine import MergeReport, merge_adapters
from lora_gpt2.merging.into_base import MergedBaseReport, merge_into_base
from lora_gpt2.merging.search import SearchReport, search_weights
from lora_gpt2.model.merge import METHODS
from lora_gpt2.recipe import MergeMethod, MergeSettings, Recipe
from lora_gpt2.recipe.unused import list_unused_by_merge
from lora_gpt2.store.catalog import Store


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """What a merge came to.

    Args:
        method: the method of the merge; of a search alone, the best.
        search: every mix that was measured, where the weights were searched.
        adapter: the adapter that was published.
        base: the base that was written.
    """

    method: MergeMethod
    search: SearchReport | None
    adapter: MergeReport | None
    base: MergedBaseReport | None

    def to_json(self) -> dict[str, Any]:
        """Returns the result with the keys of `merge --json`."""
        search = {"search": self.search.to_json()} if self.search else {}
        written = self.adapter or self.base
        return {"method": self.method} | search | (written.to_json() if written else {})


def choose_weight(settings: MergeSettings) -> float | None:
    """Returns the weight of adapters that have none: 1 where the method takes a mean itself (TIES); None: shares."""
    return 1.0 if METHODS[settings.method].elects_sign else None


def merge(
    mix: Mix,
    sources: Sequence[LabelledSource],
    store: Store,
    recipe: Recipe,
    reporter: Reporter,
    *,
    name: str | None = None,
    into_base: Path | None = None,
    search: bool = False,
    on_search: Callable[[SearchReport], None] | None = None,
) -> MergeResult:
    """Combines adapters into a new one, or writes them into the base; verifies the result before it is kept.

    Args:
        mix: the adapters and their weights.
        sources: texts to measure the base, the parents and the merge on, beside general English.
        store: where the adapters are, and where the new one is published.
        recipe: its `merge`, `evaluate` and `data` settings.
        reporter: shows progress.
        name: the new adapter.
        into_base: the new folder of a plain GPT-2, instead of an adapter.
        search: find the weights and the method that are best over the texts; neither `name` nor `into_base` is needed.
        on_search: receives the search, before its best mix is merged.

    Raises:
        UsageError: it is not said where the result goes, or a mix is none.
        ConflictError: `into_base` exists.
        NotFoundError: there is no such adapter.
        CheckFailed: the result does not compute what it should; nothing is kept.
    """
    _check_target(name, into_base, search, store)
    read_manifests(store, [str(mix)])
    texts = read_sources(sources, recipe.data, reporter)
    session, _ = open_session(store, mix.references, recipe, "float32")
    settings, found = recipe.merge, None
    how: dict[str, Any]
    for line in list_unused_by_merge(recipe, is_search=search, is_base=into_base is not None, is_adapter=bool(name)):
        reporter.message(line)
    if search:
        found = search_weights(session, mix, texts, settings, recipe.evaluate, reporter)
        if on_search is not None:
            on_search(found)
        best = found.best
        if found.base.mean <= best.mean:
            reporter.message("no mix is better than the base alone on these texts")
        mix = Mix((reference, weight) for reference, weight in zip(mix.references, best.weights, strict=True) if weight)
        settings = settings.model_copy(update={"method": best.method})
    adapter = written = None
    how = {"evaluate": recipe.evaluate, "reporter": reporter, "searched_on": found.labels if found else []}
    if name:
        adapter = merge_adapters(session, mix, name, settings, texts, **how)
    if into_base:
        written = merge_into_base(session, mix, into_base, settings, texts, **how)
    return MergeResult(method=settings.method, search=found, adapter=adapter, base=written)


def _check_target(name: str | None, into_base: Path | None, search: bool, store: Store) -> None:
    """Finds out now, not after the work, whether the result has a place."""
    if bool(name) + bool(into_base) > 1 or not (name or into_base or search):
        raise UsageError("say where the merge goes", "--as NAME for an adapter, --into-base DIR for a plain GPT-2")
    if name:
        check_name(name)
        store.check_writable()
    if into_base and (into_base.exists() or into_base.is_symlink()):
        raise ConflictError(f"{into_base} exists", "choose a new folder, or remove it first")
