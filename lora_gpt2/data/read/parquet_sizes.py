"""The sizes of a Parquet file's columns, read in a process of its own.

PyArrow ends the whole process (`std::terminate`) where it meets certain damage in the metadata of a column. So a child
reads them, which may die of it, and stays for the next file otherwise. Run as a script, this file is the child.
"""

from __future__ import annotations

import atexit
import io
import json
import struct
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import IO, Any

FOOT = struct.Struct("<I4s")
MAGIC = b"PAR1"
LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, kw_only=True)
class ColumnPart:
    """One column of one row group: its name, its bytes unpacked and on disk, and whether values repeat by reference."""

    path: str
    unpacked: int
    packed: int
    has_dictionary: bool


class _Child:
    """The process that reads, started when it is needed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, footer: bytes) -> Any:
        """Returns the child's answer, or None if it died of the question."""
        with self.lock:
            process = self.process = self.process or subprocess.Popen(  # noqa: S603 - Python and this file
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(LENGTH.pack(len(footer)) + footer)
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = b""
            if not answer:
                self.stop()
            return json.loads(answer) if answer else None

    def stop(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.kill()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    pipe.close()
            self.process.wait()
            self.process = None


_child = _Child()
atexit.register(_child.stop)


def read_sizes(file: IO[bytes]) -> list[ColumnPart]:
    """Returns the columns of a Parquet file, row group by row group; raises `ValueError` for damaged metadata."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - FOOT.size))
    tail = file.read(FOOT.size)
    if len(tail) < FOOT.size or tail[4:] != MAGIC or (length := FOOT.unpack(tail)[0]) > size - FOOT.size:
        raise ValueError("it does not end as one")
    file.seek(size - FOOT.size - length)
    answer = _child.ask(file.read(length))
    file.seek(0)
    if answer is None or isinstance(answer, str):
        raise ValueError(answer or "its metadata is damaged")
    return [ColumnPart(**part) for part in answer]


def _describe(footer: bytes) -> Any:
    from pyarrow import parquet

    content = MAGIC + footer + FOOT.pack(len(footer), MAGIC)
    try:
        metadata = parquet.read_metadata(io.BytesIO(content))
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        parts = [group.column(index) for group in groups for index in range(metadata.num_columns)]
        return [
            {
                "path": part.path_in_schema,
                "unpacked": part.total_uncompressed_size,
                "packed": part.total_compressed_size,
                "has_dictionary": part.has_dictionary_page,
            }
            for part in parts
        ]
    except Exception as error:  # noqa: BLE001 - the parent says it
        return f"{type(error).__name__}: {error}"


def _answer_questions() -> None:
    source, target = sys.stdin.buffer, sys.stdout.buffer
    while len(head := source.read(LENGTH.size)) == LENGTH.size:
        target.write(json.dumps(_describe(source.read(LENGTH.unpack(head)[0]))).encode() + b"\n")
        target.flush()


if __name__ == "__main__":
    _answer_questions()
