"""Training an adapter on what people preferred: its present version is the reference, and costs no second model.

The reference's log-likelihoods are computed once, before the first step, by the weights that training starts from. The
weights that are kept are the last ones that are within the limits and tell held-out pairs apart no worse than the
parent, give or take a standard error (the loss of a few dozen held-out choices is noisy). Limits: the perplexity of the
parent's own text may rise by `preferences.max_perplexity_ratio`, the loss of general English by `train.forget` nats per
token. What goes beyond them is taken back, and training goes on in smaller steps. Each step replays some of the text
that the parent was trained on, so that preferring costs little of it.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import TrainingDiverged
from lora_gpt2.core.interrupt import StopRequest
from lora_gpt2.data.blocks import IGNORE, TokenBlocks
from lora_gpt2.data.prepared import PreparedData
from lora_gpt2.evaluation.general import measure_general
from lora_gpt2.model.bank import AdapterBank
from lora_gpt2.model.base import Base
from lora_gpt2.model.fused import TrainingAdapters
from lora_gpt2.model.lora import Adapter, plan_targets
from lora_gpt2.recipe import Recipe
from lora_gpt2.training.block_order import BlockOrder
from lora_gpt2.training.checkpoint import RunFolder
from lora_gpt2.training.pairs import PairRows, iter_groups, score_rows
from lora_gpt2.training.preference_loss import PreferenceLoss
from lora_gpt2.training.process_group import ProcessGroup
from lora_gpt2.training.schedule import lr_factor
from lora_gpt2.training.step import MicroBatch, SlotHyperparams, StepRunner
from lora_gpt2.training.validation import measure_blocks

OWN_TOKENS = 16_384
TAKEN_BACK = 0.5  # how much smaller steps are after some that went beyond the limits
VALIDATIONS = 10
PROGRESS = ("step", "rate_factor", "best_step", "records", "seconds", "num_tokens")  # of a checkpoint


@dataclass(frozen=True, kw_only=True)
class PairScore:
    """How well held-out pairs are told apart.

    Args:
        loss: mean loss.
        error: its standard error.
        accuracy: share of the pairs whose chosen text is ahead.
        margin: mean margin in nats.
    """

    loss: float
    error: float
    accuracy: float
    margin: float


class PreferenceTrainer:
    """Trains one adapter on pairs; see the module's docstring.

    Args:
        base: the base.
        recipe: the settings.
        parent: the adapter to start from, which is the reference.
        pairs: all pairs.
        split: indices of those to train on and of those held out.
        own_text: the text that the parent was trained on; None where it cannot be read.
        mismatched: for `kto`, the prompts of the pairs with texts of others; see `mismatch_pairs`.
    """

    def __init__(
        self,
        base: Base,
        recipe: Recipe,
        parent: Adapter,
        pairs: PairRows,
        split: tuple[Sequence[int], Sequence[int]],
        own_text: PreparedData | None = None,
        *,
        mismatched: PairRows | None = None,
    ) -> None:
        self.base, self.recipe, self.pairs, self.mismatched = base, recipe, pairs, mismatched
        self.own_text = own_text.validation if own_text and own_text.validation.num_targets else None
        (self.trained, self.held_out), settings = split, recipe.preferences
        self.loss = PreferenceLoss(kind=settings.loss, beta=settings.beta, smoothing=settings.smoothing)
        self.bank = AdapterBank(base.config, parent.ranks, 1, "training", base.model.wte.weight)
        self.bank.load(0, parent)
        mask = self.bank.build_mask([plan_targets(base.config, recipe.lora)])  # what a sliced target leaves alone
        multipliers = self.bank.build_lr_multipliers([recipe.train.loraplus_lr_ratio], mask)
        self.runner = StepRunner(base.model, self.bank, mask, multipliers, ProcessGroup())
        self.micro_batch_tokens = recipe.train.micro_batch_tokens
        self.pairs_per_step = min(len(self.trained), settings.batch_size)
        self.replayed = self._order_replay(own_text.train) if own_text and settings.replay_weight else None
        per_epoch = -(-len(self.trained) // self.pairs_per_step)
        self.num_steps = recipe.train.steps or max(1, math.ceil(recipe.train.epochs * per_epoch))
        self.validate_every = recipe.train.validate_every or max(1, self.num_steps // VALIDATIONS)
        self.reference = self._score(pairs, range(pairs.num_pairs))
        self.mismatched_reference = self._score(mismatched, range(pairs.num_pairs)) if mismatched else None
        self.parent_own = self._measure_own_text()
        self.parent_general = self._measure_general()
        self.allowed, self.rate_factor = self.bank.flat.clone(), 1.0
        self.best, self.best_score, self.best_step = self.bank.flat.clone(), self.measure(), 0
        self.first_score = self.best_score
        self.records: list[dict[str, Any]] = [self._record(0, self.first_score, self.parent_own, self.parent_general)]
        self.step, self.seconds, self.num_tokens = 0, 0.0, 0

    @property
    def adapters(self) -> TrainingAdapters:
        """The adapter as it is now."""
        return TrainingAdapters(self.bank, [0])

    def read_best(self) -> Adapter:
        """Returns the weights that are kept; the parent's where none were better."""
        return self.bank.read(0, self.best)

    def measure(self) -> PairScore:
        """Returns how well the held-out pairs are told apart now."""
        rows = self.pairs.rows_of(self.held_out)
        lengths = torch.from_numpy(self.pairs.lengths).flatten()[rows]
        reference = self.reference[rows] + self._measure_shift(self.held_out)
        losses, margins, _ = self.loss.measure(self._score(self.pairs, self.held_out), reference, lengths)
        return PairScore(
            loss=float(losses.mean()),
            error=float(losses.std() / math.sqrt(len(losses))) if len(losses) > 1 else 0.0,
            accuracy=float((margins > 0).float().mean()),
            margin=float(margins.mean()),
        )

    def train(self, stop: StopRequest, reporter: Reporter, run: RunFolder | None = None) -> None:
        """Runs to the end; `run` keeps checkpoints.

        Raises:
            TrainingDiverged: the loss or its gradient is no longer finite.
            Interrupted: a stop was requested; a checkpoint of the last step is kept.
        """
        kept = "--resume continues" if run else "nothing was published"
        with reporter.task("training", self.num_steps - self.step, "steps") as task:
            for step in range(self.step, self.num_steps):
                started = time.monotonic()
                loss = self._run_step(step)
                self.seconds += time.monotonic() - started
                if not math.isfinite(loss):
                    hint = "use a smaller --set train.learning_rate, or a larger preferences.beta"
                    raise TrainingDiverged(f"{self.recipe.name} diverged in step {step + 1}", hint)
                is_due = (step + 1) % self.validate_every == 0 or step + 1 == self.num_steps
                score = self._validate(step + 1, loss) if is_due else None
                note = f"loss {loss:.3f}" + (
                    "" if score is None else f" held out {score.loss:.3f}, {score.accuracy:.0%}"
                )
                task.advance(1, note)
                self.step = step + 1
                every = self.recipe.train.checkpoint_every
                if run and (stop.signal_number or (every and self.step % every == 0)):
                    self._save(run)
                stop.raise_if_asked(kept)
        if run:
            self._save(run)  # so that a full disk while publishing costs no training

    def _save(self, run: RunFolder) -> None:
        state = {key: getattr(self, key) for key in PROGRESS} | {"best_score": asdict(self.best_score)}
        run.save(self.step, self._list_tensors(), state)

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continues where a checkpoint was taken."""
        for name, tensor in self._list_tensors().items():
            tensor.copy_(tensors[name])
        self.bank.refresh_casts()
        for key in PROGRESS:
            setattr(self, key, state[key])
        self.best_score = PairScore(**state["best_score"])

    def _list_tensors(self) -> dict[str, Tensor]:
        return {"flat": self.bank.flat, "best": self.best, "allowed": self.allowed, **self.runner.list_state()}

    def _run_step(self, step: int) -> float:
        settings = self.recipe.train
        chosen = self._choose_pairs(step)
        rate = (
            settings.peak_learning_rate(self.base.config.n_embd)
            * lr_factor(step, self.num_steps, settings)
            * self.rate_factor
        )
        hyperparams = SlotHyperparams(
            learning_rates=torch.tensor([rate]),
            weight_decays=torch.tensor([settings.weight_decay]),
            max_grad_norms=torch.tensor([settings.max_grad_norm or math.inf]),
            is_active=torch.tensor([True]),
        )
        rows = self.pairs.rows_of(chosen)
        groups = iter_groups(rows, self.pairs.inputs.shape[1], self.micro_batch_tokens)
        shift = self._measure_shift(chosen)
        batches = [self._build(group, len(chosen), shift) for group in groups]
        batches += self._build_replayed(step)
        self.num_tokens += sum(int((batch.targets != IGNORE).sum()) for batch in batches)
        return float(self.runner.run(batches, hyperparams)[0, 0])

    def _order_replay(self, blocks: TokenBlocks) -> BlockOrder | None:
        """Returns which blocks a step replays: about as many tokens as its pairs have."""
        tokens = 2 * self.pairs_per_step * self.pairs.inputs.shape[1]
        count = min(blocks.num_blocks, -(-tokens // blocks.block_size))
        return BlockOrder(blocks, count, self.recipe.train.seed) if count else None

    def _build_replayed(self, step: int) -> list[MicroBatch]:
        """Returns the text of the parent that a step replays, in groups."""
        if self.replayed is None:
            return []
        batch, weight = self.replayed.read(step), self.recipe.preferences.replay_weight
        count, size = int((batch.targets != IGNORE).sum()), max(1, self.micro_batch_tokens // batch.inputs.shape[1])
        found = []
        for start in range(0, len(batch.inputs), size):
            some = batch.take(range(start, min(start + size, len(batch.inputs))))
            inputs, targets = torch.from_numpy(some.inputs), torch.from_numpy(some.targets)
            weights = torch.full((targets.numel(),), 1 / max(1, count))
            plain = self._build_one(inputs, targets, weights)
            positions = None if some.positions is None else torch.from_numpy(some.positions)
            found.append(replace(plain, penalties=torch.tensor([weight]), positions=positions))
        return found

    def _choose_pairs(self, step: int) -> list[int]:
        """Returns the pairs of a step: each once in an epoch, in an order of its own."""
        order: list[int] = []
        first, per_epoch = step * self.pairs_per_step, len(self.trained)
        for epoch in range(first // per_epoch, (first + self.pairs_per_step - 1) // per_epoch + 1):
            generator = random.Random(f"{self.recipe.train.seed} {epoch}")  # noqa: S311 - an order, no secret
            order += generator.sample(list(self.trained), per_epoch)
        begin = first % per_epoch
        return order[begin : begin + self.pairs_per_step]

    def _build(self, rows: Sequence[int], num_pairs: int, shift: float = 0.0) -> MicroBatch:
        if self.bank.flat.device.type == "cuda":  # steps of one shape are captured once
            inputs, targets = (torch.from_numpy(side[list(rows)]) for side in (self.pairs.inputs, self.pairs.targets))
        else:
            inputs, targets = self.pairs.read(rows)
        plain = self._build_one(inputs, targets, torch.full((targets.numel(),), 1 / num_pairs))
        return replace(plain, preference=self.loss, reference_logps=self.reference[list(rows)] + shift)

    def _build_one(self, inputs: Tensor, targets: Tensor, loss_weights: Tensor) -> MicroBatch:
        return MicroBatch(
            slots=[0],
            slot_ids=torch.zeros(1, dtype=torch.long),
            inputs=inputs,
            targets=targets,
            loss_weights=loss_weights,
            dropout=0.0,
            label_smoothing=0.0,
            seeds=torch.zeros(len(inputs), dtype=torch.long),
            noise_alpha=0.0,
            gradient_checkpointing=self.recipe.train.gradient_checkpointing,
        )

    def _validate(self, step: int, loss: float) -> PairScore:
        """Measures the weights and keeps them; if they are beyond the limits, goes back and on in smaller steps."""
        score, own, general = self.measure(), self._measure_own_text(), self._measure_general()
        self.records.append(self._record(step, score, own, general) | {"loss": loss})
        if not self._is_allowed(own, general):
            self.bank.flat.copy_(self.allowed)
            self.bank.refresh_casts()
            self.rate_factor *= TAKEN_BACK
            return score
        self.allowed.copy_(self.bank.flat)
        if score.loss - score.error < self.first_score.loss:  # a few dozen choices, some of them wrong, are noisy
            self.best.copy_(self.bank.flat)
            self.best_score, self.best_step = score, step
        return score

    def _is_allowed(self, own: float | None, general: float | None) -> bool:
        budget, most = self.recipe.train.forget, math.log(self.recipe.preferences.max_perplexity_ratio)
        if own is not None and self.parent_own is not None and own - self.parent_own > most:
            return False
        return (
            budget is None or general is None or self.parent_general is None or general - self.parent_general <= budget
        )

    def _record(self, step: int, score: PairScore, own: float | None, general: float | None) -> dict[str, Any]:
        measured = {f"held_out_{key}": value for key, value in asdict(score).items()}
        return {"step": step, **measured, "own_text_loss": own, "general_loss": general}

    def _score(self, rows: PairRows, pairs: Sequence[int]) -> Tensor:
        return score_rows(self.base.model, self.adapters, rows, rows.rows_of(pairs), self.micro_batch_tokens)

    def _measure_shift(self, pairs: Sequence[int]) -> float:
        """Returns how far the adapter is from its reference, by what it makes of mismatched texts; nats, at least 0.

        That is z of `kto`, of some pairs; 0 for other losses.
        """
        if self.mismatched is None or self.mismatched_reference is None:
            return 0.0
        before = self.mismatched_reference[self.mismatched.rows_of(pairs)]
        return max(0.0, float((self._score(self.mismatched, pairs) - before).mean()))

    def _measure_own_text(self) -> float | None:
        """Returns the loss of the parent's own held-out text in nats per token; None where it cannot be read."""
        if self.own_text is None:
            return None
        return measure_blocks(self.base, self.own_text, self.adapters, max_tokens=OWN_TOKENS)

    def _measure_general(self) -> float | None:
        """Returns the loss of general English in nats per token; None where there is no budget of forgetting."""
        if self.recipe.train.forget is None:
            return None
        with torch.no_grad():
            return measure_general(self.base, lambda choices: self.adapters).nll_nats_per_token
