"""Lets lora_gpt2 see, on Linux, what it would see on Windows; for a process of its own.

Its modules (and no others) find no POSIX-only module, no POSIX-only name in `os` and `signal`, and an `open` that
refuses folders. For every module, a file that is open or mapped in any process cannot be renamed, replaced or removed,
nor can a folder above it be renamed: that is what Windows does with files that Python opened.

    echo '["adapters", "list"]' | python -c "from tests.windows import main; main()"
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import json
import os
import signal
import stat
import sys
import types
from pathlib import Path

MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "pty", "tty", "syslog", "posix", "curses", "readline")
NAMES = {
    "os": (
        "O_CLOEXEC",
        "O_DIRECTORY",
        "O_NOFOLLOW",
        "O_NONBLOCK",
        "O_SYNC",
        "O_DSYNC",
        "O_ASYNC",
        "O_NOCTTY",
        "O_NDELAY",
        "O_PATH",
        "O_TMPFILE",
        "O_DIRECT",
        "O_LARGEFILE",
        "O_NOATIME",
        "O_RSYNC",
        "O_ACCMODE",
        "fork",
        "forkpty",
        "wait",
        "wait3",
        "wait4",
        "waitid",
        "WNOHANG",
        "WIFSIGNALED",
        "WTERMSIG",
        "WEXITSTATUS",
        "getuid",
        "geteuid",
        "getgid",
        "getegid",
        "setuid",
        "setgid",
        "setsid",
        "getsid",
        "getpgid",
        "getpgrp",
        "setpgid",
        "setpgrp",
        "killpg",
        "nice",
        "getpriority",
        "getloadavg",
        "sysconf",
        "confstr",
        "pathconf",
        "uname",
        "chown",
        "fchown",
        "lchown",
        "chroot",
        "fchdir",
        "fdatasync",
        "sync",
        "mkfifo",
        "mknod",
        "statvfs",
        "fstatvfs",
        "lockf",
        "openpty",
        "ttyname",
        "ctermid",
        "sched_getaffinity",
        "sched_setaffinity",
        "sendfile",
        "posix_fadvise",
        "posix_fallocate",
        "posix_spawn",
        "pread",
        "pwrite",
        "getxattr",
        "setxattr",
        "pipe2",
        "register_at_fork",
        "memfd_create",
        "copy_file_range",
    ),
    "signal": (
        "SIGHUP",
        "SIGALRM",
        "SIGQUIT",
        "SIGKILL",
        "SIGUSR1",
        "SIGUSR2",
        "SIGPIPE",
        "SIGCHLD",
        "SIGSTOP",
        "SIGCONT",
        "SIGTSTP",
        "SIGWINCH",
        "alarm",
        "setitimer",
        "getitimer",
        "ITIMER_REAL",
        "pause",
        "pthread_kill",
        "pthread_sigmask",
        "sigwait",
        "sigpending",
        "siginterrupt",
    ),
}
OURS = "lora_gpt2"


def install() -> None:
    """Changes this process for good; lora_gpt2 must not have been imported."""
    assert OURS not in sys.modules
    originals = {name: getattr(os, name) for name in ("rename", "replace", "unlink", "remove")}
    os.rename = lambda source, target, **rest: _refuse(source) or originals["rename"](source, target, **rest)
    os.replace = lambda source, target, **rest: (
        _refuse(source) or _refuse(target) or originals["replace"](source, target, **rest)
    )
    os.unlink = os.remove = lambda path, *, dir_fd=None: (
        _refuse(_absolute(path, dir_fd)) or originals["unlink"](path, dir_fd=dir_fd)
    )
    seen = {"os": _copy_without(os, NAMES["os"]), "signal": _copy_without(signal, NAMES["signal"])}
    seen["os"].name, seen["os"].O_BINARY = "nt", 0
    seen["os"].open = lambda path, *rest, **named: _refuse_folder(path) or os.open(path, *rest, **named)
    original = builtins.__import__

    def find(name, globals=None, locals=None, fromlist=(), level=0):
        if globals and str(globals.get("__name__")).partition(".")[0] == OURS:
            if name in MODULES:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            if name in seen:
                return seen[name]
        return original(name, globals, locals, fromlist, level)

    builtins.__import__ = find


def _copy_without(module: types.ModuleType, names: tuple[str, ...]) -> types.ModuleType:
    copy = types.ModuleType(module.__name__)
    copy.__dict__.update({name: value for name, value in vars(module).items() if name not in names})
    return copy


def _absolute(path, dir_fd):
    return path if dir_fd is None else f"{os.readlink(f'/proc/self/fd/{dir_fd}')}/{os.fsdecode(path)}"


def _refuse(path) -> None:
    """Raises what Windows does if a file is open, or one below a folder."""
    whole = os.path.realpath(os.fsdecode(path))
    if any(each == whole or each.startswith(f"{whole}/") for each in _iter_open()):
        raise PermissionError(errno.EACCES, "The process cannot access the file", os.fsdecode(path))


def _refuse_folder(path) -> None:
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", os.fsdecode(path))


def _iter_open():
    """Yields the plain files that any process has open or mapped."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            for link in (process / "fd").iterdir():
                if stat.S_ISREG(link.stat().st_mode):
                    yield os.readlink(link)
            for line in (process / "maps").read_text().splitlines():
                if "/" in line:
                    yield line[line.index("/") :]
        except OSError:  # it has ended, or is not ours
            continue


def main() -> None:
    """Runs the command lines that come as JSON, a line each; answers each with exit code, stdout and stderr."""
    install()
    from lora_gpt2.cli import run

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(json.loads(line))
        answers.write(json.dumps([code, out.getvalue(), err.getvalue()]) + "\n")
        answers.flush()
