"""Training on other machines: what is sent to them, what comes back, and how one takes over from another.

A task is what one device trains: domains, or a group of candidates. Text goes there as prepared blocks; adapters come
back whole and are published by the driver alone, so that no file system is shared. With each checkpoint the task's
folder comes back too: where a machine is lost, another one goes on from there. Nothing here knows Ray.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_gpt2.core.console import SilentReporter
from lora_gpt2.core.dirs import find_cache_dir
from lora_gpt2.core.errors import ConflictError, CorruptError, Interrupted, LoraGpt2Error, UsageError
from lora_gpt2.core.files import wrap_os_errors
from lora_gpt2.core.locks import hold_lock
from lora_gpt2.model.checkpoint import name_everywhere
from lora_gpt2.recipe import Recipe
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.manifest import CARD, MANIFEST, WEIGHTS, parse_manifest
from lora_gpt2.store.version import verify_hashes
from lora_gpt2.training.candidates import CANDIDATES
from lora_gpt2.training.checkpoint import open_run_folder
from lora_gpt2.training.events import TrainingEvent
from lora_gpt2.training.grouped_search import GroupTask
from lora_gpt2.training.rounds import Outcome, run_group
from lora_gpt2.training.run import join_names, train_recipes

CACHE, STATE = "LORA_GPT2_CACHE", "state"
Files = dict[str, bytes]


@dataclass(frozen=True, kw_only=True)
class RemoteTask:
    """Domains that train on one device: their recipes, and the number of slots they take turns in (0: what fits).

    `key` names the task in its run.
    """

    key: str
    recipes: Sequence[Recipe]
    num_slots: int


class Mailbox:
    """Where tasks leave what the driver is to have, in a process beside it; what they go on from is in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._delivered = list[Files]()
        self._tokens = dict[str, int]()

    def find_state(self, key: str) -> Files:
        """Returns the files of the last folder that a task left, none if it has not begun."""
        found = self._list(key)
        return read_folder(found[-1] / STATE) if found else {}

    def keep_state(self, key: str, state: Files) -> None:
        """Replaces the files of a task's folder, as a whole; drops them if there are none."""
        before = self._list(key)
        if state:
            partial = self.folder / f".{key}.partial"
            number = int(before[-1].suffix[1:]) + 1 if before else 0
            shutil.rmtree(partial, ignore_errors=True)
            with wrap_os_errors(f"keep the state of a task in {self.folder}"):
                write_folder(state, partial)
                partial.rename(self.folder / f"{key}.{number:09d}")
        for folder in before:
            shutil.rmtree(folder, ignore_errors=True)

    def _list(self, key: str) -> list[Path]:
        return sorted(self.folder.glob(f"{key}.*"))

    def deliver(self, files: Files) -> None:
        """Leaves the files of a version to be published."""
        self._delivered.append(files)

    def report(self, tokens: Mapping[str, int]) -> None:
        """Says how many tokens adapters have been trained on, padding included."""
        self._tokens |= tokens

    def collect(self) -> tuple[list[Files], dict[str, int]]:
        """Returns the versions that were delivered since the last call, and the tokens by adapter."""
        delivered, self._delivered = self._delivered, []
        return delivered, dict(self._tokens)


def read_folder(folder: Path) -> Files:
    """Returns every file of a folder but locks by its path, which begins with the folder's name."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("lock"))
    return {path.relative_to(folder.parent).as_posix(): path.read_bytes() for path in found}


def write_folder(files: Files, parent: Path) -> Path:
    """Writes the files of a folder into `parent`; returns it. Raises `CorruptError` for a path that leads out of it."""
    for name, content in files.items():
        target = parent / name
        if not target.resolve().is_relative_to(parent.resolve()):
            raise CorruptError(f"{name} leads out of its folder", "train it again")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return parent / next(iter(files)).partition("/")[0]


def run_task(task: RemoteTask, prepared: Sequence[Files], mailbox: Mailbox) -> str:
    """Trains the domains of a task; returns what went wrong, "" if nothing did.

    `prepared` has the files of each domain's text. What is wrong with one domain does not stop the others. Raises
    `Interrupted` where this machine is told to stop: the task is to go on elsewhere.
    """
    with _open_workplace(task.key, task.recipes, prepared, mailbox) as (store, options):
        try:
            train_recipes(task.recipes, store, SilentReporter(), num_slots=task.num_slots, **options)
        except Interrupted:  # of this machine, not of the run
            raise
        except LoraGpt2Error as error:
            return error.message.partition("; published: ")[0]
        return ""


def run_remote_group(key: str, task: GroupTask, prepared: Files, mailbox: Mailbox) -> Outcome:
    """Trains a group of a search for a round; `prepared` has the files of the text. Raises what `run_group` does."""
    with _open_workplace(key, task.recipes, [prepared], mailbox) as (store, options):
        return run_group(task.recipes, task.group, store, SilentReporter(), **options)


@contextmanager
def _open_workplace(
    key: str, recipes: Sequence[Recipe], prepared: Sequence[Files], mailbox: Mailbox
) -> Iterator[tuple[Store, dict[str, Any]]]:
    """Yields a store on this machine and the options of `train_recipes`, to go on where the task left off.

    Texts are those of the recipes, or one for all. What the store has at the end is delivered.
    """
    with _open_folder() as work:
        if state := mailbox.find_state(key):
            write_folder(state, work)
        folders = [write_folder(text, work / "text" / str(index)) for index, text in enumerate(prepared)]
        texts = {r.name: folders[index % len(folders)] for index, r in enumerate(recipes)}
        shipper = _Shipper(key, work / STATE, mailbox)
        before = os.environ.get(CACHE)
        os.environ[CACHE] = str(work / STATE / "cache")
        try:
            _move_run(open_run_folder(shipper.store.root, [recipe.name for recipe in recipes]).path)
            yield shipper.store, {"callbacks": [shipper], "texts": texts, "resume": True}
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


class _Shipper:
    """A callback that leaves versions, checkpoints and progress in the mailbox."""

    def __init__(self, key: str, state: Path, mailbox: Mailbox) -> None:
        self.key, self.state, self.mailbox = key, state, mailbox
        self.store = Store(state / "store")
        self._delivered = set[str]()
        self._kept: list[tuple[str, int]] = []

    def __call__(self, event: TrainingEvent) -> None:
        if event.kind == "checkpoint":
            self._keep()
        elif event.kind in ("step", "end"):
            self.mailbox.report({event.adapter: event.step * event.slot.tokens_per_step})

    def _keep(self) -> None:
        """Leaves the folder, once for a checkpoint: each adapter of it is an event."""
        files = sorted(self.state.glob("cache/runs/*/*.checkpoint"))
        if (now := [(path.name, path.stat().st_mtime_ns) for path in files]) != self._kept:
            self._kept = now
            self.deliver_new()
            state, newest = read_folder(self.state), files[-1].name
            kept = {name: state[name] for name in state if not name.endswith(".checkpoint") or name.endswith(newest)}
            self.mailbox.keep_state(self.key, kept)

    def deliver_new(self) -> None:
        """Delivers the versions that have not been."""
        for name in set(self.store.list_names()) - self._delivered:
            with self.store.open(name) as version:
                self.mailbox.deliver({**version.read_files(), MANIFEST: version.manifest.to_bytes()})
            self._delivered.add(name)


def check_sendable(recipes: Sequence[Recipe]) -> None:
    """Raises `UsageError` for recipes that need more on another machine than their text."""
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


def name_base(recipe: Recipe) -> Recipe:
    """Returns the recipe with its base as other machines find it."""
    return recipe.model_copy(update={"base": name_everywhere(recipe.base)})


def publish_delivered(store: Store, files: Files, *, once: bool = False) -> str:
    """Publishes a version that came back, as the next one of its adapter; returns its reference.

    With `once`, it may be there already, because a driver was killed before it could note that.

    Raises `CorruptError` if it is not what was published there.
    """
    manifest = parse_manifest(files[MANIFEST])
    if once and manifest.name in store.list_names():
        newest = store.read_manifest(manifest.name)
        if all(newest.files.get(name) == manifest.files.get(name) for name in (WEIGHTS, CANDIDATES)):
            return newest.reference
    verify_hashes(files, manifest, manifest.reference)
    content = {name: data for name, data in files.items() if name not in (MANIFEST, CARD)}
    return store.add_version(manifest.name, content, lambda version: replace(manifest, version=version)).reference
