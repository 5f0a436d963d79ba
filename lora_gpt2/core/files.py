"""Files and folders that are either whole or absent.

Writers go to a temporary name beside the target, sync, and rename: a crash leaves the old state or the new one. Costs
one fsync per file and folder. Windows differs in three things: it cannot sync a folder, its `open` follows links, and
it refuses to rename or replace a file that is open somewhere.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from lora_gpt2.core.errors import ConflictError, CorruptError, LoraGpt2Error, NotFoundError, ResourceError

OPEN_FLAGS: int = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
DONT_WAIT: int = getattr(os, "O_NONBLOCK", 0)  # for the other end of a pipe
SHARING_SECONDS = 2.0 if os.name == "nt" else 0.0  # Windows: how long to wait for a reader or a virus scanner
T = TypeVar("T")


def translate_os_error(error: OSError, action: str) -> LoraGpt2Error:
    """Returns our error for a failed file operation; `action` is what was tried, such as "write x.json".

    Usually a `ResourceError`; `NotFoundError` for a file that was to be read and is not there, `ConflictError` for one
    that another process has made meanwhile.
    """
    where = f" ({error.filename})" if error.filename else ""
    reasons = {
        errno.ENOSPC: ("no space is left on the disk", "free some space, or choose another disk"),
        errno.EDQUOT: ("the disk quota is used up", "free some space, or choose another disk"),
        errno.EFBIG: ("the file would be larger than the limit for this process", "raise it with 'ulimit -f'"),
        errno.EROFS: ("the file system is read-only", "choose a folder that can be written, for example with --store"),
        errno.EACCES: ("permission is denied", "check the owner and the mode with 'ls -l'"),
        errno.EPERM: ("permission is denied", "check the owner and the mode with 'ls -l'"),
    }
    if error.errno in (errno.EEXIST, errno.ENOTEMPTY) and error.filename2:  # a rename to it
        taken = f"cannot {action}: it exists ({error.filename2})"
        return ConflictError(taken, "choose another name, or remove it first")
    if isinstance(error, FileNotFoundError) and action.startswith("read"):
        return NotFoundError(f"cannot {action}: there is no such file", "check the path")
    reason, hint = reasons.get(error.errno or 0, (error.strerror or str(error), "check the path and the disk"))
    return ResourceError(f"cannot {action}: {reason}{where}", hint)


@contextlib.contextmanager
def wrap_os_errors(action: str) -> Iterator[None]:
    """Turns `OSError` inside the block into ours; see `translate_os_error`."""
    try:
        yield
    except OSError as error:
        raise translate_os_error(error, action) from error


def retry_while_open(operation: Callable[[], T]) -> T:
    """Returns the result of a file operation; on Windows it is repeated for a while if another process has it open."""
    deadline = time.monotonic() + SHARING_SECONDS
    while True:
        try:
            return operation()
        except PermissionError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.01)


def rename_path(source: Path, target: Path) -> None:
    """Renames a file or folder to a name that is free, in one step."""
    retry_while_open(lambda: os.rename(source, target))


def replace_file(source: Path, target: Path) -> None:
    """Renames a file over another one, in one step."""
    retry_while_open(lambda: os.replace(source, target))


def fsync_dir(path: Path) -> None:
    """Makes the names inside a folder durable; does nothing on Windows, which cannot open a folder."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_file(path: Path) -> None:
    """Makes a file's bytes durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_file(path: Path, content: bytes) -> None:
    """Writes a file and makes its bytes durable, with the mode that the umask allows."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | OPEN_FLAGS, 0o666)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(handle, rest) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def read_regular(path: Path | str, max_bytes: int | None = None) -> bytes:
    """Returns the bytes of a plain file; a link, a pipe or a device is never followed or waited for.

    Raises:
        CorruptError: it is not a plain file, or larger than `max_bytes`.
        OSError: it is missing or cannot be read.
    """
    flags = os.O_RDONLY | OPEN_FLAGS | DONT_WAIT | getattr(os, "O_NOFOLLOW", 0)
    try:
        if not hasattr(os, "O_NOFOLLOW"):
            _check_no_link(path)
        handle = retry_while_open(lambda: os.open(path, flags))
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise CorruptError(f"{path} is a link, expected a plain file", "replace it by the file itself") from error
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise CorruptError(f"{path} is not a plain file", "replace it by the file that belongs there")
        if max_bytes is not None and found.st_size > max_bytes:
            raise CorruptError(f"{path} has {found.st_size:,} bytes, expected at most {max_bytes:,}", "restore it")
        content = os.read(handle, found.st_size + 1)
        while len(content) < found.st_size and (piece := os.read(handle, found.st_size)):
            content += piece
        return content
    finally:
        os.close(handle)


def _check_no_link(path: Path | str) -> None:
    """Raises what opening a link or a folder does elsewhere; a link made between this and the opening is followed."""
    mode = os.lstat(path).st_mode
    if stat.S_ISLNK(mode):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    if stat.S_ISDIR(mode):
        raise CorruptError(f"{path} is not a plain file", "replace it by the file that belongs there")


def remove_stale(parent: Path, stem: str) -> None:
    """Removes what processes that were killed left of writing this file or folder; of others, nothing."""
    for path in parent.glob(f".{glob.escape(stem)}.*.partial"):
        import psutil  # only here, because it is rarely needed

        pid = path.name.removeprefix(f".{stem}.").partition(".")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()


def write_atomic(path: Path, content: bytes) -> None:
    """Replaces a file as a whole and makes it durable, with the mode that the umask allows."""
    remove_stale(path.parent, path.name)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write_file(partial, content)
        replace_file(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    fsync_dir(path.parent)


def write_user_file(path: Path, content: str | bytes) -> None:
    """Replaces a file that the user named, as a whole; what is no plain file, such as /dev/stdout, is written to."""
    data = content.encode("utf-8", "replace") if isinstance(content, str) else content
    target = path.resolve()  # a link stays one
    if target.exists() and not target.is_file():
        path.write_bytes(data)
    else:
        write_atomic(target, data)


@contextlib.contextmanager
def temporary_dir(parent: Path, stem: str) -> Iterator[Path]:
    """Yields a new folder beside the target, to be renamed by the block; what remains of it is removed."""
    parent.mkdir(parents=True, exist_ok=True)
    remove_stale(parent, stem)
    path = Path(tempfile.mkdtemp(prefix=f".{stem}.{os.getpid()}.", suffix=".partial", dir=parent))
    path.chmod(0o777 & ~current_umask())
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def sync_tree(path: Path) -> None:
    """Makes every file of a flat folder durable and gives it the mode that the umask allows."""
    for file in path.iterdir():
        file.chmod(0o666 & ~current_umask())
        fsync_file(file)
    fsync_dir(path)


def current_umask() -> int:
    """Returns the process's umask (which can only be read by setting it)."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
