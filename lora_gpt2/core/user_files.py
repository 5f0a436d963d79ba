"""Files that a user names on the command line: regular ones only, read up to a limit, never waited for.

A pipe that nobody writes to would block for ever, and a device such as /dev/zero never ends. Links are followed, for
they are the user's own; what lies in a store is read by `files.read_regular`, which follows none.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_gpt2.core.errors import DataError, NotFoundError, ResourceError, UsageError
from lora_gpt2.core.files import DONT_WAIT, OPEN_FLAGS, translate_os_error

MAX_TEXT_BYTES = 256 * 2**20
_NO_SUCH_FILE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP})
PICTURES = (".png", ".svg")
_NO_REGULAR_HINT = "write its content to a file, and name that"


def read_user_file(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """Returns the bytes of a regular file.

    Raises:
        NotFoundError: there is no such file.
        UsageError: it is a folder, a pipe or a device, or larger than `max_bytes`.
        ResourceError: it cannot be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | OPEN_FLAGS | DONT_WAIT)
    except OSError as error:
        if error.errno in _NO_SUCH_FILE:
            raise NotFoundError(f"cannot read {path}: there is no such file", "check the path") from error
        if error.errno == errno.ENXIO or path.is_dir():  # a socket; a folder, which Windows does not open
            raise _refuse_kind(path) from error
        raise translate_os_error(error, f"read {path}") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _refuse_kind(path)
    with open(handle, "rb") as file:
        try:
            content = file.read(max_bytes + 1)
        except OSError as error:
            raise translate_os_error(error, f"read {path}") from error
    if len(content) > max_bytes:
        raise UsageError(f"{path} is larger than {max_bytes:,} bytes", "name a smaller file, or a part of it")
    return content


def read_user_text(path: Path, errors: str = "strict", max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Returns the text of a regular file in UTF-8, without its byte-order mark and with line ends `\\n`.

    Raises:
        DataError: it is not UTF-8, and `errors` is strict.
        NotFoundError, UsageError, ResourceError: see `read_user_file`.
    """
    try:
        text = read_user_file(path, max_bytes).decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        hint = f"convert it, such as: iconv -f WINDOWS-1252 -t UTF-8 {path}"
        raise DataError(f"{path}: byte {error.start} is not valid UTF-8", hint) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_stdin(max_characters: int = MAX_TEXT_BYTES) -> str:
    """Returns the text on standard input.

    Raises:
        UsageError: there is none, it is a device, or it has more than `max_characters`.
        DataError: it is not in the terminal's encoding.
    """
    check_stdin()
    try:
        text = sys.stdin.read(max_characters + 1)
    except UnicodeDecodeError as error:
        raise DataError(f"stdin is not valid {error.encoding.upper()}", "convert it with iconv") from error
    if len(text) > max_characters:
        raise UsageError(f"stdin has more than {max_characters:,} characters", "give a smaller text")
    return text


def check_stdin() -> None:
    """Raises `UsageError` if standard input is missing, or a device that never ends, such as /dev/zero."""
    hint = "pipe text in, as in: cat my_text.txt | lora-gpt2 …"
    if sys.stdin is None:
        raise UsageError("there is nothing on stdin", hint)
    try:
        found = os.fstat(sys.stdin.fileno())
    except (OSError, ValueError):  # no file behind it
        return
    is_null = getattr(found, "st_rdev", 0) == getattr(os.stat(os.devnull), "st_rdev", 0)  # 0 on Windows
    if stat.S_ISCHR(found.st_mode) and not is_null and not sys.stdin.isatty():
        raise UsageError("stdin is a device", hint)


def check_output(path: Path | None, kinds: Sequence[str] = ()) -> None:
    """Raises our error if a file cannot be written there, before the work whose result it will hold.

    Raises:
        UsageError: it is a pipe or a device, or ends in none of `kinds`, where its ending says what is written.
        ResourceError: it is a folder, or its folder does not exist or cannot be written.
    """
    if path is None:
        return
    if kinds and path.suffix.lower() not in kinds:
        raise UsageError(f"{path} does not end in {' or '.join(kinds)}", f"name it {path.stem}{kinds[0]}, for example")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UsageError(f"{path} is not a regular file", "name a file that may be written")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ResourceError(f"{path} cannot be written", "name a file in a folder that exists and is yours")


def _refuse_kind(path: Path) -> UsageError:
    return UsageError(f"{path} is not a regular file", _NO_REGULAR_HINT)
