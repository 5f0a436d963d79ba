"""Fails the N-th file operation of a piece of work: a kill, a full disk, a broken disk, a torn write.

Only operations that change something are counted: `os.open` for writing, `write`, `fsync`, `mkdir`, `rename`,
`replace`, `unlink`, `rmdir`. A kill is a real one: the work runs in a forked child that ends at once, so that no
`finally` tidies up after it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

OPERATIONS = ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")
KINDS = ("kill", "torn", "full", "broken")
FIRED = 99


class Shim:
    """Counts operations while it is installed, and fails the `at`-th one (0: none)."""

    def __init__(self, kind: str = "", at: int = 0) -> None:
        self.kind, self.at, self.count, self.fired = kind, at, 0, False
        self.originals = {name: getattr(os, name) for name in OPERATIONS}

    def __enter__(self) -> Shim:
        for name in OPERATIONS:
            setattr(os, name, self._wrap(name))
        return self

    def __exit__(self, *rest: object) -> None:
        for name, original in self.originals.items():
            setattr(os, name, original)

    def _wrap(self, name: str) -> Callable[..., object]:
        original = self.originals[name]

        def call(*args, **kwargs):
            flags = args[1] if name == "open" and len(args) > 1 else kwargs.get("flags", os.O_WRONLY)
            if name == "open" and not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return original(*args, **kwargs)
            self.count += 1
            if self.count == self.at:
                self.fired = True
                self._fail(name, args)
            return original(*args, **kwargs)

        return call

    def _fail(self, name: str, args: tuple) -> None:
        if self.kind == "torn" and name == "write":
            self.originals["write"](args[0], bytes(args[1])[: len(args[1]) // 2])
        if self.kind in ("kill", "torn"):
            os._exit(FIRED)
        raise OSError({"full": errno.ENOSPC, "broken": errno.EIO}[self.kind], "injected")


def count_operations(work: Callable[[], object]) -> int:
    """Returns how many operations a piece of work does when nothing fails."""
    with Shim() as shim:
        work()
    return shim.count


def inject(work: Callable[[], object], kind: str, at: int) -> bool:
    """Runs the work with one fault; returns True if the fault fired. Errors that the work raises are its answer."""
    if kind in ("kill", "torn"):
        child = os.fork()
        if child == 0:
            with Shim(kind, at):
                try:
                    work()
                finally:
                    os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == FIRED
    from lora_gpt2.core.errors import ResourceError

    with Shim(kind, at) as shim:
        try:
            work()
        except ResourceError as error:
            assert error.exit_code == 7
    return shim.fired
