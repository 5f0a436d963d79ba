"""The candidates of a search: which there are, how they are reported, and what is kept with the adapter that won."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_gpt2.core.fingerprint import fingerprint_json
from lora_gpt2.evaluation.general import measure_general
from lora_gpt2.evaluation.perplexity import to_perplexity
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.session import Session
from lora_gpt2.recipe import Recipe
from lora_gpt2.recipe_files import set_values
from lora_gpt2.store.catalog import Store
from lora_gpt2.training.halving import SuccessiveHalving

if TYPE_CHECKING:
    from lora_gpt2.training.trainer import Trainer

CANDIDATES = "candidates.json"
NAME_LENGTH = 52  # of an adapter, to leave room for what makes it the name of a candidate
Candidate = tuple[Recipe, dict[str, Any]]
"""A recipe, and the settings in which it differs from that of the search."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is searched.

    Args:
        recipe: that of the adapter, which the best candidate is published as.
        candidates: their recipes have names of their own.
        halving: says which of them go on.
    """

    recipe: Recipe
    candidates: Sequence[Candidate]
    halving: SuccessiveHalving

    @classmethod
    def build(cls, recipe: Recipe, num_candidates: int) -> Search:
        """Returns the search among candidates of a recipe; see `list_candidates`."""
        found = list_candidates(recipe, num_candidates)
        count, name = len(found), recipe.name
        if len(name) > NAME_LENGTH:
            name = f"{name[: NAME_LENGTH - 9]}-{fingerprint_json(name)[:8]}"
        longest = max(candidate.train.steps or 0 for candidate, _ in found)
        named = [
            (_name_candidate(candidate, f"{name}.{index}-of-{count}", settings), settings)
            for index, (candidate, settings) in enumerate(found, start=1)
        ]
        return cls(recipe=recipe, candidates=named, halving=SuccessiveHalving.build(len(found), longest))

    @property
    def recipes(self) -> list[Recipe]:
        """The candidates' recipes."""
        return [candidate for candidate, _ in self.candidates]

    @property
    def names(self) -> list[str]:
        """The candidates' names."""
        return [candidate.name for candidate in self.recipes]

    @property
    def num_steps(self) -> int:
        """The steps of the longest candidate."""
        return max(candidate.train.steps or 0 for candidate in self.recipes)

    def rename(self, candidate: Recipe) -> Recipe:
        """Returns the recipe of a candidate as that of the adapter."""
        return candidate.model_copy(update={"name": self.recipe.name, "description": self.recipe.description})


def _name_candidate(recipe: Recipe, name: str, settings: dict[str, Any]) -> Recipe:
    train = recipe.train.model_copy(update={"sample_tokens": 0})
    description = ", ".join(f"{key} {value}" for key, value in settings.items())
    return recipe.model_copy(update={"name": name, "train": train, "description": description})


@dataclass(frozen=True, kw_only=True)
class CandidateReport:
    """One candidate of a search.

    Args:
        settings: those in which it differs from the recipe, by dotted key.
        steps: number of steps it trained for.
        validation_perplexity: the best on the validation tokens of the run, on which candidates are compared.
        general_perplexity: on general English, of the same weights; None if it diverged.
        divergence: from the base on held-out general text, where `train.forget` is set.
        is_best: True for the one that was published.
    """

    settings: dict[str, Any]
    steps: int
    validation_perplexity: float
    general_perplexity: float | None
    divergence: float | None
    is_best: bool


def describe_candidate(trainer: Trainer, index: int, settings: dict[str, Any], is_best: bool) -> CandidateReport:
    """Returns the row of a slot, whose best weights are measured on general English."""
    slot, general = trainer.slots[index], None
    if not slot.failure:
        session = Session(trainer.base)
        session.load_in_memory({slot.name: trainer.read_best(index)})
        general = measure_general(trainer.base, session.select(Mix.single(slot.name))).perplexity
    return CandidateReport(
        settings=settings,
        steps=slot.last_step,
        validation_perplexity=to_perplexity(slot.best_nll),
        general_perplexity=general,
        divergence=slot.best_divergence,
        is_best=is_best,
    )


def build_page(candidates: Sequence[CandidateReport]) -> dict[str, bytes]:
    """Returns the file that is published with the adapter."""
    rows = [asdict(item) for item in candidates]
    for row in rows:
        if not math.isfinite(row["validation_perplexity"]):  # it failed before its first validation
            row["validation_perplexity"] = None  # for JSON has no infinity
    return {CANDIDATES: (json.dumps(rows, indent=1, allow_nan=False) + "\n").encode()}


def read_candidates(store: Store, reference: str) -> list[CandidateReport]:
    """Returns the candidates of the search that an adapter won."""
    with store.open(reference) as version:
        rows = json.loads(version.read_file(CANDIDATES))
    for row in rows:
        if row["validation_perplexity"] is None:
            row["validation_perplexity"] = math.inf
    return [CandidateReport(**row) for row in rows]


def list_candidates(recipe: Recipe, num_candidates: int) -> list[Candidate]:
    """Returns candidates, the recipe itself first, each with the settings that it does not share with the recipe.

    They are drawn from the grid of the recipe's `tune` section such that each value of a setting comes about equally
    often. The same recipe gives the same candidates.
    """
    tune = recipe.tune
    rate = recipe.train.learning_rate
    axes: dict[str, list[Any]] = {
        "learning_rate": list(tune.learning_rate_factors),
        "lora.rank": list(tune.ranks),
        "lora.targets": list(tune.targets),
        "lora.dropout": list(tune.dropouts),
        "train.steps": list(tune.step_fractions),
    }
    assert rate is not None
    assert recipe.train.steps is not None
    found: dict[str, Candidate] = {}
    generator = np.random.default_rng(0)
    own: dict[str, Any] = {"learning_rate": 1.0, "train.steps": 1.0}
    columns = {key: _draw_evenly(values, 64 * num_candidates, generator) for key, values in axes.items()}
    for row in [own, *(dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))]:
        changes = {
            "train.learning_rate": rate * row["learning_rate"],
            "train.steps": max(1, round(recipe.train.steps * row["train.steps"])),
            **{key: value for key, value in row.items() if key.startswith("lora.")},
        }
        if "lora.rank" in changes and changes["lora.rank"] != recipe.lora.rank:
            changes |= {"lora.alpha": None, "lora.rank_pattern": {}}
        candidate = _apply(recipe, changes)
        different = {key: value for key, value in changes.items() if _get(recipe, key) != _get(candidate, key)}
        found.setdefault(repr(sorted(different.items(), key=str)), (candidate, different))
        if len(found) == num_candidates:
            break
    return list(found.values())


def _draw_evenly(values: Sequence[Any], count: int, generator: np.random.Generator) -> list[Any]:
    """Returns so many values, all of them in each run of `len(values)`, in random order."""
    drawn = list[Any]()
    while len(drawn) < count:
        drawn += [values[index] for index in generator.permutation(len(values))]
    return drawn[:count]


def _apply(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    values = set_values(recipe.model_dump(exclude_unset=True), changes)
    for key in (key for key, value in changes.items() if value is None):
        section, _, name = key.partition(".")
        values.setdefault(section, {})[name] = None
    return Recipe.model_validate(values)


def _get(recipe: Recipe, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(recipe, section), name)
