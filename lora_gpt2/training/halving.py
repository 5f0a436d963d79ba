"""Several candidates for one adapter in one run, of which the worse half stops at each rung.

Successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943, algorithm 1) on validation loss: with 8 candidates
and a run of T steps, 8 train for T/8 steps, 4 go on to T/4, 2 to 3T/4 and one to T, which is 2.75 times the work of one
run, and less of its time, because all share the pass over the base. What the last one computes is what it would have
computed alone.

While the learning rate is still high, a higher one looks worse than it will be at the end. So a rung compares averages
of each candidate's recent weights, which come close to what decay would make of them (polynomial decay averaging,
Shamir and Zhang 2013, arXiv:1212.1824, section 4), and the last rung is late.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lora_gpt2.recipe import Recipe
from lora_gpt2.recipe_files import set_values
from lora_gpt2.training.slot import TrainingSlot

RECENCY = 8
"""The exponent of the averaging."""


@dataclass(frozen=True, kw_only=True)
class SuccessiveHalving:
    """The rungs of a search, by step, and how many candidates there are at first."""

    num_candidates: int
    rungs: tuple[int, ...]

    @classmethod
    def build(cls, num_candidates: int, num_steps: int) -> SuccessiveHalving:
        """Returns the rungs of a run of `num_steps`: each at twice the steps of the one before, the last at 3/4."""
        count = min(num_candidates.bit_length() - 1, num_steps.bit_length() - 1)
        rungs = [num_steps >> (count - index) for index in range(count)]
        return cls(num_candidates=num_candidates, rungs=tuple([*rungs[:-1], max(1, 3 * num_steps // 4)][:count]))

    def count_steps(self, num_steps: int) -> int:
        """Returns the steps of all candidates together, if all are as long as the longest."""
        ends = [*self.rungs, num_steps]
        lengths = [end - start for start, end in zip([0, *self.rungs], ends, strict=True)]
        return sum((self.num_candidates >> index) * length for index, length in enumerate(lengths))

    def stop_losers(self, step: int, slots: Sequence[TrainingSlot], measure: Callable[[int], float]) -> None:
        """Stops, if there is a rung after `step` steps, the slots that are not among the better half.

        `measure` returns the validation loss of a slot's averaged weights.
        """
        if step not in self.rungs:
            return
        kept = max(1, self.num_candidates >> (self.rungs.index(step) + 1))
        running = [index for index, slot in enumerate(slots) if not slot.failure and not slot.stopped]
        scores = {index: (slots[index].best_excess, min(slots[index].best_nll, measure(index))) for index in running}
        for index in sorted(running, key=scores.__getitem__)[kept:]:
            slots[index].stopped = True

    def choose(self, slots: Sequence[TrainingSlot]) -> int:
        """Returns the best of the slots that did not fail."""
        return min((k for k, slot in enumerate(slots) if not slot.failure), key=lambda index: score(slots[index]))


def average_weights(average: Tensor, weights: Tensor, step: int) -> None:
    """Adds the weights after `step` steps (from 1) to their average, in which the last ninth of the steps prevails."""
    average.lerp_(weights, min(1.0, (RECENCY + 1) / (step + RECENCY)))


def score(slot: TrainingSlot) -> tuple[float, float]:
    """Returns what is compared, the lower the better: the excess over the budget of forgetting, then the loss."""
    return slot.best_excess, slot.best_nll


def list_candidates(recipe: Recipe, num_candidates: int) -> list[tuple[Recipe, dict[str, Any]]]:
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
    found: dict[str, tuple[Recipe, dict[str, Any]]] = {}
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
    values = set_values(recipe.model_dump(), changes)
    for key in (key for key, value in changes.items() if value is None):
        section, _, name = key.partition(".")
        values[section][name] = None
    return Recipe.model_validate(values)


def _get(recipe: Recipe, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(recipe, section), name)
