"""The settings of one adapter, searched for in one run: many candidates, one pass over the base, one publication."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import UsageError
from lora_gpt2.core.names import check_name
from lora_gpt2.data.prepared import prepare_data
from lora_gpt2.evaluation.general import measure_general
from lora_gpt2.evaluation.perplexity import to_perplexity
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.session import Session
from lora_gpt2.model.checkpoint import Checkpoint
from lora_gpt2.recipe import Recipe
from lora_gpt2.store.catalog import Store
from lora_gpt2.training.halving import SuccessiveHalving, list_candidates, score
from lora_gpt2.training.plan import measure_speed, read_shape
from lora_gpt2.training.publish import AdapterReport
from lora_gpt2.training.run import resolve_learning_rate, train_recipes
from lora_gpt2.training.slot import TrainingSlot
from lora_gpt2.training.start import inherit_shape
from lora_gpt2.training.trainer import Trainer

CANDIDATES = "candidates.json"
STEPS_SHARE = 0.7
"""Share of a time budget for steps; validation, and steps of few candidates, which share less, take the rest."""


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


@dataclass(frozen=True, kw_only=True)
class TuneReport:
    """The published adapter, and all candidates, best first."""

    adapter: AdapterReport
    candidates: list[CandidateReport]


def tune(
    recipe: Recipe,
    store: Store,
    reporter: Reporter,
    *,
    num_candidates: int = 8,
    budget_seconds: float | None = None,
    resume: bool = False,
    fresh: bool = False,
) -> TuneReport:
    """Trains candidates of a recipe together, halves them by validation loss, and publishes the best.

    Test text is measured on once, with the best. `budget_seconds` decides the number of steps instead of the recipe.

    Raises what `train_recipes` does.
    """
    if num_candidates < 2:
        raise UsageError("a search needs at least two candidates", "use --candidates 8, or train")
    check_name(recipe.name)
    recipe = inherit_shape(recipe, store)
    config, _ = read_shape(recipe)
    recipe = resolve_learning_rate(recipe, config.n_embd)
    data = prepare_data(recipe.data, Checkpoint.open(recipe.base).load_tokenizer(), reporter)
    steps = TrainingSlot(recipe=recipe, data=data).num_steps
    if budget_seconds is not None:
        steps = _fit_steps(recipe, num_candidates, budget_seconds, reporter)
    candidates = list_candidates(_with_steps(recipe, steps), num_candidates)
    longest = max(candidate.train.steps or 0 for candidate, _ in candidates)
    halving = SuccessiveHalving.build(len(candidates), longest)
    recipes = [
        _prepare_candidate(candidate, f"{recipe.name[:56]}.{index}", settings)
        for index, (candidate, settings) in enumerate(candidates)
    ]
    reporter.message(f"{len(recipes)} candidates, up to {longest} steps; halved after {_join(halving.rungs)} steps")

    def conclude(trainer: Trainer, best: int) -> dict[str, bytes]:
        slots = trainer.slots
        slots[best].recipe = slots[best].recipe.model_copy(
            update={"name": recipe.name, "description": recipe.description}
        )
        order = sorted(range(len(slots)), key=lambda index: (bool(slots[index].failure), score(slots[index])))
        table = [_describe(trainer, index, candidates[index][1], index == best) for index in order]
        return {CANDIDATES: (json.dumps([asdict(item) for item in table], indent=1) + "\n").encode()}

    report = train_recipes(recipes, store, reporter, resume=resume, fresh=fresh, halving=halving, conclude=conclude)
    (adapter,) = report.adapters
    with store.open(str(adapter)) as version:
        found = json.loads(version.read_file(CANDIDATES))
    return TuneReport(adapter=adapter, candidates=[CandidateReport(**item) for item in found])


def _join(rungs: Sequence[int]) -> str:
    return ", ".join(map(str, rungs))


def _with_steps(recipe: Recipe, steps: int) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": steps})})


def _prepare_candidate(recipe: Recipe, name: str, settings: dict[str, Any]) -> Recipe:
    train = recipe.train.model_copy(update={"sample_tokens": 0})
    description = ", ".join(f"{key} {value}" for key, value in settings.items())
    return recipe.model_copy(update={"name": name, "train": train, "description": description})


def _fit_steps(recipe: Recipe, num_candidates: int, budget_seconds: float, reporter: Reporter) -> int:
    """Returns the steps of the longest candidate such that the whole search takes about this long."""
    candidates = [candidate for candidate, _ in list_candidates(_with_steps(recipe, 64), num_candidates)]
    _, runtime = read_shape(recipe)
    speed = measure_speed(candidates, runtime, reporter)
    work = SuccessiveHalving.build(len(candidates), 2**16).count_steps(2**16) / 2**16
    step_tokens = recipe.blocks_per_step * recipe.data.block_size
    return max(len(candidates), int(STEPS_SHARE * budget_seconds * speed / (work * step_tokens)))


def _describe(trainer: Trainer, index: int, settings: dict[str, Any], is_best: bool) -> CandidateReport:
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
