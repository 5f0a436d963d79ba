"""One optimizer step over all slots, written so that nothing in it waits for the device.

Everything that varies from step to step comes in as tensors, in one copy, and everything that is learnt about it leaves
as one (`stats`), so a GPU can run ahead of Python, and steps of fixed shapes can be captured once as CUDA graphs and
replayed (no launch costs): the gradients as one, the update as another, and between them several processes add up
their gradients. A slot whose loss or gradient is not finite is left as it was; the trainer reads that from `stats` and
decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from lora_gpt2.data.blocks import IGNORE
from lora_gpt2.model import counter_random
from lora_gpt2.model.bank import AdapterBank
from lora_gpt2.model.fused import TrainingAdapters
from lora_gpt2.model.gpt2 import GPT2, LowRankLogits
from lora_gpt2.model.graphs import capture, on_capture_stream
from lora_gpt2.model.loss import fused_linear_cross_entropy, fused_linear_kl_divergence, linear_nll
from lora_gpt2.model.transfer import Transfer
from lora_gpt2.training.optimizer import GradScaler, SlotAdamW, clip_slots
from lora_gpt2.training.preference_loss import PreferenceLoss
from lora_gpt2.training.process_group import ProcessGroup

NOISE = 1
"""The stream of random numbers that NEFTune's noise is; those of dropout are named after their sites."""
WARM_UP = 3
"""Steps that CUDA wants to run as they are before one is captured."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Sequences that go through the network at once: the same number for each of `slots`, in order.

    Args:
        slots: the slots.
        slot_ids: the same as a tensor.
        inputs, targets, positions: `[batch, time]`; see `blocks.BlockBatch`.
        loss_weights: `[batch * time]`; 1 / the targets in a slot's whole batch, at every position, so that the losses
            of a step add up to a mean (where there is no target the loss is 0).
        dropout: dropout rate of the adapters' inputs.
        label_smoothing: see `fused_linear_cross_entropy`.
        seeds: `[batch]`; they decide dropout and noise.
        noise_alpha: strength of NEFTune's noise.
        gradient_checkpointing: compute activations again in the backward pass.
        penalties: `[slots]`; of replayed text, the weight of its loss.
        reference: `[batch, time, width]`; the base's hidden states: the loss of replayed text is then the divergence
            from the base, else its NLL. It is summed up apart from other losses.
        preference: the loss, where rows are the chosen and the rejected text of a pair in turn; `loss_weights` are then
            1 / the pairs in a slot's whole batch.
        reference_logps: `[batch]`; log-likelihood of each of these rows under the reference, in nats.
    """

    slots: Sequence[int]
    slot_ids: Tensor
    inputs: Tensor
    targets: Tensor
    loss_weights: Tensor
    dropout: float
    label_smoothing: float
    seeds: Tensor
    noise_alpha: float
    gradient_checkpointing: bool
    positions: Tensor | None = None
    penalties: Tensor | None = None
    reference: Tensor | None = None
    preference: PreferenceLoss | None = None
    reference_logps: Tensor | None = None

    @property
    def signature(self) -> tuple[object, ...]:
        """What a captured graph cannot change."""
        settings = (
            self.dropout,
            self.label_smoothing,
            self.noise_alpha,
            self.gradient_checkpointing,
            self.reference is None,
            self.penalties is None,
            self.preference,
        )
        return (*self.slots, *self.inputs.shape, *settings)


@dataclass(frozen=True, kw_only=True)
class SlotHyperparams:
    """The hyperparameters of each slot in a step, `[slots]`; `is_active` is False for slots that do not train."""

    learning_rates: Tensor
    weight_decays: Tensor
    max_grad_norms: Tensor
    is_active: Tensor


class StepRunner:
    """Runs steps on a bank.

    Args:
        model: the frozen base.
        bank: the adapters, in training layout; its gradients are enabled here.
        mask: 0/1 buffer like the bank's, or None; see `AdapterBank.build_mask`.
        lr_multipliers: factor of the learning rate for single parameters, or None.
        process_group: the processes that share each step.
    """

    def __init__(
        self,
        model: GPT2,
        bank: AdapterBank,
        mask: Tensor | None,
        lr_multipliers: Tensor | None,
        process_group: ProcessGroup,
    ) -> None:
        self.model, self.bank, self.mask, self.lr_multipliers, self.process_group = (
            model,
            bank,
            mask,
            lr_multipliers,
            process_group,
        )
        self.gradient = bank.enable_gradients()
        self.optimizer = SlotAdamW(bank.flat)
        device = bank.flat.device
        self.grad_scaler = GradScaler(bank.num_slots, device) if model.wte.weight.dtype == torch.float16 else None
        self.losses = torch.zeros(bank.num_slots, device=device)
        self.divergences = torch.zeros(bank.num_slots, device=device)
        self.stats = torch.zeros(4, bank.num_slots, device=device)
        self.transfer = Transfer(device)
        self.graphs: tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph] | None = None
        self._signature: tuple[object, ...] = ()
        self._num_steps = 0

    def run(self, batches: Sequence[MicroBatch], hyperparams: SlotHyperparams) -> Tensor:
        """Makes one step; returns `stats` `[4, slots]`.

        They are the loss in nats per token, the gradient's norm, 1 if the step was applied, and the loss of replayed
        text in nats per token.

        The tensors of `batches` and `hyperparams` are on the host. On a GPU the result is there when the device has
        caught up.
        """
        batches, hyperparams = self.copy_to_device(batches, hyperparams)
        if self.bank.flat.device.type != "cuda":
            self.compute(batches, hyperparams)
            return self.stats
        signature = tuple(part for batch in batches for part in batch.signature)
        if signature != self._signature:
            self.graphs = None  # before others are warmed up: they keep their memory, and what has stopped stays so
            self._signature, self._num_steps = signature, 0
        self._num_steps += 1
        if self._num_steps <= WARM_UP:
            with on_capture_stream():
                self.compute(batches, hyperparams)
            return self.stats
        if self.graphs is None:
            gradients, _ = capture(lambda: self.compute_gradients(batches))
            update, _ = capture(lambda: self.apply_gradients(hyperparams))
            self.graphs = gradients, update
        gradients, update = self.graphs
        gradients.replay()
        self.process_group.all_reduce(self.gradient, self.losses, self.divergences)
        update.replay()
        return self.stats

    def list_state(self) -> dict[str, Tensor]:
        """Returns what a checkpoint keeps of the optimizer and of loss scaling."""
        optimizer, scale = self.optimizer, self.grad_scaler
        state = {"mean": optimizer.exp_avg, "square": optimizer.exp_avg_sq, "counts": optimizer.steps}
        return state if scale is None else {**state, "scale": scale.values, "good": scale.good}

    @torch.no_grad()
    def reset(self, slot_id: int) -> None:
        """Forgets what the optimizer knows of a slot."""
        for tensor in (self.optimizer.exp_avg, self.optimizer.exp_avg_sq, self.optimizer.steps):
            tensor[slot_id] = 0
        if self.grad_scaler is not None:
            self.grad_scaler.reset(slot_id)

    def copy_to_device(
        self, batches: Sequence[MicroBatch], hyperparams: SlotHyperparams
    ) -> tuple[list[MicroBatch], SlotHyperparams]:
        """Returns the same with tensors on the device, in the same memory each time while shapes stay the same."""
        items: list[MicroBatch | SlotHyperparams] = [*batches, hyperparams]
        copies = iter(self.transfer.copy([tensor for item in items for tensor in _iter_tensors(item)]))
        return [_with_tensors(batch, copies) for batch in batches], _with_tensors(hyperparams, copies)

    def compute(self, batches: Sequence[MicroBatch], hyperparams: SlotHyperparams) -> None:
        """Makes one step of tensors on the device as it is, without a graph; fills `stats`."""
        self.compute_gradients(batches)
        self.process_group.all_reduce(self.gradient, self.losses, self.divergences)
        self.apply_gradients(hyperparams)

    def compute_gradients(self, batches: Sequence[MicroBatch]) -> None:
        """Fills `gradient` `[slots, parameters]`, `losses` and `divergences` `[slots]` with this process's share."""
        self.gradient.zero_()
        self.losses.zero_()
        self.divergences.zero_()
        for batch in batches:
            weights = batch.loss_weights
            factors = batch.penalties
            if self.grad_scaler is not None:
                scales = self.grad_scaler.values[batch.slot_ids]
                factors = scales if factors is None else scales * factors
            if factors is not None:
                weights = weights * factors.repeat_interleave(
                    len(weights) // len(batch.slots), output_size=len(weights)
                )
            adapters = TrainingAdapters(self.bank, batch.slots, batch.slot_ids, batch.dropout, batch.seeds)
            noise = draw_noise(batch, self.model.config.n_embd)
            hidden = self.model(
                batch.inputs,
                adapters,
                noise=noise,
                checkpoint_blocks=batch.gradient_checkpointing,
                positions=batch.positions,
            )
            update, targets = adapters.low_rank_logits(hidden), batch.targets.flatten()
            flat, head, vocab_size = hidden.flatten(0, 1), self.model.padded_head, self.model.config.vocab_size
            if batch.preference is not None:
                totals = self.losses
                loss, values = self._score_pairs(batch, flat, targets, weights, update)
            elif batch.reference is None:
                totals = self.losses if batch.penalties is None else self.divergences
                loss, values = fused_linear_cross_entropy(
                    flat, head, targets, weights, batch.label_smoothing, update, vocab_size=vocab_size
                )
            else:
                totals, reference = self.divergences, batch.reference.flatten(0, 1)
                loss, values = fused_linear_kl_divergence(
                    flat, head, targets, weights, update, reference, vocab_size=vocab_size
                )
            loss.backward()  # type: ignore[no-untyped-call]
            totals.index_add_(0, batch.slot_ids, (values * batch.loss_weights).view(len(batch.slots), -1).sum(1))

        if self.grad_scaler is not None:
            self.gradient.div_(self.grad_scaler.values[:, None])
        if self.mask is not None:
            self.gradient.mul_(self.mask)

    def _score_pairs(
        self, batch: MicroBatch, hidden: Tensor, targets: Tensor, weights: Tensor, update: LowRankLogits | None
    ) -> tuple[Tensor, Tensor]:
        """Returns what has the gradient of the loss of pairs, and per token what adds up to it with `loss_weights`."""
        assert batch.preference is not None
        assert batch.reference_logps is not None
        head, vocab_size, rows = self.model.padded_head, self.model.config.vocab_size, len(batch.inputs)
        logps = -linear_nll(hidden.detach(), head, targets, update, vocab_size).view(rows, -1).sum(1)
        num_targets = (targets != IGNORE).view(rows, -1).sum(1)
        losses, _, slopes = batch.preference.measure(logps, batch.reference_logps, num_targets)
        time = len(targets) // rows
        weights = weights * -slopes.repeat_interleave(time, output_size=len(targets))
        loss, _ = fused_linear_cross_entropy(hidden, head, targets, weights, 0.0, update, vocab_size=vocab_size)
        values = torch.zeros_like(weights)
        values.view(-1, 2 * time)[:, 0] = losses
        return loss, values

    def apply_gradients(self, hyperparams: SlotHyperparams) -> None:
        """Clips and applies the gradients of all processes; fills `stats`."""
        norms = clip_slots(self.gradient, hyperparams.max_grad_norms)
        finite = torch.isfinite(norms) & torch.isfinite(self.losses) & torch.isfinite(self.divergences)
        applied = finite & hyperparams.is_active
        self.optimizer.step(
            self.gradient, hyperparams.learning_rates, hyperparams.weight_decays, applied, self.lr_multipliers
        )
        self.bank.refresh_casts()
        if self.grad_scaler is not None:
            self.grad_scaler.update(finite, hyperparams.is_active)
        torch.stack([self.losses, norms, applied.float(), self.divergences], out=self.stats)


def draw_noise(batch: MicroBatch, width: int) -> Tensor | None:
    """Returns uniform noise of ±alpha / sqrt(time · width) for each row (NEFTune, algorithm 1), or None."""
    if not batch.noise_alpha:
        return None
    time = batch.inputs.shape[1]
    return counter_random.draw_noise(batch.seeds, NOISE, time, width).mul_(batch.noise_alpha / math.sqrt(time * width))


def _iter_tensors(item: MicroBatch | SlotHyperparams) -> Iterator[Tensor]:
    for each in fields(item):
        if isinstance(value := getattr(item, each.name), Tensor):
            yield value


Item = TypeVar("Item", MicroBatch, SlotHyperparams)


def _with_tensors(item: Item, tensors: Iterator[Tensor]) -> Item:
    """Returns the item with its tensors replaced by the next ones."""
    names = [each.name for each in fields(item) if isinstance(getattr(item, each.name), Tensor)]
    values: dict[str, Any] = {name: next(tensors) for name in names}
    return replace(item, **values)
