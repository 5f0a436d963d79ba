"""From an adapter trained on preferences to a version in the store."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_gpt2.data.prepared import SKETCH
from lora_gpt2.data.successors import DRAFTER
from lora_gpt2.data.text_sketch import TextSketch, hash_shingles
from lora_gpt2.evaluation.general import measure_general
from lora_gpt2.evaluation.held_out import read_sketch
from lora_gpt2.evaluation.perplexity import to_perplexity
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.session import Session
from lora_gpt2.model.base import Base
from lora_gpt2.model.lora import count_parameters
from lora_gpt2.rating.preferences import Preferences
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.files import Origin, publish_adapter
from lora_gpt2.store.manifest import Manifest, Parent
from lora_gpt2.training.validation import measure_blocks

if TYPE_CHECKING:
    from lora_gpt2.training.preferences import PreferenceTrainer


@dataclass(frozen=True, kw_only=True)
class PreferenceReport:
    """What a user is told about an adapter trained on preferences; the names are those of `train --json`.

    Figures of "before" are the parent's. Accuracy is the share of held-out pairs whose chosen text is ahead of the
    parent's opinion; that of the parent is 0 by definition, chance is a half. Lengths are mean tokens.
    """

    name: str
    version: int
    path: str
    parents: tuple[str, ...]
    steps: int
    best_step: int
    train_tokens: int
    pairs: int
    held_out_pairs: int
    ties: int
    chosen_tokens: float
    rejected_tokens: float
    longer_preferred: float
    held_out_loss_before: float
    held_out_loss: float
    held_out_accuracy: float
    parent_perplexity: float | None
    validation_perplexity: float | None
    general_perplexity_before: float
    general_perplexity: float
    seconds: float
    peak_memory_bytes: int
    verdict: str

    def __str__(self) -> str:
        """Returns the reference of the version, such as `law@2`."""
        return f"{self.name}@{self.version}"


NOT_FIGURES = ("name", "version", "path", "parents")


def publish_preferred(
    store: Store, base: Base, trainer: PreferenceTrainer, parent: Manifest, found: Preferences, peak_memory_bytes: int
) -> PreferenceReport:
    """Publishes the best weights as the next version; its recipe is the parent's with the settings of this training."""
    recipe, adapter, score = trainer.recipe, trainer.read_best(), trainer.best_score
    session = Session(base, store)
    session.load_in_memory({"preferred": adapter})
    general_before, general = (
        measure_general(base, session.select(Mix.single(name))).perplexity for name in (parent.reference, "preferred")
    )
    own_before, own = (_measure_own_text(trainer, session, name) for name in (parent.reference, "preferred"))
    chosen, rejected = trainer.pairs.lengths.T
    report = PreferenceReport(
        name=recipe.name,
        version=0,
        path="",
        parents=(parent.reference,),
        steps=trainer.num_steps,
        best_step=trainer.best_step,
        train_tokens=trainer.num_tokens,
        pairs=len(trainer.trained),
        held_out_pairs=len(trainer.held_out),
        ties=found.num_ties,
        chosen_tokens=float(chosen.mean()),
        rejected_tokens=float(rejected.mean()),
        longer_preferred=float((chosen > rejected).mean()),
        held_out_loss_before=trainer.first_score.loss,
        held_out_loss=score.loss,
        held_out_accuracy=score.accuracy,
        parent_perplexity=own_before,
        validation_perplexity=own,
        general_perplexity_before=general_before,
        general_perplexity=general,
        seconds=trainer.seconds,
        peak_memory_bytes=peak_memory_bytes,
        verdict=_judge(trainer),
    )
    figures = {key: value for key, value in asdict(report).items() if key not in NOT_FIGURES}
    kept = {key: parent.figures[key] for key in ("base_perplexity", "base_general_perplexity") if key in parent.figures}
    kept["trained_parameters"] = count_parameters(base.config, recipe.lora)
    origin = Origin(
        data=dict(parent.data),
        recipe=_join_recipes(parent, recipe.model_dump(mode="json")),
        figures={**kept, **figures, "dtype": base.runtime.dtype_name},
        parents=(Parent(reference=parent.reference, digest=parent.digest, weight=1.0),),
        metrics=trainer.records,
        pages=_build_files(store, parent, found),
    )
    manifest = publish_adapter(store, recipe.name, adapter, base, origin)
    return replace(report, version=manifest.version, path=str(store.resolve(manifest.reference).absolute()))


def _measure_own_text(trainer: PreferenceTrainer, session: Session, name: str) -> float | None:
    """Returns the perplexity of all of the parent's own held-out text under an adapter; None where there is none."""
    if trainer.own_text is None:
        return None
    adapters = session.adapters_for([session.resolve(Mix.single(name))])
    return to_perplexity(measure_blocks(session.base, trainer.own_text, adapters))


def report_preferred(store: Store, reference: str) -> PreferenceReport:
    """Returns what was said of a version when it was published."""
    manifest = store.read_manifest(reference)
    figures: dict[str, Any] = {
        key: manifest.figures.get(key) for key in PreferenceReport.__dataclass_fields__ if key not in NOT_FIGURES
    }
    path, parents = str(store.resolve(manifest.reference).absolute()), tuple(p.reference for p in manifest.parents)
    return PreferenceReport(name=manifest.name, version=manifest.version, path=path, parents=parents, **figures)


def _judge(trainer: PreferenceTrainer) -> str:
    """Returns in words whether anything was learnt, from the held-out pairs."""
    score, count = trainer.best_score, len(trainer.held_out)
    if not trainer.best_step:
        limited = any(record["held_out_loss"] < trainer.first_score.loss for record in trainer.records)
        why = "within the limits of perplexity and forgetting" if limited else "on the held-out pairs"
        return f"nothing was better than the parent {why}: this version is the parent"
    spread = (score.accuracy * (1 - score.accuracy) / count) ** 0.5
    sure = "" if score.accuracy - 2 * spread > 0.5 else ", which may be chance"
    return f"prefers the chosen text more than its parent in {score.accuracy:.0%} of {count} held-out pairs{sure}"


def _join_recipes(parent: Manifest, recipe: dict[str, Any]) -> dict[str, Any]:
    """Returns the parent's recipe, with which its text is found again, and what this training changed."""
    changed = {key: recipe[key] for key in ("name", "lora", "train", "preferences")}
    return {**recipe, **parent.recipe, **changed}


def _build_files(store: Store, parent: Manifest, found: Preferences) -> dict[str, bytes]:
    """Returns what the parent's version has for its text: the sketch, with the texts of the pairs, and the drafter."""
    files = {}
    if (sketch := read_sketch(store, parent.reference)) is not None:
        joined = TextSketch.join([sketch, TextSketch.build(list(map(hash_shingles, found.texts)))])
        files[SKETCH] = joined.to_bytes()
    with store.open(parent.reference) as version:
        if DRAFTER in version.manifest.files:
            files[DRAFTER] = version.read_file(DRAFTER)
    return files
