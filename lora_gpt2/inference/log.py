"""A local record of what was written: one JSON line per continuation, for `rate` and for looking back.

It stays on this machine, readable by its owner only: `$LORA_GPT2_LOG` (`off` for none), else `generations.jsonl` in
the user's state folder. A record that cannot be written is said once and never stops the work.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.paths import find_state_dir
from lora_gpt2.inference.generate import Output


def find_log() -> Path | None:
    """Returns where continuations are recorded; None where the user wants none."""
    configured = os.environ.get("LORA_GPT2_LOG")
    if configured == "off":
        return None
    return Path(configured) if configured else find_state_dir() / "generations.jsonl"


class GenerationLog:
    """Appends continuations to a file, or to none."""

    def __init__(self, path: Path | None, reporter: Reporter) -> None:
        self.path, self._reporter = path, reporter

    def add(self, output: Output) -> None:
        """Records a continuation."""
        if self.path is None:
            return
        record = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **output.to_json()}
        line = json.dumps(record, ensure_ascii=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with open(descriptor, "ab") as file:
                file.write(line.encode("utf-8", "surrogatepass"))
        except OSError as error:
            self._reporter.message(f"continuations are not recorded: {error}")
            self.path = None
