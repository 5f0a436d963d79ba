"""How long commands take from the shell, as whole processes: the median of several runs."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

COMMANDS: dict[str, list[str]] = {
    "--help": ["--help"],
    "adapters list": ["adapters", "list"],
    "recipes list": ["recipes", "list"],
    "bases show nano": ["bases", "show", "nano"],
    "generate, 1 token": ["-q", "generate", "The", "--seed", "1", "--set", "generate.max_new_tokens=1"],
}


def measure_startup(runs: int = 5) -> dict[str, float]:
    """Returns the median wall-clock seconds of each command over `runs` runs, after one to warm the disk."""
    return {name: _median_seconds(arguments, runs) for name, arguments in COMMANDS.items()}


def _median_seconds(arguments: Sequence[str], runs: int) -> float:
    seconds = []
    for _ in range(runs + 1):
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", "lora_gpt2", *arguments], check=True, capture_output=True)  # noqa: S603
        seconds.append(time.monotonic() - started)
    return statistics.median(seconds[1:])
