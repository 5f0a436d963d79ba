"""Training on other machines: what is sent to them, what comes back, and how one takes over from another.

A task is the domains that one device trains. Their text goes there as prepared blocks; adapters come back whole and are
published by the driver alone, so that no file system is shared. With each checkpoint the task's folder comes back too:
where a machine is lost, another one goes on from there. Nothing here knows Ray; see `ray_cluster.py`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from lora_gpt2.core.console import SilentReporter
from lora_gpt2.core.errors import CorruptError, Interrupted, LoraGpt2Error
from lora_gpt2.recipe import Recipe
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.manifest import CARD, MANIFEST, parse_manifest
from lora_gpt2.store.version import verify_hashes
from lora_gpt2.training.checkpoint import open_run_folder
from lora_gpt2.training.events import TrainingEvent
from lora_gpt2.training.run import train_recipes

Files = dict[str, bytes]


@dataclass(frozen=True, kw_only=True)
class RemoteTask:
    """Domains that train on one device: their recipes, and the number of slots they take turns in (0: what fits).

    `key` names the task in its run, and the folder that it works in.
    """

    key: str
    recipes: Sequence[Recipe]
    num_slots: int


class Mailbox(Protocol):
    """Where a task leaves what the driver is to have."""

    def find_state(self, key: str) -> Files | None:
        """Returns the files of the last folder that a task left, None if it has not begun."""

    def keep_state(self, key: str, state: Files) -> None:
        """Replaces the files of a task's folder."""

    def deliver(self, files: Files) -> None:
        """Leaves the files of a version to be published."""

    def report(self, key: str, tokens: int) -> None:
        """Says how many tokens a task has trained on."""


@dataclass
class LocalMailbox:
    """A mailbox in this process."""

    states: dict[str, Files] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    delivered: list[Files] = field(default_factory=list)

    def find_state(self, key: str) -> Files | None:
        """See `Mailbox`."""
        return self.states.get(key)

    def keep_state(self, key: str, state: Files) -> None:
        """See `Mailbox`."""
        self.states[key] = state

    def deliver(self, files: Files) -> None:
        """See `Mailbox`."""
        self.delivered.append(files)

    def report(self, key: str, tokens: int) -> None:
        """See `Mailbox`."""
        self.tokens[key] = tokens

    def collect(self) -> tuple[list[Files], int]:
        """Returns the versions that were delivered since the last call, and the tokens of all tasks."""
        delivered, self.delivered = self.delivered, []
        return delivered, sum(self.tokens.values())


def read_folder(folder: Path) -> Files:
    """Returns every file of a folder by its path, which begins with the folder's name."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
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
    work = Path(tempfile.gettempdir()) / f"lora-gpt2-{task.key}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    if state := mailbox.find_state(task.key):
        write_folder(state, work)
    texts = {r.name: write_folder(text, work / "text") for r, text in zip(task.recipes, prepared, strict=True)}
    shipper = _Shipper(task.key, work / "state", mailbox)
    before = os.environ.get("LORA_GPT2_CACHE")
    os.environ["LORA_GPT2_CACHE"] = str(work / "state" / "cache")
    _move_run(open_run_folder(shipper.store.root, [recipe.name for recipe in task.recipes]).path)
    options: dict[str, Any] = {"callbacks": [shipper], "num_slots": task.num_slots, "texts": texts}
    try:
        train_recipes(task.recipes, shipper.store, SilentReporter(), resume=True, **options)
    except Interrupted:  # of this machine, not of the run
        raise
    except LoraGpt2Error as error:
        mailbox.keep_state(task.key, {})
        return error.message.partition("; published: ")[0]
    else:
        mailbox.keep_state(task.key, {})
        return ""
    finally:
        shipper.deliver_new()
        os.environ.pop("LORA_GPT2_CACHE")
        if before is not None:
            os.environ["LORA_GPT2_CACHE"] = before
        shutil.rmtree(work, ignore_errors=True)


def _move_run(expected: Path) -> None:
    """Gives the run that came from another machine the folder that it has here, where the temporary folder differs."""
    for found in expected.parent.glob("*"):
        if found != expected:
            found.rename(expected)


class _Shipper:
    """A callback that leaves versions, checkpoints and progress in the mailbox."""

    def __init__(self, key: str, state: Path, mailbox: Mailbox) -> None:
        self.key, self.state, self.mailbox = key, state, mailbox
        self.store = Store(state / "store")
        self._delivered, self._tokens = set[str](), dict[str, int]()
        self._kept: list[tuple[str, int]] = []

    def __call__(self, event: TrainingEvent) -> None:
        self._tokens[event.adapter] = event.tokens
        if event.kind == "checkpoint":
            self._keep()
        elif event.kind in ("step", "end"):
            self.mailbox.report(self.key, sum(self._tokens.values()))

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


def publish_delivered(store: Store, files: Files) -> str:
    """Publishes a version that came back, as the next one of its adapter; returns its reference.

    Raises `CorruptError` if it is not what was published there.
    """
    manifest = parse_manifest(files[MANIFEST])
    verify_hashes(files, manifest, manifest.reference)
    content = {name: data for name, data in files.items() if name not in (MANIFEST, CARD)}
    return store.add_version(manifest.name, content, lambda version: replace(manifest, version=version)).reference
