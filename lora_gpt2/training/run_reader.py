"""Reads the folder of a run again and again while others write to it; see `run_status.py`.

Curves are thinned as they grow: neighbouring steps become one point, the mean of their losses, so that a run of any
length takes bounded memory here and few bytes on a page. Validations are kept as they are.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_gpt2.core.errors import NotFoundError
from lora_gpt2.core.printable import hide_paths
from lora_gpt2.core.processes import has_ended
from lora_gpt2.training.run_status import METRICS_ENDING, RUN, STATUS

MOST_POINTS = 16_384  # of all adapters together
PRIVATE = ("store", "process", "born", "machine", "owner")  # of this machine
KILLED = "it was killed; the same command with --resume goes on from its last checkpoint"
LEAST_POINTS = 128  # of an adapter
COLUMNS = ("step", "tokens", "seconds", "loss", "learning_rate", "gradient_norm", "divergence")
MEASURED = ("step", "validation_loss", "memory_bytes", "sample", "validation_divergence")


@dataclass(kw_only=True)
class Curves:
    """The curves of one adapter.

    Attributes:
        points: rows of `COLUMNS`; each stands for `stride` steps, of which it has the mean loss and else the last.
        validations: rows of `MEASURED`.
        thinned: how often neighbours were joined.
    """

    most_points: int
    points: list[list[Any]] = field(default_factory=list)
    validations: list[list[Any]] = field(default_factory=list)
    thinned: int = 0
    _open: list[list[Any]] = field(default_factory=list)

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Adds lines of the metrics file."""
        for record in records:
            if record.get("learning_rate") != 0.0 or record.get("loss") is not None:  # step 0 is nothing but measured
                self._open.append([_finite(record.get(key)) for key in COLUMNS])
            if "validation_loss" in record:
                self.validations.append([_finite(record.get(key)) for key in MEASURED])
            if len(self._open) >= 2**self.thinned:
                self.points.append(_join(self._open))
                self._open.clear()
            if len(self.points) >= 2 * self.most_points:
                self.points = [_join(self.points[start : start + 2]) for start in range(0, len(self.points), 2)]
                self.thinned += 1

    @property
    def num_open(self) -> int:
        """Number of steps that are in no point yet."""
        return len(self._open)

    def to_json(self, after: tuple[int, int, int] = (0, 0, 0)) -> dict[str, Any]:
        """Returns the curves after so many points and validations; `open` is a point of steps that are in none yet."""
        points, validations = self.points[after[0] :], self.validations[after[1] :]
        return {"points": points, "open": _join(self._open) if self._open else None, "validations": validations}


def _join(rows: list[list[Any]]) -> list[Any]:
    loss = COLUMNS.index("loss")
    known = [row[loss] for row in rows if row[loss] is not None]
    joined = list(rows[-1])
    joined[loss] = sum(known) / len(known) if known else None
    return joined


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(kw_only=True)
class _Tail:
    """A metrics file that grows: how much of it was read, of which file."""

    curves: Curves
    offset: int = 0
    inode: int = 0


class RunReader:
    """The run in `folder`, as far as it was written at the last `refresh`.

    Args:
        folder: the folder.
        has_curves: the metrics are read too.

    Attributes:
        description, status: the content of `run.json` and `status.json`.
        generation: raised whenever what was read before no longer counts.

    Raises `NotFoundError` if there is no run in the folder.
    """

    def __init__(self, folder: Path, has_curves: bool = True) -> None:
        self.folder, self.has_curves = folder, has_curves
        self.description: dict[str, Any] = {}
        self.status: dict[str, Any] = {}
        self.generation, self.news_at = 0, 0.0
        self._tails: dict[str, _Tail] = {}
        self.refresh()
        if not self.description:
            raise NotFoundError(f"{folder} holds no run", "name the folder that 'train' wrote, or none for the newest")

    @property
    def curves(self) -> dict[str, Curves]:
        """The curves by adapter, in the order of the run."""
        return {name: tail.curves for name, tail in self._tails.items()}

    @property
    def names(self) -> list[str]:
        """The names of the adapters."""
        return [str(adapter.get("name")) for adapter in self.description.get("adapters", [])]

    @property
    def state(self) -> str:
        """The state of the run, or `killed` where its process went without a word; "" before it has said anything."""
        state = str(self.status.get("state", ""))
        return "killed" if state in ("training", "waiting") and has_ended(self.description) else state

    def refresh(self) -> None:
        """Reads what was written since the last time."""
        description = self._read(RUN) or self.description
        if description != self.description:
            self.description = description
            self._restart()
        self.status = self._read(STATUS) or self.status
        for name in self.names if self.has_curves else ():
            self._read_tail(name)

    def _restart(self) -> None:
        self.generation += 1
        most = max(LEAST_POINTS, MOST_POINTS // max(1, len(self.names)))
        self._tails = {name: _Tail(curves=Curves(most_points=most)) for name in self.names}

    def _read(self, name: str) -> dict[str, Any]:
        """Returns a file's content; nothing where it is missing or not a whole document."""
        try:
            found = json.loads((self.folder / name).read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _read_tail(self, name: str) -> None:
        tail, path = self._tails[name], self.folder / f"{name}{METRICS_ENDING}"
        try:
            with path.open("rb") as file:
                found = path.stat()
                if found.st_size < tail.offset or found.st_ino != tail.inode != 0:  # written anew, by --resume
                    self._restart()
                    tail = self._tails[name]
                file.seek(tail.offset)
                content = file.read()
        except OSError:
            return
        whole = content[: content.rfind(b"\n") + 1]  # the rest of a line is still to come
        tail.offset, tail.inode = tail.offset + len(whole), found.st_ino
        self.news_at = max(self.news_at, found.st_mtime)
        thinned = tail.curves.thinned
        tail.curves.add(record for line in whole.splitlines() if (record := _parse(line)))
        if tail.curves.thinned > thinned:
            self.generation += 1

    def to_json(self) -> dict[str, Any]:
        """Returns everything that a page shows of the run."""
        shown = {key: value for key, value in self.description.items() if key not in PRIVATE}
        return describe_curves(shown, self.describe_status(), self.curves)

    def describe_status(self) -> dict[str, Any]:
        """Returns the status, and for how many seconds nothing has been written."""
        quiet = max(0, round(time.time() - self.news_at)) if self.news_at else 0
        state, message = self.state, hide_paths(str(self.status.get("message", "")))
        message = KILLED if state == "killed" else message
        return {**self.status, "state": state, "message": message, "quiet_seconds": quiet}


def describe_curves(run: Mapping[str, Any], status: Mapping[str, Any], curves: Mapping[str, Curves]) -> dict[str, Any]:
    """Returns everything that a page shows of a run."""
    found = {name: each.to_json() for name, each in curves.items()}
    return {"run": run, "status": status, "curves": found, "columns": COLUMNS, "measured": MEASURED}


def _parse(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else {}


def list_runs(folder: Path) -> list[Path]:
    """Returns the folders of runs in a folder, or it itself if it is one; those written to last first."""
    if (folder / RUN).is_file():
        return [folder]
    try:
        found = [path for path in folder.iterdir() if (path / RUN).is_file()]
    except OSError:
        return []
    return sorted(found, key=_find_time, reverse=True)


def _find_time(folder: Path) -> float:
    """Returns when a run was written to last; files come and go meanwhile."""
    latest = 0.0
    for path in (folder / RUN, folder / STATUS, *folder.glob(f"*{METRICS_ENDING}")):
        with contextlib.suppress(OSError):
            latest = max(latest, path.stat().st_mtime)
    return latest
