"""What is checked of the slots before they train, and what is shown of them while they do."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lora_gpt2.core.errors import UsageError
from lora_gpt2.evaluation.perplexity import choose_window
from lora_gpt2.model.base import Base
from lora_gpt2.training.halving import Halving
from lora_gpt2.training.publish import DIVERGED
from lora_gpt2.training.queue import DomainQueue
from lora_gpt2.training.slot import TrainingSlot

MOST_NATS = 50.0  # of which e to the power is still shown
MOST_SHOWN = 8  # slots


def check_lengths(base: Base, slots: Sequence[TrainingSlot]) -> None:
    """Raises `UsageError` if blocks, or the windows that are measured at the end, exceed the base's context."""
    block_size, context = slots[0].recipe.data.block_size, base.config.n_positions
    if block_size > context:
        raise UsageError(
            f"data.block_size {block_size} exceeds the context of '{base.name}', {context}",
            f"use --set data.block_size={context}",
        )
    for slot in slots:
        choose_window(base.config, slot.recipe.evaluate)


def count_remaining_tokens(slots: Sequence[TrainingSlot], halving: Halving | None, queue: DomainQueue | None) -> int:
    """Returns the tokens that go through the network until the end, if nothing but a rung stops a slot early."""
    if halving:
        return halving.count_remaining(slots) * slots[0].tokens_per_step
    all_slots = [*slots, *(queue.waiting if queue else ())]
    return sum((slot.num_steps - slot.last_step) * slot.tokens_per_step for slot in all_slots if not slot.stopped)


def describe_progress(slots: Sequence[TrainingSlot], halving: Halving | None, queue: DomainQueue | None) -> str:
    """Returns the last losses of the slots; of candidates, how many are left and the best of them."""
    if halving:
        best_nll = min(slot.best_nll for slot in slots)
        shown = f", val ppl {math.exp(best_nll):.1f}" if best_nll < MOST_NATS else ""
        return f"{sum(slot.is_active for slot in slots)} candidates{shown}"
    parts = []
    if queue:
        failed = sum(bool(each.failure) for each in queue.finished.values())
        shown = f", {failed} failed" if failed else ""
        parts = [f"{len(queue.finished) - failed} done{shown}, {len(queue.waiting)} wait"]
    return "; ".join([*parts, *map(_describe_slot, slots[:MOST_SHOWN])])


def _describe_slot(slot: TrainingSlot) -> str:
    best = f" val ppl {math.exp(min(slot.best_nll, MOST_NATS)):.1f}" if slot.has_best else ""
    loss = next((r["loss"] for r in reversed(slot.records) if r["loss"] is not None), math.nan)
    return f"{slot.name} failed" if slot.failure else f"{slot.name} loss {loss:.2f}{best}"


def describe_states(
    slots: Sequence[TrainingSlot], halving: Halving | None, queue: DomainQueue | None
) -> dict[str, tuple[str, str]]:
    """Returns what each adapter is doing, and a detail; see `run_status.States`."""

    def describe(slot: TrainingSlot) -> tuple[str, str]:
        if slot.failure:
            return "failed", slot.failure
        if slot.is_active:
            return "training", ""
        return ("dropped", "") if halving and slot.stopped else ("measuring", "stopped early" if slot.stopped else "")

    states = {slot.name: ("waiting", "") for slot in queue.waiting} if queue else {}
    states |= {slot.name: describe(slot) for slot in slots}
    for name, outcome in queue.finished.items() if queue else ():
        state = "failed" if outcome.failure else "unchanged" if outcome.is_unchanged else "published"
        states[name] = (state, outcome.failure or outcome.reference)
    return states


def list_failures(slots: Sequence[TrainingSlot], queue: DomainQueue | None) -> dict[str, str]:
    """Returns what went wrong with the adapters that failed, by name; see `TrainReport.failures`."""
    found = {name: outcome.failure for name, outcome in queue.finished.items()} if queue else {}
    running = {slot.name: f"{DIVERGED} {slot.failure}" for slot in slots if slot.failure and slot.name not in found}
    return {name: failure for name, failure in {**found, **running}.items() if failure}


def is_checkpoint_due(slots: Sequence[TrainingSlot], step: int) -> bool:
    """True if a run of these slots is checkpointed after `step` steps, because it is not at its end."""
    intervals = [s.recipe.train.checkpoint_every for s in slots if s.recipe.train.checkpoint_every]
    return bool(intervals) and step % min(intervals) == 0 and any(slot.is_active for slot in slots)
