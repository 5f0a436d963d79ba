"""Checkpoints of a run: whole, self-verifying, and tied to what the run was made of.

A checkpoint is one file: the sha256 of the rest, then a safetensors blob with the tensors and, as one more of bytes,
the JSON state. It is replaced by rename, the two newest are kept, and reading takes the newest that verifies.
`identity.json` beside them says which recipes, data and base they belong to; resuming with others is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.dirs import find_runs_dir
from lora_gpt2.core.errors import CorruptError, MismatchError
from lora_gpt2.core.files import OPEN_FLAGS, fsync_dir, replace_file, wrap_os_errors, write_atomic
from lora_gpt2.core.fingerprint import fingerprint_json, flatten_json
from lora_gpt2.store.safetensors import iter_safetensors, read_own_safetensors
from lora_gpt2.training.run_status import METRICS_ENDING, RunStatus

KEPT = 2
DIGEST_BYTES = 32
STATE = "state.json"


NOTHING = "nothing"
"""What stands for a key that only one of two runs has."""


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The folder of one run: of these adapter names into this store."""

    path: Path

    @cached_property
    def status(self) -> RunStatus:
        """What the run says about itself to others."""
        return RunStatus(self.path)

    @property
    def lock(self) -> Path:
        """The file whose lock says that the run is in progress."""
        return self.path / "lock"

    def list_checkpoints(self) -> list[Path]:
        """Returns the checkpoints, newest first."""
        return sorted(self.path.glob("step-*.checkpoint"), reverse=True)

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Starts a run anew; checkpoints of an unfinished one are set aside in `previous/`."""
        with wrap_os_errors(f"write to {self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)
            for partial in self.path.glob(".*.partial"):  # of an attempt that was killed; the lock is held
                partial.unlink()
            previous = self.path / "previous"
            old = [*self.list_checkpoints(), *self.path.glob("*.json"), *self.path.glob("*.jsonl")]
            if old:
                shutil.rmtree(previous, ignore_errors=True)
                previous.mkdir()
                for file in old:
                    replace_file(file, previous / file.name)
            write_atomic(self.path / "identity.json", json.dumps(identity).encode())

    def find_last_step(self) -> int:
        """Returns the step of the newest checkpoint that an unfinished run left, 0 if there is none."""
        found = self.list_checkpoints()
        return int(found[0].stem.removeprefix("step-")) if found and not self.read_published() else 0

    def exists(self) -> bool:
        """True if a run was begun here."""
        return (self.path / "identity.json").exists()

    @property
    def begun(self) -> datetime:
        """When the run was begun, in local time; resuming does not change it."""
        return datetime.fromtimestamp((self.path / "identity.json").stat().st_mtime).astimezone()

    def read_identity(self) -> dict[str, Any]:
        """Returns what the run on disk was made of; nothing where there is none."""
        try:
            found = json.loads((self.path / "identity.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def list_names(self) -> list[str]:
        """Returns the names of the adapters that the run on disk trains."""
        return list(self.read_identity().get("adapters", {}))

    def read_parent(self, name: str) -> str:
        """Returns what an adapter of the run on disk continues from, "" if nothing is known."""
        return str(self.read_identity().get("adapters", {}).get(name, {}).get("lora", {}).get("init_from", ""))

    def find_differences(self, identity: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Returns what differs from the run on disk, by dotted key: what it was, and what it is now."""
        then, now = flatten_json(self.read_identity()), flatten_json(json.loads(json.dumps(identity)))
        pairs = {key: (then.get(key, NOTHING), now.get(key, NOTHING)) for key in sorted(then | now)}
        return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}

    def check_identity(self, identity: Mapping[str, Any], free: Sequence[str] = ()) -> str:
        """Returns what differs from the run on disk under `free`; raises `MismatchError` that lists all else."""
        if not self.read_identity():
            raise CorruptError(f"{self.path} holds no run to resume", "start it without --resume")
        differences = self.find_differences(identity)
        allowed = [key for key in differences if key.partition(".")[0] in free]
        refused = [key for key in differences if key not in allowed]

        def describe(keys: Sequence[str]) -> str:
            return "; ".join(f"{key}: {differences[key][0]} then, {differences[key][1]} now" for key in keys[:8])

        if refused:
            text = f"the run to resume differs: {describe(refused)}"
            raise MismatchError(text, "restore these, or start without --resume")
        return describe(allowed)

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Writes a checkpoint and drops all but the newest two."""
        text = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
        with wrap_os_errors(f"write a checkpoint to {self.path}"):
            target = self.path / f"step-{step:09d}.checkpoint"
            _write_sealed(target, iter_safetensors({STATE: text, **tensors}))
            for old in self.list_checkpoints()[KEPT:]:
                old.unlink()

    def load(self, reporter: Reporter) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Returns the newest checkpoint that verifies, or None; says which ones were skipped."""
        for path in self.list_checkpoints():
            with path.open("rb") as file:
                digest = file.read(DIGEST_BYTES)
                if hashlib.file_digest(file, "sha256").digest() == digest:
                    file.seek(DIGEST_BYTES)
                    try:
                        found = read_own_safetensors(file)
                        return found, json.loads(found.pop(STATE).numpy().tobytes())
                    except (ValueError, KeyError, TypeError, AttributeError) as error:
                        reporter.detail(f"{path.name}: {error}")
            reporter.message(f"skipped {path.name}: it is damaged")
        return None

    def append_metrics(self, name: str, records: Sequence[Mapping[str, Any]], anew: bool = False) -> None:
        """Adds lines to the adapter's metrics, which can be followed while the run goes on."""
        path, mode = self.path / f"{name}{METRICS_ENDING}", "w" if anew else "a"
        with wrap_os_errors(f"write metrics to {path}"), path.open(mode, encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    def finish(self, published: list[str]) -> None:
        """Notes what the run published and drops its checkpoints, also those that were never whole."""
        with wrap_os_errors(f"write to {self.path}"):
            write_atomic(self.path / "done.json", json.dumps(published).encode())
            for path in [*self.list_checkpoints(), *self.path.glob(".*.partial")]:  # those of attempts that were killed
                path.unlink()

    def close(self) -> None:
        """Drops what resuming would need; metrics and status stay."""
        with wrap_os_errors(f"write to {self.path}"):
            for name in ("identity.json", "done.json"):
                (self.path / name).unlink(missing_ok=True)
            for path in self.list_checkpoints():
                path.unlink()

    def read_published(self) -> list[str]:
        """Returns what a finished run published, or nothing if it is unfinished."""
        try:
            return [str(name) for name in json.loads((self.path / "done.json").read_bytes())]
        except (OSError, ValueError):
            return []


def find_interrupted(store_root: Path, names: Collection[str]) -> RunFolder | None:
    """Returns the newest interrupted run into a store that trains some of these adapters, and is not that of all."""
    own, found = open_run_folder(store_root, list(names)), list[tuple[float, RunFolder]]()
    for path in find_runs_dir().glob("*/identity.json"):
        run = RunFolder(path=path.parent)
        is_here = run.status.read_description().get("store") == str(store_root.absolute())
        if run.path != own.path and is_here and run.find_last_step() and {*run.list_names()} & {*names}:
            found.append((path.stat().st_mtime, run))
    return max(found, key=lambda each: each[0])[1] if found else None


def _write_sealed(path: Path, pieces: Iterable[memoryview]) -> None:
    """Replaces a file as a whole by the sha256 of some pieces and the pieces, of which one at a time is in memory."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    digest = hashlib.sha256()
    try:
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | OPEN_FLAGS, 0o666)
        try:
            _write_all(handle, memoryview(bytes(DIGEST_BYTES)))
            for piece in pieces:
                digest.update(piece)
                _write_all(handle, piece)
            os.lseek(handle, 0, os.SEEK_SET)
            _write_all(handle, memoryview(digest.digest()))
            os.fsync(handle)
        finally:
            os.close(handle)
        replace_file(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    fsync_dir(path.parent)


def _write_all(handle: int, rest: memoryview) -> None:
    while rest:
        rest = rest[os.write(handle, rest) :]


def open_run_folder(store_root: Path, names: list[str]) -> RunFolder:
    """Returns the folder for training these adapters into this store."""
    key = fingerprint_json([str(store_root.resolve()), sorted(names)])
    return RunFolder(path=find_runs_dir() / key)
