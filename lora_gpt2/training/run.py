"""From recipes to published adapters: load the base, prepare the text, train, publish, report."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from lora_gpt2.core.console import Reporter, SilentReporter
from lora_gpt2.core.errors import Interrupted, InterruptedRunError, LoraGpt2Error, MismatchError, UsageError
from lora_gpt2.core.files import wrap_os_errors
from lora_gpt2.core.interrupt import catch_signals
from lora_gpt2.core.locks import hold_lock
from lora_gpt2.core.names import check_name
from lora_gpt2.core.printable import join_names
from lora_gpt2.data.prepared import (
    PreparedData,
    check_sources,
    describe_preparation,
    measure_overlaps,
    open_prepared,
    prepare_data,
)
from lora_gpt2.inference.constraint import start_constraint
from lora_gpt2.model.base import Base, load_base
from lora_gpt2.model.lora import Adapter
from lora_gpt2.model.runtime import choose_runtime
from lora_gpt2.recipe import Recipe
from lora_gpt2.recipe.unused import list_shared, list_unused
from lora_gpt2.store.catalog import Store
from lora_gpt2.training.checkpoint import RunFolder, find_interrupted, open_run_folder
from lora_gpt2.training.events import Callback
from lora_gpt2.training.halving import Halving
from lora_gpt2.training.memory import wrap_oom_errors
from lora_gpt2.training.process_group import ProcessGroup, init_process_group
from lora_gpt2.training.progress import list_failures
from lora_gpt2.training.publish import Publisher, TrainReport
from lora_gpt2.training.queue import DomainQueue, describe_unreadable, find_finished, queue_domains
from lora_gpt2.training.replay import open_replay
from lora_gpt2.training.run_identity import describe_run, identify_run
from lora_gpt2.training.run_status import RunStatus
from lora_gpt2.training.samples import generate_sample
from lora_gpt2.training.slot import (
    MICRO_BATCHING,
    TrainedAdapter,
    TrainingSlot,
    check_together,
)
from lora_gpt2.training.start import (
    build_start,
    count_seen_by_parents,
    describe_start,
    digest_parent,
    inherit_shape,
    pin_parent,
)
from lora_gpt2.training.trackers import track
from lora_gpt2.training.trainer import Trainer

Conclude = Callable[[Trainer, int], Mapping[str, bytes]]
"""Receives the trainer and its best slot when training has ended; returns files to publish with the adapter."""


def train_recipes(
    recipes: Sequence[Recipe],
    store: Store,
    reporter: Reporter,
    *,
    resume: bool = False,
    fresh: bool = False,
    callbacks: Sequence[Callback] = (),
    halving: Halving | None = None,
    conclude: Conclude | None = None,
    num_slots: int | None = None,
    texts: Mapping[str, Path] = MappingProxyType({}),
    replay: Path | None = None,
    run_folder: RunFolder | None = None,
) -> TrainReport:
    """Trains one adapter per recipe, together, and publishes them; returns the report.

    An interrupted run of the same adapters is continued (`resume`) or set aside (`fresh`), never overwritten.
    `callbacks` receive each event of the training. With `halving` the recipes are candidates for one adapter, and
    `conclude` gets the trainer and the best slot, and returns further files of the version. With fewer `num_slots` than
    recipes (0: as many as memory has room for) the others wait, and each adapter is published when it is done; a text
    that cannot be read then stops its own domain alone. `texts` has folders of text that was prepared before, by name;
    `replay` is that of the replayed text. `run_folder` is where the run is kept, if not where its names say.

    Raises:
        UsageError: names are missing or the same, or the recipes do not share a base and dtype.
        ConflictError: the same adapters are being trained by another process.
        InterruptedRunError: an interrupted run is there, and neither `resume` nor `fresh` says what becomes of it.
        MismatchError: `resume` with other settings, data or base than the run on disk.
        ResourceError: it does not fit into memory; the last checkpoint is kept.
        TrainingDiverged: an adapter failed; the others of the run are published, and in the error's `report`.
        DataError: there is no text in a recipe's sources; the others of a queue are published, and in its `report`.
        Interrupted: the last checkpoint is kept; what a queue has published is in its `report`.
    """
    names = [check_name(recipe.name) for recipe in recipes]
    if len(set(names)) < len(names):
        raise UsageError(f"two recipes have the same name: {', '.join(names)}", "give each its own name")
    check_together(recipes)
    for recipe in recipes:
        if num_slots is None and recipe.name not in texts:
            check_sources(recipe.data)
    process_group = init_process_group()
    reporter = reporter if process_group.is_main_process else SilentReporter()
    run = run_folder or open_run_folder(store.root, names)
    options = _Options(
        resume=resume,
        callbacks=callbacks,
        halving=halving,
        conclude=conclude,
        num_slots=num_slots,
        texts=texts,
        replay=replay,
    )
    may_be_larger = resume and num_slots is not None and run_folder is None
    if may_be_larger and process_group.broadcast_object(not run.exists()):
        _finish_smaller(recipes, store, reporter, process_group, options)
    recipes = [
        inherit_shape(pin_parent(recipe, run.read_parent(name)) if resume else recipe, store)
        for name, recipe in zip(names, recipes, strict=True)
    ]
    with ExitStack() as stack:
        if process_group.is_main_process:
            store.check_writable()
            with wrap_os_errors(f"keep the run in {run.path} (see LORA_GPT2_CACHE)"):
                stack.enter_context(hold_lock(run.lock, f"the run of {join_names(names)}"))
            if not (resume or fresh) and (step := run.find_last_step()):
                raise InterruptedRunError(
                    f"an interrupted run of {join_names(names)} is kept, at step {step}",
                    "--resume continues it, --fresh starts over",
                )
        return _train_locked(recipes, store, reporter, run, process_group, options)


@dataclass(frozen=True, kw_only=True)
class _Options:
    """The keywords of `train_recipes`."""

    resume: bool
    callbacks: Sequence[Callback]
    halving: Halving | None
    conclude: Conclude | None
    num_slots: int | None
    texts: Mapping[str, Path]
    replay: Path | None


def _finish_smaller(
    recipes: Sequence[Recipe], store: Store, reporter: Reporter, process_group: ProcessGroup, options: _Options
) -> None:
    """Goes on with a queue that was interrupted before it grew, so that nothing of it is lost: it is part of this one.

    What fails in it is told at the end of this one.
    """
    names = [recipe.name for recipe in recipes]
    found = process_group.broadcast_object(find_interrupted(store.root, names))
    if found is None:
        return
    before = found.list_names()
    if not {*before} <= {*names}:
        reporter.message(f"the interrupted run of {join_names(before)} is kept: it goes on with just these adapters")
        return
    reporter.message(f"first the run that was interrupted, of {join_names(before)}")
    known = {recipe.name: recipe for recipe in recipes}
    try:
        train_recipes([known[name] for name in before], store, reporter, run_folder=found, **vars(options))
    except MismatchError as error:
        if process_group.size > 1:  # the others do not know of it
            raise
        reporter.message(f"it begins again: {error.message}")
    except LoraGpt2Error as error:
        if error.report is None or isinstance(error, Interrupted):
            raise


def _train_locked(
    recipes: Sequence[Recipe],
    store: Store,
    reporter: Reporter,
    run: RunFolder,
    process_group: ProcessGroup,
    options: _Options,
) -> TrainReport:
    base, slots, unreadable = _open_slots(recipes, reporter, process_group, options)
    halving, is_main = options.halving, process_group.is_main_process
    describe_texts({slots[0].name.rpartition(".")[0]: slots[0]} if halving else {s.name: s for s in slots}, reporter)
    replay = process_group.main_process_first(lambda: open_replay(recipes, base, reporter, options.replay))
    parents = [digest_parent(slot.recipe, store) for slot in slots]
    identity = identify_run(base, slots, process_group, parents, replay.fingerprint if replay else "")
    may_skip = is_main and options.resume and options.num_slots is not None
    found = find_finished(slots, store, base, run, identity, reporter) if may_skip else (dict[str, str](), False)
    skipped, is_over = process_group.broadcast_object(found)
    identity["skipped"] = skipped
    may_resume = is_main and options.resume and not is_over
    resume = process_group.broadcast_object(may_resume and _can_resume(run, identity, reporter))
    publisher = Publisher(store=store, base=base, reporter=reporter, is_main_process=is_main, is_resumed=resume)
    complete = sorted(skipped.values()) if len(skipped) == len(slots) else []
    if resume and (published := process_group.broadcast_object(run.read_published())):
        reporter.message(f"already complete: {join_names(published)}")
        complete = published
    if complete:
        adapters, failures = publisher.list_reports(complete), describe_unreadable(unreadable)
        return TrainReport(adapters=adapters, failures=failures, already_complete=True).raise_failures()
    checkpoint = process_group.broadcast_object(run.load(reporter) if resume and is_main else None)
    num_slots = options.num_slots
    if checkpoint and num_slots is not None:  # its tensors have a row for each slot that it had
        num_slots = len(checkpoint[1]["names"])
    rows, queue = queue_domains(slots, num_slots, base, publisher.publish_aloud, unreadable, skipped)
    with catch_signals() as stop, wrap_oom_errors(base, [slot.recipe for slot in rows]):
        trainer = Trainer(
            base,
            rows,
            reporter,
            run,
            process_group,
            sampler=generate_sample,
            open_start=lambda slot: _open_start(slot, store, base, reporter),
            replay=replay,
            halving=halving,
            queue=queue,
            callbacks=options.callbacks,
        )
        _begin(trainer, run, identity, checkpoint)
        told = describe_run(base, slots, store, halving, unreadable)
        watched = _watch(run.status, told, publisher, queue) if is_main else nullcontext()
        with track([slot.recipe for slot in slots], run, reporter, enabled=is_main) as log, watched:
            trained = trainer.train(stop, log)
            if not is_main:
                return TrainReport(adapters=[])
            report = _publish(trainer, trained, publisher, run, options.conclude)
    if queue or not report.failures:  # a queue has ended then too, and goes on with what is new
        run.finish([str(adapter) for adapter in report.adapters])
    return report.raise_failures()


@contextmanager
def _watch(
    status: RunStatus, description: Mapping[str, Any], publisher: Publisher, queue: DomainQueue | None
) -> Iterator[None]:
    """Says to others what becomes of the run, and to the caller what a queue that is interrupted has published."""
    try:
        with status.report(description):
            yield
    except Interrupted as error:
        if queue and error.report is None and (references := queue.list_references()):
            error.with_report(TrainReport(adapters=publisher.list_reports(references)))
        raise


def _begin(
    trainer: Trainer,
    run: RunFolder,
    identity: dict[str, Any],
    checkpoint: tuple[dict[str, Tensor], dict[str, Any]] | None,
) -> None:
    """Goes on where a checkpoint was taken; without one, the run's folder is made ready."""
    if checkpoint:
        trainer.restore(*checkpoint)
        is_search = trainer.halving is not None and trainer.halving.is_begun
        trainer.reporter.message(f"{'going on' if is_search else 'resuming'} at step {trainer.step}")
    elif trainer.process_group.is_main_process:
        run.begin(identity)


def _publish(
    trainer: Trainer,
    trained: Sequence[TrainedAdapter],
    publisher: Publisher,
    run: RunFolder,
    conclude: Conclude | None,
) -> TrainReport:
    """Publishes what was trained, unless a queue has done so. Raises `Interrupted` if others wait."""
    halving, queue = trainer.halving, trainer.queue
    best = halving.choose(trainer.slots) if halving else 0
    watched_names = [trainer.slots[best].name] if halving else [outcome.slot.name for outcome in trained]
    pages = conclude(trainer, best) if conclude else {}
    published = [publisher.publish(outcome, pages) for outcome in trained]
    run.status.update({name: ("published", said) for name, said in zip(watched_names, published, strict=True)})
    published = queue.list_references() if queue else published
    failures = {} if halving else list_failures(trainer.slots, queue)
    report = TrainReport(adapters=publisher.list_reports(published), failures=failures)
    if queue and queue.waiting:
        hint = f"{join_names(published)} published; --resume trains the {len(queue.waiting)} that wait"
        raise Interrupted("stopped on request", hint, signal.SIGINT).with_report(report)
    return report


def _open_slots(
    recipes: Sequence[Recipe], reporter: Reporter, process_group: ProcessGroup, options: _Options
) -> tuple[Base, list[TrainingSlot], dict[str, LoraGpt2Error]]:
    """Returns the base, a slot for each recipe with its text prepared, and errors by name of the recipes without one.

    Raises what `prepare_data` does, unless it is a queue and other recipes remain.
    """
    settings = recipes[0].train
    runtime = choose_runtime(settings.dtype, process_group.device)
    base = load_base(recipes[0].base, runtime, settings.quantize)
    for line in [*list_unused(recipes), *([] if options.halving else list_shared(recipes))]:
        reporter.message(line)
    dtype = runtime.dtype_name if settings.quantize == "none" else f"{runtime.dtype_name} over {settings.quantize}"
    reporter.message(
        f"base {base.name} on {runtime.device.type} in {dtype}; training {join_names([r.name for r in recipes])}"
    )
    unreadable: dict[str, LoraGpt2Error] = {}

    def prepare(recipe: Recipe) -> PreparedData | None:
        try:
            start_constraint(recipe.generate, base.tokenizer)  # which the adapter will be published with
            if recipe.name in options.texts:
                return open_prepared(options.texts[recipe.name], recipe.data, base.tokenizer)
            return prepare_data(recipe.data, base.tokenizer, reporter)
        except LoraGpt2Error as error:
            unreadable[recipe.name] = error
            if options.num_slots is None or len(unreadable) == len(recipes):
                raise
            reporter.message(f"{recipe.name} is left out: {error}")
            return None

    prepared = process_group.main_process_first(lambda: [prepare(recipe) for recipe in recipes])
    resolved = [resolve_learning_rate(recipe, base.config.n_embd) for recipe in recipes]
    pairs = zip(resolved, prepared, strict=True)
    return base, [TrainingSlot(recipe=recipe, data=data) for recipe, data in pairs if data is not None], unreadable


def resolve_learning_rate(recipe: Recipe, width: int) -> Recipe:
    """Returns the recipe with the learning rate that it has on a base of this width, to be recorded."""
    train = recipe.train.model_copy(update={"learning_rate": recipe.train.peak_learning_rate(width)})
    return recipe.model_copy(update={"train": train})


def _open_start(slot: TrainingSlot, store: Store, base: Base, reporter: Reporter) -> Adapter | None:
    """Returns the adapter that a slot starts from, None for a fresh one, and notes its parents in the slot."""
    start = build_start(slot, store, base, reporter)
    if start is None:
        return None
    slot.parents, slot.source = start.parents, start.source
    reporter.message(describe_start(start, slot.name))
    for parent, (seen, count) in count_seen_by_parents(slot, store, base.tokenizer).items():
        reporter.message(
            f"{slot.name}: {parent} was trained on {seen} of the {count} documents that are held out, "
            "so their perplexity is too low"
        )
    return start.adapter


def describe_texts(slots: Mapping[str, TrainingSlot], reporter: Reporter) -> None:
    """Says what is wrong with texts, by name, and which of them train on what is held out of another."""
    prepared = {name: slot.data for name, slot in slots.items()}
    for name, data in prepared.items():
        for line in describe_preparation(data):
            reporter.message(f"{name}: {line}")
    threshold = max(slot.recipe.data.near_duplicate_threshold for slot in slots.values())
    for of, among, copies, documents in measure_overlaps(prepared, threshold) if threshold else ():
        reporter.message(f"'{among}' trains on near copies of {copies} of the {documents} documents held out of '{of}'")


def _can_resume(run: RunFolder, identity: dict[str, Any], reporter: Reporter) -> bool:
    if not run.exists():
        reporter.message("there is no run to resume: starting over")
        return False
    if different := run.check_identity(identity, free=(MICRO_BATCHING,)):
        reporter.message(f"equal to rounding only, because micro-batches differ: {different}")
    return True
