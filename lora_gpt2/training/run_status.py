"""What a run says about itself beside its metrics, and what it can be asked for: by files in its folder.

`run.json` says which adapters train and for how long, `status.json` what became of each; `NAME.stop` asks for the end
of one adapter's training, `~all.stop` of all. So a run can be watched and stopped by any process, on any machine, that
sees the folder. See `run_reader.py` for the other side.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from lora_gpt2.core.errors import Interrupted, LoraGpt2Error, Waiting
from lora_gpt2.core.files import wrap_os_errors, write_atomic
from lora_gpt2.core.processes import describe_process

RUN, STATUS, METRICS_ENDING, STOP_ENDING = "run.json", "status.json", ".metrics.jsonl", ".stop"
ALL = "~all"  # no adapter's name
POLL_SECONDS = 0.5
OWNER = "LORA_GPT2_RUN_OWNER"  # in the environment: what tells the runs of a process that somebody started
RunState = Literal["training", "waiting", "done", "stopped", "failed"]
States = Mapping[str, tuple[str, str]]
"""By adapter: waiting, training, measuring, dropped (a candidate), published, unchanged (needed no training) or failed;
and a detail for people."""


class RunStatus:
    """Writes the status of the run in `folder`, and reads what it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._written: dict[str, Any] = {}
        self._polled = 0.0

    def read_description(self) -> dict[str, Any]:
        """Returns what was said when the run was begun; nothing where that is not known."""
        try:
            found = json.loads((self.folder / RUN).read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @contextlib.contextmanager
    def report(self, description: Mapping[str, Any]) -> Iterator[None]:
        """Describes a run that begins or goes on, and says how the block ended."""
        self._begin(description)
        try:
            yield
        except LoraGpt2Error as error:
            with contextlib.suppress(LoraGpt2Error):  # the disk may be what is wrong
                self.update({}, _find_state(error), f"{error.message}; {error.hint}")
            raise
        except KeyboardInterrupt:  # a second Ctrl-C
            with contextlib.suppress(LoraGpt2Error):
                self.update({}, "stopped", "at once; --resume goes on from the last checkpoint")
            raise
        except BaseException as error:
            with contextlib.suppress(LoraGpt2Error):
                self.update({}, "failed", type(error).__name__)
            raise
        self.update({}, "done")

    def _begin(self, description: Mapping[str, Any]) -> None:
        """Writes the description; what was asked for at an earlier time is dropped."""
        started = {"started": datetime.now(UTC).isoformat(timespec="seconds"), **describe_process()}
        started["owner"] = os.environ.get(OWNER, "")
        with wrap_os_errors(f"write to {self.folder}"):
            for path in self.folder.glob(f"*{STOP_ENDING}"):
                path.unlink()
            write_atomic(self.folder / RUN, json.dumps({**description, **started}).encode())
        self.update({}, "training")

    def update(self, adapters: States, state: RunState | None = None, message: str = "") -> None:
        """Says what became of some adapters, and of the run; writes only what has changed."""
        before = self._written
        known = {**before.get("adapters", {}), **{name: list(said) for name, said in adapters.items()}}
        now = {"state": state or before.get("state", "training"), "message": message, "adapters": known}
        if now != before:
            self._written = now
            with wrap_os_errors(f"write to {self.folder}"):
                write_atomic(self.folder / STATUS, json.dumps(now).encode())

    def poll_stop_requests(self) -> set[str]:
        """Returns the adapters that somebody wants to end (`ALL` for all), twice a second; else nothing."""
        now = time.monotonic()
        if now < self._polled + POLL_SECONDS:
            return set()
        self._polled = now
        return {path.name.removesuffix(STOP_ENDING) for path in self.folder.glob(f"*{STOP_ENDING}")}


def _find_state(error: LoraGpt2Error) -> RunState:
    """Returns the state of a run that ended with an error."""
    if isinstance(error, Waiting):
        return "waiting"
    return "stopped" if isinstance(error, Interrupted) else "failed"


def request_stop(folder: Path, name: str) -> None:
    """Asks a run to end the training of an adapter, or `ALL`: what it has learnt is measured and published."""
    with wrap_os_errors(f"write to {folder}"):
        (folder / f"{name}{STOP_ENDING}").touch()
