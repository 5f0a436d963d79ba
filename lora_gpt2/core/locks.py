"""Locks that end with their process: exclusive ones on files, exclusive and shared ones on folders.

Linux and macOS: `flock`, which the kernel releases however a process ends, and which works on a read-only disk.
Windows has no locks on folders and no `flock`: exclusive locks are filelock's, on a file, and a reader keeps a file of
the folder open, so that the system itself refuses to rename or remove that folder. There `hold_for_removal` cannot
tell whether somebody reads; `move_unread` can.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lora_gpt2.core.errors import ConflictError, ResourceError
from lora_gpt2.core.files import OPEN_FLAGS

POLL_SECONDS = 0.01
LOCK_HINT = "wait until it ends, or choose another name with --name"
OWNER = "~owner"  # beside a lock of filelock's, because Windows lets nobody read a locked file; in no adapter's name


def find_fcntl() -> Any:
    """Returns the module with `flock`, or None where the system has none (Windows)."""
    try:
        import fcntl
    except ImportError:
        return None
    return fcntl


def hold_lock(path: Path, what: str, wait_seconds: float = 0.0, hint: str = LOCK_HINT) -> AbstractContextManager[None]:
    """Holds an exclusive lock that the system releases when the process dies.

    Raises `ConflictError`, which names the owner and has this hint, if it is still taken after `wait_seconds`.
    """
    hold = _hold_with_flock if find_fcntl() else _hold_with_filelock
    return hold(path, what, wait_seconds, hint)


def hold_shared(folder: Path) -> AbstractContextManager[bool]:
    """Yields True while the folder is held against removal, False if it went away; works on read-only disks."""
    return _share_with_flock(folder) if find_fcntl() else _share_by_opening(folder)


@contextlib.contextmanager
def hold_for_removal(folder: Path) -> Iterator[bool]:
    """Yields True if nobody holds the folder, who then waits until this block ends; else False.

    On Windows always True: remove the folder with `move_unread`.
    """
    fcntl = find_fcntl()
    if fcntl is None:
        os.stat(folder)  # a folder that has gone is an error on every system
        yield True
        return
    handle = _open_folder(folder)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        except OSError as error:
            hint = "remove it by hand, when nobody reads it"
            raise ResourceError(f"{folder} is on a file system without locks: {error.strerror}", hint) from error
        else:
            yield True
    finally:
        os.close(handle)


@contextlib.contextmanager
def hold_new_folder(folder: Path) -> Iterator[None]:
    """Makes a folder, if it is not there, and holds it against other processes, which wait for the end of the block."""
    fcntl = find_fcntl()
    if fcntl is None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _build_filelock(folder.with_name(f"{folder.name}.lock")):
            folder.mkdir(exist_ok=True)
            yield
        return
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _open_folder(folder)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_same(folder, handle):
                yield
                return
        finally:  # where it is not the same, the one who held it has finished and removed it
            os.close(handle)


def move_unread(folder: Path, target: Path, label: str) -> None:
    """Renames a folder that `hold_for_removal` gave out; raises `ConflictError` if Windows says that it is in use."""
    try:
        os.rename(folder, target)
    except PermissionError as error:
        if find_fcntl():
            raise
        raise build_reading_error(label) from error


def build_reading_error(label: str) -> ConflictError:
    """Returns the error for what cannot be removed because it is being read."""
    return ConflictError(f"{label} is being read by another process", "try again when it has ended")


@contextlib.contextmanager
def _hold_with_flock(path: Path, what: str, wait_seconds: float, hint: str) -> Iterator[None]:
    fcntl = find_fcntl()
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_seconds
    flags = os.O_RDWR | os.O_CREAT | OPEN_FLAGS | getattr(os, "O_NOFOLLOW", 0)
    with open(os.open(path, flags, 0o666), "r+", encoding="ascii", errors="replace") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() < deadline:
                    time.sleep(POLL_SECONDS)
                    continue
                file.seek(0)
                raise _build_lock_error(what, file.read(), hint) from error
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextlib.contextmanager
def _hold_with_filelock(path: Path, what: str, wait_seconds: float, hint: str) -> Iterator[None]:
    from filelock import Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock, owner = _build_filelock(path), path.with_name(f"{path.name}{OWNER}")
    try:
        lock.acquire(timeout=wait_seconds, poll_interval=POLL_SECONDS)
    except Timeout as error:
        with contextlib.suppress(OSError):
            raise _build_lock_error(what, owner.read_text(encoding="ascii", errors="replace"), hint) from error
        raise _build_lock_error(what, "", hint) from error
    try:
        owner.write_text(str(os.getpid()), encoding="ascii")
        yield
    finally:
        lock.release()


def _build_filelock(path: Path) -> Any:
    from filelock import FileLock

    return FileLock(path, is_singleton=False, thread_local=False)


def _build_lock_error(what: str, owner: str, hint: str) -> ConflictError:
    return ConflictError(f"{what} is in use by process {owner.strip() or 'unknown'}", hint)


@contextlib.contextmanager
def _share_with_flock(folder: Path) -> Iterator[bool]:
    fcntl = find_fcntl()
    try:
        handle = _open_folder(folder)
    except (FileNotFoundError, NotADirectoryError):
        yield False
        return
    try:
        with contextlib.suppress(OSError):  # a file system without locks: then nothing is removed there either
            fcntl.flock(handle, fcntl.LOCK_SH)
        yield _is_same(folder, handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _share_by_opening(folder: Path) -> Iterator[bool]:
    """Yields True while a file of the folder is open here; an empty folder cannot be held, and has nothing to read."""
    handle = None
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
            paths = sorted(entry.path for entry in entries if entry.is_file(follow_symlinks=False))
            handle = next(filter(None, map(_try_open, paths)), None)
        yield handle is not None or folder.is_dir()
    finally:
        if handle is not None:
            os.close(handle)


def _try_open(path: str) -> int | None:
    with contextlib.suppress(OSError):
        return os.open(path, os.O_RDONLY | OPEN_FLAGS)
    return None


def _open_folder(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | OPEN_FLAGS | getattr(os, "O_DIRECTORY", 0))


def _is_same(folder: Path, handle: int) -> bool:
    """True if the folder of this name is still the one that was opened."""
    try:
        return os.stat(folder).st_ino == os.fstat(handle).st_ino
    except FileNotFoundError:
        return False
