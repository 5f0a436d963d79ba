"""One slot of a run: what it trains on, how far it has come, and what came out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lora_gpt2.core.errors import UsageError
from lora_gpt2.data.prepared import PreparedData
from lora_gpt2.model.lora import Adapter
from lora_gpt2.recipe import Recipe
from lora_gpt2.training.block_order import BlockOrder

MIN_VALIDATION_TOKENS = 4096
SHARED_SETTINGS = ("lora.dropout", "train.label_smoothing", "train.neftune_noise_alpha", "train.gradient_checkpointing")
ONE_FOR_ALL = ("base", "data.block_size", "data.layout", "train.dtype", "train.quantize")


def check_together(recipes: Sequence[Recipe]) -> None:
    """Raises `UsageError` unless the recipes can be trained over one base."""
    for key in ONE_FOR_ALL:
        if len({_get(recipe, key) for recipe in recipes}) > 1:
            raise UsageError(f"recipes trained together need one {key}", "make them equal, or train apart")


def group_recipes(recipes: Sequence[Recipe]) -> list[list[int]]:
    """Returns the places of those recipes that may share passes, group by group."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for place, recipe in enumerate(recipes):
        groups.setdefault(tuple(_get(recipe, key) for key in SHARED_SETTINGS), []).append(place)
    return list(groups.values())


def _get(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return value


@dataclass
class Domain:
    """The training state of one slot: its recipe, its data and its progress; checkpoints hold the fields in `PROGRESS`.

    `num_written` is the number of records in the metrics file.
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
    )
    name: str
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
    num_written: int = 0

    def __post_init__(self) -> None:
        settings = self.recipe.train
        rows = max(1, settings.batch_tokens // self.recipe.data.block_size)
        self.order = BlockOrder(self.data.train, rows, settings.seed)
        self.num_steps = settings.steps or self.order.num_steps(settings.epochs)
        self.validate_every = settings.validate_every or max(1, self.num_steps // 10)
        trained = self.num_steps * rows * self.recipe.data.block_size
        self.validation_tokens = min(settings.validation_tokens, max(MIN_VALIDATION_TOKENS, trained // 20))

    def is_active(self, step: int) -> bool:
        """True if the slot trains in the step after `step`."""
        return step < self.num_steps and not self.stopped and not self.failure

    def is_validation_due(self, step: int) -> bool:
        """True if the slot is validated after `step` steps."""
        return self.last_step == step and (step % self.validate_every == 0 or step == self.num_steps)


@dataclass(frozen=True)
class TrainedAdapter:
    """The outcome of one slot; NLL in nats per token over the whole validation part.

    `test_nll` has the base's and the adapter's over the test part, which no choice was made on; None without one.
    """

    domain: Domain
    adapter: Adapter
    base_nll: float
    validation_nll: float
    test_nll: tuple[float, float] | None
    seconds: float
