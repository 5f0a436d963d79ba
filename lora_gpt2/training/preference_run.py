"""From choices to a published version: read what was preferred, train, publish; interrupted, it can be resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import DataError, InterruptedRunError, NotFoundError, ResourceError, UsageError
from lora_gpt2.core.files import wrap_os_errors
from lora_gpt2.core.interrupt import catch_signals
from lora_gpt2.core.locks import hold_lock
from lora_gpt2.core.memory import is_out_of_memory
from lora_gpt2.core.names import AUTO
from lora_gpt2.data.prepared import PreparedData
from lora_gpt2.evaluation.held_out import read_own_text
from lora_gpt2.model.base import Base, load_base
from lora_gpt2.model.runtime import choose_runtime, measure_peak_memory
from lora_gpt2.rating.preferences import Preference, Preferences, read_preferences
from lora_gpt2.recipe import Recipe
from lora_gpt2.recipe.unused import list_unused
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.fetch import is_foreign
from lora_gpt2.store.files import load_adapter
from lora_gpt2.store.manifest import Manifest, Parent
from lora_gpt2.training.checkpoint import RunFolder, open_run_folder
from lora_gpt2.training.pairs import PairRows, encode_pairs, match_labelled, mismatch_pairs, split_pairs
from lora_gpt2.training.preferences import PreferenceTrainer
from lora_gpt2.training.process_group import init_process_group
from lora_gpt2.training.publish import find_published
from lora_gpt2.training.publish_preferences import PreferenceReport, publish_preferred, report_preferred
from lora_gpt2.training.slot import MICRO_BATCHING
from lora_gpt2.training.start import describe_start, inherit_shape, pin_parent, reshape_parent

Split = tuple[list[int], list[int]]
FEWEST_PAIRS = 20
CHECKPOINT_FORMAT = 1


def train_preferences(
    recipe: Recipe, store: Store, reporter: Reporter, *, resume: bool = False, fresh: bool = False
) -> PreferenceReport:
    """Trains the next version of an adapter on what people preferred, and publishes it; returns its figures.

    An interrupted run of the same adapter is continued (`resume`) or set aside (`fresh`), never overwritten.

    Raises:
        UsageError: the recipe names no adapter of the store to continue, or text besides; several processes.
        ResourceError: it does not fit into memory.
        NotFoundError: there is no such adapter, or no such file.
        DataError: fewer than `FEWEST_PAIRS` pairs are decided.
        TrainingDiverged: the loss is no longer finite; nothing is published.
        ConflictError: the same adapter is trained on preferences by another process.
        InterruptedRunError: an interrupted run is there, and neither `resume` nor `fresh` says what becomes of it.
        MismatchError: `resume` with other settings, pairs, parent or base.
        Interrupted: a stop was requested; nothing is published, the last step is kept.
    """
    if recipe.lora.init_from in ("", AUTO):
        raise UsageError("preferences need an adapter to start from", "name it: --from law")
    if is_foreign(recipe.lora.init_from):
        raise UsageError("preferences need an adapter of the store", "lora-gpt2 adapters import it first")
    if recipe.data.sources:
        raise UsageError("train on text or on preferences, not on both", "train on the text first, then --from it")
    if init_process_group().size > 1:
        raise UsageError("preferences are trained on in one process", "start it without torchrun or accelerate")
    found = read_preferences(recipe.preferences.sources)
    pairs, split = _choose_pairs(found, is_labelled=recipe.preferences.loss == "kto")
    store.check_writable()
    run = open_run_folder(store.root, [f"{recipe.name} by preferences"])
    recipe = inherit_shape(pin_parent(recipe, run.read_identity().get("init_from", "")) if resume else recipe, store)
    with wrap_os_errors(f"keep the run in {run.path} (see LORA_GPT2_CACHE)"):
        run.path.mkdir(parents=True, exist_ok=True)
    with hold_lock(run.lock, f"the run of {recipe.name}"):
        if resume and (published := run.read_published()):
            reporter.message(f"already complete: {', '.join(published)}")
            return report_preferred(store, published[0])
        if not (resume or fresh) and (step := run.find_last_step()):
            kept = f"an interrupted run of {recipe.name} on preferences is kept, at step {step}"
            raise InterruptedRunError(kept, "--resume continues it, --fresh starts over")
        report = _train_locked(recipe, (found, pairs, split), store, reporter, run, resume)
        run.finish([str(report)])
    return report


def _choose_pairs(found: Preferences, is_labelled: bool) -> tuple[list[Preference], Split]:
    """Returns the pairs, or all texts by their labels in pairs, and which of them to train on and to hold out."""
    if found.labelled and not is_labelled:
        raise UsageError("texts that are labelled one by one need the loss kto", "--set preferences.loss=kto")
    if is_labelled:
        texts = found.label_all()
        if len(texts) < FEWEST_PAIRS:
            raise DataError(f"{len(texts)} texts are labelled", f"at least {FEWEST_PAIRS} are needed: ask for more")
        return match_labelled(texts)
    if len(found.pairs) < FEWEST_PAIRS:
        ties = f", {found.num_ties} are ties" if found.num_ties else ""
        raise DataError(
            f"{len(found.pairs)} pairs are decided{ties}", f"at least {FEWEST_PAIRS} are needed: ask for more"
        )
    return found.pairs, split_pairs(found.pairs)


def _train_locked(
    recipe: Recipe,
    chosen: tuple[Preferences, list[Preference], Split],
    store: Store,
    reporter: Reporter,
    run: RunFolder,
    resume: bool,
) -> PreferenceReport:
    found, pairs, split = chosen
    base = load_base(recipe.base, choose_runtime(recipe.train.dtype), recipe.train.quantize)
    manifest, parent = load_adapter(store, recipe.lora.init_from, base)
    start = reshape_parent(
        recipe, base, parent, (Parent(reference=manifest.reference, digest=manifest.digest, weight=1.0),)
    )
    for line in [*list_unused([recipe]), *([describe_start(start, recipe.name)] if start.relative_error else [])]:
        reporter.message(line)
    rate = recipe.train.learning_rate or (
        recipe.train.peak_learning_rate(base.config.n_embd) * recipe.preferences.learning_rate_factor
    )
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"learning_rate": rate})})
    rows, mismatched = encode_pairs(pairs, base.tokenizer, base.config.n_positions), None
    if recipe.preferences.loss == "kto":
        mismatched = encode_pairs(mismatch_pairs(pairs, split), base.tokenizer, base.config.n_positions)
    _say_what_is_there(found, rows, split, manifest, reporter)
    own_text = _read_own(store, manifest, reporter)
    identity = _identify_run(recipe, base, manifest, rows, own_text)
    checkpoint = None
    if resume and run.find_last_step():
        if different := run.check_identity(identity, free=(MICRO_BATCHING,)):
            reporter.message(f"equal to rounding only, because micro-batches differ: {different}")
        checkpoint = run.load(reporter)
    elif resume:
        reporter.message("there is no run to resume: starting over")
    with catch_signals() as stop, _explain_oom(rows):
        trainer = PreferenceTrainer(base, recipe, start.adapter, rows, split, own_text, mismatched=mismatched)
        if checkpoint:
            trainer.restore(*checkpoint)
            reporter.message(f"resuming at step {trainer.step}")
        else:
            run.begin(identity)
        trainer.train(stop, reporter, run)
    best, parents = trainer.read_best(), [manifest.reference]
    if checkpoint and (published := find_published(store, base, recipe.name, best, parents)):
        return report_preferred(store, f"{recipe.name}@{published}")  # it was killed after that
    return publish_preferred(store, base, trainer, manifest, found, measure_peak_memory(base.runtime.device))


def _identify_run(
    recipe: Recipe, base: Base, parent: Manifest, rows: PairRows, own_text: PreparedData | None
) -> dict[str, Any]:
    """Returns everything that decides the numbers of a run."""
    of_micro_batches = {"micro_batch_tokens", "gradient_checkpointing"}
    irrelevant = {"checkpoint_every", "trackers", *of_micro_batches}
    pairs = hashlib.sha256(rows.inputs.tobytes() + rows.targets.tobytes()).hexdigest()
    return {
        "format": CHECKPOINT_FORMAT,
        "base": base.fingerprint,
        "dtype": base.runtime.dtype_name,
        "device": base.runtime.device.type,
        "parent": parent.digest,
        "init_from": parent.reference,
        "own_text": own_text.fingerprint if own_text else "",
        "pairs": pairs,
        "preferences": recipe.preferences.model_dump(mode="json", exclude={"sources"}),
        "lora": recipe.lora.model_dump(mode="json", exclude={"init_from"}),
        "train": recipe.train.model_dump(mode="json", exclude=irrelevant),
        MICRO_BATCHING: recipe.train.model_dump(mode="json", include=of_micro_batches),
    }


@contextmanager
def _explain_oom(rows: PairRows) -> Iterator[None]:
    """Turns running out of memory into a `ResourceError` that names what needs less."""
    try:
        yield
    except BaseException as error:  # a panic of Rust is no Exception
        if not is_out_of_memory(error):
            raise
        hint = "use --set train.micro_batch_tokens=1024, or train.gradient_checkpointing=true"
        raise ResourceError(f"out of memory with texts of up to {rows.inputs.shape[1]} tokens", hint) from error


def _say_what_is_there(
    found: Preferences,
    rows: PairRows,
    split: Split,
    manifest: Manifest,
    reporter: Reporter,
) -> None:
    ties = f", {found.num_ties} ties left out" if found.num_ties else ""
    if found.labelled:
        desirable = sum(text.is_desirable for text in found.labelled)
        reporter.message(f"{desirable} desirable and {len(found.labelled) - desirable} undesirable texts, in pairs")
    reporter.message(
        f"{manifest.reference}: {len(split[0])} pairs to train on, {len(split[1])} held out{ties}; "
        f"{describe_lengths(rows)}"
    )
    if rows.num_cut:
        reporter.message(f"{rows.num_cut} texts are longer than the context and are cut")


def describe_lengths(rows: PairRows) -> str:
    """Returns how far the longer text was preferred, which a model learns as readily as anything else."""
    chosen, rejected = rows.lengths.T
    longer = float((chosen > rejected).mean())
    return f"the longer text was preferred in {longer:.0%} ({chosen.mean():.0f} and {rejected.mean():.0f} tokens)"


def _read_own(store: Store, manifest: Manifest, reporter: Reporter) -> PreparedData | None:
    try:
        return read_own_text(store, manifest.reference, reporter).prepared
    except NotFoundError as error:
        reporter.message(f"its own text is neither replayed nor watched: {error.message}")
        return None
