"""Several candidates for one adapter in one run, of which the worse half stops at each rung.

Successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943, algorithm 1) on validation loss: with 8 candidates
and a run of T steps, 8 train for T/12 steps, 4 go on to T/4, 2 to 5T/8 and one to T, which is 2.46 times the work of
one run. What the last one computes is what it would have computed alone.

While the learning rate is still high, a higher one looks worse than it will be at the end. So a rung compares averages
of each candidate's recent weights, which come close to what decay would make of them (polynomial decay averaging,
Shamir and Zhang 2013, arXiv:1212.1824, section 4), and the last rung is late.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from lora_gpt2.training.slot import TrainingSlot

if TYPE_CHECKING:
    from lora_gpt2.training.trainer import Trainer

RECENCY = 8
"""The exponent of the averaging."""


class Halving(Protocol):
    """What stops the candidates of a trainer; a `SuccessiveHalving`, or a round of a larger one (`rounds.py`)."""

    @property
    def rungs(self) -> tuple[int, ...]:
        """The steps after which every candidate is validated."""

    @property
    def is_begun(self) -> bool:
        """True for a round that is not the first."""

    def count_remaining(self, slots: Sequence[TrainingSlot]) -> int:
        """Returns the steps that all candidates together have left."""

    def halve(self, trainer: Trainer) -> None:
        """Stops, if there is a rung where the trainer is, the worse candidates."""

    def choose(self, slots: Sequence[TrainingSlot]) -> int:
        """Returns the slot that is published."""


@dataclass(frozen=True, kw_only=True)
class SuccessiveHalving:
    """The rungs of a search, by step, and how many candidates there are at first."""

    num_candidates: int
    rungs: tuple[int, ...]
    is_begun: bool = False

    @classmethod
    def build(cls, num_candidates: int, num_steps: int) -> SuccessiveHalving:
        """Returns the rungs of a run of `num_steps`: the last at 5/8 of it, the one before at 1/4.

        The first is where all candidates together have trained for two thirds of a run, those between lie in equal
        proportions.
        """
        count = min(num_candidates.bit_length() - 1, num_steps.bit_length() - 1)
        if not count:
            return cls(num_candidates=num_candidates, rungs=())
        ratio = 8 / (3 * num_candidates)  # of the first rung to that at 1/4
        shares = [0.25 * ratio ** (index / max(1, count - 2)) for index in reversed(range(count - 1))]
        rungs = sorted({max(1, int(num_steps * share)) for share in [*shares, 0.625]})
        return cls(num_candidates=num_candidates, rungs=tuple(rungs))

    def count_steps(self, num_steps: int) -> int:
        """Returns the steps of all candidates together, if all are as long as the longest."""
        ends = [*self.rungs, num_steps]
        lengths = [end - start for start, end in zip([0, *self.rungs], ends, strict=True)]
        return sum((self.num_candidates >> index) * length for index, length in enumerate(lengths))

    def count_remaining(self, slots: Sequence[TrainingSlot]) -> int:
        """Returns the steps that all candidates together have left, if all are as long as the longest."""
        done = sum(slot.last_step for slot in slots)
        return max(0, self.count_steps(max(slot.num_steps for slot in slots)) - done)

    def count_kept(self, rung: int) -> int:
        """Returns how many candidates go on after a rung, by its index."""
        return max(1, self.num_candidates >> (rung + 1))

    def halve(self, trainer: Trainer) -> None:
        """Stops, if there is a rung where the trainer is, the slots that are not among the better half."""
        running = [index for index, slot in enumerate(trainer.slots) if not slot.stopped]
        self.stop_losers(trainer.step, trainer.slots, trainer.measure_average)
        for index in running:
            if trainer.slots[index].stopped:
                keep_rung(trainer, index)

    def stop_losers(self, step: int, slots: Sequence[TrainingSlot], measure: Callable[[int], float]) -> None:
        """Does so after `step` steps; `measure` returns the validation loss of a slot's averaged weights.

        Twice is as good as once.
        """
        if step not in self.rungs:
            return
        running = [index for index, slot in enumerate(slots) if not slot.failure and not slot.stopped]
        rates = {index: rate(slots[index], measure(index)) for index in running}
        for index in sorted(running, key=rates.__getitem__)[self.count_kept(self.rungs.index(step)) :]:
            slots[index].stopped = True

    def choose(self, slots: Sequence[TrainingSlot]) -> int:
        """Returns the best of the slots that did not fail."""
        return min((k for k, slot in enumerate(slots) if not slot.failure), key=lambda index: score(slots[index]))


def keep_rung(trainer: Trainer, index: int) -> None:
    """Keeps the weights of a candidate that ends at a rung, if they are its best."""
    if trainer.slots[index].take_rung():
        trainer.best[index] = trainer.bank.flat[index]


def average_weights(average: Tensor, weights: Tensor, step: int) -> None:
    """Adds the weights after `step` steps (from 1) to their average, in which the last ninth of the steps prevails."""
    average.lerp_(weights, min(1.0, (RECENCY + 1) / (step + RECENCY)))


def score(slot: TrainingSlot) -> tuple[float, float]:
    """Returns what is compared at the end, the lower the better: the excess over the budget of forgetting, the loss."""
    return slot.best_excess, slot.best_nll


def rate(slot: TrainingSlot, average_nll: float) -> tuple[float, float]:
    """Returns what is compared at a rung, where `average_nll` is the validation loss of the slot's averaged weights."""
    excess, nll = min(score(slot), slot.rung or score(slot))
    return excess, min(nll, average_nll)
