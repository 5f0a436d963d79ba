"""From recipes to published adapters: load the base, prepare the text, train, publish, report."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_gpt2.core.console import Reporter, SilentReporter
from lora_gpt2.core.errors import InterruptedRunError, TrainingDiverged, UsageError
from lora_gpt2.core.files import wrap_os_errors
from lora_gpt2.core.interrupt import catch_signals
from lora_gpt2.core.locks import hold_lock
from lora_gpt2.core.memory import check_room
from lora_gpt2.core.names import check_name
from lora_gpt2.data.prepared import (
    SKETCH,
    PreparedData,
    check_sources,
    describe_preparation,
    measure_overlaps,
    prepare_data,
)
from lora_gpt2.evaluation.general import measure_general
from lora_gpt2.evaluation.perplexity import Score, choose_window, to_perplexity
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.session import Session
from lora_gpt2.model.base import Base, load_base
from lora_gpt2.model.lora import Adapter, count_parameters
from lora_gpt2.model.runtime import choose_runtime, measure_peak_memory
from lora_gpt2.recipe import Recipe
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.files import Origin, publish_adapter
from lora_gpt2.store.manifest import WEIGHTS
from lora_gpt2.store.peft.tensors import to_peft
from lora_gpt2.store.references import name_of
from lora_gpt2.training.checkpoint import RunFolder, open_run_folder
from lora_gpt2.training.diagnosis import diagnose_curve, diagnose_forgetting
from lora_gpt2.training.events import Callback
from lora_gpt2.training.memory import wrap_oom_errors
from lora_gpt2.training.process_group import ProcessGroup, init_process_group
from lora_gpt2.training.replay import open_replay
from lora_gpt2.training.report import render_report
from lora_gpt2.training.samples import generate_sample
from lora_gpt2.training.slot import TrainedAdapter, TrainingSlot, check_together
from lora_gpt2.training.start import (
    build_start,
    count_seen_by_parents,
    describe_start,
    digest_parent,
    inherit_shape,
    join_sketches,
)
from lora_gpt2.training.trackers import track
from lora_gpt2.training.trainer import Trainer

MICRO_BATCHING = "passes"  # as checkpoints name it
CHECKPOINT_FORMAT = 3  # version of what a checkpoint holds
COPIES, ROOM_BYTES = 3, 2**27  # what publishing takes: copies of the adapter, and the libraries' own


@dataclass(frozen=True, kw_only=True)
class AdapterReport:
    """What a user is told about one trained adapter; the names are those of `train --json`."""

    name: str
    version: int
    path: str
    parents: tuple[str, ...]
    steps: int
    best_step: int
    train_tokens: int
    base_perplexity: float
    parent_perplexity: float | None
    validation_perplexity: float
    base_test_perplexity: float | None
    test_perplexity: float | None
    base_general_perplexity: float
    general_perplexity: float
    tokens_per_second: float
    peak_memory_bytes: int
    seconds: float
    verdict: str
    forgetting: str

    def __str__(self) -> str:
        """Returns the reference of the version, such as `law@2`."""
        return f"{self.name}@{self.version}"


NOT_FIGURES = ("name", "version", "path", "parents")


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """The adapters of a run; `already_complete` if there was nothing left to do."""

    adapters: list[AdapterReport]
    already_complete: bool = False


def train_recipes(
    recipes: Sequence[Recipe],
    store: Store,
    reporter: Reporter,
    *,
    resume: bool = False,
    fresh: bool = False,
    callbacks: Sequence[Callback] = (),
) -> TrainReport:
    """Trains one adapter per recipe, together, and publishes them; returns the report.

    An interrupted run of the same adapters is continued (`resume`) or set aside (`fresh`), never overwritten.
    `callbacks` receive each event of the training.

    Raises:
        UsageError: names are missing or the same, or the recipes do not share a base and dtype.
        ConflictError: the same adapters are being trained by another process.
        InterruptedRunError: an interrupted run is there, and neither `resume` nor `fresh` says what becomes of it.
        MismatchError: `resume` with other settings, data or base than the run on disk.
        ResourceError: it does not fit into memory; the last checkpoint is kept.
        TrainingDiverged: an adapter failed; the others of the run are published.
        Interrupted: nothing is published; the last checkpoint is kept.
    """
    names = [check_name(recipe.name) for recipe in recipes]
    if len(set(names)) < len(names):
        raise UsageError(f"two recipes have the same name: {', '.join(names)}", "give each its own name")
    check_together(recipes)
    for recipe in recipes:
        check_sources(recipe.data)
    process_group = init_process_group()
    reporter = reporter if process_group.is_main_process else SilentReporter()
    run = open_run_folder(store.root, names)
    recipes = [inherit_shape(pin_parent(recipe, run) if resume else recipe, store) for recipe in recipes]
    with ExitStack() as stack:
        if process_group.is_main_process:
            store.check_writable()
            with wrap_os_errors(f"keep the run in {run.path} (see LORA_GPT2_CACHE)"):
                stack.enter_context(hold_lock(run.lock, f"the run of {', '.join(names)}"))
            if not (resume or fresh) and (step := run.find_last_step()):
                raise InterruptedRunError(
                    f"an interrupted run of {', '.join(names)} is kept, at step {step}",
                    "--resume continues it, --fresh starts over",
                )
        return _train_locked(recipes, store, reporter, run, process_group, resume=resume, callbacks=callbacks)


def _train_locked(
    recipes: Sequence[Recipe],
    store: Store,
    reporter: Reporter,
    run: RunFolder,
    process_group: ProcessGroup,
    *,
    resume: bool,
    callbacks: Sequence[Callback],
) -> TrainReport:
    settings = recipes[0].train
    runtime = choose_runtime(settings.dtype, process_group.device)
    base = load_base(recipes[0].base, runtime, settings.quantize)
    dtype = runtime.dtype_name if settings.quantize == "none" else f"{runtime.dtype_name} over {settings.quantize}"
    reporter.message(
        f"base {base.name} on {runtime.device.type} in {dtype}; training {', '.join(r.name for r in recipes)}"
    )
    prepared = process_group.main_process_first(
        lambda: [prepare_data(r.data, base.tokenizer, reporter) for r in recipes]
    )
    for recipe, data in zip(recipes, prepared, strict=True):
        for line in describe_preparation(data):
            reporter.message(f"{recipe.name}: {line}")
    recipes = [resolve_learning_rate(recipe, base.config.n_embd) for recipe in recipes]
    slots = [TrainingSlot(recipe=recipe, data=data) for recipe, data in zip(recipes, prepared, strict=True)]
    _warn_of_overlaps(slots, reporter)
    replay = process_group.main_process_first(lambda: open_replay(recipes, base, reporter))
    identity = _identify_run(base, slots, process_group, [digest_parent(recipe, store) for recipe in recipes])
    resume = process_group.broadcast_object(
        resume and process_group.is_main_process and _can_resume(run, identity, reporter)
    )
    if resume and (published := process_group.broadcast_object(run.read_published())):
        reporter.message(f"already complete: {', '.join(published)}")
        found = (
            [_report_published(store, reference) for reference in published] if process_group.is_main_process else []
        )
        return TrainReport(adapters=found, already_complete=True)
    with catch_signals() as stop, wrap_oom_errors(base, [slot.recipe for slot in slots]):
        checkpoint = process_group.broadcast_object(
            run.load(reporter) if resume and process_group.is_main_process else None
        )
        trainer = Trainer(
            base,
            slots,
            reporter,
            run,
            process_group,
            sampler=generate_sample,
            initial={} if checkpoint else _open_starts(slots, store, base, reporter),
            replay=replay,
            callbacks=callbacks,
        )
        if checkpoint:
            trainer.restore(*checkpoint)
            reporter.message(f"resuming at step {trainer.step}")
        elif process_group.is_main_process:
            run.begin(identity)
        with track(recipes, run.path, enabled=process_group.is_main_process) as log:
            trained = trainer.train(stop, log)
        if not process_group.is_main_process:
            return TrainReport(adapters=[])
        general = measure_general(base)
        reports = [_publish(store, base, outcome, general, resume) for outcome in trained]
    if failures := trainer.describe_failures():
        kept = ", ".join(map(str, reports))
        raise TrainingDiverged(f"{failures}; published: {kept}", "train it again with a smaller train.learning_rate")
    run.finish(list(map(str, reports)))
    return TrainReport(adapters=reports)


def resolve_learning_rate(recipe: Recipe, width: int) -> Recipe:
    """Returns the recipe with the learning rate that it has on a base of this width, to be recorded."""
    train = recipe.train.model_copy(update={"learning_rate": recipe.train.peak_learning_rate(width)})
    return recipe.model_copy(update={"train": train})


def pin_parent(recipe: Recipe, run: RunFolder) -> Recipe:
    """Returns the recipe with the version that an interrupted run continues from, where it names no version itself."""
    then = run.read_identity().get("adapters", {}).get(recipe.name, {}).get("lora", {}).get("init_from", "")
    if not then or name_of(then) != recipe.lora.init_from:
        return recipe
    lora = recipe.lora.model_copy(update={"init_from": then})
    return recipe.model_copy(update={"lora": lora})


def _open_starts(slots: Sequence[TrainingSlot], store: Store, base: Base, reporter: Reporter) -> dict[str, Adapter]:
    """Returns the adapters that slots start from, by name, and notes their parents."""
    initial = {}
    for slot in slots:
        if start := build_start(slot, store, base, reporter):
            initial[slot.name] = start.adapter
            slot.parents, slot.source = start.parents, start.source
            reporter.message(describe_start(start, slot.name))
        for parent, (seen, count) in count_seen_by_parents(slot, store, base.tokenizer).items():
            reporter.message(
                f"{slot.name}: {parent} was trained on {seen} of the {count} documents that are held out, "
                "so their perplexity is too low"
            )
    return initial


def _warn_of_overlaps(slots: Sequence[TrainingSlot], reporter: Reporter) -> None:
    threshold = max(slot.recipe.data.near_duplicate_threshold for slot in slots)
    prepared = {slot.name: slot.data for slot in slots}
    for of, among, copies, documents in measure_overlaps(prepared, threshold) if threshold else ():
        reporter.message(f"'{among}' trains on near copies of {copies} of the {documents} documents held out of '{of}'")


def _can_resume(run: RunFolder, identity: dict[str, Any], reporter: Reporter) -> bool:
    if not run.exists():
        reporter.message("there is no run to resume: starting over")
        return False
    if different := run.check_identity(identity, free=(MICRO_BATCHING,)):
        reporter.message(f"equal to rounding only, because micro-batches differ: {different}")
    return True


def _identify_run(
    base: Base, slots: Sequence[TrainingSlot], process_group: ProcessGroup, parents: Sequence[str]
) -> dict[str, Any]:
    """Returns everything that decides the numbers of a run; what is under `MICRO_BATCHING` only by rounding."""
    of_micro_batches = {"micro_batch_tokens", "gradient_checkpointing"}
    irrelevant = {"checkpoint_every", "trackers", *of_micro_batches}
    return {
        MICRO_BATCHING: {
            slot.name: slot.recipe.train.model_dump(mode="json", include=of_micro_batches) for slot in slots
        },
        "format": CHECKPOINT_FORMAT,
        "order": [slot.name for slot in slots],
        "base": base.fingerprint,
        "dtype": base.runtime.dtype_name,
        "device": base.runtime.device.type,
        "processes": process_group.size,
        "adapters": {
            slot.name: {
                "data": slot.data.fingerprint,
                "parent": parent,
                "lora": slot.recipe.lora.model_dump(mode="json"),
                "train": slot.recipe.train.model_dump(mode="json", exclude=irrelevant)
                | {"learning_rate": slot.recipe.train.peak_learning_rate(base.config.n_embd)},
            }
            for slot, parent in zip(slots, parents, strict=True)
        },
    }


def _publish(store: Store, base: Base, outcome: TrainedAdapter, base_general: Score, resumed: bool) -> AdapterReport:
    """Publishes an adapter, unless a run that was interrupted afterwards has done so already."""
    slot, adapter = outcome.slot, outcome.adapter
    if resumed and (version := _find_published(store, base, outcome)):
        return _report_published(store, f"{slot.name}@{version}")
    count = sum(update.a.numel() + update.b.numel() for update in adapter.updates.values())
    check_room(COPIES * 4 * count + ROOM_BYTES)
    session = Session(base)
    session.load_in_memory({slot.name: adapter})
    general = measure_general(base, session.select(Mix.single(slot.name)))
    num_epochs = slot.train_tokens / max(1, slot.data.train.num_targets)
    report = AdapterReport(
        name=slot.name,
        version=0,
        path="",
        parents=tuple(parent.reference for parent in slot.parents) or ((slot.source,) if slot.source else ()),
        steps=slot.last_step,
        best_step=slot.best_step,
        train_tokens=slot.train_tokens,
        base_perplexity=to_perplexity(outcome.base_nll),
        parent_perplexity=None if slot.parent_nll is None else to_perplexity(slot.parent_nll),
        validation_perplexity=to_perplexity(outcome.validation_nll),
        base_test_perplexity=to_perplexity(outcome.test_nll[0]) if outcome.test_nll else None,
        test_perplexity=to_perplexity(outcome.test_nll[1]) if outcome.test_nll else None,
        base_general_perplexity=base_general.perplexity,
        general_perplexity=general.perplexity,
        tokens_per_second=slot.train_tokens / max(outcome.seconds, 1e-9),
        peak_memory_bytes=measure_peak_memory(base.runtime.device),
        seconds=outcome.seconds,
        verdict=diagnose_curve(slot.records, slot.num_steps, num_epochs, slot.data.validation.num_targets),
        forgetting=diagnose_forgetting(base_general, general),
    )
    figures = {key: value for key, value in vars(report).items() if key not in NOT_FIGURES}
    figures["trained_parameters"] = count_parameters(base.config, slot.recipe.lora)
    figures["dtype"] = base.runtime.dtype_name
    figures["test"] = _describe_test(base, slot)
    pages = render_report(slot.name, slot.recipe, slot.records, figures, describe_preparation(slot.data))
    sketch = join_sketches(slot, store)
    pages |= {SKETCH: sketch.to_bytes()}
    recipe = slot.recipe.model_dump(mode="json")
    origin = Origin(
        data=_describe_data(slot.recipe, slot.data) | ({} if sketch.is_whole else {"sketch_is_whole": False}),
        recipe=recipe,
        figures=figures,
        parents=slot.parents,
        provenance={"by": "train", "from": Path(slot.source).name} if slot.source else {},
        metrics=slot.records,
        pages=pages,
    )
    manifest = publish_adapter(store, slot.name, adapter, base, origin)
    return replace(report, version=manifest.version, path=str(store.resolve(manifest.reference).absolute()))


def _describe_test(base: Base, slot: TrainingSlot) -> dict[str, Any]:
    """Returns how the test figure was measured, so that one that differs can be explained."""
    settings, report = slot.recipe.evaluate, slot.data.report
    window, stride = choose_window(base, settings)
    return {
        "documents": report["documents"]["test"],
        "files": report["test_files"],
        "profile": slot.recipe.data.profile,
        "protocol": settings.protocol,
        "window": window,
        "stride": stride,
        "dtype": base.runtime.dtype_name,
    }


def _find_published(store: Store, base: Base, outcome: TrainedAdapter) -> int | None:
    """Returns the newest version if it has this adapter's weights; a kill may have left it without being in use."""
    name = outcome.slot.name
    digest = hashlib.sha256(to_peft(outcome.adapter, base.name, base.config)[WEIGHTS]).hexdigest()
    for version in store.list_versions(name)[-1:]:
        if store.read_manifest(f"{name}@{version}").files.get(WEIGHTS) == digest:
            store.use_version(name, version)
            return version
    return None


def _describe_data(recipe: Recipe, data: PreparedData) -> dict[str, Any]:
    return {
        "sources": [Path(source).name for source in recipe.data.sources],
        "fingerprint": data.fingerprint,
        "train_tokens": data.train.num_tokens,
        **{key: data.report[key] for key in ("documents_read", "documents_kept", "documents", "tokens", "reading")},
        "rules": {
            name: {key: rule[key] for key in ("documents", "characters_removed")}
            for name, rule in data.report["rules"].items()
        },
        "set_aside": data.report["rejected"],
    }


def _report_published(store: Store, reference: str) -> AdapterReport:
    manifest = store.read_manifest(reference)
    figures: dict[str, Any] = {
        key: manifest.figures.get(key) for key in AdapterReport.__dataclass_fields__ if key not in NOT_FIGURES
    }
    path, parents = str(store.resolve(manifest.reference).absolute()), tuple(p.reference for p in manifest.parents)
    return AdapterReport(name=manifest.name, version=manifest.version, path=path, parents=parents, **figures)
