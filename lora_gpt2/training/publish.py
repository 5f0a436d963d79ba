"""From a trained adapter to a version in the store: what is measured at the end, recorded and reported."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from pydantic import ValidationError

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import DataError, IntegrityError, NotFoundError, ResourceError, TrainingDiverged
from lora_gpt2.core.memory import check_room
from lora_gpt2.core.printable import join_names
from lora_gpt2.data.prepared import SKETCH, describe_preparation
from lora_gpt2.data.successors import DRAFTER, SuccessorTable
from lora_gpt2.evaluation.general import measure_general
from lora_gpt2.evaluation.perplexity import Score, choose_window, to_perplexity
from lora_gpt2.inference.embedding import EmbeddingMoments
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.session import Session
from lora_gpt2.model.base import Base
from lora_gpt2.model.lora import Adapter, count_parameters
from lora_gpt2.model.runtime import measure_peak_memory
from lora_gpt2.recipe import DataSettings, Recipe
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.files import Origin, publish_adapter
from lora_gpt2.store.manifest import WEIGHTS, Manifest
from lora_gpt2.store.peft.tensors import to_peft
from lora_gpt2.training.diagnosis import describe_forgetting, diagnose_curve, diagnose_test
from lora_gpt2.training.report import render_report
from lora_gpt2.training.slot import TrainedAdapter, TrainingSlot, fingerprint_recipes
from lora_gpt2.training.start import join_sketches

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
    divergence: float | None
    tokens_per_second: float
    peak_memory_bytes: int
    seconds: float
    verdict: str
    forgetting: str

    def __str__(self) -> str:
        """Returns the reference of the version, such as `law@2`."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """The adapters of a run, and by name why others failed; `already_complete` if there was nothing left to do."""

    adapters: list[AdapterReport]
    failures: dict[str, str] = field(default_factory=dict)
    already_complete: bool = False

    def raise_failures(self) -> TrainReport:
        """Returns the report, if no adapter failed.

        Raises `TrainingDiverged`, `DataError` or `ResourceError` (it was lost), with the report.
        """
        if not self.failures:
            return self
        failures, published = describe_failures(self.failures), join_names([str(each) for each in self.adapters])
        message = f"{failures}; {f'published: {published}' if published else 'nothing was published'}"
        if any(reason.startswith(DIVERGED) for reason in self.failures.values()):
            hint = "use a smaller --set train.learning_rate, with --fresh"
            raise TrainingDiverged(message, hint).with_report(self)
        if all(NO_TEXT in failure for failure in self.failures.values()):
            raise DataError(message, "fix the text, and train it alone, or with --resume").with_report(self)
        raise ResourceError(message, "fix these, and train them with --resume").with_report(self)


def describe_failures(failures: Mapping[str, str]) -> str:
    """Returns in one line why adapters failed, by name; those that failed for the same reason together."""
    reasons = dict.fromkeys(failures.values())
    named = {why: join_names([f"'{name}'" for name, each in failures.items() if each == why]) for why in reasons}
    return "; ".join(f"{names} {why}" for why, names in named.items())


NO_TEXT, DIVERGED = "has no usable text", "diverged at"
"""How the reasons of failures begin."""
NOT_FIGURES = ("name", "version", "path", "parents")


def publish_trained(
    store: Store,
    base: Base,
    outcome: TrainedAdapter,
    base_general: Score,
    resumed: bool,
    more: Mapping[str, bytes] = MappingProxyType({}),
) -> AdapterReport:
    """Publishes an adapter, unless a run that was interrupted afterwards has done so already.

    `more` are further files of the version, by name.
    """
    slot, adapter = outcome.slot, outcome.adapter
    parents = [parent.reference for parent in slot.parents]
    if resumed and (version := find_published(store, base, slot.name, adapter, parents, more)):
        return report_published(store, f"{slot.name}@{version}")
    count = sum(update.a.numel() + update.b.numel() for update in adapter.updates.values())
    check_room(COPIES * 4 * count + ROOM_BYTES)
    session = Session(base)
    session.load_in_memory({slot.name: adapter})
    general = measure_general(base, session.select(Mix.single(slot.name)))
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
        divergence=slot.final_divergence,
        tokens_per_second=slot.train_tokens / max(outcome.seconds, 1e-9),
        peak_memory_bytes=measure_peak_memory(base.runtime.device),
        seconds=outcome.seconds,
        verdict=_judge(outcome, base),
        forgetting=describe_forgetting(slot, base_general, general),
    )
    figures = {key: value for key, value in vars(report).items() if key not in NOT_FIGURES}
    figures["trained_parameters"] = count_parameters(base.config, slot.recipe.lora)
    figures["dtype"] = base.runtime.dtype_name
    figures["test"] = _describe_test(base, slot)
    pages = render_report(slot.name, slot.recipe, slot.records, figures, _list_notes(slot))
    sketch = join_sketches(slot, store)
    pages |= {SKETCH: sketch.to_bytes(), **_build_drafter(slot), **more}
    recipe = slot.recipe.model_dump(mode="json")
    origin = Origin(
        data=_describe_data(slot, base) | ({} if sketch.is_whole else {"sketch_is_whole": False}),
        recipe=recipe,
        figures=figures,
        parents=slot.parents,
        provenance={"by": "train", "from": Path(slot.source).name} if slot.source else {},
        metrics=slot.records,
        pages=pages,
    )
    manifest = publish_adapter(store, slot.name, adapter, base, origin)
    return replace(report, version=manifest.version, path=str(store.resolve(manifest.reference).absolute()))


def _list_notes(slot: TrainingSlot) -> list[str]:
    """Returns what became of the text, and whether the curve is of less validation text than the perplexity."""
    tokens, of_curve = slot.data.validation.num_tokens, slot.validation_tokens
    said = f"the validations of the curve are on {of_curve:,} of {tokens:,} tokens, the perplexity is on all"
    return [*([said] if of_curve < tokens else []), *describe_preparation(slot.data)]


def _judge(outcome: TrainedAdapter, base: Base) -> str:
    """Returns what there is to say of the curve and of the test figure."""
    slot = outcome.slot
    num_epochs = slot.train_tokens / max(1, slot.data.train.num_targets)
    train = slot.recipe.train
    step = slot.best_step if train.forget is not None and train.keep_best and slot.has_best else None
    said = diagnose_curve(
        slot.records, slot.num_steps, num_epochs, slot.data.validation.num_targets, step, exceeds=bool(slot.best_excess)
    )
    window, _ = choose_window(base.config, slot.recipe.evaluate)
    return said + diagnose_test(outcome.test_nll, slot.recipe.data.block_size, window)


def _build_drafter(slot: TrainingSlot) -> dict[str, bytes]:
    """Returns the file that drafts the adapter's text, unless the recipe leaves it out."""
    if not slot.recipe.train.drafter:
        return {}
    return {DRAFTER: SuccessorTable.build(np.asarray(slot.data.train.stream)).to_bytes()}


def _describe_test(base: Base, slot: TrainingSlot) -> dict[str, Any]:
    """Returns how the test figure was measured, so that one that differs can be explained."""
    settings, report = slot.recipe.evaluate, slot.data.report
    window, stride = choose_window(base.config, settings)
    return {
        "documents": report["documents"]["test"],
        "files": report["test_files"],
        "profile": slot.recipe.data.profile,
        "protocol": settings.protocol,
        "window": window,
        "stride": stride,
        "dtype": base.runtime.dtype_name,
    }


def find_published(
    store: Store,
    base: Base,
    name: str,
    adapter: Adapter,
    parents: Sequence[str],
    more: Mapping[str, bytes] = MappingProxyType({}),
) -> int | None:
    """Returns the newest version if it has this adapter's weights and these files, and is none of its parents.

    A kill may have left it without being in use.
    """
    files = {WEIGHTS: to_peft(adapter, base.name, base.config)[WEIGHTS], **more}
    digests = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
    for version in store.list_versions(name)[-1:] if store.has_adapter(name) else ():
        if f"{name}@{version}" in parents:  # whose weights are the best where nothing was better
            continue
        if digests.items() <= store.read_manifest(f"{name}@{version}").files.items():
            store.use_version(name, version)
            return version
    return None


def find_up_to_date(slots: Sequence[TrainingSlot], store: Store, base_fingerprint: str) -> dict[str, str]:
    """Returns the references of the versions that training these slots would give again, by name, the newest of each.

    One need not be in use: it may have been continued, tuned or rolled back since, which is left as it is.
    """
    found = {}
    for slot in slots:
        for version in reversed(store.list_versions(slot.name)):
            with suppress(IntegrityError, NotFoundError):
                manifest = store.read_manifest(f"{slot.name}@{version}")
                is_of_text = manifest.data.get("fingerprint") == slot.data.fingerprint
                if is_of_text and manifest.base.fingerprint == base_fingerprint and _is_made_by(manifest, slot.recipe):
                    found[slot.name] = manifest.reference
                    break
    return found


def _is_made_by(manifest: Manifest, recipe: Recipe) -> bool:
    """True if a version was trained with the settings of a recipe; its base and text are compared elsewhere."""
    try:
        known = Recipe.model_validate(manifest.recipe)
    except ValidationError:  # of another version of this program
        return False
    free: dict[str, Any] = {"data": DataSettings(), "base": "", "description": ""}
    one, other = (fingerprint_recipes([each.model_copy(update=free)]) for each in (known, recipe))
    return one == other


def _describe_data(slot: TrainingSlot, base: Base) -> dict[str, Any]:
    recipe, data = slot.recipe, slot.data
    moments = EmbeddingMoments.measure(Session(base), data.train.stream)
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
        **({"embedding": moments.to_json()} if moments is not None else {}),
    }


def report_published(store: Store, reference: str) -> AdapterReport:
    """Returns what was said of a version when it was published."""
    manifest = store.read_manifest(reference)
    figures: dict[str, Any] = {
        key: manifest.figures.get(key) for key in AdapterReport.__dataclass_fields__ if key not in NOT_FIGURES
    }
    path, parents = str(store.resolve(manifest.reference).absolute()), tuple(p.reference for p in manifest.parents)
    return AdapterReport(name=manifest.name, version=manifest.version, path=path, parents=parents, **figures)


@dataclass(kw_only=True)
class Publisher:
    """Publishes adapters, also while others are being trained, and keeps their reports by reference."""

    store: Store
    base: Base
    reporter: Reporter
    is_main_process: bool
    is_resumed: bool
    reports: dict[str, AdapterReport] = field(default_factory=dict)

    @cached_property
    def general(self) -> Score:
        """How well the base predicts general English."""
        return measure_general(self.base)

    def publish(self, outcome: TrainedAdapter, pages: Mapping[str, bytes] = MappingProxyType({})) -> str:
        """Publishes an adapter, with further files; returns its reference."""
        if not self.is_main_process:
            return outcome.slot.name
        report = publish_trained(self.store, self.base, outcome, self.general, self.is_resumed, pages)
        self.reports[str(report)] = report
        return str(report)

    def publish_aloud(self, outcome: TrainedAdapter) -> str:
        """Publishes an adapter and says so, because others are still being trained."""
        reference = self.publish(outcome)
        if report := self.reports.get(reference):
            before, after = report.base_perplexity, report.validation_perplexity
            self.reporter.message(f"{reference}: perplexity {before:.2f} -> {after:.2f} after {report.steps} steps")
        return reference

    def list_reports(self, references: Sequence[str]) -> list[AdapterReport]:
        """Returns the reports of some adapters, those of an earlier session too; only the main process has any."""
        if not self.is_main_process:
            return []
        return [self.reports.get(reference) or report_published(self.store, reference) for reference in references]
