"""Training on another machine: how a task goes on there from where a lost machine left off, and what it sends back.

A task is what one device trains: domains, or a group of candidates. What it needs is sent (`task_inputs.py`); adapters
come back whole (`mailbox.py`) and are published by the driver alone, so that no file system is shared. With each
checkpoint the task's folder comes back too: where a machine is lost, another one goes on from there. Nothing here knows
Ray.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_gpt2.core.console import SilentReporter
from lora_gpt2.core.dirs import find_cache_dir
from lora_gpt2.core.errors import ConflictError, Interrupted, LoraGpt2Error
from lora_gpt2.core.locks import hold_lock
from lora_gpt2.recipe import Recipe
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.exchange import read_version_files
from lora_gpt2.store.manifest import CARD, MANIFEST, WEIGHTS, parse_manifest
from lora_gpt2.store.version import verify_hashes
from lora_gpt2.training.candidates import CANDIDATES
from lora_gpt2.training.checkpoint import open_run_folder
from lora_gpt2.training.events import TrainingEvent
from lora_gpt2.training.grouped_search import GroupTask
from lora_gpt2.training.mailbox import STATE, Files, Mailbox, read_folder, write_folder
from lora_gpt2.training.rounds import Outcome, run_group
from lora_gpt2.training.run import train_recipes
from lora_gpt2.training.task_inputs import TaskInputs

CACHE = "LORA_GPT2_CACHE"
REPORT_SECONDS = 0.5  # between two reports of progress, each of which waits for the driver's machine


@dataclass(frozen=True, kw_only=True)
class RemoteTask:
    """Domains that train on one device: their recipes, and the number of slots they take turns in (0: what fits).

    `key` names the task in its run.
    """

    key: str
    recipes: Sequence[Recipe]
    num_slots: int


def run_task(task: RemoteTask, inputs: TaskInputs, mailbox: Mailbox) -> dict[str, str]:
    """Trains the domains of a task; returns what went wrong, by name.

    What is wrong with one domain does not stop the others. Raises `Interrupted` where this machine is told to stop: the
    task is to go on elsewhere.
    """
    with _open_workplace(task.key, task.recipes, inputs, mailbox) as (store, options):
        try:
            train_recipes(task.recipes, store, num_slots=task.num_slots, **options)
        except Interrupted:  # of this machine, not of the run
            raise
        except LoraGpt2Error as error:
            if error.report is not None:
                return dict(error.report.failures)
            return dict.fromkeys((recipe.name for recipe in task.recipes), f"failed: {error.message}")
        return {}


def run_remote_group(key: str, task: GroupTask, inputs: TaskInputs, mailbox: Mailbox) -> Outcome:
    """Trains a group of a search for a round. Raises what `run_group` does."""
    with _open_workplace(key, task.recipes, inputs, mailbox) as (store, options):
        return run_group(task.recipes, task.group, store, **options)


@contextmanager
def _open_workplace(
    key: str, recipes: Sequence[Recipe], inputs: TaskInputs, mailbox: Mailbox
) -> Iterator[tuple[Store, dict[str, Any]]]:
    """Yields a store on this machine and the options of `train_recipes`, to go on where the task left off.

    What the store has at the end, besides the parents, is delivered.
    """
    with _open_folder() as work:
        if state := mailbox.find_state(key):
            write_folder(state, work)
        shipper = _Shipper(key, work / STATE, mailbox, inputs.parent_references)
        options = inputs.unpack(recipes, shipper.store, work)
        before = os.environ.get(CACHE)
        os.environ[CACHE] = str(work / STATE / "cache")
        try:
            _move_run(open_run_folder(shipper.store.root, [recipe.name for recipe in recipes]).path)
            options |= {"reporter": _Forwarder(mailbox), "callbacks": [shipper], "resume": bool(state)}
            yield shipper.store, options
        finally:
            os.environ.pop(CACHE)
            if before is not None:
                os.environ[CACHE] = before
            shipper.deliver_new()


@contextmanager
def _open_folder() -> Iterator[Path]:
    """Yields a folder to work in; removes it, and those of tasks that were killed on this machine."""
    parent, host = find_cache_dir() / "tasks", re.sub(r"\W", "-", platform.node())
    for lock in parent.glob(f"{host}.*.lock"):
        with suppress(ConflictError, OSError):
            with hold_lock(lock, "a task"):
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            _unlink_lock(lock)
    work = parent / f"{host}.{uuid.uuid4().hex}"
    lock = work.with_name(f"{work.name}.lock")
    try:
        with hold_lock(lock, "a task", wait_seconds=10):  # while another one looks at it
            work.mkdir()
            yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        _unlink_lock(lock)


def _unlink_lock(lock: Path) -> None:
    """Removes a lock that is no longer held, and what Windows has beside it."""
    for path in lock.parent.glob(f"{lock.name}*"):
        path.unlink(missing_ok=True)


def _move_run(expected: Path) -> None:
    """Gives the run that came from another machine the folder that it has here, where paths differ."""
    for found in expected.parent.glob("*"):
        if found != expected:
            found.rename(expected)


class _Forwarder(SilentReporter):
    """A reporter that leaves messages in the mailbox, but for those of publications: only the driver's last."""

    def __init__(self, mailbox: Mailbox) -> None:
        self.mailbox = mailbox

    def message(self, text: str) -> None:
        if "@" not in text.partition(":")[0]:  # no name has one, every reference does
            self.mailbox.say(text)


class _Shipper:
    """A callback that leaves versions, checkpoints and progress in the mailbox.

    `known` are the versions that the driver's store has.
    """

    def __init__(self, key: str, state: Path, mailbox: Mailbox, known: set[str]) -> None:
        self.key, self.state, self.mailbox = key, state, mailbox
        self.store = Store(state / "store")
        self._known, self._delivered = known, set[str]()
        self._tokens, self._report_at = dict[str, int](), 0.0
        self._kept: list[tuple[str, int]] = []

    def __call__(self, event: TrainingEvent) -> None:
        if event.kind == "checkpoint":
            self._keep()
        elif event.kind in ("step", "end"):
            self._tokens[event.adapter] = event.step * event.slot.tokens_per_step
            if event.kind == "end" or time.monotonic() > self._report_at:
                self.mailbox.report(self._tokens)
                self._report_at = time.monotonic() + REPORT_SECONDS

    def _keep(self) -> None:
        """Leaves the folder, once for a checkpoint: each adapter of it is an event."""
        files = sorted(self.state.glob("cache/runs/*/*.checkpoint"))
        if (now := [(path.name, path.stat().st_mtime_ns) for path in files]) != self._kept:
            self._kept = now
            self.deliver_new()
            state, newest = read_folder(self.state), files[-1].name
            unneeded = tuple(f"{STATE}/store/{reference.replace('@', '/')}/" for reference in self._known)
            kept = {
                name: content
                for name, content in state.items()
                if not name.startswith(unneeded) and (not name.endswith(".checkpoint") or name.endswith(newest))
            }
            self.mailbox.keep_state(self.key, int(files[-1].stem.removeprefix("step-")), kept)

    def deliver_new(self) -> None:
        """Delivers the versions that have not been."""
        for name in self.store.list_names():
            manifest, files = read_version_files(self.store, name)
            if manifest.reference not in self._known | self._delivered:
                self.mailbox.deliver(files)
                self._delivered.add(manifest.reference)


def publish_delivered(store: Store, files: Files, *, once: bool = False) -> str:
    """Publishes a version that came back, as the next one of its adapter; returns its reference.

    With `once`, it may be there already, because a driver was killed before it could note that.

    Raises `CorruptError` if it is not what was published there.
    """
    manifest = parse_manifest(files[MANIFEST])
    if once and manifest.name in store.list_names():
        newest = store.read_manifest(manifest.name)
        is_parent = newest.reference in [parent.reference for parent in manifest.parents]
        if not is_parent and all(newest.files.get(name) == manifest.files.get(name) for name in (WEIGHTS, CANDIDATES)):
            return newest.reference
    verify_hashes(files, manifest, manifest.reference)
    content = {name: data for name, data in files.items() if name not in (MANIFEST, CARD)}
    return store.add_version(manifest.name, content, lambda version: replace(manifest, version=version)).reference
