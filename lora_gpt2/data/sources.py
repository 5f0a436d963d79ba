"""Reads documents from files, folders and globs, and says file:line:field where that fails.

.txt and .md: one document per file, or several separated by lines that hold only `<|endoftext|>`. .jsonl: one object
per line; .json: a list, an object with one list in it, or one object; the text is in `text_field`, or the item is a
string. Files are read whole (JSON lines one by one), up to the limits below.
"""

from __future__ import annotations

import codecs
import json
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_gpt2.core.errors import DataError, NotFoundError
from lora_gpt2.data.tokenizer import EOS
from lora_gpt2.recipe import DataSettings

SUFFIXES = (".txt", ".md", ".json", ".jsonl")
MAX_FILE_BYTES = 512 * 2**20
MAX_LINE_BYTES = 64 * 2**20
SIGNATURES = (b"\x89PNG", b"%PDF", b"PK\x03\x04", b"\x1f\x8b", b"\x7fELF", b"GIF8", b"\xff\xd8\xff", b"PAR1")
BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


@dataclass(frozen=True)
class Document:
    """One piece of text and where it stood, such as `a.jsonl:12`."""

    text: str
    origin: str


def find_files(sources: Sequence[str]) -> list[Path]:
    """Returns the files of the sources, sorted within each; a folder gives every file in it that we can read.

    Raises:
        NotFoundError: a source names nothing.
        DataError: it is a device, a pipe, or of a kind that we do not read.
    """
    files: list[Path] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            found = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in SUFFIXES and p.is_file()]
            found = [p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts)]
            if not found:
                raise DataError(f"{source} holds no {', '.join(SUFFIXES)} file", "name the files, or another folder")
        elif path.exists():
            if not stat.S_ISREG(path.stat().st_mode):
                raise DataError(f"{source} is not a regular file", "write its content to a file first")
            if path.suffix.lower() not in SUFFIXES:
                hint = f"supported are {', '.join(SUFFIXES)}; rename the file if it is one of them"
                raise DataError(f"{source}: files of kind '{path.suffix}' are not read", hint)
            found = [path]
        else:
            found = _glob(source)
        files += found
    return files


def _glob(source: str) -> list[Path]:
    path = Path(source)
    root = Path(path.anchor) if path.is_absolute() else Path()
    pattern = str(path.relative_to(path.anchor)) if path.is_absolute() else source
    found = []
    if any(c in source for c in "*?["):
        try:
            found = [p for p in sorted(root.glob(pattern)) if p.is_file() and p.suffix.lower() in SUFFIXES]
        except ValueError as error:
            raise DataError(f"'{source}' is not a pattern: {error}", "** stands alone, as in texts/**/*.txt") from error
    if not found:
        raise NotFoundError(f"there is no file, folder or match for '{source}'", "check the path")
    return found


def read_documents(sources: Sequence[str], settings: DataSettings) -> Iterator[Document]:
    """Yields the documents of all sources in order; raises `DataError` at the first one that cannot be read."""
    for path in find_files(sources):
        yield from read_file(path, settings)


def read_file(path: Path, settings: DataSettings) -> Iterator[Document]:
    """Yields the documents of one file."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
        if head.startswith(SIGNATURES):
            raise DataError(f"{path} is a binary file, not text", "convert it to text first")
        suffix = path.suffix.lower()
        if suffix == ".jsonl":
            yield from _read_json_lines(path, settings)
            return
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB", "split it, or use .jsonl")
        text = decode(path.read_bytes(), str(path), settings.encoding_errors)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "check its permissions") from error
    if suffix == ".json":
        yield from _read_json(text, path, settings)
    else:
        for number, part in enumerate(_split_at_eos(text)):
            yield Document(part, str(path) if number == 0 else f"{path}#{number + 1}")


def _split_at_eos(text: str) -> Iterator[str]:
    if EOS not in text:
        yield text
        return
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        if line.strip() == EOS:
            yield "".join(lines).strip("\r\n")
            lines = []
        else:
            lines.append(line)
    if rest := "".join(lines).strip("\r\n"):
        yield rest


def decode(content: bytes, where: str, errors: str) -> str:
    """Returns the text of bytes in UTF-8, or in UTF-16 if they begin so; raises `DataError` with file:offset."""
    encoding = "utf-8"
    for bom, name in BOMS:
        if content.startswith(bom):
            content, encoding = content[len(bom) :], name
            break
    try:
        return content.decode(encoding, errors)
    except UnicodeDecodeError as error:
        found = content[error.start : error.start + 4].hex(" ")
        raise DataError(
            f"{where}: byte {error.start} is not valid {encoding.upper()} (found {found})",
            "convert the file to UTF-8, or use --set data.encoding_errors=replace",
        ) from error


def _read_json_lines(path: Path, settings: DataSettings) -> Iterator[Document]:
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path}:{number}"
            if len(raw) > MAX_LINE_BYTES:
                raise DataError(f"{where}: the line is longer than {MAX_LINE_BYTES >> 20} MiB", "split the document")
            line = decode(raw, where, settings.encoding_errors).strip()
            if line:
                yield Document(_get_text(_parse_json(line, where), where, settings), where)


def _read_json(text: str, path: Path, settings: DataSettings) -> Iterator[Document]:
    value = _parse_json(text, str(path))
    if isinstance(value, dict) and settings.text_field not in value:
        lists = [item for item in value.values() if isinstance(item, list)]
        if len(lists) == 1:
            value = lists[0]
    for number, item in enumerate(value if isinstance(value, list) else [value], start=1):
        where = f"{path}:[{number}]" if isinstance(value, list) else str(path)
        yield Document(_get_text(item, where, settings), where)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        place = f"{where}:{error.lineno}" if error.lineno > 1 else where
        raise DataError(f"{place}: not JSON: {error.msg}, column {error.colno}", "mend or remove the line") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DataError(f"{where}: not JSON: {reason}", "mend or remove it") from error


def _get_text(item: Any, where: str, settings: DataSettings) -> str:
    field = settings.text_field
    if isinstance(item, dict):
        if field not in item:
            known = ", ".join(sorted(map(str, item))[:8]) or "none"
            raise DataError(f"{where}: no field '{field}' (found: {known})", "name it with --set data.text_field=NAME")
        item, where = item[field], f"{where}:{field}"
    if not isinstance(item, str):
        raise DataError(f"{where}: expected text, found {type(item).__name__}", "every document is a string")
    try:
        item.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: character {error.start} is half of a surrogate pair", "mend the escape") from error
    return item
