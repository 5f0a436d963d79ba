"""What a trainer leaves in its run's folder between two steps, and what it is told there."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lora_gpt2.training import progress
from lora_gpt2.training.checkpoint import RunFolder
from lora_gpt2.training.halving import Halving
from lora_gpt2.training.queue import DomainQueue
from lora_gpt2.training.run_status import ALL
from lora_gpt2.training.slot import TrainingSlot
from lora_gpt2.training.trackers import Log


def write_metrics(run: RunFolder | None, slots: Sequence[TrainingSlot], log: Log | None) -> None:
    """Appends the records since the last time to the adapters' files, and passes them to the trackers."""
    fresh = {slot.name: slot.records[slot.num_written :] for slot in slots}
    for slot in slots:
        slot.num_written = len(slot.records)
        if run is not None and fresh[slot.name]:
            run.append_metrics(slot.name, fresh[slot.name])
    if log is not None:
        pairs = [(name, record) for name, records in fresh.items() for record in records]
        for name, record in sorted(pairs, key=lambda pair: int(pair[1]["step"])):
            log(name, record)


def write_states(
    run: RunFolder | None, slots: Sequence[TrainingSlot], halving: Halving | None, queue: DomainQueue | None
) -> None:
    """Says what each adapter is doing."""
    if run is not None:
        run.status.update(progress.describe_states(slots, halving, queue))


def mark_stop_requests(asked: Collection[str], slots: Sequence[TrainingSlot], queue: DomainQueue | None) -> bool:
    """Marks the slots whose end was asked for by name; where all shall end, nobody else begins, and it returns True."""
    for slot in slots:
        slot.stop_requested |= bool({slot.name, ALL} & set(asked))
    if queue and ALL in asked:
        queue.is_closed = True
    return ALL in asked
