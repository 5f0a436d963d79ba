"""The training loop: K adapters over one base, one step after another.

Each slot has its own data order, learning rate, clipping, number of steps and early stop; the loss is the sum over the
slots of their mean NLL per token, so a slot's gradient is what it would be alone. A slot that has stopped, or whose
loss is no longer finite, leaves the batch and the others continue. The base is never written. Everything random is a
function of the seed, the step and the sequence, so a run continued from a checkpoint equals an unbroken one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import Interrupted
from lora_gpt2.core.interrupt import StopRequest
from lora_gpt2.core.memory import release_freed
from lora_gpt2.model.bank import AdapterBank
from lora_gpt2.model.base import Base
from lora_gpt2.model.fused import TrainingAdapters
from lora_gpt2.model.lora import Adapter, build_adapter, build_ranks, merge_ranks, plan_targets
from lora_gpt2.model.runtime import measure_peak_memory
from lora_gpt2.training import progress
from lora_gpt2.training.checkpoint import RunFolder
from lora_gpt2.training.dispatch import StepDispatcher, StepResult
from lora_gpt2.training.events import Callback, EventKind, describe_event
from lora_gpt2.training.halving import Halving, average_weights
from lora_gpt2.training.journal import mark_stop_requests, write_metrics, write_states
from lora_gpt2.training.micro_batches import MicroBatchBuilder
from lora_gpt2.training.process_group import ProcessGroup
from lora_gpt2.training.publish import TrainReport
from lora_gpt2.training.queue import DomainQueue
from lora_gpt2.training.replay import Replay
from lora_gpt2.training.slot import TrainedAdapter, TrainingSlot
from lora_gpt2.training.step import StepRunner
from lora_gpt2.training.trackers import Log
from lora_gpt2.training.validation import HeldOutLosses, OnTokens, ignore_tokens, measure_blocks

MAX_SKIPS = 20
"""Steps that dynamic loss scaling may skip in a row."""


class Trainer:
    """Trains the slots' adapters over `base`; see the module's docstring.

    Args:
        base: the base.
        slots: their recipes must have passed `check_together`.
        reporter: shows progress.
        run: keeps checkpoints and metrics; None keeps none.
        process_group: the processes of the run.
        sampler: called as `sampler(base, slot, adapter)`; returns a text to keep with each validation.
        open_start: returns the adapter that a slot starts from, in the shape of its recipe; None for a fresh one.
        replay: general text for slots with a budget of forgetting.
        halving: slots are candidates for one adapter, of which the worse ones stop early and one is returned.
        queue: domains that wait for a slot.
        callbacks: receive each event of each adapter, in the main process.

    `lookahead` is the number of steps that may be in flight when Python continues.

    Raises:
        UsageError: the block size or the window of `evaluate` exceeds the base's context, or there is nothing to adapt.
    """

    def __init__(
        self,
        base: Base,
        slots: Sequence[TrainingSlot],
        reporter: Reporter,
        run: RunFolder | None = None,
        process_group: ProcessGroup | None = None,
        *,
        sampler: Callable[[Base, TrainingSlot, Adapter], str] | None = None,
        open_start: Callable[[TrainingSlot], Adapter | None] = lambda slot: None,
        replay: Replay | None = None,
        halving: Halving | None = None,
        queue: DomainQueue | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.base, self.slots, self.reporter, self.run = base, list(slots), reporter, run
        self.process_group, self.sampler, self.callbacks = process_group or ProcessGroup(), sampler, callbacks
        self.device = base.model.wte.weight.device
        self.lookahead = 1 if self.device.type == "cuda" else 0
        self.open_start, self.replay, self.halving, self.queue = open_start, replay, halving, queue
        all_slots = [*slots, *(queue.waiting if queue else ())]
        progress.check_lengths(base, all_slots)
        ranks = merge_ranks(build_ranks(base.config, slot.recipe.lora) for slot in all_slots)
        self.bank = AdapterBank(base.config, ranks, len(slots), "training", base.model.wte.weight)
        for slot_id, slot in enumerate(slots):
            self.bank.load(slot_id, build_adapter(base.config, slot.recipe.lora, slot.recipe.train.seed))
        mask, lr_multipliers = self._build_masks(all_slots)
        self.runner = StepRunner(base.model, self.bank, mask, lr_multipliers, self.process_group)
        self.micro_batches = MicroBatchBuilder(self.slots, self.process_group, replay)
        self.dispatcher = StepDispatcher(self.slots, self.runner, self.micro_batches, self.device)
        self.losses = HeldOutLosses(base, self.bank, self.slots)
        self.best = self.bank.flat.clone()
        self.average = self.bank.flat.clone() if halving else self.bank.flat[:0]
        self.step, self.seconds, self.is_told_to_end = 0, 0.0, False

    def _build_masks(self, all_slots: Sequence[TrainingSlot]) -> tuple[Tensor | None, Tensor | None]:
        """Returns the mask and the learning-rate multipliers of the bank, each None where no slot needs one."""
        plans = [plan_targets(self.base.config, slot.recipe.lora) for slot in all_slots]
        has_mask = any(plan.blocks is not None or plan.frozen_rank for some in plans for plan in some)
        mask = self.bank.build_mask(plans[: len(self.slots)])
        mask = torch.ones_like(self.bank.flat) if has_mask and mask is None else mask
        ratios = [slot.recipe.train.loraplus_lr_ratio for slot in all_slots]
        multipliers = self.bank.build_lr_multipliers(ratios[: len(self.slots)], mask)
        if multipliers is mask and any(ratio != 1 for ratio in ratios):
            multipliers = torch.ones_like(self.bank.flat) if mask is None else mask.clone()
        return mask, multipliers

    def train(self, stop: StopRequest, log: Log | None = None) -> list[TrainedAdapter]:
        """Runs to the end and returns the adapters that did not fail, the best ones where `keep_best` is set.

        `log` receives each record of each adapter, by name.

        Raises:
            TrainingDiverged: no slot is left whose loss and gradient are finite; the last checkpoint is kept.
            Interrupted: a signal came, or the round of a search is over; a checkpoint of the last whole step is kept.
        """
        remaining = progress.count_remaining_tokens(self.slots, self.halving, self.queue)
        if self.step == 0:
            for slot_id in range(len(self.slots)):
                self._start(slot_id)
        with self.reporter.task("training", remaining, "tokens") as task:
            while active := self._list_active(log):
                self._advance(active)
                self._write_metrics(log)
                task.advance(
                    sum(self.slots[slot_id].tokens_per_step for slot_id in active),
                    progress.describe_progress(self.slots, self.halving, self.queue),
                )
                asked = self.run.status.poll_stop_requests() if self.run else ()
                signal, asked = self.process_group.broadcast_object((stop.signal_number, asked))
                self.is_told_to_end |= mark_stop_requests(asked, self.slots, self.queue)
                if signal or progress.is_checkpoint_due(self.slots, self.step):
                    self._collect(0)
                    self._write_metrics(log)
                    self.save_checkpoint()
                kept = f"step {self.step} is kept; the same command with --resume continues"
                stop.raise_if_asked(kept if self.run else "this training keeps no checkpoints", signal)
        self._collect(0)
        self._write_metrics(log)
        healthy = [k for k, slot in enumerate(self.slots) if not slot.failure]
        if self.queue and any(outcome.reference for outcome in self.queue.finished.values()):
            return []
        if not healthy:
            TrainReport(adapters=[], failures=progress.list_failures(self.slots, self.queue)).raise_failures()
        self.save_checkpoint()  # so that a full disk while publishing costs no training
        return list(self._conclude([self.halving.choose(self.slots)] if self.halving else healthy, stop))

    def read_best(self, slot_id: int) -> Adapter:
        """Returns a slot's best weights so far; those that it has where no validation was better."""
        is_kept = self.slots[slot_id].recipe.train.keep_best and self.slots[slot_id].has_best
        return self.bank.read(slot_id, self.best if is_kept else None)

    def run_step(self, slot_ids: list[int]) -> None:
        """Runs one step and waits for it."""
        self._launch(slot_ids)
        self._collect(0)

    def _launch(self, slot_ids: list[int]) -> None:
        self.dispatcher.launch(slot_ids)
        self.step += 1
        for slot_id in slot_ids:
            self.slots[slot_id].last_step += 1
            if self.halving:
                average_weights(self.average[slot_id], self.bank.flat[slot_id], self.slots[slot_id].last_step)

    def measure_average(self, slot_id: int) -> float:
        """Returns the validation loss of a slot's averaged weights, in nats per target."""
        kept = self.bank.flat[slot_id].clone()
        self.bank.write(slot_id, self.average[slot_id])
        nll = self.process_group.broadcast_object(self.measure_validation(slot_id))
        self.bank.write(slot_id, kept)
        return nll

    def _list_active(self, log: Log | None) -> list[int]:
        """Returns the slots that train in the next step, after those that ended have been given to who waits."""
        changed = False
        for slot_id, slot in enumerate(self.slots):
            if self.queue is None or slot.is_active:
                continue
            if slot.name not in self.queue.finished:
                self._collect(0)
                self._write_metrics(log)
                self.queue.finish(slot, partial(self._conclude_one, slot_id, ignore_tokens))
                changed = True
            if (after := self.queue.take_next()) is not None:
                self.slots[slot_id] = after
                self._load_fresh([slot_id])
                self._start(slot_id)
                changed = True
        if changed:
            release_freed()  # by measuring and publishing
            self.save_checkpoint()
        self._halve()
        return [slot_id for slot_id, slot in enumerate(self.slots) if slot.is_active]

    def _halve(self) -> None:
        """Stops the worse candidates of a search, if this is a rung; keeps a checkpoint where that ends the round."""
        if self.halving is None:
            return
        try:
            self.halving.halve(self)
        except Interrupted:
            self.save_checkpoint()
            raise

    def _load_fresh(self, slot_ids: Iterable[int]) -> None:
        """Gives rows of the bank to the domains that have them now."""
        for slot_id in slot_ids:
            slot = self.slots[slot_id]
            self.bank.load(slot_id, build_adapter(self.base.config, slot.recipe.lora, slot.recipe.train.seed))
            self.best[slot_id] = self.bank.flat[slot_id]
            self.runner.reset(slot_id)
        buffers = self.runner.mask, self.runner.lr_multipliers
        for buffer, values in zip(buffers, self._build_masks(self.slots), strict=True):
            if buffer is not None:
                buffer.fill_(1.0) if values is None else buffer.copy_(values)

    def _start(self, slot_id: int) -> None:
        """Begins with a domain: opens and measures the adapter that it continues, which is the best so far."""
        slot = self.slots[slot_id]
        if start := self.open_start(slot):
            self.bank.load(slot_id, start)
            self.best[slot_id] = self.bank.flat[slot_id]
        slot.started_seconds = self.seconds
        if slot.is_continued:
            slot.records.append({"step": 0, "tokens": 0, "loss": None, "learning_rate": 0.0, "seconds": 0.0})
            self._validate(slot_id)
            slot.parent_nll = self.measure_validation(slot_id, whole=True)

    def _advance(self, active: list[int]) -> None:
        """Launches a step; validates the slots that are due."""
        started = time.monotonic()
        self._launch(active)
        self.seconds, started = self.seconds + time.monotonic() - started, time.monotonic()
        is_rung = self.halving is not None and self.step in self.halving.rungs
        due = [slot_id for slot_id in active if is_rung or self.slots[slot_id].is_validation_due]
        self._collect(0 if due else self.lookahead)
        self.seconds += time.monotonic() - started
        if (self.callbacks or self.run) and (stopping := self._apply_stop_requests(active)):
            self._collect(0)
            due = list(dict.fromkeys([*due, *stopping]))
        for slot_id in due:
            if not self.slots[slot_id].failure:
                self._validate(slot_id)
        if self.callbacks:
            self._apply_stop_requests(due)  # asked for when a validation was reported

    def _apply_stop_requests(self, active: Sequence[int]) -> list[int]:
        """Marks the slots that a callback wants to end as stopped, in every process alike; returns them."""
        asked = [slot_id for slot_id in active if self.slots[slot_id].stop_requested]
        asked = self.process_group.broadcast_object(asked)
        for slot_id in asked:
            self.slots[slot_id].stopped = True
        return asked

    def _emit(self, kind: EventKind, slot: TrainingSlot, validation_loss: float | None = None) -> None:
        if self.callbacks and self.process_group.is_main_process:
            event = describe_event(kind, slot, self.seconds, validation_loss)
            for callback in self.callbacks:
                callback(event)

    def _collect(self, max_pending: int) -> None:
        """Records the results of steps until at most `max_pending` are in flight."""
        for result in self.dispatcher.collect(max_pending):
            if not self.slots[result.slot_id].failure:
                self._record(self.slots[result.slot_id], result)

    def _record(self, slot: TrainingSlot, result: StepResult) -> None:
        skipped_in_a_row = 0 if result.is_applied else slot.skipped_in_a_row + 1
        if skipped_in_a_row > (MAX_SKIPS if self.runner.grad_scaler is not None else 0):
            self._fail(slot, f"step {result.step}: loss {result.loss}, gradient norm {result.gradient_norm}")
            return
        slot.record_step(
            step=result.step,
            num_tokens=result.num_tokens,
            loss=result.loss,
            learning_rate=result.learning_rate,
            gradient_norm=result.gradient_norm,
            is_applied=result.is_applied,
            seconds=self.seconds - slot.started_seconds,
        )
        if slot.recipe.replayed_per_step:
            slot.records[-1] |= {"divergence": result.divergence, "penalty": slot.penalty}
            if result.is_applied:
                slot.record_divergence(result.divergence)
        self._emit("step", slot)

    def _fail(self, slot: TrainingSlot, reason: str) -> None:
        learning_rate = slot.recipe.train.peak_learning_rate(self.base.config.n_embd)
        slot.failure = f"{reason}, peak learning rate {learning_rate:.3g}"
        if len(self.slots) > 1:
            self.reporter.message(f"'{slot.name}' diverged at {slot.failure}; the others continue")

    def _validate(self, slot_id: int) -> None:
        """Measures a slot, keeps its weights if they are the best so far, and stops it by its patience."""
        slot, nll = self.slots[slot_id], self.process_group.broadcast_object(self.measure_validation(slot_id))
        if not math.isfinite(nll):
            self._fail(slot, f"step {slot.last_step}: validation loss {nll}")
            return
        record = slot.records[-1]
        record |= {"validation_loss": nll, "memory_bytes": measure_peak_memory(self.device)}
        if self.sampler is not None:
            record["sample"] = self.sampler(self.base, slot, self.bank.read(slot_id))
        divergence = self.process_group.broadcast_object(self.measure_divergence(slot_id))
        if divergence is not None:
            record["validation_divergence"] = divergence
        if slot.record_validation(slot.last_step, nll, divergence):
            self.best[slot_id] = self.bank.flat[slot_id]
        self._emit("validation", slot, nll)
        if slot.stopped:
            self.reporter.message(f"'{slot.name}' stopped at step {slot.last_step}: best was step {slot.best_step}")

    def measure_validation(self, slot_id: int, whole: bool = False) -> float:
        """Returns a slot's mean NLL over the first tokens of its validation split, or all, in nats per target."""
        slot = self.slots[slot_id]
        return measure_blocks(
            self.base,
            slot.data.validation,
            TrainingAdapters(self.bank, [slot_id]),
            max_tokens=None if whole else slot.validation_tokens,
            batch_tokens=slot.recipe.train.micro_batch_tokens,
        )

    def measure_divergence(self, slot_id: int) -> float | None:
        """Returns a slot's divergence from the base on general text that it does not replay, in nats per target."""
        if self.replay is None or not self.slots[slot_id].recipe.replayed_per_step:
            return None
        return self.replay.measure_divergence(self.base, TrainingAdapters(self.bank, [slot_id]))

    def _conclude(self, slot_ids: Sequence[int], stop: StopRequest) -> Iterator[TrainedAdapter]:
        """Yields the adapters with their losses on all held-out text."""
        with self.reporter.task("measuring", self.losses.count_tokens(slot_ids), "tokens") as task:
            for slot_id in slot_ids:
                yield self._conclude_one(slot_id, task.advance)
                stop.raise_if_asked("all steps are kept; the same command with --resume publishes them")

    def _conclude_one(self, slot_id: int, on_tokens: OnTokens) -> TrainedAdapter:
        slot = self.slots[slot_id]
        if slot.recipe.train.keep_best and slot.has_best:
            self.bank.write(slot_id, self.best[slot_id])
        base_nll, validation_nll = self.losses.measure_validation(slot_id, on_tokens)
        self._emit("end", slot, validation_nll)
        return TrainedAdapter(
            slot=slot,
            adapter=self.bank.read(slot_id),
            base_nll=base_nll,
            validation_nll=validation_nll,
            test_nll=self.losses.measure_test(slot_id, on_tokens),
            seconds=self.seconds - slot.started_seconds,
        )

    def _write_metrics(self, log: Log | None = None) -> None:
        if self.process_group.is_main_process:
            write_metrics(self.run, self.slots, log)
            write_states(self.run, self.slots, self.halving, self.queue)

    def save_checkpoint(self) -> None:
        """Writes everything that the rest of the run depends on."""
        if self.run is None or not self.process_group.is_main_process:
            return
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "names": [slot.name for slot in self.slots],
            "domains": [slot.progress_to_json() for slot in self.slots],
            "finished": self.queue.to_json() if self.queue else {},
        }
        self.run.save(self.step, self._list_tensors(), state)
        for slot in self.slots:
            self._emit("checkpoint", slot)

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continues where a checkpoint was taken."""
        if self.queue:
            self.queue.restore(self.slots, state["names"], state["finished"])
            self._load_fresh(range(len(self.slots)))
        for name, tensor in self._list_tensors().items():
            tensor.copy_(tensors[name])
        self.bank.refresh_casts()
        self.step, self.seconds = state["step"], state["seconds"]
        for slot, values in zip(self.slots, state["domains"], strict=True):
            slot.restore_progress(values)
            if self.run is not None and self.process_group.is_main_process:
                self.run.append_metrics(slot.name, slot.records, anew=True)
                slot.num_written = len(slot.records)

    def _list_tensors(self) -> dict[str, Tensor]:
        tensors = {"flat": self.bank.flat, "best": self.best, **self.runner.list_state()}
        return tensors | ({"average": self.average} if self.halving else {})
