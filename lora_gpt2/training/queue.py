"""More domains than slots: those that wait for one, and what became of those that had one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.runtime import Runtime
from lora_gpt2.recipe import Recipe
from lora_gpt2.training.memory import estimate_memory
from lora_gpt2.training.slot import TrainedAdapter, TrainingSlot

MOST_SLOTS = 8
"""Slots that are used where memory has room for more: beyond it a step takes longer, but no token gets cheaper."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What became of a domain: the reference of its adapter, or why it failed."""

    reference: str = ""
    failure: str = ""


class DomainQueue:
    """The domains that wait, and those that are finished, by name.

    Args:
        waiting: in the order in which they get a slot.
        publish: called with each trained adapter; returns its reference.
    """

    def __init__(self, waiting: Sequence[TrainingSlot], publish: Callable[[TrainedAdapter], str]) -> None:
        self.waiting, self.publish = deque(waiting), publish
        self.finished: dict[str, Finished] = {}

    def finish(self, slot: TrainingSlot, conclude: Callable[[], TrainedAdapter]) -> TrainingSlot | None:
        """Publishes the adapter of a slot, unless it failed; returns the domain that takes its place, if one waits."""
        reference = "" if slot.failure else self.publish(conclude())
        self.finished[slot.name] = Finished(reference=reference, failure=slot.failure)
        return self.waiting.popleft() if self.waiting else None

    def list_references(self) -> list[str]:
        """Returns the references of the adapters that were published, by name."""
        return [outcome.reference for _, outcome in sorted(self.finished.items()) if outcome.reference]

    def to_json(self) -> dict[str, Any]:
        """Returns what is finished, for a checkpoint."""
        return {name: vars(outcome) for name, outcome in self.finished.items()}

    def restore(self, slots: list[TrainingSlot], running: Sequence[str], finished: dict[str, Any]) -> None:
        """Sets what is finished and what waits to those of a checkpoint, and `slots` to the domains that had one."""
        known = {slot.name: slot for slot in [*slots, *self.waiting]}
        self.finished = {name: Finished(**outcome) for name, outcome in finished.items()}
        slots[:] = [known[name] for name in running]
        self.waiting = deque(slot for name, slot in known.items() if name not in {*running, *self.finished})


def order_domains(slots: Sequence[TrainingSlot]) -> list[TrainingSlot]:
    """Returns the domains with the longest training first, so that no long one is left to train alone at the end."""
    return sorted(slots, key=lambda slot: slot.num_steps * slot.tokens_per_step, reverse=True)


def choose_num_slots(recipes: Sequence[Recipe], config: GPT2Config, runtime: Runtime, budget: int) -> int:
    """Returns how many of these recipes can be trained at the same time within `budget` bytes, at least one."""
    largest = sorted(recipes, key=lambda recipe: estimate_memory(config, [recipe], runtime).peak, reverse=True)
    counts = range(2, min(MOST_SLOTS, len(recipes)) + 1)
    fitting = [count for count in counts if estimate_memory(config, largest[:count], runtime).peak <= budget]
    return max(fitting, default=1)
