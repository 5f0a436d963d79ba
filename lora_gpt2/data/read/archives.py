"""Archives of files (.zip, .tar, .tar.gz, .tgz): unpacked into a temporary folder, where each file is a source.

What is in them is never believed: no path leaves the folder, links and devices are left out, and an archive that
unpacks to far more than it is is refused before anything is written.
"""

from __future__ import annotations

import atexit
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO

from lora_gpt2.core.errors import DataError
from lora_gpt2.core.files import wrap_os_errors

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_BYTES, MAX_RATIO, MAX_FILES = 2**36, 1000, 1_000_000
SMALL = 2**26  # bytes that may be unpacked from however little
PIECE = 2**20
HINT = "unpack it, and name its folder"


def is_archive(path: Path) -> bool:
    """True if a file is, by its name, an archive of files."""
    return path.name.lower().endswith(ARCHIVES)


def unpack(path: Path) -> Path:
    """Returns a folder with the files of an archive, which is removed when the process ends.

    Raises:
        DataError: it is damaged, encrypted, or unpacks to too much.
        ResourceError: there is no room for it.
    """
    found = path.stat()
    return _unpack(path.absolute(), found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=64)
def _unpack(path: Path, size: int, changed: int) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="lora-gpt2-unpacked-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    limit = min(MAX_BYTES, max(SMALL, MAX_RATIO * size))
    written = 0
    try:
        for number, (name, file) in enumerate(_iter_files(path)):
            target = folder / path.name / _make_safe(name)
            with wrap_os_errors(f"unpack {path}"):
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as out:
                    while piece := file.read(PIECE):
                        written += len(piece)
                        if written > limit or number >= MAX_FILES:
                            raise DataError(f"{path} unpacks to more than {limit:,} bytes or {MAX_FILES:,} files", HINT)
                        out.write(piece)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        reason = "it is encrypted" if "password" in str(error) else f"it is damaged: {error}"
        raise DataError(f"{path} cannot be unpacked: {reason}", HINT) from error
    return folder / path.name


def _iter_files(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if path.name.lower().endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            for item in archive.infolist():
                if not item.is_dir():
                    with archive.open(item) as file:
                        yield item.filename, file
        return
    with tarfile.open(path) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isreg() else None
            if content is not None:
                yield member.name, content


def _shorten(name: str) -> str:
    """Returns a file's name of at most 200 characters, with its ending."""
    ending = "".join(PurePosixPath(name).suffixes[-2:])[-40:]
    return name if len(name) <= 200 else name[: 200 - len(ending)] + ending


def _make_safe(name: str) -> Path:
    """Returns a path below the folder: no root, no drive, no `..`."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    kept = [_shorten(part.replace(":", "_")) for part in parts if part not in ("/", "..", ".")]
    return Path(*kept) if kept else Path("file")
