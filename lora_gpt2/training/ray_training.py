"""Many domains over the machines of a Ray cluster: a task of a few of them for each device.

The driver reads the text, sends it, and alone publishes what comes back. Where a machine is lost, its task goes on
elsewhere from the checkpoint that it left in the mailbox, which is in a folder of the driver's machine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_gpt2.core.console import OnceReporter, Reporter
from lora_gpt2.core.errors import (
    CorruptError,
    InterruptedRunError,
    LoraGpt2Error,
    MismatchError,
    UsageError,
)
from lora_gpt2.core.files import wrap_os_errors, write_atomic
from lora_gpt2.core.fingerprint import fingerprint_json
from lora_gpt2.core.interrupt import catch_signals
from lora_gpt2.core.locks import hold_lock
from lora_gpt2.core.names import check_name
from lora_gpt2.core.printable import count_of, join_names
from lora_gpt2.core.ray_cluster import TaskLost, check_address, connect
from lora_gpt2.data.prepared import prepare_data
from lora_gpt2.model.checkpoint import Checkpoint
from lora_gpt2.model.stored_weights import fingerprint_base
from lora_gpt2.recipe import Recipe
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.manifest import MANIFEST, parse_manifest
from lora_gpt2.training.checkpoint import RunFolder, open_run_folder
from lora_gpt2.training.mailbox import Files, Mailbox, has_state
from lora_gpt2.training.memory import MOST_SLOTS
from lora_gpt2.training.publish import DIVERGED, NO_TEXT, TrainReport, find_up_to_date, report_published
from lora_gpt2.training.queue import order_domains
from lora_gpt2.training.remote import RemoteTask, publish_delivered, run_task
from lora_gpt2.training.run import describe_texts, resolve_learning_rate
from lora_gpt2.training.slot import TrainingSlot, check_together, fingerprint_recipes
from lora_gpt2.training.start import inherit_shape, pin_parent
from lora_gpt2.training.task_inputs import check_sendable, collect_inputs, name_base

LEDGER = "published.json"


@dataclass(kw_only=True)
class _Driver:
    """The driver's side of a run, which can be killed too: what is published is in a ledger, the rest in `states`.

    Args:
        recipes: the fingerprint of what it trains.
        parents: the versions that adapters continue from, by name.
        tasks: the domains of each task.
        published: references by name.
    """

    store: Store
    run: RunFolder
    reporter: Reporter
    recipes: str
    is_resumed: bool
    parents: dict[str, str] = field(default_factory=dict)
    tasks: list[list[str]] = field(default_factory=list)
    published: dict[str, str] = field(default_factory=dict)

    @property
    def states(self) -> Path:
        """The folder of the mailbox."""
        return self.run.path / "states"

    def read_ledger(self) -> None:
        """Takes over what an interrupted run came to."""
        path = self.run.path / LEDGER
        if not path.exists():
            return
        try:
            found = json.loads(path.read_bytes())
            recipes, self.published = found["recipes"], found["published"]
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptError(f"{path} is damaged", "remove it, and train again what is not published") from error
        if self.is_resumed and recipes != self.recipes:
            raise MismatchError("the run to resume had other settings", "restore these, or use --fresh")
        self.parents, self.tasks = found.get("parents", {}), found.get("tasks", [])

    def write_ledger(self) -> None:
        """Notes what the run has come to."""
        content = {key: getattr(self, key) for key in ("recipes", "parents", "tasks", "published")}
        with wrap_os_errors(f"write to {self.run.path}"):
            write_atomic(self.run.path / LEDGER, json.dumps(content).encode())

    def publish(self, files: Files) -> None:
        """Publishes an adapter that came back, unless a machine that was lost had sent it already."""
        name = parse_manifest(files[MANIFEST]).name
        if name in self.published:
            return
        self.published[name] = publish_delivered(self.store, files, once=self.is_resumed)
        self.write_ledger()
        report = report_published(self.store, self.published[name])
        before, after = report.base_perplexity, report.validation_perplexity
        self.reporter.message(f"{report}: perplexity {before:.2f} -> {after:.2f} after {report.steps} steps")

    def take_over(self, found: dict[str, str]) -> None:
        """Takes versions that an earlier run published for those of this one."""
        if found:
            self.published |= found
            self.write_ledger()
            self.reporter.message(f"already published: {join_names(list(found.values()))}")

    def drop_changed(self, names: Sequence[str]) -> None:
        """Trains those again that an earlier run published, of another text than they have now."""
        if changed := [name for name in names if name in self.published]:
            self.reporter.message(f"texts have changed since the run was interrupted: {join_names(changed)}")
            for task in [task for task in self.tasks if set(task) & set(changed)]:
                Mailbox(self.states).forget_state(find_key(task))
                self.tasks.remove(task)
            self.published = {name: each for name, each in self.published.items() if name not in changed}
            self.write_ledger()

    def divide(self, names: Sequence[str], size: int, num_devices: int) -> None:
        """Divides the domains among tasks, of at most `size`, so that all devices have as much to do.

        A task that has left something to go on from keeps its domains, published ones too.
        """
        kept = [[name for name in task if name in names] for task in self.tasks if self._is_begun(task)]
        rest = [name for name in names if name not in self.published and not any(name in task for task in kept)]
        count = -(-len(rest) // size)
        count = min(len(rest), -(-count // num_devices) * num_devices)
        self.tasks = [*kept, *(rest[index::count] for index in range(count))]
        self.write_ledger()

    def _is_begun(self, names: Sequence[str]) -> bool:
        return not set(names) <= self.published.keys() and has_state(self.states, find_key(names))


def train_on_ray(
    recipes: Sequence[Recipe],
    store: Store,
    reporter: Reporter,
    address: str,
    *,
    resume: bool = False,
    fresh: bool = False,
    num_slots: int = 0,
) -> TrainReport:
    """Trains one adapter per recipe on the machines of a Ray cluster, and publishes each when it comes back.

    Args:
        recipes: of one base, which each machine finds by the same name: `nano`, a hub id, or a folder there.
        store: of this machine alone.
        reporter: receives the progress of all tasks.
        address: of a cluster that this machine is part of; `auto` for the one that runs here, `local` for this machine.
        resume: leave out what an interrupted run has published.
        fresh: train everything anew.
        num_slots: adapters that a device trains at a time; 0 for as many as fit into its memory.

    Raises:
        UsageError: names are missing or the same, the recipes do not share a base, or need what cannot be sent.
        NotFoundError, CorruptError: of an adapter that is continued.
        MismatchError: the run to resume had other settings.
        InterruptedRunError: an interrupted run is there, and neither `resume` nor `fresh` says what becomes of it.
        ResourceError: Ray is not installed, there is no such cluster, or a task was lost too often; the others go on.
        TrainingDiverged, DataError: an adapter failed; the others are published, and in the error's `report`.
        Interrupted: what has come back is published.
    """
    names = [check_name(recipe.name) for recipe in recipes]
    _check(recipes, names, address)
    run = open_run_folder(store.root, [*names, "on Ray"])
    made_of = fingerprint_recipes(recipes)
    once = OnceReporter(reporter)  # machines say the same
    driver = _Driver(store=store, run=run, reporter=once, recipes=made_of, is_resumed=resume)
    store.check_writable()
    with wrap_os_errors(f"keep the run in {driver.run.path} (see LORA_GPT2_CACHE)"):
        driver.run.path.mkdir(parents=True, exist_ok=True)
    with hold_lock(driver.run.lock, f"the run of {join_names(names)}"):
        driver.read_ledger()
        is_kept = bool(driver.published) or any(driver.states.glob("*"))
        if is_kept and not (resume or fresh):
            raise InterruptedRunError(
                f"an interrupted run of {join_names(names)} is kept, {len(driver.published)} are published",
                "--resume continues it, --fresh starts over",
            )
        if not resume:
            driver.parents, driver.tasks, driver.published = {}, [], {}
            shutil.rmtree(driver.states, ignore_errors=True)
        known = [inherit_shape(pin_parent(r, driver.parents.get(r.name, "")), store) for r in recipes]
        driver.parents = {recipe.name: recipe.lora.init_from for recipe in known}
        driver.write_ledger()
        slots, failures = _read_texts(known, once)
        if resume and slots:
            fingerprint = fingerprint_base(Checkpoint.open(recipes[0].base))
            found = find_up_to_date(slots, store, fingerprint)
            driver.drop_changed([slot.name for slot in slots if slot.name not in found])
            driver.take_over({name: each for name, each in found.items() if name not in driver.published})
        if any(slot.name not in driver.published for slot in slots):
            failures |= _train(driver, slots, address, num_slots)
        references = [driver.published[name] for name in sorted(driver.published)]
        adapters = [report_published(store, reference) for reference in references]
        report = TrainReport(adapters=adapters, failures=failures).raise_failures()
        (driver.run.path / LEDGER).unlink()
        shutil.rmtree(driver.states, ignore_errors=True)
    return report


def _check(recipes: Sequence[Recipe], names: Sequence[str], address: str) -> None:
    if len(set(names)) < len(names):
        raise UsageError(f"two recipes have the same name: {', '.join(names)}", "give each its own name")
    check_together(recipes)
    check_address(address)
    check_sendable(recipes)


def _read_texts(recipes: Sequence[Recipe], reporter: Reporter) -> tuple[list[TrainingSlot], dict[str, str]]:
    """Returns the domains with their text, and by name why a text cannot be read."""
    slots, failures = list[TrainingSlot](), dict[str, str]()
    checkpoint = Checkpoint.open(recipes[0].base) if recipes else None
    for recipe in recipes:
        assert checkpoint is not None
        try:
            data = prepare_data(recipe.data, checkpoint.load_tokenizer(), reporter)
        except LoraGpt2Error as error:
            failures[recipe.name] = f"{NO_TEXT}: {error.message}"
            reporter.message(f"{recipe.name} is left out: {error.message}")
        else:
            known = resolve_learning_rate(name_base(recipe), checkpoint.config.n_embd)
            slots.append(TrainingSlot(recipe=known, data=data))
    if slots:
        describe_texts({slot.name: slot for slot in slots}, reporter)
    return order_domains(slots), failures


def _train(driver: _Driver, slots: Sequence[TrainingSlot], address: str, num_slots: int) -> dict[str, str]:
    """Runs the tasks, and publishes what they deliver; returns what failed, by name."""
    failures, known = dict[str, str](), {slot.name: slot for slot in slots}
    with connect(address) as cluster, catch_signals() as stop:  # Ray has a handler of its own for SIGTERM
        mailbox = cluster.start_actor(Mailbox, driver.states)
        driver.divide(list(known), num_slots or MOST_SLOTS, cluster.num_devices)
        calls = {}
        for names in driver.tasks:
            recipes, texts = [known[name].recipe for name in names], [known[name].data for name in names]
            task = RemoteTask(key=find_key(names), recipes=recipes, num_slots=num_slots)
            inputs = collect_inputs(recipes, texts, driver.store, driver.reporter)
            calls[task.key] = [task, cluster.put(inputs), mailbox]
        running = [known[name] for task in driver.tasks for name in task]
        total = sum(slot.num_steps * slot.tokens_per_step for slot in running)
        driver.reporter.message(f"{count_of(len(running), 'adapter')} to train; {cluster.describe()}")
        with driver.reporter.task("training on Ray", total, "tokens") as progress:
            shown = 0

            def collect() -> None:
                nonlocal shown
                stop.raise_if_asked(f"{len(driver.published)} adapters are published; --resume goes on")
                mail = mailbox.collect()
                for message in mail.messages:
                    driver.reporter.message(message)
                for files in mail.versions:
                    driver.publish(files)
                tokens = sum(mail.tokens.values())
                if tokens > shown:
                    progress.advance(tokens - shown)
                shown = tokens

            for key, result in cluster.run(run_task, calls, collect):
                if isinstance(result, TaskLost):
                    lost = (recipe.name for recipe in calls[key][0].recipes if recipe.name not in driver.published)
                    failures |= dict.fromkeys(lost, f"not trained: {result.reason}")
                    continue
                failures |= result
                if all(failure.startswith(DIVERGED) for failure in result.values()):  # which would diverge again
                    mailbox.forget_state(key)
    return failures


def find_key(names: Sequence[str]) -> str:
    """Returns the key of a task, which is the same when the run goes on."""
    return fingerprint_json(list(names))[:16]
