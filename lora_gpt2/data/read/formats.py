"""Reads a source, format by format, into documents; what cannot be read is yielded as an error with its place.

Text, JSON lines, tables and data sets stream, so a source may be larger than memory; .json and .html are read whole,
up to a limit.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import BufferedReader
from itertools import chain
from typing import Any, BinaryIO, cast

from lora_gpt2.core.errors import DataError
from lora_gpt2.core.names import HUB
from lora_gpt2.data.clean.rules import choose_rules
from lora_gpt2.data.read.encoding import check_is_text, decode, find_declared, iter_lines, raise_errors
from lora_gpt2.data.read.layouts import read_columns
from lora_gpt2.data.read.records import (
    FIELD_HINT,
    Document,
    Reading,
    build_documents,
    is_free,
    is_record,
    list_fields,
    parse_json,
)
from lora_gpt2.data.read.sources import DOCUMENTS, Source, find_sources
from lora_gpt2.data.read.tables import read_table, set_aside
from lora_gpt2.data.tokenizer import EOS
from lora_gpt2.recipe import DataSettings

MAX_FILE_BYTES = 512 * 2**20
PAGE_MARK = "<!doctype html>"
START = "<|startoftext|>"
MARK = re.compile(
    rf"(?:\A|(?<=[\r\n]))[ \t]*(?:{re.escape(START)}|{re.escape(EOS)})|{re.escape(EOS)}[ \t]*(?=[\r\n]|\Z)"
    rf"|(?<=[^\s\"'`(\[]){re.escape(EOS)}(?=[^\s\"'`)\].,;:])"
)
"""Marks between documents, as training files for GPT-2 have them: at a line's end or beginning, or between words that
nothing else separates. Elsewhere, as in a sentence about the mark, they are text."""


class ReadingLog:
    """What reading found besides documents: the bytes read, for progress, and what it decided by itself."""

    def __init__(self) -> None:
        self.finished = 0
        self.open: set[BinaryIO] = set()
        self.notes: Counter[str] = Counter()

    def note(self, text: str) -> None:
        """Counts something that was decided without being asked for, such as which column is read."""
        self.notes[text] += 1

    def offset(self) -> int:
        """Returns the bytes read so far, as they lie on disk."""
        return self.finished + sum(file.tell() for file in self.open)


def read_documents(specs: Sequence[str], settings: DataSettings, splits_marks: bool = True) -> Iterator[Document]:
    """Yields the documents of all sources in order, as they are; raises `DataError` at the first unreadable one.

    With `splits_marks` those are cut that have EOS between them.

    What is to be measured or audited comes from `pipeline.read_clean`, which cleans it as training does.
    """
    for source in find_sources(specs, settings):
        log = ReadingLog()
        for item in read_source(source, settings, log) if splits_marks else _read_source(source, settings, log, 0):
            if isinstance(item, DataError):
                raise item
            yield item


def read_source(source: Source, settings: DataSettings, log: ReadingLog | None = None, piece: int = 0) -> Reading:
    """Yields the documents of one source, or the error in the place of one.

    Documents of running text longer than `piece` characters come in several, cut between paragraphs (0: never).
    """
    log = log or ReadingLog()
    documents = _split_marks(_read_source(source, settings, log, piece), source.name, log)
    yield from _split_prompts(documents, settings)


def _read_source(source: Source, settings: DataSettings, log: ReadingLog, piece: int) -> Reading:
    try:
        if source.kind in ("saved", "hub"):
            from lora_gpt2.data.read.hub_dataset import iter_rows

            for where, row in iter_rows(source.name.removeprefix(HUB), source.path, settings):
                yield from build_documents(row, where, settings, log.note)
            return
        if source.is_gzip:
            _check_gzip(source)
        with _open(source, log) as file:
            yield from _read_file(file, source, settings, log, piece)
    except DataError as error:
        yield error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield DataError(f"{source.name} is damaged: {error}", "unpack it with gunzip to see, or fetch it again")
    except OSError as error:
        yield DataError(f"{source.name} cannot be read: {error.strerror or error}", "check its permissions")


def _read_file(file: BufferedReader, source: Source, settings: DataSettings, log: ReadingLog, piece: int) -> Reading:
    if source.kind in ("text", "code", *DOCUMENTS.values()) and not is_free(settings):
        log.note("a file of running text has no fields, so data.text_field, template and prompt change nothing in it")
    if source.kind in DOCUMENTS.values():
        yield from _read_document(file, source, log)
        return
    if source.kind != "parquet":
        check_is_text(file.peek(8192)[:8192], source.name, settings.encoding)
    if source.kind == "text":
        yield from _read_text(file, source.name, settings, piece)
    elif source.kind == "code":
        yield from _read_code(file, source.name, settings, log, piece)
    else:
        yield from READERS[source.kind](file, source.name, settings, log)


def _check_gzip(source: Source) -> None:
    """Unpacks a file to its end, so that a wrong checksum is found before any of its lines is used."""
    assert source.path is not None
    with gzip.open(source.path) as file:
        while file.read(1 << 20):
            pass


@contextmanager
def _open(source: Source, log: ReadingLog) -> Iterator[BufferedReader]:
    assert source.path is not None
    with source.path.open("rb") as raw:
        log.open.add(raw)
        try:
            yield BufferedReader(cast(Any, gzip.GzipFile(fileobj=raw))) if source.is_gzip else raw
        finally:
            log.finished += raw.tell()
            log.open.discard(raw)


def _read_whole(file: BufferedReader, where: str) -> bytes:
    content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise DataError(f"{where} is larger than {MAX_FILE_BYTES >> 20} MiB", "split it, or use .jsonl or .txt")
    return content


def _read_text(file: BufferedReader, where: str, settings: DataSettings, piece: int) -> Reading:
    """Yields what stands between lines of `EOS`: whole, or as paragraphs or lines."""
    bad: list[DataError] = []
    lines = iter_lines(file, where, settings.encoding_errors, settings.encoding)
    lines = set_aside(lines, bad) if settings.unit == "line" else raise_errors(lines)
    number, has_mark = 0, False
    run: list[str] = []
    length, continues = 0, False
    for line in chain(lines, [None]):
        is_mark = line is not None and line.strip() == EOS
        has_mark = has_mark or is_mark
        too_long = bool(piece) and length > piece and line is not None and (not line.strip() or length > 2 * piece)
        if line is None or is_mark or too_long:
            text = "".join(run)
            if is_mark or (line is None and has_mark):
                text = text.strip("\r\n")
            if text or is_mark or (line is None and not number):
                for part in _cut(text, settings.unit):
                    number += 1
                    yield Document(
                        part,
                        where if number == 1 else f"{where}#{number}",
                        continues=continues and settings.unit == "file",
                    )
            yield from bad
            bad.clear()
            run, length, continues = [], 0, too_long
        if line is not None and not is_mark:
            run.append(line)
            length += len(line)


def _read_document(file: BufferedReader, source: Source, log: ReadingLog) -> Reading:
    from lora_gpt2.data.read.documents import read_document

    texts = read_document(source.kind, _read_whole(file, source.name), source.name, log.note)
    for number, text in enumerate(texts, start=1):
        yield Document(text, source.name if number == 1 else f"{source.name}#{number}")


def _read_code(file: BufferedReader, where: str, settings: DataSettings, log: ReadingLog, piece: int) -> Reading:
    if settings.profile == "prose":
        log.note("source code: its whitespace is left alone, as with data.profile=code")
    for item in _read_text(file, where, settings, piece):
        yield replace(item, is_code=True) if isinstance(item, Document) else item


def _cut(text: str, unit: str) -> Iterable[str]:
    if unit == "file":
        return [text]
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if unit == "line":
        return [line for line in lines if line.strip()]
    paragraphs = "\n".join(line if line.strip() else "" for line in lines).split("\n\n")
    return [paragraph.strip("\n") for paragraph in paragraphs if paragraph.strip()]


def _split_marks(documents: Reading, where: str, log: ReadingLog) -> Reading:
    """Yields documents without the marks that stand between them, cut where one does; see `MARK`."""
    for document in documents:
        if isinstance(document, DataError) or "<|" not in document.text or not MARK.search(document.text):
            yield document
            continue
        log.note(f"{where}: documents with {EOS} or {START} between them or at their ends")
        parts = [part.strip("\r\n") for part in MARK.split(document.text)]
        parts = [part for part in parts if part.strip()] or [""]
        for number, part in enumerate(parts, start=1):
            origin = document.origin if number == 1 else f"{document.origin}#{number}"
            continues = document.continues and number == 1
            yield replace(
                document, text=part, origin=origin, continues=continues, prompt=document.prompt * (number == 1)
            )


def _split_prompts(documents: Reading, settings: DataSettings) -> Reading:
    """Yields documents with what stands before `data.separator` as their prompt."""
    for document in documents:
        if isinstance(document, DataError) or not settings.separator or document.continues:
            yield document
            continue
        if document.prompt:
            shown = f"{document.origin}: it has a prompt already, so data.separator does not apply"
            yield DataError(shown, "leave data.separator out, or name one text with data.text_field")
            continue
        head, found, rest = document.text.partition(settings.separator)
        if found:
            yield replace(document, text=rest, prompt=head + found)
        elif document.text.strip():
            shown = f"{document.origin}: the separator '{settings.separator}' is not in it"
            yield DataError(shown, "check data.separator and data.unit, or set it aside with --skip-bad")


def _read_page(file: BufferedReader, where: str, settings: DataSettings, log: ReadingLog) -> Reading:
    content = _read_whole(file, where)
    text = decode(content, where, settings.encoding_errors, settings.encoding, find_declared(content[:4096]))
    is_cleaned = "html" in choose_rules(settings.profile, settings.rules)
    is_marked = text.lstrip("\ufeff \t\r\n")[: len(PAGE_MARK)].lower() == PAGE_MARK
    yield Document(f"{PAGE_MARK}\n{text}" if is_cleaned and not is_marked else text, where)  # the rule looks for it


def _read_json(file: BufferedReader, where: str, settings: DataSettings, log: ReadingLog) -> Reading:
    text = decode(_read_whole(file, where), where, settings.encoding_errors, settings.encoding)
    try:
        value = parse_json(text, where)
    except DataError:
        lines = text.strip().split("\n")
        if len(lines) < 2 or not all(line.lstrip().startswith(("{", '"')) for line in lines if line.strip()):
            raise
        yield from _read_lines(lines, where, settings, log)  # JSON lines in a .json file
        return
    yield from _read_value(value, where, settings, log)


def _read_value(value: Any, where: str, settings: DataSettings, log: ReadingLog) -> Reading:
    if isinstance(value, dict) and (rows := read_columns(value)) is not None:
        log.note(f"{where}: a table of {len(rows)} rows, as pandas writes it")
        value = rows
    if isinstance(value, dict) and not is_record(value, settings):
        lists = [key for key, item in value.items() if isinstance(item, list)]
        if len(lists) != 1:
            known = ", ".join(sorted(value)[:8]) or "none"
            missing = " or ".join(f"'{name}'" for name in list_fields(settings) if name not in value)
            raise DataError(f"{where}: no field {missing} (found: {known})", FIELD_HINT)
        value = value[lists[0]]
    if isinstance(value, list):
        for number, item in enumerate(value, start=1):
            yield from build_documents(item, f"{where}:[{number}]", settings, log.note)
    else:
        yield from build_documents(value, where, settings, log.note)


def _read_json_lines(file: BufferedReader, where: str, settings: DataSettings, log: ReadingLog) -> Reading:
    if file.peek(64)[:64].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _read_json(file, where, settings, log)  # an array in a .jsonl file
        return
    yield from _read_lines(iter_lines(file, where, settings.encoding_errors, settings.encoding), where, settings, log)


def _read_lines(lines: Iterable[str | DataError], where: str, settings: DataSettings, log: ReadingLog) -> Reading:
    for number, line in enumerate(lines, start=1):
        if isinstance(line, DataError):
            yield line
        elif line.strip():
            try:
                value = parse_json(line.strip(), f"{where}:{number}")
                yield from build_documents(value, f"{where}:{number}", settings, log.note)
            except DataError as error:
                yield error


def _read_commas(file: BufferedReader, where: str, settings: DataSettings, log: ReadingLog) -> Reading:
    return read_table(file, where, settings, log.note)


def _read_tabs(file: BufferedReader, where: str, settings: DataSettings, log: ReadingLog) -> Reading:
    return read_table(file, where, settings, log.note, tabs=True)


def _read_parquet(file: BufferedReader, where: str, settings: DataSettings, log: ReadingLog) -> Reading:
    from lora_gpt2.data.read.parquet import iter_rows

    for number, row in iter_rows(file, where, settings):
        if isinstance(row, DataError):
            yield row
        else:
            yield from build_documents(row, f"{where}:{number}", settings, log.note)


READERS: dict[str, Callable[[BufferedReader, str, DataSettings, ReadingLog], Reading]] = {
    "html": _read_page,
    "json": _read_json,
    "jsonl": _read_json_lines,
    "csv": _read_commas,
    "tsv": _read_tabs,
    "parquet": _read_parquet,
}
