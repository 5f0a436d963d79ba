"""Local records, a JSON line each: of what was written, and of what was chosen blind; for `rate` and for looking back.

They stay on this machine, readable by their owner only: `$LORA_GPT2_LOG` (`off` for none), else `generations.jsonl` in
the user's state folder; choices are in `choices.jsonl` beside it. A record that cannot be written is said once and
never stops the work.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.dirs import find_state_dir
from lora_gpt2.core.errors import NotFoundError
from lora_gpt2.core.files import DONT_WAIT, OPEN_FLAGS, wrap_os_errors

CHOICES = "choices.jsonl"


def find_log() -> Path | None:
    """Returns where continuations are recorded; None where the user wants none."""
    configured = os.environ.get("LORA_GPT2_LOG")
    if configured == "off":
        return None
    return Path(configured) if configured else find_state_dir() / "generations.jsonl"


def find_votes() -> Path | None:
    """Returns where blind choices are recorded; None where the user wants no records."""
    log = find_log()
    return None if log is None or (log.exists() and not log.is_file()) else log.parent / CHOICES


class LocalLog:
    """Appends records to a file, or to none."""

    def __init__(self, path: Path | None, reporter: Reporter) -> None:
        self.path, self._reporter, self._has_failed = path, reporter, False

    def add(self, record: Mapping[str, Any]) -> bool:
        """Writes a record, with the time; returns whether it is kept."""
        if self.path is None:
            return False
        stamped = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **record}
        line = json.dumps(stamped, ensure_ascii=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | OPEN_FLAGS | DONT_WAIT, 0o600)
            with open(descriptor, "ab") as file:
                file.write(line.encode("utf-8", "surrogatepass"))
        except OSError as error:
            if not self._has_failed:
                self._reporter.message(f"what is done is not recorded: {error}")
            self._has_failed = True
        else:
            return True
        return False


def read_log(path: Path | None) -> list[dict[str, Any]]:
    """Returns the records of a file, the oldest first; a partial last line, left by an interruption, is ignored.

    Raises `NotFoundError` where nothing was recorded.
    """
    hint = "it comes with 'repl' and 'serve', unless LORA_GPT2_LOG is off"
    if path is None or not path.is_file():
        raise NotFoundError(f"nothing was recorded in {path or 'any file'}", hint)
    with wrap_os_errors(f"read {path}"):
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
