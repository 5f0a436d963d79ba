"""Which process wrote a file, and whether it is still there."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil


def describe_process() -> dict[str, Any]:
    """Returns what tells this process from all others, on this machine and on others that see the same files."""
    return {"machine": _name_machine(), "process": os.getpid(), "born": _find_birth(os.getpid())}


def has_ended(described: Mapping[str, Any]) -> bool:
    """True if the process was one of this machine, and is not there any more; False where that cannot be told."""
    number, born = described.get("process"), described.get("born")
    if described.get("machine") != _name_machine() or not isinstance(number, int) or not isinstance(born, str):
        return False
    try:
        return _find_birth(number) != born
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, OSError, ValueError, OverflowError):
        return False


@cache
def _name_machine() -> str:
    """Returns the machine since it was started, and the container: processes of another one have other numbers."""
    parts = [platform.node()]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _find_birth(number: int) -> str:
    """Returns when a process began, by a clock that nobody sets; raises `psutil.NoSuchProcess` where there is none."""
    process = psutil.Process(number)
    if process.status() == psutil.STATUS_ZOMBIE:
        raise psutil.NoSuchProcess(number)
    with suppress(OSError, IndexError):
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[19]  # ticks since the start
    return f"{process.create_time():.0f}"
