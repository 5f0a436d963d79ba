"""One optimizer step over all slots, written so that nothing in it waits for the device.

Everything that varies from step to step comes in as tensors, and everything that is learnt about it leaves as one
(`stats`), so a GPU can run ahead of Python, and steps of fixed shapes can be recorded once as a CUDA graph and
replayed (no launch costs). A slot whose loss or gradient is not finite is left as it was; the trainer reads that from
`stats` and decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lora_gpt2.model.bank import AdapterBank
from lora_gpt2.model.fused import TrainingAdapters
from lora_gpt2.model.gpt2 import GPT2
from lora_gpt2.model.loss import fused_linear_cross_entropy
from lora_gpt2.training.optimizer import GradScaler, SlotAdamW, clip_slots
from lora_gpt2.training.process_group import ProcessGroup

WARM_UP = 3


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the network at once: the same number for each of `slots`, in order.

    `inputs`, `targets`, `positions` `[rows, time]` (see `blocks.Rows`); `weights` `[rows * time]` sum to a slot's share
    of its batch; `row_seeds` decide dropout and noise.
    """

    slots: Sequence[int]
    places: Tensor
    inputs: Tensor
    targets: Tensor
    weights: Tensor
    dropout: float
    smoothing: float
    row_seeds: Sequence[int]
    noise_alpha: float
    checkpointing: bool
    positions: Tensor | None = None

    @property
    def signature(self) -> tuple[object, ...]:
        """What a recorded pass cannot change."""
        return (*self.slots, *self.inputs.shape, self.smoothing, self.checkpointing)

    @property
    def is_random(self) -> bool:
        """True if a pass draws numbers, which a recording would repeat."""
        return self.dropout > 0 or self.noise_alpha > 0


@dataclass(frozen=True)
class SlotHyperparams:
    """Per slot `[slots]`: learning rate, weight decay, limit of the gradient's norm, and whether it trains."""

    rates: Tensor
    decays: Tensor
    limits: Tensor
    active: Tensor


class StepRunner:
    """Runs steps on a bank.

    Args:
        model: the frozen base.
        bank: the adapters, in training layout; its gradients are enabled here.
        mask: 0/1 buffer like the bank's, or None; see `AdapterBank.build_mask`.
        lr_multipliers: factor of the learning rate for single parameters, or None.
        world: the processes that share each step.
    """

    def __init__(
        self, model: GPT2, bank: AdapterBank, mask: Tensor | None, lr_multipliers: Tensor | None, world: ProcessGroup
    ) -> None:
        self.model, self.bank, self.mask, self.lr_multipliers, self.world = model, bank, mask, lr_multipliers, world
        self.gradient = bank.enable_gradients()
        self.optimizer = SlotAdamW(bank.flat)
        device = bank.flat.device
        self.scale = GradScaler(bank.num_slots, device) if model.wte.weight.dtype == torch.float16 else None
        self.losses = torch.zeros(bank.num_slots, device=device)
        self.stats = torch.zeros(3, bank.num_slots, device=device)
        self.num_runs: dict[tuple[object, ...], int] = {}
        self.graphs: dict[tuple[object, ...], tuple[torch.cuda.CUDAGraph, list[MicroBatch], SlotHyperparams]] = {}

    def run(self, passes: list[MicroBatch], rates: SlotHyperparams) -> Tensor:
        """Makes one step; returns `stats` `[3, slots]`: loss in nats per token, gradient norm, 1 if it was applied.

        On a GPU the result is there when the device has caught up.
        """
        device = self.bank.flat.device
        key = tuple(part for each in passes for part in each.signature)
        if device.type != "cuda" or self.world.size > 1 or any(each.is_random for each in passes):
            self.compute(passes, rates)
            return self.stats
        self.num_runs[key] = self.num_runs.get(key, 0) + 1
        if self.num_runs[key] <= WARM_UP:
            torch.cuda.synchronize()  # CUDA wants some steps on another stream before it records one
            with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
                self.compute(passes, rates)
            torch.cuda.synchronize()
            return self.stats
        if key not in self.graphs:
            self.graphs.clear()  # each keeps its memory, and slots that have stopped do not come back
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.compute(passes, rates)
            self.graphs[key] = (graph, passes, rates)
        graph, fixed_passes, fixed_rates = self.graphs[key]
        for fixed, fresh in zip(fixed_passes, passes, strict=True):
            _copy_tensors(fixed, fresh)
        _copy_tensors(fixed_rates, rates)
        graph.replay()
        return self.stats

    def compute_gradients(self, passes: list[MicroBatch]) -> None:
        """Fills `gradient` `[slots, parameters]` and `losses` `[slots]`, summed over the processes."""
        self.gradient.zero_()
        self.losses.zero_()
        for each in passes:
            weights = each.weights
            if self.scale is not None:
                weights = weights * self.scale.values[each.places].repeat_interleave(
                    len(weights) // len(each.slots), output_size=len(weights)
                )
            rows = TrainingAdapters(self.bank, each.slots, each.places, each.dropout, each.row_seeds)
            noise = draw_noise(each, self.model.config.width)
            hidden = self.model(
                each.inputs, rows, noise=noise, checkpoint_blocks=each.checkpointing, positions=each.positions
            )
            update, targets = rows.low_rank_logits(hidden), each.targets.flatten()
            loss, nll = fused_linear_cross_entropy(
                hidden.flatten(0, 1), self.model.head, targets, weights, each.smoothing, update
            )
            loss.backward()  # type: ignore[no-untyped-call]
            self.losses.index_add_(0, each.places, (nll * each.weights).view(len(each.slots), -1).sum(1))
        self.world.all_reduce(self.gradient, self.losses)
        if self.scale is not None:
            self.gradient.div_(self.scale.values[:, None])
        if self.mask is not None:
            self.gradient.mul_(self.mask)

    def compute(self, passes: list[MicroBatch], rates: SlotHyperparams) -> None:
        """Gradients, clipping, update and `stats`; runs as it is, or while it is being recorded."""
        self.compute_gradients(passes)
        norms = clip_slots(self.gradient, rates.limits)
        finite = torch.isfinite(norms) & torch.isfinite(self.losses)
        applied = finite & rates.active
        self.optimizer.step(self.gradient, rates.rates, rates.decays, applied, self.lr_multipliers)
        self.bank.refresh()
        if self.scale is not None:
            self.scale.update(finite, rates.active)
        torch.stack([self.losses, norms, applied.float()], out=self.stats)


def draw_noise(each: MicroBatch, width: int) -> Tensor | None:
    """Returns uniform noise of ±alpha / sqrt(time · width) for each row (NEFTune, algorithm 1), or None."""
    if not each.noise_alpha:
        return None
    noise = torch.empty(*each.inputs.shape, width)
    for row, seed in enumerate(each.row_seeds):
        noise[row].uniform_(-1, 1, generator=torch.Generator().manual_seed(seed))
    return noise.mul_(each.noise_alpha / math.sqrt(noise[0].numel())).to(each.inputs.device)


def _copy_tensors(fixed: MicroBatch | SlotHyperparams, fresh: MicroBatch | SlotHyperparams) -> None:
    for item in fields(fixed):
        target, source = getattr(fixed, item.name), getattr(fresh, item.name)
        if isinstance(target, Tensor) and target is not source:
            target.copy_(source, non_blocking=True)
