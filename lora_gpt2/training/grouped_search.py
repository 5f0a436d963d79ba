"""A search whose candidates do not train in one run: they are too many for the memory, or there are several devices.

They are divided into groups, which train from rung to rung; at each rung the candidates of all groups are compared.
What the search has come to is in a ledger, so that it can be killed at any moment.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import CorruptError, InterruptedRunError, MismatchError, TrainingDiverged
from lora_gpt2.core.files import wrap_os_errors, write_atomic
from lora_gpt2.core.locks import hold_lock
from lora_gpt2.recipe import Recipe
from lora_gpt2.store.catalog import Store
from lora_gpt2.training.candidates import CandidateReport, Search
from lora_gpt2.training.checkpoint import RunFolder, open_run_folder
from lora_gpt2.training.memory import count_fitting, measure_budget
from lora_gpt2.training.plan import measure_speed, read_shape
from lora_gpt2.training.publish import TrainReport, report_published
from lora_gpt2.training.rounds import LAST, GroupRound, Outcome, Publication, Standing, run_group
from lora_gpt2.training.slot import fingerprint_recipes, group_recipes

LEDGER = "search.json"


@dataclass(frozen=True, kw_only=True)
class GroupTask:
    """A round that one device trains: the candidates of a group, of which `group` says who still does."""

    recipes: Sequence[Recipe]
    group: GroupRound

    @property
    def names(self) -> list[str]:
        """The candidates' names."""
        return [recipe.name for recipe in self.recipes]


class Devices(Protocol):
    """What groups train on."""

    @property
    def num_devices(self) -> int:
        """Number of devices: so many tasks run at a time."""

    @property
    def kind(self) -> str:
        """What a ledger calls them."""

    def count_slots(self, recipes: Sequence[Recipe]) -> int:
        """Returns how many of these candidates one device trains at the same time."""

    def measure_speed(self, recipes: Sequence[Recipe]) -> float:
        """Returns the tokens per second of one device that trains these together."""

    def run(self, tasks: Sequence[GroupTask]) -> Iterable[Outcome]:
        """Runs tasks, one after another or at the same time; a group goes on from where its last task ended."""

    def forget(self, groups: Sequence[Sequence[str]]) -> None:
        """Drops what going on with these groups would need."""


@dataclass(frozen=True, kw_only=True)
class ThisDevice:
    """The device of this process, on which groups take turns."""

    store: Store
    reporter: Reporter
    num_devices: int = 1
    kind: str = "on this machine"

    def count_slots(self, recipes: Sequence[Recipe]) -> int:
        """See `Devices`."""
        config, runtime = read_shape(recipes[0])
        return count_fitting(config, recipes, runtime, measure_budget(runtime.device))

    def measure_speed(self, recipes: Sequence[Recipe]) -> float:
        """See `Devices`."""
        return measure_speed(recipes, read_shape(recipes[0])[1], self.reporter)

    def run(self, tasks: Sequence[GroupTask]) -> Iterator[Outcome]:
        """See `Devices`."""
        for task in tasks:
            resume = self._open(task.names).exists()
            yield run_group(task.recipes, task.group, self.store, self.reporter, resume=resume)

    def forget(self, groups: Sequence[Sequence[str]]) -> None:
        """See `Devices`."""
        for names in groups:
            self._open(names).close()

    def _open(self, names: Sequence[str]) -> RunFolder:
        return open_run_folder(self.store.root, list(names))


@dataclass(kw_only=True)
class Ledger:
    """What a search has come to, in a file: its groups, the standings at the rungs that were reached, and its end.

    `num_steps` are those of the recipe, `parent` is the version that it continues from; `published` is the reference of
    the adapter, "" while the search goes on; `is_told_to_end` if no further round begins.
    """

    path: Path
    candidates: str
    devices: str
    num_steps: int
    groups: list[list[str]]
    parent: str = ""
    standings: list[dict[str, Standing]] = field(default_factory=list)
    published: str = ""
    is_told_to_end: bool = False

    @classmethod
    def read(cls, path: Path) -> Ledger | None:
        """Returns the ledger in a file, None if there is none."""
        try:
            found = json.loads(path.read_bytes())
            found["standings"] = [
                {name: Standing.parse(value) for name, value in each.items()} for each in found["standings"]
            ]
            return cls(path=path, **found)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptError(f"{path} is damaged", "--fresh searches anew") from error

    def write(self) -> None:
        """Writes the file."""
        content = {key: value for key, value in asdict(self).items() if key != "path"}
        with wrap_os_errors(f"write to {self.path}"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, json.dumps(content).encode())


def divide(recipes: Sequence[Recipe], size: int) -> list[list[str]]:
    """Returns names in as few groups of at most `size` as there can be, all about as large.

    Candidates that share micro-batches are in the same group where that is possible.
    """
    order = [recipes[index].name for indices in group_recipes(recipes) for index in indices]
    count = -(-len(order) // size)
    bounds = [len(order) * index // count for index in range(count + 1)]
    return [order[start:end] for start, end in pairwise(bounds)]


def read_ledger(search: Search, store: Store) -> Ledger | None:
    """Returns the ledger of a search that was begun in groups, None for any other."""
    return Ledger.read(_find_ledger(search, store))


def forget_groups(search: Search, store: Store, devices: Devices) -> None:
    """Drops a search in groups that was interrupted."""
    if ledger := read_ledger(search, store):
        devices.forget(ledger.groups)
        ledger.path.unlink()


def _find_ledger(search: Search, store: Store) -> Path:
    return open_run_folder(store.root, [*search.names, "in groups"]).path / LEDGER


def search_in_groups(
    search: Search, store: Store, devices: Devices, reporter: Reporter, size: int, *, resume: bool, fresh: bool
) -> TrainReport:
    """Trains the candidates of a search in groups of at most `size`, and publishes the best.

    Raises:
        InterruptedRunError: an interrupted search is there, and neither `resume` nor `fresh` says what becomes of it.
        MismatchError: the search to resume had other settings.
        TrainingDiverged: all candidates did.
        Interrupted: what has been trained is kept.
    """
    made_of = fingerprint_recipes(search.recipes)
    path = _find_ledger(search, store)
    with wrap_os_errors(f"keep the search in {path.parent} (see LORA_GPT2_CACHE)"):
        path.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(path.with_name("lock"), f"the search for {search.recipe.name}"):
        try:
            ledger = Ledger.read(path)
        except CorruptError:
            if not fresh:
                raise
            ledger = None
        if ledger and not (resume or fresh or ledger.published):
            raise InterruptedRunError(
                f"an interrupted search for {search.recipe.name} is kept, at rung {len(ledger.standings)}",
                "--resume continues it, --fresh starts over",
            )
        if ledger and resume and ledger.candidates != made_of:
            raise MismatchError("the search to resume had other settings", "restore these, or use --fresh")
        if ledger and resume and ledger.devices != devices.kind and not ledger.published:
            raise MismatchError(f"the search to resume was {ledger.devices}", "continue it there, or use --fresh")
        if ledger is None or not resume:
            before, groups = ledger.groups if ledger else [], divide(search.recipes, size)
            ledger = Ledger(
                path=path,
                candidates=made_of,
                devices=devices.kind,
                num_steps=search.recipe.train.steps or 0,
                groups=groups,
                parent=search.recipe.lora.init_from,
            )
            ledger.write()
            devices.forget([*before, *groups])
        if ledger.published:
            reporter.message(f"already complete: {ledger.published}")
        else:
            report = _GroupedSearch(search=search, ledger=ledger, devices=devices, reporter=reporter).run()
            ledger.published = str(report.adapters[0])
            ledger.write()
        devices.forget(ledger.groups)
        return TrainReport(adapters=[report_published(store, ledger.published)])


@dataclass(kw_only=True)
class _GroupedSearch:
    search: Search
    ledger: Ledger
    devices: Devices
    reporter: Reporter

    def run(self) -> TrainReport:
        """Trains to the end and publishes the best."""
        search, known = self.search, dict[str, Standing]()
        survivors = names = search.names
        rungs = search.halving.rungs
        for index, until in enumerate([*rungs, search.num_steps]):
            known |= self._train(index, survivors, until)
            if self.ledger.is_told_to_end and index == len(self.ledger.standings) - 1:
                break
            running = [name for name in survivors if known[name].is_running]
            kept = sorted(running, key=lambda name: known[name].at_rung)[: search.halving.count_kept(index)]
            survivors = [name for name in names if name in kept]
            if until in rungs:
                self.reporter.message(f"after {until} steps {len(survivors)} of {len(running)} candidates go on")
        order = sorted(known, key=lambda name: (known[name].best, names.index(name)))
        if known[order[0]].best == LAST:
            raise TrainingDiverged("all candidates diverged; nothing was published", "use a smaller learning rate")
        return self._publish(order)

    def _train(self, index: int, survivors: Sequence[str], until: int) -> dict[str, Standing]:
        """Returns the standings at a rung, by its index, of the groups in which some candidates still train."""
        if index == len(self.ledger.standings):
            groups = [group for group in self.ledger.groups if set(group) & set(survivors)]
            tasks = [self._build_task(group, survivors=survivors, until=until) for group in groups]
            found: dict[str, Standing] = {}
            for outcome in self.devices.run(tasks):
                found |= outcome.standings
                if outcome.is_told_to_end:
                    self.ledger.is_told_to_end = True
                    break
            self.ledger.standings.append(found)
            self.ledger.write()
        return self.ledger.standings[index]

    def _publish(self, order: Sequence[str]) -> TrainReport:
        (group,) = (group for group in self.ledger.groups if order[0] in group)
        begun = [each for each in self.ledger.groups if set(each) & set(order)]
        others = [self._build_task(each) for each in begun if each is not group]
        rows: dict[str, CandidateReport] = {}
        for outcome in self.devices.run(others):
            rows |= outcome.rows
        recipe = self.search.recipe
        publication = Publication(order=order, name=recipe.name, description=recipe.description, rows=rows)
        (outcome,) = self.devices.run([self._build_task(group, publication=publication)])
        assert outcome.report is not None
        return outcome.report

    def _build_task(self, names: Sequence[str], **values: Any) -> GroupTask:
        chosen = [(recipe, settings) for recipe, settings in self.search.candidates if recipe.name in names]
        settings = {recipe.name: settings for recipe, settings in chosen}
        group = GroupRound(settings=settings, is_begun=bool(self.ledger.standings), **values)
        return GroupTask(recipes=[recipe for recipe, _ in chosen], group=group)
