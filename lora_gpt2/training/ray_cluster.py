"""Many domains over the machines of a Ray cluster (Moritz et al. 2018, arXiv:1712.05889): a task for each device.

The driver reads the text, sends it, and alone publishes what comes back. Ray starts a task again where its machine was
lost; the task then goes on from the checkpoint that it left in the mailbox, an actor on the driver's machine.
"""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import (
    DataError,
    Interrupted,
    InterruptedRunError,
    LoraGpt2Error,
    MismatchError,
    ResourceError,
    TrainingDiverged,
    UsageError,
)
from lora_gpt2.core.files import wrap_os_errors, write_atomic
from lora_gpt2.core.fingerprint import fingerprint_json
from lora_gpt2.core.interrupt import catch_signals
from lora_gpt2.core.locks import hold_lock
from lora_gpt2.core.names import check_name
from lora_gpt2.data.prepared import prepare_data
from lora_gpt2.model.checkpoint import Checkpoint
from lora_gpt2.recipe import Recipe
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.manifest import MANIFEST, WEIGHTS, parse_manifest
from lora_gpt2.training.checkpoint import RunFolder, open_run_folder
from lora_gpt2.training.memory import MOST_SLOTS
from lora_gpt2.training.publish import report_published
from lora_gpt2.training.queue import order_domains
from lora_gpt2.training.remote import Files, LocalMailbox, RemoteTask, publish_delivered, read_folder, run_task
from lora_gpt2.training.run import TrainReport, join_names, resolve_learning_rate
from lora_gpt2.training.slot import TrainingSlot, check_together

if TYPE_CHECKING:
    pass

LEDGER = "published.json"
MAX_RETRIES = 8  # lost machines that a task survives
POLL_SECONDS, CONNECT_SECONDS = 0.5, 10.0


@dataclass(kw_only=True)
class _Driver:
    """The driver's side of a run: what is published already is in a ledger, so that it can be killed too."""

    store: Store
    run: RunFolder
    reporter: Reporter
    recipes: str
    is_resumed: bool
    published: dict[str, str] = field(default_factory=dict)

    def read_ledger(self) -> None:
        """Takes over what an interrupted run published."""
        path = self.run.path / LEDGER
        if not path.exists():
            return
        found = json.loads(path.read_bytes())
        if self.is_resumed and found["recipes"] != self.recipes:
            raise MismatchError("the run to resume had other settings", "restore these, or use --fresh")
        self.published = found["published"]

    def write_ledger(self) -> None:
        """Notes what is published; what was there without a name is set aside with the run."""
        with wrap_os_errors(f"write to {self.run.path}"):
            content = {"recipes": self.recipes, "published": self.published}
            write_atomic(self.run.path / LEDGER, json.dumps(content).encode())

    def _find_published(self, files: Files) -> str:
        """Returns the version of these very weights, if a run that was killed published it and could not note it."""
        manifest = parse_manifest(files[MANIFEST])
        if not self.is_resumed or manifest.name not in self.store.list_names():
            return ""
        newest = self.store.read_manifest(manifest.name)
        return newest.reference if newest.files[WEIGHTS] == manifest.files[WEIGHTS] else ""

    def publish(self, files: Files) -> None:
        """Publishes an adapter that came back, unless a machine that was lost had sent it already."""
        name = parse_manifest(files[MANIFEST]).name
        if name in self.published:
            return
        self.published[name] = self._find_published(files) or publish_delivered(self.store, files)
        self.write_ledger()
        report = report_published(self.store, self.published[name])
        before, after = report.base_perplexity, report.validation_perplexity
        self.reporter.message(f"{report}: perplexity {before:.2f} -> {after:.2f} after {report.steps} steps")


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
        UsageError: names are missing or the same, the recipes do not share a base, or one continues an adapter.
        MismatchError: the run to resume had other settings.
        InterruptedRunError: an interrupted run is there, and neither `resume` nor `fresh` says what becomes of it.
        ResourceError: Ray is not installed, there is no such cluster, or a task was lost too often; the others go on.
        TrainingDiverged, DataError: an adapter failed; the others are published.
        Interrupted: what has come back is published.
    """
    names = [check_name(recipe.name) for recipe in recipes]
    _check(recipes, names, address)
    run = open_run_folder(store.root, [*names, "on Ray"])
    made_of = fingerprint_json([recipe.model_dump(mode="json") for recipe in recipes])
    driver = _Driver(store=store, run=run, reporter=reporter, recipes=made_of, is_resumed=resume)
    store.check_writable()
    with wrap_os_errors(f"keep the run in {driver.run.path} (see LORA_GPT2_CACHE)"):
        driver.run.path.mkdir(parents=True, exist_ok=True)
    with hold_lock(driver.run.lock, f"the run of {join_names(names)}"):
        driver.read_ledger()
        if driver.published and not (resume or fresh):
            raise InterruptedRunError(
                f"an interrupted run of {join_names(names)} is kept, {len(driver.published)} are published",
                "--resume continues it, --fresh starts over",
            )
        driver.published = {} if fresh else driver.published
        driver.write_ledger()
        slots, failures = _read_texts([r for r in recipes if r.name not in driver.published], reporter)
        if slots:
            failures |= _train(driver, slots, address, num_slots)
        references = [driver.published[name] for name in sorted(driver.published)]
        if failures:
            message = "; ".join(dict.fromkeys(failures.values()))
            is_text = all("no usable text" in failure for failure in failures.values())
            kind = TrainingDiverged if "diverged" in message else DataError if is_text else ResourceError
            raise kind(f"{message}; published: {join_names(references)}", "fix these, and train them with --resume")
        (driver.run.path / LEDGER).unlink()
    return TrainReport(adapters=[report_published(store, reference) for reference in references])


def _check(recipes: Sequence[Recipe], names: Sequence[str], address: str) -> None:
    if len(set(names)) < len(names):
        raise UsageError(f"two recipes have the same name: {', '.join(names)}", "give each its own name")
    check_together(recipes)
    if address.startswith("ray://"):
        raise UsageError("this machine must be part of the Ray cluster", "run it there, or 'ray job submit' it")
    if named := [recipe.name for recipe in recipes if recipe.train.replay or recipe.train.trackers]:
        raise UsageError(
            f"{join_names(named)}: --ray does not send the files of train.replay, nor back those of train.trackers",
            "leave them out, or train here without --ray",
        )
    if continued := [recipe.name for recipe in recipes if recipe.lora.init_from]:
        raise UsageError(
            f"{join_names(continued)}: --ray does not continue adapters, which are in the store of this machine",
            "leave --from out, or train them here without --ray",
        )


def _read_texts(recipes: Sequence[Recipe], reporter: Reporter) -> tuple[list[TrainingSlot], dict[str, str]]:
    """Returns the domains with their text, and by name why a text cannot be read."""
    slots, failures = list[TrainingSlot](), dict[str, str]()
    checkpoint = Checkpoint.open(recipes[0].base) if recipes else None
    for recipe in recipes:
        assert checkpoint is not None
        try:
            data = prepare_data(recipe.data, checkpoint.load_tokenizer(), reporter)
        except LoraGpt2Error as error:
            failures[recipe.name] = f"'{recipe.name}' has no usable text: {error.message}"
            reporter.message(f"{recipe.name} is left out: {error.message}")
        else:
            base = str(Path(recipe.base).absolute()) if Path(recipe.base).is_dir() else recipe.base
            known = resolve_learning_rate(recipe.model_copy(update={"base": base}), checkpoint.config.n_embd)
            slots.append(TrainingSlot(recipe=known, data=data))
    return order_domains(slots), failures


def _train(driver: _Driver, slots: Sequence[TrainingSlot], address: str, num_slots: int) -> dict[str, str]:
    """Runs the tasks, and publishes what they deliver; returns what failed, by the task."""
    size = num_slots or MOST_SLOTS
    chunks = [slots[start : start + size] for start in range(0, len(slots), size)]
    total, failures = sum(slot.num_steps * slot.tokens_per_step for slot in slots), dict[str, str]()
    with _connect(address) as library, catch_signals() as stop:  # Ray has a handler of its own for SIGTERM
        mailbox = _start_mailbox(library)
        options = {"max_retries": MAX_RETRIES, "retry_exceptions": [Interrupted], **_find_device(library)}
        start = library.remote(**options)(_run_in_ray)  # a worker of a GPU ends with its task, and frees its memory
        tasks: dict[Any, Sequence[TrainingSlot]] = {}
        for chunk in chunks:
            names = [slot.name for slot in chunk]
            key = fingerprint_json([str(driver.run.path), names, time.time_ns()])[:16]
            task = RemoteTask(key=key, recipes=[slot.recipe for slot in chunk], num_slots=num_slots)
            texts = [library.put(read_folder(slot.data.path)) for slot in chunk]
            tasks[start.remote(task, mailbox, *texts)] = chunk
        driver.reporter.message(f"{len(slots)} adapters in {len(tasks)} tasks on {len(library.nodes())} nodes")
        with driver.reporter.task("training on Ray", total, "tokens") as progress:
            done = 0
            while tasks:
                stop.raise_if_asked(f"{len(driver.published)} adapters are published; --resume goes on")
                ready, _ = library.wait(list(tasks), timeout=POLL_SECONDS)
                found = [(tasks[each], _read_result(library, each)) for each in ready]
                delivered, tokens = _collect(library, mailbox)
                for files in delivered:
                    driver.publish(files)
                progress.advance(max(0, tokens - done))
                done = max(done, tokens)
                for chunk, failure in found:
                    failures |= {chunk[0].name: failure} if failure else {}
                tasks = {each: chunk for each, chunk in tasks.items() if each not in ready}
    return failures


def _read_result(library: Any, reference: Any) -> str:
    """Returns what went wrong in a task that has ended, "" if nothing did."""
    try:
        return str(library.get(reference))
    except library.exceptions.RayError as error:
        return f"a task was lost: {_last_line(error)}"


def _collect(library: Any, mailbox: Any) -> tuple[list[Files], int]:
    try:
        delivered, tokens = library.get(mailbox.collect.remote())
    except library.exceptions.RayError as error:
        raise ResourceError(f"what the tasks sent is lost: {_last_line(error)}", "--resume goes on") from error
    return delivered, tokens


def _last_line(error: Exception) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


def _run_in_ray(task: RemoteTask, mailbox: Any, *prepared: Files) -> str:
    """Runs on a machine of the cluster."""
    return run_task(task, prepared, _Remote(mailbox))


class _Remote:
    """The mailbox as a task sees it."""

    def __init__(self, actor: Any) -> None:
        import ray

        self._actor, self._get = actor, ray.get

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments: self._get(getattr(self._actor, name).remote(*arguments))


@contextmanager
def _connect(address: str) -> Iterator[Any]:
    """Yields Ray, connected to a cluster; what it started here is stopped at the end."""
    try:
        import ray
    except ImportError as error:
        raise ResourceError("--ray needs Ray", "pip install 'lora-gpt2[ray]'") from error
    try:
        _check_reachable(address)
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace="lora-gpt2",
            include_dashboard=False if address == "local" else None,
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ResourceError(f"there is no Ray cluster at {address}: {reason}", "start one: ray start --head") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raises `OSError` if nothing listens at `host:port`; Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if host:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()


def _start_mailbox(library: Any) -> Any:
    """Returns a mailbox on this machine, which is not lost unless the driver is."""
    here = library.get_runtime_context().get_node_id()
    strategy = library.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node_id=here, soft=False)
    return library.remote(LocalMailbox).options(num_cpus=0, scheduling_strategy=strategy).remote()


def _find_device(library: Any) -> dict[str, float]:
    """Returns what a task asks for: a GPU where the cluster has any, else all the cores of a machine."""
    nodes = [node["Resources"] for node in library.nodes() if node["Alive"]]
    if any(node.get("GPU") for node in nodes):
        return {"num_gpus": 1}
    cores = [node["CPU"] for node in nodes if node.get("CPU")]
    if not cores:
        raise ResourceError("the Ray cluster has neither GPUs nor CPUs", "add a machine: ray start --address=HEAD")
    return {"num_cpus": min(cores)}
