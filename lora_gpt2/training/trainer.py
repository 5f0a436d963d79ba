"""The training loop: K domains over one base, one step after another.

Each slot has its own data order, learning rate, clipping and number of steps; the loss is the sum over the slots of
their mean NLL per token, so a slot's gradient is what it would be alone. The base is never written. Everything random
is a function of the seed and the step, so a run continued from a checkpoint equals an unbroken one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import TrainingDiverged, UsageError
from lora_gpt2.core.interrupt import StopRequest
from lora_gpt2.data.blocks import IGNORE, TokenBlocks
from lora_gpt2.data.prepared import PreparedData
from lora_gpt2.model.bank import AdapterBank, TrainingRows
from lora_gpt2.model.base import Base
from lora_gpt2.model.gpt2 import ActiveAdapters
from lora_gpt2.model.lora import Adapter, build_adapter, plan_targets
from lora_gpt2.model.loss import chunked_cross_entropy, measure_nll
from lora_gpt2.recipe import Recipe
from lora_gpt2.training.batches import BlockOrder
from lora_gpt2.training.checkpoint import RunFolder
from lora_gpt2.training.optimizer import SlotAdamW, clip_slots
from lora_gpt2.training.schedule import rate_share


@dataclass
class Domain:
    """One slot: its recipe, its blocks, and how far it has come."""

    name: str
    recipe: Recipe
    data: PreparedData
    order: BlockOrder = field(init=False)
    num_steps: int = field(init=False)
    validate_every: int = field(init=False)
    best_nll: float = math.inf
    best_step: int = 0
    train_tokens: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        settings = self.recipe.train
        rows = max(1, settings.batch_tokens // self.recipe.data.block_size)
        self.order = BlockOrder(self.data.train, rows, settings.seed)
        self.num_steps = settings.steps or self.order.num_steps(settings.epochs)
        self.validate_every = settings.validate_every or max(1, self.num_steps // 10)


@dataclass(frozen=True)
class TrainedAdapter:
    """The outcome of one slot; NLL in nats per token over the whole validation part."""

    domain: Domain
    adapter: Adapter
    base_nll: float
    validation_nll: float
    seconds: float


class Trainer:
    """Trains the domains' adapters over `base`; see the module's docstring.

    Raises:
        UsageError: the domains' block sizes differ, or exceed the base's context.
    """

    def __init__(self, base: Base, domains: Sequence[Domain], reporter: Reporter, run: RunFolder | None = None) -> None:
        self.base, self.domains, self.reporter, self.run = base, list(domains), reporter, run
        sizes = {domain.recipe.data.block_size for domain in domains}
        if len(sizes) > 1:
            raise UsageError("recipes trained together need one data.block_size", "make them equal, or train apart")
        self.block_size = sizes.pop()
        if self.block_size > base.config.context:
            raise UsageError(
                f"data.block_size {self.block_size} exceeds the context of '{base.name}', {base.config.context}",
                f"use --set data.block_size={base.config.context}",
            )
        plans = [plan_targets(base.config, domain.recipe.lora) for domain in domains]
        adapters = [build_adapter(base.config, d.recipe.lora, d.recipe.train.seed) for d in domains]
        ranks: dict[str, int] = {}
        for adapter in adapters:
            for site, rank in adapter.ranks.items():
                ranks[site] = max(rank, ranks.get(site, 0))
        self.bank = AdapterBank(base.config, ranks, len(domains), "training", base.model.wte.weight)
        for slot, adapter in enumerate(adapters):
            self.bank.load(slot, adapter)
        self.gradient = self.bank.enable_gradients()
        self.mask = self.bank.build_mask(plans)
        self.optimizer = SlotAdamW(self.bank.flat)
        self.best = self.bank.flat.clone()
        self.step = 0
        self.seconds = 0.0

    @property
    def total_steps(self) -> int:
        """Steps until the last slot is done."""
        return max(domain.num_steps for domain in self.domains)

    def train(self, stop: StopRequest) -> list[TrainedAdapter]:
        """Runs to the end and returns the adapters, the best ones where `keep_best` is set.

        Raises:
            TrainingDiverged: a loss or gradient is not finite; the last checkpoint is kept.
            Interrupted: a signal came; a checkpoint of the last whole step is kept.
        """
        tokens_per_step = sum(d.order.rows for d in self.domains) * self.block_size
        remaining = (self.total_steps - self.step) * tokens_per_step
        with self.reporter.task("training", remaining, "tokens") as task:
            while self.step < self.total_steps:
                started = time.monotonic()
                self._train_step(started)
                task.advance(tokens_per_step, self._note())
                self._write_metrics()
                if stop.signal_number:
                    self.save_checkpoint()
                    stop.raise_if_asked(f"step {self.step} is kept; 'train' with the same recipes and --resume goes on")
                if self._is_checkpoint_due():
                    self.save_checkpoint()
        self.save_checkpoint()  # so that a full disk while publishing costs no training
        concluded = []
        for slot in range(len(self.domains)):
            concluded.append(self._conclude(slot))
            stop.raise_if_asked("all steps are kept; 'train' with the same recipes and --resume publishes them")
        return concluded

    def _active(self) -> list[int]:
        return [slot for slot, domain in enumerate(self.domains) if self.step < domain.num_steps]

    def _train_step(self, started: float) -> None:
        active = self._active()
        losses, counts = self.compute_gradients(active)
        settings = [domain.recipe.train for domain in self.domains]
        shares = [rate_share(self.step, d.num_steps, d.recipe.train) for d in self.domains]
        rates = [
            s.learning_rate * share if k in active else 0.0
            for k, (s, share) in enumerate(zip(settings, shares, strict=True))
        ]
        limits = [s.clip or math.inf for s in settings]
        norms = clip_slots(self.gradient, self._per_slot(limits))
        self._check_finite(active, losses, norms.tolist())
        self.optimizer.step(self.gradient, self._per_slot(rates), self._per_slot([s.weight_decay for s in settings]))
        self.step += 1
        self.seconds += time.monotonic() - started
        for slot in active:
            domain = self.domains[slot]
            domain.train_tokens += counts[slot]
            record = {
                "step": self.step, "tokens": domain.train_tokens, "loss": losses[slot], "learning_rate": rates[slot],
                "gradient_norm": norms[slot].item(), "seconds": round(self.seconds, 3),
            }  # fmt: skip
            if self.step % domain.validate_every == 0 or self.step == domain.num_steps:
                record["validation_loss"] = self._validate(slot)
            domain.records.append(record)

    def compute_gradients(self, active: Sequence[int]) -> tuple[list[float], list[int]]:
        """Fills the gradient buffer for the current step; returns loss and number of targets per slot."""
        self.gradient.zero_()
        batches = {slot: self.domains[slot].order.read(self.step) for slot in active}
        counts = [int((batches[k][1] != IGNORE).sum()) if k in batches else 0 for k in range(len(self.domains))]
        losses = torch.zeros(len(self.domains), device=self.bank.flat.device)
        generator = torch.Generator(self.bank.flat.device)
        generator.manual_seed(hash((self.step, *(domain.recipe.train.seed for domain in self.domains))) % 2**63)
        for slots, inputs, targets in self._iter_micro_batches(batches):
            scales = [1 / max(1, counts[slot]) for slot in slots]
            weights = self._per_slot(scales).repeat_interleave(targets.numel() // len(slots))
            hidden = self.base.model(inputs, self._adapters(slots, generator))
            loss, nll = chunked_cross_entropy(hidden.flatten(0, 1), self.base.model.head, targets.flatten(), weights)
            loss.backward()  # type: ignore[no-untyped-call]
            losses[slots] += (nll * weights).view(len(slots), -1).sum(1)
        if self.mask is not None:
            self.gradient.mul_(self.mask)
        return losses.tolist(), counts

    def _adapters(self, slots: list[int], generator: torch.Generator) -> TrainingRows:
        return TrainingRows(self.bank, slots, self.domains[slots[0]].recipe.lora.dropout, generator)

    def _iter_micro_batches(
        self, batches: dict[int, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Yields slots, inputs and targets `[slots * rows, time]`: every slot has the same number of rows in a pass.

        Slots with different dropout do not share a pass.
        """
        for dropout in sorted({self.domains[slot].recipe.lora.dropout for slot in batches}):
            group = [slot for slot in batches if self.domains[slot].recipe.lora.dropout == dropout]
            limit = min(self.domains[slot].recipe.train.micro_batch_tokens for slot in group)
            width = max(1, limit // self.block_size // len(group))
            for start in range(0, max(len(batches[slot][0]) for slot in group), width):
                slots = [slot for slot in group if len(batches[slot][0]) > start]
                rows = max(min(width, len(batches[slot][0]) - start) for slot in slots)
                inputs = np.zeros((len(slots), rows, self.block_size), dtype=np.int64)
                targets = np.full_like(inputs, IGNORE)
                for place, slot in enumerate(slots):
                    piece = slice(start, start + rows)
                    count = len(batches[slot][0][piece])
                    inputs[place, :count], targets[place, :count] = (side[piece] for side in batches[slot])
                yield slots, self._to_device(inputs), self._to_device(targets)

    def _to_device(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(array).flatten(0, -2).to(self.bank.flat.device)

    def _per_slot(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.bank.flat.device)

    def _check_finite(self, active: Sequence[int], losses: Sequence[float], norms: Sequence[float]) -> None:
        for slot in active:
            if not (math.isfinite(losses[slot]) and math.isfinite(norms[slot])):
                self._refuse(slot, self.step + 1, f"loss {losses[slot]}, gradient norm {norms[slot]}")

    def _refuse_infinite(self, slot: int, validation_nll: float) -> None:
        if not math.isfinite(validation_nll):
            self._refuse(slot, self.step, f"validation loss {validation_nll}")

    def _refuse(self, slot: int, step: int, what: str) -> None:
        domain = self.domains[slot]
        raise TrainingDiverged(
            f"'{domain.name}' diverged at step {step}: {what}, peak learning rate "
            f"{domain.recipe.train.learning_rate:.3g}; nothing was published",
            "use a smaller --set train.learning_rate",
        )

    def _validate(self, slot: int) -> float:
        domain = self.domains[slot]
        limit = domain.recipe.train.validation_tokens
        nll = self.measure_blocks(domain.data.validation, TrainingRows(self.bank, [slot]), limit)
        self._refuse_infinite(slot, nll)
        if nll < domain.best_nll:
            domain.best_nll, domain.best_step = nll, self.step
            self.best[slot] = self.bank.flat[slot]
        return nll

    @torch.no_grad()
    def measure_blocks(self, blocks: TokenBlocks, adapters: ActiveAdapters | None, limit: int | None = None) -> float:
        """Returns the mean NLL in nats per target over the first `limit` tokens of the blocks (None: all)."""
        count = blocks.num_blocks if limit is None else min(blocks.num_blocks, max(1, limit // self.block_size))
        rows = max(1, self.domains[0].recipe.train.micro_batch_tokens // self.block_size)
        total, targets_seen = 0.0, 0
        for start in range(0, count, rows):
            inputs, targets = map(torch.from_numpy, blocks.read(range(start, min(start + rows, count))))
            inputs, targets = inputs.to(self.bank.flat.device), targets.to(self.bank.flat.device)
            hidden = self.base.model(inputs, adapters).flatten(0, 1)
            total += measure_nll(hidden, self.base.model.head, targets.flatten()).double().sum().item()
            targets_seen += int((targets != IGNORE).sum())
        return total / targets_seen

    def _conclude(self, slot: int) -> TrainedAdapter:
        domain = self.domains[slot]
        flat = self.best if domain.recipe.train.keep_best else self.bank.flat
        with torch.no_grad():
            self.bank.flat[slot] = flat[slot]
        adapter = self.bank.read(slot)
        validation_nll = self.measure_blocks(domain.data.validation, TrainingRows(self.bank, [slot]))
        self._refuse_infinite(slot, validation_nll)
        base_nll = self.measure_blocks(domain.data.validation, None)
        return TrainedAdapter(domain, adapter, base_nll, validation_nll, self.seconds)

    def _note(self) -> str:
        parts = []
        for domain in self.domains:
            best = f" val ppl {math.exp(min(domain.best_nll, 50)):.1f}" if domain.best_step else ""
            parts.append(f"{domain.name} loss {domain.records[-1]['loss']:.2f}{best}")
        return "; ".join(parts)

    def _is_checkpoint_due(self) -> bool:
        intervals = [d.recipe.train.checkpoint_every for d in self.domains if d.recipe.train.checkpoint_every]
        return bool(intervals) and self.step % min(intervals) == 0 and self.step < self.total_steps

    def _write_metrics(self) -> None:
        if self.run is not None:
            for domain in self.domains:
                if domain.records[-1]["step"] == self.step:
                    self.run.append_metrics(domain.name, domain.records[-1:])

    def save_checkpoint(self) -> None:
        """Writes everything that the rest of the run depends on."""
        if self.run is None:
            return
        tensors = {
            "flat": self.bank.flat, "best": self.best, "mean": self.optimizer.mean, "square": self.optimizer.square,
        }  # fmt: skip
        domains = [
            {"best_nll": d.best_nll if d.best_step else None, "best_step": d.best_step, "train_tokens": d.train_tokens,
             "records": d.records} for d in self.domains
        ]  # fmt: skip
        self.run.save(self.step, tensors, {"step": self.step, "seconds": self.seconds, "domains": domains})

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Puts the trainer where a checkpoint was taken."""
        with torch.no_grad():
            self.bank.flat.copy_(tensors["flat"])
            self.best.copy_(tensors["best"])
            self.optimizer.mean.copy_(tensors["mean"])
            self.optimizer.square.copy_(tensors["square"])
        self.step = self.optimizer.num_steps = state["step"]
        self.seconds = state["seconds"]
        for domain, saved in zip(self.domains, state["domains"], strict=True):
            domain.best_step, domain.train_tokens = saved["best_step"], saved["train_tokens"]
            domain.best_nll = math.inf if saved["best_nll"] is None else saved["best_nll"]
            domain.records = saved["records"]
            if self.run is not None:
                self.run.append_metrics(domain.name, domain.records, anew=True)
