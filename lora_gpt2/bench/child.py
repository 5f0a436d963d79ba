"""One side of a comparison in a process of its own, so that neither side warms nor crowds the other."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from lora_gpt2.core.errors import ResourceError


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
