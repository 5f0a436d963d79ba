"""One slot of a run: the recipe and data that its adapter trains on, its progress, and the outcome."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from lora_gpt2.core.errors import UsageError
from lora_gpt2.core.fingerprint import fingerprint_json
from lora_gpt2.data.prepared import PreparedData
from lora_gpt2.model.lora import Adapter
from lora_gpt2.recipe import Recipe
from lora_gpt2.store.manifest import Parent
from lora_gpt2.training.block_order import BlockOrder

MIN_VALIDATION_TOKENS = 4096
FIRST_PENALTY, PENALTY_RATE, AVERAGED = 4.0, 0.05, 0.2
LEAST_PENALTY, MOST_PENALTY = 0.01, 30.0
TOLERANCE = 0.1
"""Fraction by which the divergence of the best weights may exceed the budget, because it is measured on little text."""
PER_MICRO_BATCH = ("lora.dropout", "train.label_smoothing", "train.neftune_noise_alpha", "train.gradient_checkpointing")
"""Settings that all slots of a micro-batch have in common."""
PER_RUN = (
    "base",
    "data.block_size",
    "data.layout",
    "train.dtype",
    "train.quantize",
    "train.replay",
    "train.replay_tokens",
)
"""Settings that all recipes of a run have in common."""
OF_MICRO_BATCHES = {"micro_batch_tokens", "gradient_checkpointing"}  # of section `train`: they decide on rounding alone
MICRO_BATCHING = "passes"
"""What checkpoints call the settings of micro-batches."""
IRRELEVANT = {"checkpoint_every", "trackers", "drafter", "sample_tokens", "sample_prompt"}
"""Settings of section `train` that decide on no weights."""


def fingerprint_recipes(recipes: Sequence[Recipe]) -> str:
    """Returns what recipes have in common that give the same adapters, but for rounding."""
    free = {"train": {*IRRELEVANT, *OF_MICRO_BATCHES}}
    return fingerprint_json([recipe.model_dump(mode="json", exclude=free) for recipe in recipes])


def check_together(recipes: Sequence[Recipe]) -> None:
    """Raises `UsageError` unless the recipes can be trained over one base."""
    for key in PER_RUN:
        if len({_get(recipe, key) for recipe in recipes}) > 1:
            raise UsageError(f"recipes trained together need one {key}", "make them equal, or train apart")


def group_recipes(recipes: Sequence[Recipe]) -> list[list[int]]:
    """Returns the indices of those recipes that may share micro-batches, group by group."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, recipe in enumerate(recipes):
        groups.setdefault(tuple(_get(recipe, key) for key in PER_MICRO_BATCH), []).append(index)
    return list(groups.values())


def _get(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return value


def find_excess(divergence: float | None, budget: float | None) -> float:
    """Returns by how much a divergence exceeds a budget of forgetting and its tolerance, as a fraction of it."""
    return 0.0 if budget is None or divergence is None else max(0.0, divergence / budget - 1 - TOLERANCE)


@dataclass(kw_only=True)
class TrainingSlot:
    """The state of one slot; checkpoints hold the fields in `PROGRESS`.

    Args:
        recipe: its settings; the adapter has its name.
        data: its prepared text.

    Attributes:
        order: the blocks of each step.
        num_steps: the step after which it is done.
        validate_every: steps between validations.
        validation_tokens: maximum number of tokens in a validation during the run.
        records: the lines of its metrics file.
        parents: the versions that the adapter continues from.
        source: see `Start`.
        parent_nll: mean NLL over the validation split before the first step, where it continues from another adapter.
        penalty: weight of the divergence from the base in the loss, in place of the budget of forgetting.
        divergence: moving average of the divergence on replayed text, in nats per token.
        best_excess: by how much the best weights exceed the budget, as a fraction of it.
        rung: excess and loss at a rung of a search where no validation was due, which nothing else depends on.
        started_seconds: what the run had taken before the slot's first step.
        num_written: the number of `records` in the file.
        stop_requested: a callback has asked for the end.
    """

    PROGRESS: ClassVar[tuple[str, ...]] = (
        "best_nll",
        "best_step",
        "last_step",
        "train_tokens",
        "validations_without_improvement",
        "num_skipped",
        "skipped_in_a_row",
        "stopped",
        "failure",
        "records",
        "source",
        "parent_nll",
        "penalty",
        "divergence",
        "best_excess",
        "rung",
        "started_seconds",
    )
    recipe: Recipe
    data: PreparedData
    order: BlockOrder = field(init=False)
    num_steps: int = field(init=False)
    validate_every: int = field(init=False)
    validation_tokens: int = field(init=False)
    best_nll: float = math.inf
    best_step: int = 0
    last_step: int = 0
    train_tokens: int = 0
    validations_without_improvement: int = 0
    num_skipped: int = 0
    skipped_in_a_row: int = 0
    stopped: bool = False
    failure: str = ""
    records: list[dict[str, Any]] = field(default_factory=list)
    parents: tuple[Parent, ...] = ()
    source: str = ""
    parent_nll: float | None = None
    penalty: float = FIRST_PENALTY
    divergence: float = 0.0
    best_excess: float = 0.0
    rung: tuple[float, float] | None = None
    started_seconds: float = 0.0
    num_written: int = 0
    stop_requested: bool = False

    def __post_init__(self) -> None:
        settings = self.recipe.train
        self.order = BlockOrder(self.data.train, self.recipe.blocks_per_step, settings.seed)
        self.num_steps = settings.steps or self.order.num_steps(settings.epochs)
        self.validate_every = settings.validate_every or max(1, self.num_steps // 10)
        trained = self.num_steps * self.tokens_per_step
        self.validation_tokens = min(settings.validation_tokens, max(MIN_VALIDATION_TOKENS, trained // 20))

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.recipe.name

    @property
    def is_continued(self) -> bool:
        """True if the adapter continues from another one."""
        return bool(self.parents or self.source)

    @property
    def has_best(self) -> bool:
        """True once a validation has shown which weights are the best so far; step 0 may be it."""
        return math.isfinite(self.best_nll)

    @property
    def best_divergence(self) -> float | None:
        """Divergence of the best weights from the base on held-out general text, in nats per token, if measured."""
        records = (record for record in self.records if record["step"] == self.best_step)
        return next((record.get("validation_divergence") for record in records), None)

    @property
    def final_divergence(self) -> float | None:
        """That of the weights that are published: the best, or with `keep_best` off the last."""
        if self.recipe.train.keep_best and self.has_best:
            return self.best_divergence
        measured = (record.get("validation_divergence") for record in reversed(self.records))
        return next((divergence for divergence in measured if divergence is not None), None)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that go through the network in a step, padding included."""
        return self.order.batch_size * self.recipe.data.block_size

    @property
    def is_active(self) -> bool:
        """True if the slot trains in the next step."""
        return self.last_step < self.num_steps and not self.stopped and not self.failure

    @property
    def is_validation_due(self) -> bool:
        """True if the slot is validated after the step that it has just made."""
        return self.last_step % self.validate_every == 0 or self.last_step == self.num_steps

    def record_step(
        self,
        *,
        step: int,
        num_tokens: int,
        loss: float,
        learning_rate: float,
        gradient_norm: float,
        is_applied: bool,
        seconds: float,
    ) -> None:
        """Adds the outcome of a step; one that was not applied, because it overflowed, has neither loss nor norm."""
        self.train_tokens += num_tokens
        self.skipped_in_a_row = 0 if is_applied else self.skipped_in_a_row + 1
        self.num_skipped += not is_applied
        record: dict[str, Any] = {
            "step": step,
            "tokens": self.train_tokens,
            "loss": loss if is_applied else None,
            "learning_rate": learning_rate,
            "gradient_norm": gradient_norm if is_applied else None,
            "seconds": round(seconds, 3),
        }
        self.records.append(record if is_applied else record | {"skipped": self.num_skipped})

    def record_divergence(self, divergence: float) -> None:
        """Raises the penalty if the divergence of a step is over the budget, else lowers it: dual ascent on its log."""
        assert self.recipe.train.forget is not None
        self.divergence += AVERAGED * (divergence - self.divergence)
        excess = self.divergence / self.recipe.train.forget - 1
        self.penalty *= math.exp(PENALTY_RATE * min(excess, 2.0))
        self.penalty = min(max(self.penalty, LEAST_PENALTY), MOST_PENALTY)

    def record_validation(self, step: int, nll: float, divergence: float | None = None) -> bool:
        """Adds the loss of a validation; returns True if it is the best so far. Sets `stopped` by the patience.

        The best is the lowest loss among those within the budget of forgetting, else the one that exceeds it least.
        """
        excess = find_excess(divergence, self.recipe.train.forget)
        if not (self.is_validation_due or self.stopped):  # but for the rung of a search this one would not have been
            self.rung = (excess, nll)
            return False
        self.validations_without_improvement, self.rung = self.validations_without_improvement + 1, None
        if is_best := not self.has_best or (excess, nll) < (self.best_excess, self.best_nll):
            self.best_nll, self.best_step, self.validations_without_improvement = nll, step, 0
            self.best_excess = excess
        patience = self.recipe.train.patience
        if patience and self.validations_without_improvement >= patience and step < self.num_steps:
            self.stopped = True
        return is_best

    def take_rung(self) -> bool:
        """Takes the weights at a rung for the best, for a candidate that ends there; returns True if they are."""
        if self.rung is None or self.rung >= (self.best_excess, self.best_nll):
            return False
        (self.best_excess, self.best_nll), self.best_step = self.rung, self.last_step
        return True

    def progress_to_json(self) -> dict[str, Any]:
        """Returns the progress for a checkpoint."""
        values = {key: getattr(self, key) for key in self.PROGRESS}
        parents = [asdict(parent) for parent in self.parents]
        return values | {"best_nll": self.best_nll if self.has_best else None, "parents": parents}

    def restore_progress(self, values: Mapping[str, Any]) -> None:
        """Sets the progress to that of a checkpoint."""
        for key in self.PROGRESS:
            setattr(self, key, values.get(key, getattr(self, key)))
        self.best_nll = math.inf if values["best_nll"] is None else values["best_nll"]
        self.rung = None if self.rung is None else (self.rung[0], self.rung[1])
        self.parents = tuple(Parent(**parent) for parent in values["parents"])


@dataclass(frozen=True, kw_only=True)
class TrainedAdapter:
    """The outcome of one slot.

    Args:
        slot: the slot.
        adapter: its adapter.
        base_nll, validation_nll: mean NLL of the base and of the adapter over the whole validation split, in nats per
            token.
        test_nll: those over the test split, which no choice was made on; None without one.
        seconds: duration of the training.
    """

    slot: TrainingSlot
    adapter: Adapter
    base_nll: float
    validation_nll: float
    test_nll: tuple[float, float] | None
    seconds: float
