"""The training loop: K domains over one base, one step after another.

Each slot has its own data order, learning rate, clipping, number of steps and early stop; the loss is the sum over the
slots of their mean NLL per token, so a slot's gradient is what it would be alone. A slot that has stopped, or whose
loss is not finite any more, gives its rows up and the others go on. The base is never written. Everything random is a
function of the seed, the step and the row, so a run continued from a checkpoint equals an unbroken one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import TrainingDiverged, UsageError
from lora_gpt2.core.interrupt import StopRequest
from lora_gpt2.data.blocks import IGNORE, TokenBlocks
from lora_gpt2.data.inspect import list_documents
from lora_gpt2.data.read.records import Document
from lora_gpt2.evaluation.perplexity import Jobs, choose_window, measure_perplexity
from lora_gpt2.model.bank import AdapterBank
from lora_gpt2.model.base import Base
from lora_gpt2.model.fused import TrainingAdapters
from lora_gpt2.model.gpt2 import ActiveAdapters
from lora_gpt2.model.lora import Adapter, build_adapter, merge_ranks, plan_targets
from lora_gpt2.model.loss import score_tokens
from lora_gpt2.model.runtime import as_float64, measure_peak_memory
from lora_gpt2.training.checkpoint import RunFolder
from lora_gpt2.training.micro_batches import MicroBatchBuilder
from lora_gpt2.training.process_group import ProcessGroup
from lora_gpt2.training.schedule import lr_factor
from lora_gpt2.training.slot import Domain, TrainedAdapter
from lora_gpt2.training.step import SlotHyperparams, StepRunner
from lora_gpt2.training.trackers import Log

MAX_SKIPS = 20


@dataclass(frozen=True)
class _Launched:
    """A step that the device may still be working on."""

    step: int
    slots: list[int]
    counts: list[int]
    rates: list[float]
    stats: Tensor
    done: torch.cuda.Event | None


class Trainer:
    """Trains the domains' adapters over `base`; see the module's docstring.

    The domains' recipes must have passed `check_together`. `sampler(base, domain, adapter)` returns a text to keep
    with each validation. `lookahead` is how many steps Python may be ahead of the device.

    Raises:
        UsageError: the block size or the window of `evaluate` exceeds the base's context, or there is nothing to adapt.
    """

    def __init__(
        self,
        base: Base,
        domains: Sequence[Domain],
        reporter: Reporter,
        run: RunFolder | None = None,
        world: ProcessGroup | None = None,
        sampler: Callable[[Base, Domain, Adapter], str] | None = None,
    ) -> None:
        self.base, self.domains, self.reporter, self.run = base, list(domains), reporter, run
        self.world, self.sampler = world or ProcessGroup(), sampler
        self.device = base.model.wte.weight.device
        self.lookahead = 1 if self.device.type == "cuda" else 0
        self.block_size = domains[0].recipe.data.block_size
        if self.block_size > base.config.context:
            raise UsageError(
                f"data.block_size {self.block_size} exceeds the context of '{base.name}', {base.config.context}",
                f"use --set data.block_size={base.config.context}",
            )
        for domain in domains:
            choose_window(base, domain.recipe.evaluate)  # what is measured at the end shall not fail then
        plans = [plan_targets(base.config, domain.recipe.lora) for domain in domains]
        adapters = [build_adapter(base.config, d.recipe.lora, d.recipe.train.seed) for d in domains]
        ranks = merge_ranks(adapter.ranks for adapter in adapters)
        self.bank = AdapterBank(base.config, ranks, len(domains), "training", base.model.wte.weight)
        for slot, adapter in enumerate(adapters):
            self.bank.load(slot, adapter)
        lr_multipliers = self.bank.build_lr_multipliers([domain.recipe.train.loraplus_lr_ratio for domain in domains])
        self.runner = StepRunner(base.model, self.bank, self.bank.build_mask(plans), lr_multipliers, self.world)
        self.passes = MicroBatchBuilder(self.domains, self.device, self.world)
        self.best = self.bank.flat.clone()
        self.launched: list[_Launched] = []
        self.step = 0
        self.seconds = 0.0

    @property
    def total_steps(self) -> int:
        """Steps until the last slot is done, if none stops early."""
        return max(domain.num_steps for domain in self.domains)

    def train(self, stop: StopRequest, log: Log | None = None) -> list[TrainedAdapter]:
        """Runs to the end and returns the adapters that did not fail, the best ones where `keep_best` is set.

        `log` is told each record of each adapter, by name.

        Raises:
            TrainingDiverged: no slot is left whose loss and gradient are finite; the last checkpoint is kept.
            Interrupted: a signal came; a checkpoint of the last whole step is kept.
        """
        tokens = [domain.order.rows * self.block_size for domain in self.domains]
        remaining = sum(max(0, d.num_steps - self.step) * t for d, t in zip(self.domains, tokens, strict=True))
        with self.reporter.task("training", remaining, "tokens") as task:
            while active := [slot for slot, domain in enumerate(self.domains) if domain.is_active(self.step)]:
                self._advance(active)
                self._write_metrics(log)
                task.advance(sum(tokens[slot] for slot in active), self._note())
                asked = self.world.broadcast_object(stop.signal_number)
                if asked or self._is_checkpoint_due():
                    self._settle(0)
                    self._write_metrics(log)
                    self.save_checkpoint()
                kept = f"step {self.step} is kept; 'train' with the same recipes and --resume goes on"
                stop.raise_if_asked(kept if self.run else "this training keeps no checkpoints", asked)
        self._settle(0)
        self._write_metrics(log)
        healthy = [slot for slot, domain in enumerate(self.domains) if not domain.failure]
        if not healthy:
            raise TrainingDiverged(f"{self.describe_failures()}; nothing was published", _SMALLER)
        self.save_checkpoint()  # so that a full disk while publishing costs no training
        return list(self._conclude(healthy, stop))

    def describe_failures(self) -> str:
        """Returns what went wrong with the slots that failed, or nothing."""
        return "; ".join(f"'{d.name}' diverged at {d.failure}" for d in self.domains if d.failure)

    def _advance(self, active: list[int]) -> None:
        """Launches a step; validates the slots whose turn it is."""
        started = time.monotonic()
        self._launch(active)
        due = [slot for slot in active if self.domains[slot].is_validation_due(self.step)]
        self._settle(0 if due else self.lookahead)
        self.seconds += time.monotonic() - started
        for slot in due:
            if not self.domains[slot].failure:
                self._validate(slot)

    def run_step(self, active: list[int]) -> None:
        """Makes one step and waits for it."""
        self._launch(active)
        self._settle(0)

    def _launch(self, active: list[int]) -> None:
        settings, width = [domain.recipe.train for domain in self.domains], self.base.config.width
        rates = [
            s.peak_learning_rate(width) * lr_factor(self.step, d.num_steps, s)
            for s, d in zip(settings, self.domains, strict=True)
        ]
        flags = [slot in active for slot in range(len(self.domains))]
        passes, counts = self.passes.build(active, self.step)
        device_rates = SlotHyperparams(
            self._per_slot(rates),
            self._per_slot([s.weight_decay for s in settings]),
            self._per_slot([s.max_grad_norm or math.inf for s in settings]),
            self._per_slot(flags, torch.bool),
        )
        stats = self.runner.run(passes, device_rates)
        done = None
        if self.device.type == "cuda":
            host = torch.empty(stats.shape, pin_memory=True)
            host.copy_(stats, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        else:
            host = stats.clone()
        self.step += 1
        for slot in active:
            self.domains[slot].last_step = self.step
        self.launched.append(_Launched(self.step, active, counts, rates, host, done))

    def _settle(self, most_open: int) -> None:
        """Takes in the outcome of launched steps until at most so many are open."""
        while len(self.launched) > most_open:
            launched = self.launched.pop(0)
            if launched.done is not None:
                launched.done.synchronize()
            losses, norms, applied = launched.stats.tolist()
            for slot in launched.slots:
                self._take_in(launched, slot, losses[slot], norms[slot], bool(applied[slot]))

    def _take_in(self, launched: _Launched, slot: int, loss: float, norm: float, applied: bool) -> None:
        domain = self.domains[slot]
        if domain.failure:
            return
        domain.train_tokens += launched.counts[slot]
        domain.skipped_in_a_row = 0 if applied else domain.skipped_in_a_row + 1
        domain.num_skipped += not applied
        if domain.skipped_in_a_row > (MAX_SKIPS if self.runner.scale is not None else 0):
            self._fail(slot, f"step {launched.step}: loss {loss}, gradient norm {norm}")
            return
        record: dict[str, Any] = {
            "step": launched.step,
            "tokens": domain.train_tokens,
            "loss": loss,
            "learning_rate": launched.rates[slot],
            "gradient_norm": norm,
            "seconds": round(self.seconds, 3),
        }
        if not applied:
            record.update(loss=None, gradient_norm=None, skipped=domain.num_skipped)
        domain.records.append(record)

    def _fail(self, slot: int, what: str) -> None:
        domain = self.domains[slot]
        rate = domain.recipe.train.peak_learning_rate(self.base.config.width)
        domain.failure = f"{what}, peak learning rate {rate:.3g}"
        if len(self.domains) > 1:
            self.reporter.message(f"'{domain.name}' diverged at {domain.failure}; the others go on")

    def _per_slot(self, values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device)

    def _validate(self, slot: int) -> None:
        """Measures a slot, keeps its weights if they are the best so far, and stops it when its patience is over."""
        domain = self.domains[slot]
        settings, record = domain.recipe.train, domain.records[-1]
        adapters = TrainingAdapters(self.bank, [slot])
        size, blocks = settings.micro_batch_tokens, domain.data.validation
        nll = self.world.broadcast_object(self.measure_blocks(blocks, adapters, domain.validation_tokens, size))
        if not math.isfinite(nll):
            self._fail(slot, f"step {self.step}: validation loss {nll}")
            return
        record |= {"validation_loss": nll, "memory_bytes": measure_peak_memory(self.device)}
        if self.sampler is not None:
            record["sample"] = self.sampler(self.base, domain, self.bank.read(slot))
        domain.validations_without_improvement += 1
        if nll < domain.best_nll:
            domain.best_nll, domain.best_step, domain.validations_without_improvement = nll, self.step, 0
            self.best[slot] = self.bank.flat[slot]
        if (
            settings.patience
            and domain.validations_without_improvement >= settings.patience
            and self.step < domain.num_steps
        ):
            domain.stopped = True
            self.reporter.message(f"'{domain.name}' stopped at step {self.step}: best was step {domain.best_step}")

    @torch.no_grad()
    def measure_blocks(
        self,
        blocks: TokenBlocks,
        adapters: ActiveAdapters | None,
        limit: int | None = None,
        batch_tokens: int = 4096,
        on_tokens: Callable[[int], None] = lambda tokens: None,
    ) -> float:
        """Returns the mean NLL in nats per target over the first `limit` tokens of the blocks (None: all).

        `on_tokens` hears how many tokens a batch had.
        """
        size = blocks.block_size
        count = blocks.num_blocks if limit is None else min(blocks.num_blocks, max(1, limit // size))
        rows = max(1, batch_tokens // size)
        total, targets_seen = 0.0, 0
        for start in range(0, count, rows):
            read = blocks.read(range(start, min(start + rows, count)))
            inputs, targets = (torch.from_numpy(side).to(self.device) for side in (read.inputs, read.targets))
            positions = None if read.positions is None else torch.from_numpy(read.positions).to(self.device)
            hidden = self.base.model(inputs, adapters, positions=positions)
            total += as_float64(score_tokens(self.base.model, hidden, adapters, targets.flatten())).sum().item()
            targets_seen += int((targets != IGNORE).sum())
            on_tokens(inputs.numel())
        return total / targets_seen

    def _conclude(self, slots: Sequence[int], stop: StopRequest) -> Iterator[TrainedAdapter]:
        """Yields the adapters with their figures on all held-out text; the base is measured once on the same text."""
        held_out = _HeldOut(self, slots)
        with self.reporter.task("measuring", held_out.count_tokens(), "tokens") as task:
            for slot in slots:
                domain = self.domains[slot]
                if domain.recipe.train.keep_best and domain.best_step:
                    self.bank.flat[slot] = self.best[slot]
                    self.bank.refresh()
                validation = held_out.measure_validation(slot, task.advance)
                test = held_out.measure_test(slot, task.advance)
                yield TrainedAdapter(domain, self.bank.read(slot), *validation, test, self.seconds)
                stop.raise_if_asked("all steps are kept; 'train' with the same recipes and --resume publishes them")

    def _note(self) -> str:
        parts = []
        for domain in self.domains:
            best = f" val ppl {math.exp(min(domain.best_nll, 50)):.1f}" if domain.best_step else ""
            loss = next((r["loss"] for r in reversed(domain.records) if r["loss"] is not None), math.nan)
            parts.append(f"{domain.name} failed" if domain.failure else f"{domain.name} loss {loss:.2f}{best}")
        return "; ".join(parts)

    def _is_checkpoint_due(self) -> bool:
        intervals = [d.recipe.train.checkpoint_every for d in self.domains if d.recipe.train.checkpoint_every]
        return bool(intervals) and self.step % min(intervals) == 0 and self.step < self.total_steps

    def _write_metrics(self, log: Log | None = None) -> None:
        """Appends the records since the last time to the run's files, and tells the trackers."""
        if not self.world.is_main_process:
            return
        fresh = {domain.name: domain.records[domain.num_written :] for domain in self.domains}
        for domain in self.domains:
            domain.num_written = len(domain.records)
            if self.run is not None and fresh[domain.name]:
                self.run.append_metrics(domain.name, fresh[domain.name])
        if log is not None:
            pairs = [(name, record) for name, records in fresh.items() for record in records]
            for name, record in sorted(pairs, key=lambda pair: int(pair[1]["step"])):
                log(name, record)

    def save_checkpoint(self) -> None:
        """Writes everything that the rest of the run depends on."""
        if self.run is None or not self.world.is_main_process:
            return
        progress = [{key: getattr(d, key) for key in Domain.PROGRESS} for d in self.domains]
        for item in progress:
            item["best_nll"] = item["best_nll"] if item["best_step"] else None
        state = {"step": self.step, "seconds": self.seconds, "domains": progress}
        self.run.save(self.step, self._list_tensors(), state)

    def _list_tensors(self) -> dict[str, Tensor]:
        optimizer, scale = self.runner.optimizer, self.runner.scale
        tensors = {
            "flat": self.bank.flat,
            "best": self.best,
            "mean": optimizer.mean,
            "square": optimizer.square,
            "counts": optimizer.counts,
        }
        return tensors if scale is None else {**tensors, "scale": scale.values, "good": scale.good}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Puts the trainer where a checkpoint was taken."""
        for name, tensor in self._list_tensors().items():
            tensor.copy_(tensors[name])
        self.bank.refresh()
        self.step, self.seconds = state["step"], state["seconds"]
        for domain, saved in zip(self.domains, state["domains"], strict=True):
            for key in Domain.PROGRESS:
                setattr(domain, key, saved[key])
            domain.best_nll = math.inf if saved["best_nll"] is None else saved["best_nll"]
            if self.run is not None and self.world.is_main_process:
                self.run.append_metrics(domain.name, domain.records, anew=True)
                domain.num_written = len(domain.records)


class _HeldOut:
    """Figures on held-out text: validation by blocks, as during the run; test text as `evaluate` measures it."""

    def __init__(self, trainer: Trainer, slots: Sequence[int]) -> None:
        self.trainer, self.slots = trainer, slots
        self.known: dict[tuple[Any, ...], float] = {}

    def _key(self, slot: int, part: str) -> tuple[Any, ...]:
        domain = self.trainer.domains[slot]
        return domain.data.fingerprint, part, domain.recipe.evaluate if part == "test" else None

    def count_tokens(self) -> int:
        """Returns how many tokens there are to measure: each text under its adapter, and once under the base."""
        sizes = {}
        for slot in self.slots:
            blocks = self.trainer.domains[slot].data.validation
            sizes[slot, "validation"] = blocks.num_blocks * blocks.block_size
            if documents := self._list_documents(slot):
                settings = self.trainer.domains[slot].recipe.evaluate
                sizes[slot, "test"] = Jobs(self.trainer.base, [documents], settings).forward_tokens
        once = {self._key(*place): size for place, size in sizes.items()}
        return int(sum(sizes.values()) + sum(once.values()))

    def measure_validation(self, slot: int, on_tokens: Callable[[int], None]) -> tuple[float, float]:
        """Returns the base's and the adapter's mean NLL in nats per target over the validation blocks."""
        trainer, domain = self.trainer, self.trainer.domains[slot]
        blocks, size = domain.data.validation, domain.recipe.train.micro_batch_tokens
        key = self._key(slot, "validation")
        if key not in self.known:
            self.known[key] = trainer.measure_blocks(blocks, None, None, size, on_tokens)
        return self.known[key], trainer.measure_blocks(
            blocks, TrainingAdapters(trainer.bank, [slot]), None, size, on_tokens
        )

    def _list_documents(self, slot: int) -> list[Document]:
        """Returns the test documents, none if there is nothing to score in them."""
        data = self.trainer.domains[slot].data
        return list_documents(data, "test", self.trainer.base.tokenizer) if data.test.num_targets else []

    @torch.no_grad()
    def measure_test(self, slot: int, on_tokens: Callable[[int], None]) -> tuple[float, float] | None:
        """Returns both over the test documents by the protocol of `evaluate`, which gives the same number later."""
        trainer, domain = self.trainer, self.trainer.domains[slot]
        if not (documents := self._list_documents(slot)):
            return None
        settings = domain.recipe.evaluate
        key = self._key(slot, "test")
        if key not in self.known:
            score = measure_perplexity(trainer.base, documents, settings, on_tokens=on_tokens)
            self.known[key] = score.nll_nats_per_token
        score = measure_perplexity(
            trainer.base, documents, settings, lambda rows: TrainingAdapters(trainer.bank, [slot]), on_tokens
        )
        return self.known[key], score.nll_nats_per_token


_SMALLER = "use a smaller --set train.learning_rate, with --fresh"
