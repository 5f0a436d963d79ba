"""Fails the N-th file operation of a piece of work: a kill, a full disk, a broken disk, a torn write.

Only operations that change something are counted: `os.open` for writing, `write`, `fsync`, `mkdir`, `rename`,
`replace`, `unlink`, `rmdir`. A kill is a real one: the work runs in a forked child that ends at once, so that no
`finally` tidies up after it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

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


class Disk:
    """Knows, while it is installed, what a power loss would take: bytes and names that were not synced.

    A file that was opened for writing may lose its bytes until it is synced, a folder what came, went or was renamed in
    it until the folder is. `moves` has every rename with what was unsafe just before it. Lock files are not counted.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.unsafe, self.moves = root, set(), []
        self.places: dict[int, str] = {}
        self.originals = {name: getattr(os, name) for name in ("open", "fsync", "mkdir", "rename", "replace")}

    def __enter__(self) -> Disk:
        for name in self.originals:
            setattr(os, name, getattr(self, f"_{name}"))
        return self

    def __exit__(self, *rest: object) -> None:
        for name, original in self.originals.items():
            setattr(os, name, original)

    def list_unsafe(self) -> list[str]:
        """Returns what a power loss would take now, below the root."""
        return sorted(str(Path(path).relative_to(self.root)) for path in self.unsafe if os.path.exists(path))

    def _mark(self, path: object) -> None:
        path = os.path.abspath(str(path))
        if Path(path).is_relative_to(self.root) and "/.locks" not in path:
            self.unsafe.add(path)

    def _open(self, path, flags, *rest, **more):
        if flags & os.O_CREAT and not os.path.exists(path):
            self._mark(os.path.dirname(path))
        handle = self.originals["open"](path, flags, *rest, **more)
        self.places[handle] = os.path.abspath(str(path))
        if flags & (os.O_WRONLY | os.O_RDWR):
            self._mark(path)
        return handle

    def _fsync(self, handle):
        self.unsafe.discard(self.places[handle])
        return self.originals["fsync"](handle)

    def _mkdir(self, path, *rest, **more):
        self.originals["mkdir"](path, *rest, **more)
        self._mark(os.path.dirname(path))

    def _rename(self, source, target, **more):
        self._move("rename", source, target, **more)

    def _replace(self, source, target, **more):
        self._move("replace", source, target, **more)

    def _move(self, kind, source, target, **more):
        source, target = os.path.abspath(str(source)), os.path.abspath(str(target))
        self.moves.append((source, target, set(self.unsafe)))
        self.originals[kind](source, target, **more)
        self._mark(os.path.dirname(source))
        self._mark(os.path.dirname(target))
