"""What a callback is told while adapters train: steps, validations, checkpoints and the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from lora_gpt2.training.slot import TrainingSlot

EventKind = Literal["step", "validation", "checkpoint", "end"]


@dataclass(frozen=True, kw_only=True)
class TrainingEvent:
    """One moment of the training of one adapter.

    Args:
        kind: `step` (after each optimizer step), `validation`, `checkpoint` (it is on disk) or `end` (nothing follows).
        adapter: name of the adapter.
        step: number of steps done.
        num_steps: number of steps planned.
        tokens: number of training tokens seen, without padding.
        seconds: duration of the training so far.
        loss: mean NLL of the last step in nats per token; None if the step was skipped (float16).
        learning_rate: the one of the last step.
        gradient_norm: before clipping; None if the step was skipped.
        validation_loss: mean NLL in nats per token, in `validation` (of part of the split) and `end` (of all of it).
    """

    kind: EventKind
    adapter: str
    step: int
    num_steps: int
    tokens: int
    seconds: float
    loss: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    validation_loss: float | None = None
    slot: TrainingSlot = field(repr=False, compare=False)

    def stop(self) -> None:
        """Ends this adapter's training after the current step: it is measured and published as it is."""
        self.slot.stop_requested = True

    def __str__(self) -> str:
        """Returns one line, which `print` as a callback shows."""
        loss = self.validation_loss if self.kind in ("validation", "end") else self.loss
        figure = "" if loss is None or self.kind == "checkpoint" else f", loss {loss:.3f}"
        rate = f", learning rate {self.learning_rate:.2e}" if self.kind == "step" and self.learning_rate else ""
        return f"{self.adapter}: {self.kind} {self.step:,} of {self.num_steps:,}{figure}{rate}"


Callback = Callable[[TrainingEvent], object]
"""Receives each event; what it raises ends the run, whose last checkpoint is kept."""


def describe_event(
    kind: EventKind, slot: TrainingSlot, seconds: float, validation_loss: float | None = None
) -> TrainingEvent:
    """Returns the event of a slot, with the figures of its last step."""
    last = slot.records[-1] if slot.records else {}
    return TrainingEvent(
        kind=kind,
        adapter=slot.name,
        step=int(last.get("step", 0)),
        num_steps=slot.num_steps,
        tokens=slot.train_tokens,
        seconds=seconds,
        loss=last.get("loss"),
        learning_rate=last.get("learning_rate"),
        gradient_norm=last.get("gradient_norm"),
        validation_loss=validation_loss,
        slot=slot,
    )
