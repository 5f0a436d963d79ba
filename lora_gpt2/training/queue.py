"""More domains than slots: those that wait for one, and what became of those that had one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import CorruptError, LoraGpt2Error, NotFoundError
from lora_gpt2.model.base import Base
from lora_gpt2.store.catalog import Store
from lora_gpt2.training.checkpoint import RunFolder
from lora_gpt2.training.memory import list_concurrent, measure_budget
from lora_gpt2.training.publish import DIVERGED, NO_TEXT, find_up_to_date
from lora_gpt2.training.slot import MICRO_BATCHING, TrainedAdapter, TrainingSlot


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What became of a domain: the reference of its adapter (`is_unchanged` if it needed no training), or a failure."""

    reference: str = ""
    failure: str = ""
    is_unchanged: bool = False


class DomainQueue:
    """The domains that wait, and those that are finished, by name.

    Args:
        waiting: in the order in which they get a slot.
        publish: called with each trained adapter; returns its reference.
        unreadable: why the text of a domain could not be read, by name: it gets no slot.

    Where `is_closed`, nobody gets a slot any more: those that wait are left to `--resume`.
    """

    def __init__(
        self,
        waiting: Sequence[TrainingSlot],
        publish: Callable[[TrainedAdapter], str],
        unreadable: Mapping[str, LoraGpt2Error] = MappingProxyType({}),
    ) -> None:
        self.waiting, self.publish = deque(waiting), publish
        self.is_closed = False
        self.finished = {name: Finished(failure=why) for name, why in describe_unreadable(unreadable).items()}

    def finish(self, slot: TrainingSlot, conclude: Callable[[], TrainedAdapter]) -> None:
        """Publishes the adapter of a slot, unless it failed."""
        failure = f"{DIVERGED} {slot.failure}" if slot.failure else ""
        reference = "" if failure else self.publish(conclude())
        self.finished[slot.name] = Finished(reference=reference, failure=failure)

    def take_next(self) -> TrainingSlot | None:
        """Returns the domain that gets a free slot, None if none waits."""
        return self.waiting.popleft() if self.waiting and not self.is_closed else None

    def list_references(self) -> list[str]:
        """Returns the references of the adapters that were published, by name."""
        return [outcome.reference for _, outcome in sorted(self.finished.items()) if outcome.reference]

    def to_json(self) -> dict[str, Any]:
        """Returns what is finished, for a checkpoint."""
        return {name: vars(outcome) for name, outcome in self.finished.items()}

    def restore(self, slots: list[TrainingSlot], running: Sequence[str], finished: dict[str, Any]) -> None:
        """Sets what is finished and what waits to those of a checkpoint, and `slots` to the domains that had one."""
        known = {slot.name: slot for slot in [*slots, *self.waiting]}
        self.finished |= {name: Finished(**outcome) for name, outcome in finished.items()}
        slots[:] = [known[name] for name in running]
        self.waiting = deque(slot for name, slot in known.items() if name not in {*running, *self.finished})


def find_finished(
    slots: Sequence[TrainingSlot],
    store: Store,
    base: Base,
    run: RunFolder,
    identity: Mapping[str, Any],
    reporter: Reporter,
) -> tuple[dict[str, str], bool]:
    """Returns the references of domains that need no training, by name, and True if there is no run to go on with.

    Where there is one, they are those that it began without; else those whose versions in use training would give
    again.
    """
    is_begun = run.exists() and not run.read_published()
    if is_begun and not _has_other_texts(run, identity, reporter):
        return dict(run.read_identity().get("skipped", {})), False
    if found := find_up_to_date(slots, store, base.fingerprint):
        what = "complete" if len(found) == len(slots) else "published"
        reporter.message(f"already {what}: {', '.join(found.values())}")
        used = [_find_used(store, name, reference) for name, reference in found.items()]
        if others := [reference for reference in used if reference and reference not in found.values()]:
            reporter.message(f"left in use, though of other text or settings: {', '.join(others)}")
    return found, is_begun or bool(run.read_published()) or bool(found)


def _find_used(store: Store, name: str, reference: str) -> str:
    """Returns the version of an adapter that is in use: `reference`, where a kill left none in use."""
    try:
        return f"{name}@{store.read_current(name)}"
    except NotFoundError:
        store.use_version(name, int(reference.partition("@")[2]))
    except CorruptError:  # which `adapters rollback` says
        return ""
    return reference


def _has_other_texts(run: RunFolder, identity: Mapping[str, Any], reporter: Reporter) -> bool:
    """True if only the domains of an interrupted queue, or their texts, are not those of now: it begins anew then.

    What it has published stays. Other differences are refused later, as in any run.
    """
    before, now = (set(each.get("adapters", {})) for each in (run.read_identity(), identity))
    of_names = tuple(f"{part}.{name}." for part in ("adapters", MICRO_BATCHING) for name in before ^ now)
    found = [key for key in run.find_differences(identity) if not key.startswith(("skipped", "order", *of_names))]
    texts = [key for key in found if key in {f"adapters.{name}.data" for name in before & now}]
    if len(texts) < len(found) or not (texts or before ^ now):
        return False
    reporter.message("texts have changed since the run was interrupted: those that were in training begin again")
    return True


def describe_unreadable(unreadable: Mapping[str, LoraGpt2Error]) -> dict[str, str]:
    """Returns why domains get no slot, by name; see `TrainReport.failures`."""
    return {name: f"{NO_TEXT}: {error.message}" for name, error in unreadable.items()}


def queue_domains(
    slots: Sequence[TrainingSlot],
    num_slots: int | None,
    base: Base,
    publish: Callable[[TrainedAdapter], str],
    unreadable: Mapping[str, LoraGpt2Error],
    skipped: Mapping[str, str],
) -> tuple[Sequence[TrainingSlot], DomainQueue | None]:
    """Returns the domains that begin, and the queue of the others; None where nobody has to wait.

    `skipped` have the references of those that are finished.
    """
    if num_slots is None:
        return slots, None
    slots = [slot for slot in slots if slot.name not in skipped]
    if not num_slots:
        recipes, budget = [slot.recipe for slot in slots], measure_budget(base.runtime.device)
        num_slots = len(list_concurrent(base.config, recipes, base.runtime, budget, num_slots))
    ordered = order_domains(slots)
    queue = DomainQueue(ordered[num_slots:], publish, unreadable)
    queue.finished |= {name: Finished(reference=reference, is_unchanged=True) for name, reference in skipped.items()}
    return ordered[:num_slots], queue


def order_domains(slots: Sequence[TrainingSlot]) -> list[TrainingSlot]:
    """Returns the domains with the longest training first, so that no long one is left to train alone at the end."""
    return sorted(slots, key=lambda slot: slot.num_steps * slot.tokens_per_step, reverse=True)
