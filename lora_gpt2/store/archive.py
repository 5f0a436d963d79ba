"""One version as one file: a `.tar.gz` with the same bytes each time, read without unpacking anything to disk."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from lora_gpt2.core.errors import CorruptError
from lora_gpt2.core.files import read_regular, wrap_os_errors
from lora_gpt2.store.manifest import MAX_FILE_BYTES

MEMBER = re.compile(r"(?:[A-Za-z0-9._@-]{1,100}/)?([A-Za-z0-9_][A-Za-z0-9._-]{0,99})")
MAX_MEMBERS = 64
SLACK_BYTES, LARGEST_RATIO = 2**26, 8  # weights hardly shrink; what grows more than this is a bomb


def pack_archive(files: Mapping[str, bytes], folder: str) -> bytes:
    """Returns an archive of files under `folder/`; the same files give the same bytes."""
    packed = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0, compresslevel=6) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for name in sorted(files):
            member = tarfile.TarInfo(f"{folder}/{name}")  # owner 0, time 0, mode 0644
            member.size = len(files[name])
            archive.addfile(member, io.BytesIO(files[name]))
    return packed.getvalue()


def read_archive(path: Path) -> dict[str, bytes]:
    """Returns the files of an archive by their last names; nothing is written, no link or path is followed.

    Raises `CorruptError` if it is damaged, holds anything but plain files, or unpacks to far more than its size.
    """
    with wrap_os_errors(f"read {path}"):
        packed = read_regular(path.resolve(), MAX_FILE_BYTES)
    unpacker = zlib.decompressobj(wbits=31)
    try:
        content = unpacker.decompress(packed, SLACK_BYTES + LARGEST_RATIO * len(packed))
        if unpacker.unconsumed_tail or not unpacker.eof:
            what = "unpacks to far more than an adapter" if unpacker.unconsumed_tail else "is cut off"
            raise CorruptError(f"{path} {what}", "fetch it again")
        return _read_members(content, path)
    except (zlib.error, tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        reason = "headers of headers" if isinstance(error, RecursionError) else str(error)
        raise CorruptError(f"{path} is not a .tar.gz, or damaged: {reason}", "fetch it again") from error


def _read_members(content: bytes, path: Path) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
        for member in archive:
            match = MEMBER.fullmatch(member.name)
            is_plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and member.size <= len(content)
            if not is_plain or match is None or match[1] in files or len(files) >= MAX_MEMBERS:
                raise CorruptError(
                    f"{path}: {member.name[:80]!r} has no place in an adapter's archive",
                    "make one with 'lora-gpt2 adapters export NAME FILE.tar.gz'",
                )
            file = archive.extractfile(member)
            assert file is not None
            files[match[1]] = file.read()
    return files
