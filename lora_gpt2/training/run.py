"""From recipes to published adapters: load the base, prepare the text, train, publish, report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import UsageError
from lora_gpt2.core.interrupt import catch_signals
from lora_gpt2.core.paths import check_name, hold_lock, os_errors_as_ours
from lora_gpt2.data.prepared import prepare_data
from lora_gpt2.model.base import Base, load_base
from lora_gpt2.model.lora import count_parameters
from lora_gpt2.model.runtime import choose_runtime, measure_peak_memory
from lora_gpt2.recipe import Recipe
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.files import Origin, publish_adapter
from lora_gpt2.training.checkpoint import RunFolder, open_run_folder
from lora_gpt2.training.trainer import Domain, TrainedAdapter, Trainer


@dataclass(frozen=True)
class AdapterReport:
    """What a user is told about one trained adapter; the names are those of `train --json`."""

    name: str
    version: int
    steps: int
    best_step: int
    train_tokens: int
    base_perplexity: float
    validation_perplexity: float
    tokens_per_second: float
    peak_memory_bytes: int
    seconds: float


@dataclass(frozen=True)
class TrainReport:
    """The adapters of a run; `already_complete` if there was nothing left to do."""

    adapters: list[AdapterReport]
    already_complete: bool = False


def train_recipes(recipes: Sequence[Recipe], store: Store, reporter: Reporter, resume: bool = False) -> TrainReport:
    """Trains one adapter per recipe, together, and publishes them; returns the report.

    Raises:
        UsageError: names are missing or the same, or the recipes do not share a base and precision.
        ConflictError: the same adapters are being trained by another process.
        MismatchError: `resume` with other settings, data or base than the run on disk.
        TrainingDiverged, Interrupted: nothing is published; the last checkpoint is kept.
    """
    names = [check_name(recipe.name) for recipe in recipes]
    if len(set(names)) < len(names):
        raise UsageError(f"two recipes have the same name: {', '.join(names)}", "give each its own name")
    for key in ("base", "train.precision"):
        if len({_get(recipe, key) for recipe in recipes}) > 1:
            raise UsageError(f"recipes trained together need one {key}", "make them equal, or train apart")
    store.check_writable()
    run = open_run_folder(store.root, names)
    with (
        os_errors_as_ours(f"keep the run in {run.path} (see LORA_GPT2_CACHE)"),
        hold_lock(run.lock, f"the run of {', '.join(names)}"),
    ):
        return _train_locked(recipes, store, reporter, run, resume)


def _train_locked(
    recipes: Sequence[Recipe], store: Store, reporter: Reporter, run: RunFolder, resume: bool
) -> TrainReport:
    base = load_base(recipes[0].base, choose_runtime(recipes[0].train.precision, for_training=True))
    shown = f"{base.name} on {base.runtime.device.type} in {base.runtime.dtype_name}"
    reporter.message(f"base {shown}; training {', '.join(recipe.name for recipe in recipes)}")
    domains = [Domain(r.name, r, prepare_data(r.data, base.tokenizer, reporter)) for r in recipes]
    identity = _identify_run(base, domains)
    if resume:
        run.check_identity(identity)
        if published := run.read_published():
            reporter.message(f"already complete: {', '.join(published)}")
            return TrainReport([_report_published(store, reference) for reference in published], already_complete=True)
    trainer = Trainer(base, domains, reporter, run)
    checkpoint = run.load(reporter) if resume else None
    if checkpoint:
        trainer.restore(*checkpoint)
        reporter.message(f"resuming at step {trainer.step}")
    else:
        run.begin(identity)
    with catch_signals() as stop:
        trained = trainer.train(stop)
    reports = [_publish(store, base, outcome) for outcome in trained]
    run.finish([f"{report.name}@{report.version}" for report in reports])
    return TrainReport(reports)


def _get(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _identify_run(base: Base, domains: Sequence[Domain]) -> dict[str, Any]:
    return {
        "base": base.fingerprint,
        "dtype": base.runtime.dtype_name,
        "adapters": {
            d.name: {
                "data": d.data.fingerprint,
                **d.recipe.model_dump(mode="json", include={"lora", "train"}),
            }
            for d in domains
        },
    }


def _publish(store: Store, base: Base, outcome: TrainedAdapter) -> AdapterReport:
    domain = outcome.domain
    report = AdapterReport(
        name=domain.name, version=0, steps=domain.num_steps, best_step=domain.best_step,
        train_tokens=domain.train_tokens, base_perplexity=math.exp(min(outcome.base_nll, 700)),
        validation_perplexity=math.exp(min(outcome.validation_nll, 700)),
        tokens_per_second=domain.train_tokens / max(outcome.seconds, 1e-9),
        peak_memory_bytes=measure_peak_memory(base.runtime.device), seconds=outcome.seconds,
    )  # fmt: skip
    figures = {key: value for key, value in vars(report).items() if key not in ("name", "version")}
    figures["trained_parameters"] = count_parameters(base.config, domain.recipe.lora)
    figures["dtype"] = base.runtime.dtype_name
    sources = [Path(source).name for source in domain.recipe.data.sources]
    data = {
        "sources": sources, "fingerprint": domain.data.fingerprint, "train_tokens": domain.data.train.num_tokens,
        **{key: domain.data.report[key] for key in ("documents_read", "documents_kept", "documents", "tokens")},
    }  # fmt: skip
    origin = Origin(data, domain.recipe.model_dump(mode="json"), figures, metrics=domain.records)
    manifest = publish_adapter(store, domain.name, outcome.adapter, base, origin)
    return AdapterReport(**{**vars(report), "version": manifest.version})


def _report_published(store: Store, reference: str) -> AdapterReport:
    manifest = store.read_manifest(reference)
    keys = [key for key in AdapterReport.__dataclass_fields__ if key not in ("name", "version")]
    return AdapterReport(manifest.name, manifest.version, **{key: manifest.figures[key] for key in keys})
