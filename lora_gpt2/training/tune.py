"""The settings of one adapter, searched for among many candidates, of which the best is published."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lora_gpt2.core.console import OnceReporter, Reporter
from lora_gpt2.core.errors import MismatchError, UsageError
from lora_gpt2.core.names import check_name
from lora_gpt2.data.prepared import PreparedData, prepare_data
from lora_gpt2.model.checkpoint import Checkpoint
from lora_gpt2.recipe import Recipe
from lora_gpt2.store.catalog import Store
from lora_gpt2.training.candidates import (
    CandidateReport,
    Search,
    build_page,
    describe_candidate,
    list_candidates,
    read_candidates,
)
from lora_gpt2.training.checkpoint import open_run_folder
from lora_gpt2.training.grouped_search import Devices, ThisDevice, divide, forget_groups, read_ledger, search_in_groups
from lora_gpt2.training.halving import SuccessiveHalving, score
from lora_gpt2.training.process_group import count_processes
from lora_gpt2.training.publish import AdapterReport, TrainReport
from lora_gpt2.training.run import resolve_learning_rate, train_recipes
from lora_gpt2.training.slot import TrainingSlot
from lora_gpt2.training.start import inherit_shape, pin_parent
from lora_gpt2.training.trainer import Trainer

STEPS_SHARE = 0.7
"""Share of a time budget for steps; validation, and steps of few candidates, which share less, take the rest."""


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
    num_slots: int = 0,
    ray: str = "",
    resume: bool = False,
    fresh: bool = False,
) -> TuneReport:
    """Trains candidates of a recipe, halves them by validation loss, and publishes the best.

    Test text is measured on once, with the best.

    Args:
        recipe: the first candidate; its section `tune` has the grid of the others.
        store: where the best is published.
        reporter: shows progress.
        num_candidates: the recipe included.
        budget_seconds: decides the number of steps instead of the recipe.
        num_slots: candidates that a device trains at a time, 0 for as many as fit into its memory; the others wait
            between two rungs.
        ray: address of a Ray cluster over whose devices the candidates are divided; see `core.ray_cluster.connect`.
        resume: go on with an interrupted search.
        fresh: set it aside.

    Raises what `train_recipes` does.
    """
    if num_candidates < 2:
        raise UsageError("a search needs at least two candidates", "use --candidates 8, or train")
    check_name(recipe.name)
    recipe = inherit_shape(_pin_parent(recipe, num_candidates, store) if resume else recipe, store)
    checkpoint = Checkpoint.open(recipe.base)
    recipe = resolve_learning_rate(recipe, checkpoint.config.n_embd)
    data = prepare_data(recipe.data, checkpoint.load_tokenizer(), reporter)
    slot = TrainingSlot(recipe=recipe, data=data)
    steps = slot.num_steps
    if count_processes() > 1 and (num_slots or ray):
        raise UsageError("one process leads a search in groups", "leave --slots out, or use --ray without torchrun")
    with _open_devices(ray, store, reporter, recipe, data, resume=resume) as devices:
        candidates = [candidate for candidate, _ in list_candidates(_with_steps(recipe, steps), num_candidates)]
        size = num_slots or (devices.count_slots(candidates) if count_processes() == 1 else len(candidates))
        if budget_seconds is not None and {"steps", "epochs"} & recipe.train.model_fields_set:
            reporter.message("the budget decides the number of steps: train.steps and train.epochs change nothing")
        if budget_seconds is not None:
            known = _find_steps(Search.build(_with_steps(recipe, steps), num_candidates), store) if resume else 0
            steps = known or _fit_steps(candidates, size, budget_seconds, devices, slot.tokens_per_step)
        search = Search.build(_with_steps(recipe, steps), num_candidates)
        rungs = ", ".join(map(str, search.halving.rungs))
        count = len(search.names)
        reporter.message(f"{count} candidates, up to {search.num_steps} steps; halved after {rungs} steps")
        together, ledger = open_run_folder(store.root, search.names), read_ledger(search, store)
        is_together = not fresh and bool(together.find_last_step())
        in_groups = not fresh and ledger is not None and (resume or not ledger.published)
        if is_together and ray:
            raise MismatchError("a search that was begun on this machine is kept", "continue it here, or use --fresh")
        if not ray and (is_together or (size >= count and not in_groups)):
            if fresh:
                forget_groups(search, store, ThisDevice(store=store, reporter=reporter))
            report = _search_together(search, store, reporter, resume=resume, fresh=fresh)
        else:
            if fresh:
                together.close()
            report = search_in_groups(search, store, devices, reporter, size, resume=resume, fresh=fresh)
    (adapter,) = report.adapters
    return TuneReport(adapter=adapter, candidates=read_candidates(store, str(adapter)))


@contextmanager
def _open_devices(
    address: str, store: Store, reporter: Reporter, recipe: Recipe, data: PreparedData, *, resume: bool
) -> Iterator[Devices]:
    """Yields the devices of a cluster, or the one here without an address."""
    reporter = OnceReporter(reporter)  # every round of every group begins with the same messages
    if not address:
        yield ThisDevice(store=store, reporter=reporter)
        return
    from lora_gpt2.training.ray_search import open_ray_devices

    with open_ray_devices(address, store, reporter, recipe, data, resume=resume) as devices:
        yield devices


def _search_together(search: Search, store: Store, reporter: Reporter, *, resume: bool, fresh: bool) -> TrainReport:
    """Trains all candidates in one run."""

    def conclude(trainer: Trainer, best: int) -> dict[str, bytes]:
        slots = trainer.slots
        slots[best].recipe = search.rename(slots[best].recipe)
        order = sorted(range(len(slots)), key=lambda index: (bool(slots[index].failure), score(slots[index])))
        settings = [settings for _, settings in search.candidates]
        return build_page([describe_candidate(trainer, k, settings[k], is_best=k == best) for k in order])

    return train_recipes(
        search.recipes, store, reporter, resume=resume, fresh=fresh, halving=search.halving, conclude=conclude
    )


def _with_steps(recipe: Recipe, steps: int) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": steps})})


def _pin_parent(recipe: Recipe, num_candidates: int, store: Store) -> Recipe:
    """Returns the recipe with the version that an interrupted search continues from, where it names no version."""
    if not recipe.lora.init_from:
        return recipe
    search = Search.build(_with_steps(inherit_shape(recipe, store), 1), num_candidates)
    ledger = read_ledger(search, store)
    together = open_run_folder(store.root, search.names)
    return pin_parent(recipe, ledger.parent if ledger else together.read_parent(search.names[0]))


def _find_steps(search: Search, store: Store) -> int:
    """Returns the steps of a search that was interrupted, 0 if there is none."""
    if ledger := read_ledger(search, store):
        return ledger.num_steps
    adapters = open_run_folder(store.root, search.names).read_identity().get("adapters", {})
    return int(adapters[search.names[0]]["train"]["steps"] or 0) if adapters else 0


def _fit_steps(candidates: list[Recipe], size: int, budget_seconds: float, devices: Devices, step_tokens: int) -> int:
    """Returns the steps of the longest candidate such that the whole search takes about this long."""
    groups = divide([recipe.model_copy(update={"name": str(k)}) for k, recipe in enumerate(candidates)], size)
    speed = devices.measure_speed([candidates[int(name)] for name in groups[0]])
    speed *= min(len(groups), devices.num_devices)
    work = SuccessiveHalving.build(len(candidates), 2**16).count_steps(2**16) / 2**16
    return max(len(candidates), int(STEPS_SHARE * budget_seconds * speed / (work * step_tokens)))
