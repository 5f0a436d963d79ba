"""One adapter per domain, trained together, and every adapter measured on every domain's test text.

A domain is a folder with train.*, valid.* and test.* (.txt, .md, .json, .jsonl). The question it answers: does each
adapter win its own column, and by how much against the base?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import NotFoundError
from lora_gpt2.data.domains import SPLITS, find_split
from lora_gpt2.evaluation.matrix import Cell, LabelledSource, measure_matrix, read_sources
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.session import Session
from lora_gpt2.model.base import load_base
from lora_gpt2.model.runtime import choose_runtime
from lora_gpt2.recipe import Recipe
from lora_gpt2.recipe_files import load_recipe
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.references import BASE
from lora_gpt2.training.publish import AdapterReport
from lora_gpt2.training.run import train_recipes


@dataclass(frozen=True, kw_only=True)
class DomainsReport:
    """The trained adapters and the matrix over the test texts."""

    adapters: list[AdapterReport]
    cells: list[Cell]

    def winners(self) -> dict[str, str]:
        """Returns, for each domain, the adapter with the lowest perplexity on it."""
        return {
            source: min((c for c in self.cells if c.source == source), key=lambda c: c.score.nll_nats).adapter
            for source in dict.fromkeys(cell.source for cell in self.cells)
        }


def measure_domains(
    folders: Sequence[Path], store: Store, overrides: Sequence[str], reporter: Reporter
) -> DomainsReport:
    """Trains an adapter per folder, all in one run, and returns the matrix on their test texts."""
    recipes = [build_recipe_for(folder, overrides) for folder in folders]
    report = train_recipes(recipes, store, reporter, fresh=True)
    settings = recipes[0].evaluate
    session = Session(load_base(recipes[0].base, choose_runtime(settings.dtype)), store)
    rows = {name: session.select(Mix.parse([name])) for name in [BASE, *(recipe.name for recipe in recipes)]}
    sources = read_sources(
        [LabelledSource(recipe.name, recipe.data.test[0]) for recipe in recipes], recipes[0].data, reporter
    )
    return DomainsReport(
        adapters=report.adapters, cells=measure_matrix(session.base, rows, sources, settings, reporter)
    )


def build_recipe_for(folder: Path, overrides: Sequence[str]) -> Recipe:
    """Returns the recipe of a domain's folder; raises `NotFoundError` if a part is missing."""
    found: dict[str, tuple[str, ...]] = {}
    for key, stems in SPLITS.items():
        files = find_split(folder, stems)
        if not files:
            raise NotFoundError(
                f"{folder} has no {stems[0]} file", "a domain's folder holds train.*, valid.* and test.*"
            )
        found[f"data.{key}"] = files[:1]
    name = folder.name.lower().replace("_", "-")
    return load_recipe(None, overrides, {"name": name, **found})
