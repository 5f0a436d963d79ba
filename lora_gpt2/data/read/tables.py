"""Tables with a delimiter, such as .csv and .tsv: their header, their rows, and what is wrong with one."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterable, Iterator
from io import BufferedReader
from itertools import chain
from typing import Any

from lora_gpt2.core.errors import DataError
from lora_gpt2.data.read.encoding import MAX_LINE_BYTES, iter_lines
from lora_gpt2.data.read.layouts import Note, is_usual
from lora_gpt2.data.read.records import FIELD_HINT, FIX_HINT, Reading, build_documents, is_free
from lora_gpt2.recipe import DataSettings

DELIMITERS = ",;\t|"
MAX_ROW_CHARACTERS, MAX_SPENT_CHARACTERS = 2**24, 2**26
"""Of the longest row, beyond which a quote that is not closed is a stray one; of what is read in vain for such quotes
in a table, after which rows are single lines."""
LONGEST_NAME, MOST_WORDS = 64, 6
"""Of a column; a first row with a longer cell is text."""


def read_table(file: BufferedReader, where: str, settings: DataSettings, note: Note, tabs: bool = False) -> Reading:
    """Yields the documents of a table with a delimiter, or the error in the place of one."""
    csv.field_size_limit(MAX_LINE_BYTES)
    bad: list[DataError] = []
    lines = set_aside(iter_lines(file, where, settings.encoding_errors, settings.encoding), bad)
    head = next(lines, "")
    delimiter = "\t" if tabs else max(DELIMITERS, key=lambda mark: (head.count(mark), mark == ","))
    header: list[str] | None = None
    for number, row in _iter_rows(chain([head], lines), delimiter):
        yield from bad
        bad.clear()
        if isinstance(row, csv.Error):
            yield DataError(f"{where}:{number}: not a row of the table: {row}", FIX_HINT)
            continue
        if header is None:
            header = _read_header(row, where, settings)
            only = header[0] if len(header) == 1 and settings.text_field not in header else ""
            if only:
                note(f"{where}: the only column, '{only}', is read")
            if settings.header:
                continue
        if len(row) == len(header):
            record: Any = row[0] if only else dict(zip(header, row, strict=True))
            yield from build_documents(record, f"{where}:{number}", settings, note)
        elif row:
            yield DataError(f"{where}:{number}: {len(row)} cells, expected {len(header)}", FIX_HINT)
    yield from bad


def _iter_rows(lines: Iterator[str], delimiter: str) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """Yields rows, each with the number of its last line; a quote that is never closed costs its own line alone."""
    ahead, held, number, length, spent = deque[str](), list[str](), 0, 0, 0

    def feed() -> Iterator[str]:
        nonlocal length
        while not held or length < min(MAX_ROW_CHARACTERS, MAX_SPENT_CHARACTERS - spent):
            if (line := ahead.popleft() if ahead else next(lines, None)) is None:
                return
            held.append(line)
            length += len(line)
            yield line

    rows = csv.reader(feed(), delimiter=delimiter, strict=True)
    while True:
        held.clear()
        length = 0
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            number, spent = number + 1, spent + length
            yield number, error
            ahead.extendleft(reversed(held[1:]))
            rows = csv.reader(feed(), delimiter=delimiter, strict=True)
        else:
            number += len(held)
            yield number, row


def set_aside(lines: Iterable[str | DataError], bad: list[DataError]) -> Iterator[str]:
    """Yields the lines, and puts errors among them into `bad`."""
    for line in lines:
        if isinstance(line, DataError):
            bad.append(line)
        else:
            yield line


def _read_header(row: list[str], where: str, settings: DataSettings) -> list[str]:
    """Returns the names of a table's columns: its first row, or with `data.header=false` their numbers.

    Raises `DataError` for a first row that is text, and where no column is the one that is read.
    """
    if not settings.header:
        names = [str(number) for number in range(1, len(row) + 1)]
        if is_free(settings) and len(row) > 1:
            raise DataError(
                f"{where}: {len(row)} columns without names", "name one by its number: --set data.text_field=1"
            )
        return names
    header = [name.strip() for name in row]
    is_built = settings.template or settings.prompt or {"prompt", "completion"} <= set(header)
    is_named = settings.text_field in header or is_built or (is_free(settings) and is_usual(header))
    longest = max(header, key=len, default="")
    if not is_named and (len(longest) > LONGEST_NAME or len(longest.split()) > MOST_WORDS):
        raise DataError(
            f"{where}: the first row looks like text, not like names of columns: '{longest[:40]}…'",
            "if it is a record, use --set data.header=false; else name the column with --set data.text_field=NAME",
        )
    if len(header) > 1 and not is_named:
        columns = ", ".join(name for name in header[:20])
        raise DataError(f"{where}: no column '{settings.text_field}' (columns: {columns})", FIELD_HINT)
    return header
