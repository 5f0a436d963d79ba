"""One side of a comparison in a process of its own, so that neither side warms nor crowds the other."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import ResourceError


def run_in_turn(
    module: str,
    names: Sequence[str],
    spec: dict[str, Any],
    rounds: int,
    reporter: Reporter,
    describe: Callable[[dict[str, Any]], str],
) -> dict[str, list[dict[str, Any]]]:
    """Returns each side's figures of every round, the sides run in turn: what slows the machine down slows them all.

    Raises what `run_child` does.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with reporter.task("measuring", rounds * len(names), "runs") as task:
        for _ in range(rounds):
            for name in names:
                found[name].append(run_child(module, name, spec))
                task.advance(1, f"{name} {describe(found[name][-1])}")
    return found


def run_child(module: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Returns what `run_side` of a module writes on stdout for the side `name`.

    Raises `ResourceError` with the last line of its stderr if it fails.
    """
    code = f"from {module} import run_side; run_side()"
    request = json.dumps({"name": name, "spec": spec})
    done = subprocess.run([sys.executable, "-c", code], input=request, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ResourceError(f"'{name}' failed: {last[0]}", "it may need less memory: use a smaller batch or base")
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures
