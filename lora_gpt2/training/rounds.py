"""A search in rounds: groups of candidates that train apart, one group after another or on several devices at a time.

Between two rungs a group is a run like any other. At a rung it keeps a checkpoint and ends with how good its candidates
are; whoever leads the search (`grouped_search.py`) compares those of all groups, and the next round of a group goes on
from its checkpoint with the candidates that are left. What a candidate computes is what it computes in one run of all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import CorruptError, Waiting
from lora_gpt2.recipe import Recipe
from lora_gpt2.store.catalog import Store
from lora_gpt2.training.candidates import CandidateReport, build_page, describe_candidate
from lora_gpt2.training.halving import keep_rung, rate, score
from lora_gpt2.training.publish import TrainReport
from lora_gpt2.training.run import train_recipes
from lora_gpt2.training.slot import TrainingSlot

if TYPE_CHECKING:
    from lora_gpt2.training.trainer import Trainer

LAST = (math.inf, math.inf)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How good a candidate is at the end of a round; the lower the better.

    Args:
        at_rung: what a rung compares; see `halving.rate`.
        best: of its best weights; see `halving.score`.
        is_running: False if it diverged, or stopped by its patience.
    """

    at_rung: tuple[float, float]
    best: tuple[float, float]
    is_running: bool

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> Standing:
        """Returns the standing that was written as JSON."""
        (a, b), (c, d) = value["at_rung"], value["best"]
        return cls(at_rung=(a, b), best=(c, d), is_running=value["is_running"])


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a group has to say at the end of a round: standings after a rung, or, when the search is over, its rows.

    `is_told_to_end` if somebody who watches it wants what there is to be published.
    """

    standings: Mapping[str, Standing] = field(default_factory=dict)
    is_told_to_end: bool = False
    rows: Mapping[str, CandidateReport] = field(default_factory=dict)
    report: TrainReport | None = None


class RungReached(Waiting):
    """A group has reached the end of its round, and waits for the others."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__("waits for the other candidates", "the search goes on")
        self.outcome = outcome


@dataclass(frozen=True, kw_only=True)
class Publication:
    """How the best candidate is published.

    Args:
        order: the names of all candidates, the best first.
        name, description: those of the adapter.
        rows: those of the other groups' candidates, by name.
    """

    order: Sequence[str]
    name: str
    description: str
    rows: Mapping[str, CandidateReport]


@dataclass(frozen=True, kw_only=True)
class GroupRound:
    """One round of one group, in the place of `SuccessiveHalving`.

    Args:
        settings: those of each candidate of the group in which it differs from the recipe, by name.
        survivors: the candidates that train.
        until: the step after which the round ends; None when the search is over, and candidates are only measured.
        publication: how to publish the best, if it is in this group.
        is_begun: this is not the group's first round.
    """

    settings: Mapping[str, Mapping[str, Any]]
    survivors: Sequence[str] = ()
    until: int | None = None
    publication: Publication | None = None
    is_begun: bool = False

    @property
    def rungs(self) -> tuple[int, ...]:
        """The steps after which every candidate is validated."""
        return () if self.until is None else (self.until,)

    def count_remaining(self, slots: Sequence[TrainingSlot]) -> int:
        """Returns the steps that the survivors have left in this round, together."""
        end = self.until or 0
        running = [slot for slot in slots if slot.name in self.survivors]
        return sum(max(0, min(end, slot.num_steps) - slot.last_step) for slot in running)

    def halve(self, trainer: Trainer) -> None:
        """Stops all but the survivors; raises `RungReached` at the end of the round.

        Raises `CorruptError` if the checkpoint of the last round is gone.
        """
        if self.is_begun and not trainer.step:
            raise CorruptError("what a group of candidates has trained is gone", "--fresh starts over")
        for index, slot in enumerate(trainer.slots):
            if slot.name not in self.survivors and not slot.stopped:
                slot.stopped = True
                keep_rung(trainer, index)
        if self.until is None:
            if self.publication is None:
                raise RungReached(Outcome(rows=self.describe(trainer)))
            return
        running = [slot for slot in trainer.slots if slot.is_active]
        if trainer.step < self.until and running:
            return
        standings = {slot.name: _stand(trainer, index) for index, slot in enumerate(trainer.slots)}
        raise RungReached(Outcome(standings=standings, is_told_to_end=trainer.is_told_to_end))

    def choose(self, slots: Sequence[TrainingSlot]) -> int:
        """Returns the slot of the winner."""
        assert self.publication is not None
        return [slot.name for slot in slots].index(self.publication.order[0])

    def describe(self, trainer: Trainer) -> dict[str, CandidateReport]:
        """Returns the row of each candidate of the group."""
        winner = self.publication.order[0] if self.publication else ""
        names = [slot.name for slot in trainer.slots]
        return {
            name: describe_candidate(trainer, index, dict(self.settings[name]), name == winner)
            for index, name in enumerate(names)
        }


def _stand(trainer: Trainer, index: int) -> Standing:
    slot = trainer.slots[index]
    if slot.failure:
        return Standing(at_rung=LAST, best=LAST, is_running=False)
    at_rung = rate(slot, trainer.measure_average(index)) if not slot.stopped else score(slot)
    best = min(score(slot), slot.rung or score(slot))
    return Standing(at_rung=at_rung, best=best, is_running=not slot.stopped)


def run_group(
    recipes: Sequence[Recipe], group: GroupRound, store: Store, reporter: Reporter, **options: Any
) -> Outcome:
    """Trains the candidates of a group for a round, or publishes the best of them.

    `options` are those of `train_recipes`. Raises what it does.
    """
    rows: dict[str, CandidateReport] = {}

    def conclude(trainer: Trainer, best: int) -> dict[str, bytes]:
        assert group.publication is not None
        rows.update(group.describe(trainer))
        slot, publication = trainer.slots[best], group.publication
        slot.recipe = slot.recipe.model_copy(update={"name": publication.name, "description": publication.description})
        known = {**publication.rows, **rows}
        return build_page([known[name] for name in publication.order])

    try:
        report = train_recipes(recipes, store, reporter, halving=group, conclude=conclude, **options)
    except RungReached as reached:
        return reached.outcome
    return Outcome(rows=rows, report=report)
