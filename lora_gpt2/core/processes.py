"""Which process wrote a file, and whether it is still there."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import psutil

SAME_SECONDS = 1.0


def describe_process() -> dict[str, Any]:
    """Returns what tells this process from all others, on this machine and on others that see the same files."""
    return {"host": platform.node(), "process": os.getpid(), "born": psutil.Process().create_time()}


def has_ended(described: Mapping[str, Any]) -> bool:
    """True if the process was one of this machine, and is not there any more; False where that cannot be told."""
    number, born = described.get("process"), described.get("born")
    if described.get("host") != platform.node() or not isinstance(number, int) or not isinstance(born, float):
        return False
    with suppress(psutil.NoSuchProcess, ValueError, OverflowError):
        found = psutil.Process(number)
        return bool(found.status() == psutil.STATUS_ZOMBIE or abs(found.create_time() - born) > SAME_SECONDS)
    return True
