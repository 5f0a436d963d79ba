"""Optimizer steps in flight: Python launches steps while the device still works on earlier ones."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_gpt2.training.micro_batches import MicroBatchBuilder
from lora_gpt2.training.schedule import lr_factor
from lora_gpt2.training.slot import TrainingSlot
from lora_gpt2.training.step import SlotHyperparams, StepRunner


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The outcome of a step for one slot.

    Args:
        step: number of the step, from 1.
        slot_id: the slot.
        num_tokens: number of targets in its batch.
        learning_rate: the scheduled learning rate.
        loss: mean NLL in nats per target.
        gradient_norm: before clipping.
        is_applied: False if loss or gradient were not finite, so that the step was skipped.
        divergence: from the base on replayed text, in nats per target; 0 where nothing is replayed.
    """

    step: int
    slot_id: int
    num_tokens: int
    learning_rate: float
    loss: float
    gradient_norm: float
    is_applied: bool
    divergence: float


@dataclass(frozen=True, kw_only=True)
class _PendingStep:
    steps: Sequence[int]
    slot_ids: Sequence[int]
    num_tokens: Sequence[int]
    learning_rates: Sequence[float]
    stats: Tensor
    done: torch.cuda.Event | None


class StepDispatcher:
    """Launches steps of all active slots and collects their results."""

    def __init__(
        self, slots: Sequence[TrainingSlot], runner: StepRunner, micro_batches: MicroBatchBuilder, device: torch.device
    ) -> None:
        self.slots, self.runner, self.micro_batches, self.device = slots, runner, micro_batches, device
        self._pending: deque[_PendingStep] = deque()

    def launch(self, slot_ids: Sequence[int]) -> None:
        """Launches the next step of these slots."""
        width = self.runner.model.config.n_embd
        settings = [slot.recipe.train for slot in self.slots]
        learning_rates = [
            each.peak_learning_rate(width) * lr_factor(slot.last_step, slot.num_steps, each)
            for each, slot in zip(settings, self.slots, strict=True)
        ]
        batches, num_tokens = self.micro_batches.build(slot_ids)
        hyperparams = SlotHyperparams(
            learning_rates=self._per_slot(learning_rates),
            weight_decays=self._per_slot([each.weight_decay for each in settings]),
            max_grad_norms=self._per_slot([each.max_grad_norm or math.inf for each in settings]),
            is_active=self._per_slot([k in slot_ids for k in range(len(self.slots))], torch.bool),
        )
        stats, done = self._copy_to_host(self.runner.run(batches, hyperparams))
        self._pending.append(
            _PendingStep(
                steps=[slot.last_step + 1 for slot in self.slots],
                slot_ids=slot_ids,
                num_tokens=num_tokens,
                learning_rates=learning_rates,
                stats=stats,
                done=done,
            )
        )

    def collect(self, max_pending: int = 0) -> Iterator[StepResult]:
        """Yields the results of the oldest steps, slot by slot, until at most `max_pending` are in flight."""
        while len(self._pending) > max_pending:
            pending = self._pending.popleft()
            if pending.done is not None:
                pending.done.synchronize()
            losses, norms, applied, divergences = pending.stats.tolist()
            for slot_id in pending.slot_ids:
                yield StepResult(
                    step=pending.steps[slot_id],
                    slot_id=slot_id,
                    num_tokens=pending.num_tokens[slot_id],
                    learning_rate=pending.learning_rates[slot_id],
                    loss=losses[slot_id],
                    gradient_norm=norms[slot_id],
                    is_applied=bool(applied[slot_id]),
                    divergence=divergences[slot_id],
                )

    def _copy_to_host(self, stats: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """Returns a copy that the next step does not overwrite, and the event after which it is there."""
        if self.device.type != "cuda":
            return stats.clone(), None
        host = torch.empty(stats.shape, pin_memory=True)
        host.copy_(stats, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return host, done

    @staticmethod
    def _per_slot(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype)
