"""Bytes to text, by evidence: a mark, valid UTF-8, what a page declares, else Windows-1252 if it reads like it.

What is none of these is an error with its place, never a guess that turns a text into other letters.
"""

from __future__ import annotations

import codecs
import contextlib
import re
from collections.abc import Iterable, Iterator
from io import BufferedReader

from lora_gpt2.core.errors import DataError, UsageError

MAX_LINE_BYTES = 64 * 2**20
PEEKED = 2**16
BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
SIGNATURES = (b"\x89PNG", b"%PDF", b"PK\x03\x04", b"\x1f\x8b", b"\x7fELF", b"GIF8", b"\xff\xd8\xff", b"PAR1")
DECLARED = re.compile(rb"""(?:charset\s*=|<\?xml[^>]{0,80}\sencoding\s*=)\s*["']?\s*([A-Za-z0-9_.:-]{2,40})""", re.I)
BROWSER_ALIASES = {
    "iso8859-1": "cp1252",
    "ascii": "cp1252",
    "iso8859-9": "cp1254",
    "euc_kr": "cp949",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "tis-620": "cp874",
}
SEVEN_BITS = ("iso2022_jp", "iso2022_kr", "hz", "utf-7")
LIKELY_CP1252 = frozenset(  # letters of western languages and the punctuation of word processors
    bytes(
        [0x80, 0x82, 0x84, 0x85, 0x8A, 0x8C, 0x8E, *range(0x91, 0x98), 0x99, 0x9A, 0x9C, 0x9E, 0xA0, 0xA1, 0xA3, 0xA7]
    ).decode("cp1252")
    + bytes([0xA9, 0xAB, 0xAE, *range(0xB0, 0xB5), 0xB7, *range(0xBA, 0xBF)]).decode("cp1252")
    + bytes(
        {*range(0xBF, 0x100)} - {0xC3, 0xCC, 0xD0, 0xD2, 0xD5, 0xD7, 0xD9, 0xDB, 0xDD, 0xDE, 0xF0, 0xF7, 0xFE, 0xFF}
    ).decode("cp1252")
)
PLAUSIBLE_SHARE = 0.9
SURROGATE = re.compile("[\ud800-\udfff]")
Lines = Iterator[str | DataError]


def check_is_text(head: bytes, where: str, encoding: str = "auto") -> None:
    """Raises `DataError` if the first bytes of a file are those of a binary format, or mostly control characters."""
    control = sum(byte < 9 or 13 < byte < 27 or 27 < byte < 32 for byte in head)
    is_known = encoding != "auto" or find_mark(head)[0] is not None
    if head.startswith(SIGNATURES) or (control > len(head) * 0.1 and not is_known):
        raise DataError(f"{where} is a binary file, not text", "convert it to text first")


def check_encoding(name: str) -> str:
    """Returns an encoding's name as Python spells it; raises `UsageError` if Python has none of that name."""
    try:
        "".encode(name)
        return codecs.lookup(name).name
    except (LookupError, ValueError) as error:
        raise UsageError(f"there is no text encoding '{name}'", "such as utf-8, cp1252, cp1251 or shift_jis") from error


def find_declared(head: bytes) -> str | None:
    """Returns the encoding that an HTML or XML page declares in its first bytes, as browsers read it, or None."""
    match = DECLARED.search(head)
    try:
        name = codecs.lookup(match[1].decode("ascii")).name if match else None
        "".encode(name or "utf-8")
    except (LookupError, ValueError):
        return None
    return None if name in (None, "utf-16", "utf-16-le", "utf-16-be") else BROWSER_ALIASES.get(name, name)


def find_mark(head: bytes) -> tuple[str | None, int]:
    """Returns the encoding that a byte-order mark, or zero bytes in every other place, gives away; and its length."""
    for mark, name in BOMS:
        if head.startswith(mark):
            return name, len(mark)
    return _find_wide(head), 0


def _find_wide(head: bytes) -> str | None:
    """Returns UTF-16 without a mark: text in Latin letters, so every other byte is zero."""
    half = len(head) // 2
    if half >= 4:
        for name, zero, letter in (("utf-16-le", head[1::2], head[::2]), ("utf-16-be", head[::2], head[1::2])):
            if zero[:half].count(0) > 0.7 * half and letter[:half].count(0) < 0.1 * half:
                return name
    return None


def decode(content: bytes, where: str, errors: str, encoding: str = "auto", declared: str | None = None) -> str:
    """Returns the text of some bytes; `declared` is tried when they are not valid UTF-8.

    Raises:
        DataError: with file:offset, where they are in no encoding that can be told.
    """
    mark, length = find_mark(content[:256])
    chosen = mark if encoding == "auto" else check_encoding(encoding)
    if chosen is None and declared is not None:
        for name in (declared,) if declared in SEVEN_BITS else ("utf-8", declared):  # pages lie about it
            with contextlib.suppress(UnicodeDecodeError):
                return content.decode(name).encode("utf-8", "replace").decode()  # UTF-7 may hold half characters
    if chosen is not None:
        return _decode_as(content[length if mark == chosen else 0 :], chosen, where, errors, length)
    return "".join(raise_errors(_decode_lines(content.splitlines(keepends=True), where, errors)))


def iter_lines(file: BufferedReader, where: str, errors: str, encoding: str = "auto") -> Lines:
    """Yields the lines of a file of any size, ends included; each may be UTF-8 or, by evidence, Windows-1252.

    Lines end in a line feed, or, where the beginning of the file has none, in a carriage return. A line that can be
    read as neither encoding is yielded as the error.

    Raises:
        DataError: a line is longer than `MAX_LINE_BYTES`, or not in the encoding that the file's mark or user names.
    """
    mark, length = find_mark(file.peek(256)[:256])
    chosen = mark if encoding == "auto" else check_encoding(encoding)
    if mark == chosen:
        file.read(length)
    head = file.peek(PEEKED)
    is_old = b"\r" in head and b"\n" not in head
    if chosen is None or (chosen == "utf-8" and encoding == "auto"):
        raw = _iter_old_lines(file, where) if is_old else _iter_raw_lines(file, where)
        yield from _decode_lines(raw, where, errors, length)
        return
    decoder = codecs.getincrementaldecoder(chosen)(errors)
    offset, pending = length, ""
    while piece := file.read(1 << 16):
        try:
            pending += decoder.decode(piece)
        except UnicodeDecodeError as error:
            raise _refuse(where, offset + error.start, chosen, piece[error.start : error.start + 4]) from error
        except UnicodeError as error:  # UTF-16 without the mark it should begin with
            raise _refuse(where, offset, chosen, piece[:4]) from error
        offset += len(piece)
        *lines, pending = pending.split("\r" if is_old else "\n")
        yield from (_join_surrogates(f"{line}\n", where, errors) for line in lines)
        if len(pending) > MAX_LINE_BYTES:
            raise _refuse_line(where)
    yield _join_surrogates(pending, where, errors)  # half a character at the end is left out


def _iter_raw_lines(file: BufferedReader, where: str) -> Iterator[bytes]:
    while line := file.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES:
            raise _refuse_line(where)
        yield line


def _iter_old_lines(file: BufferedReader, where: str) -> Iterator[bytes]:
    """Yields the lines of a file in which carriage returns end them, as on old Macs and in some exports."""
    pending = b""
    while piece := file.read(PEEKED):
        *lines, pending = (pending + piece).split(b"\r")
        if len(pending) > MAX_LINE_BYTES:
            raise _refuse_line(where)
        yield from (line + b"\r" for line in lines)
    if pending:
        yield pending


def _decode_lines(lines: Iterable[bytes], where: str, errors: str, offset: int = 0) -> Lines:
    is_utf8 = False  # a character beyond ASCII has been seen
    for number, line in enumerate(lines, start=1):
        try:
            text: str | DataError = line.decode("utf-8")
        except UnicodeDecodeError as error:
            text = _decode_odd_line(line, error, f"{where}:{number}", offset, errors, is_utf8)
        else:
            is_utf8 = is_utf8 or not line.isascii()
        yield text
        offset += len(line)


def raise_errors(lines: Lines) -> Iterator[str]:
    """Yields the lines, and raises the first error among them."""
    for line in lines:
        if isinstance(line, DataError):
            raise line
        yield line


def _decode_odd_line(
    line: bytes, error: UnicodeDecodeError, where: str, offset: int, errors: str, is_utf8: bool
) -> str | DataError:
    """Returns a line that is not UTF-8: cut short at its end, Windows-1252, with U+FFFD if wanted; or the error.

    One byte that could begin a character at the very end is a download that broke off where UTF-8 was seen before
    (`is_utf8`), and else a letter of Windows-1252 if it is a likely one.
    """
    is_cut = error.reason == "unexpected end of data" and error.end == len(line) and not line.endswith(b"\n")
    is_begun = is_utf8 or not line[: error.start].isascii() or error.end - error.start > 1
    high = line.decode("cp1252", "replace").translate(_ASCII_GONE)
    is_likely = sum(c in LIKELY_CP1252 for c in high) >= PLAUSIBLE_SHARE * len(high) and "\ufffd" not in high
    if is_cut and (is_begun or not is_likely):
        return line[: error.start].decode("utf-8")
    if is_likely:
        return line.decode("cp1252")
    if errors == "replace":
        return line.decode("utf-8", errors)
    return _refuse(where, offset + error.start, "utf-8", line[error.start : error.start + 4])


_ASCII_GONE = dict.fromkeys(range(128))


def _decode_as(content: bytes, encoding: str, where: str, errors: str, offset: int) -> str:
    try:
        return _join_surrogates(content.decode(encoding, errors), where, errors)
    except UnicodeDecodeError as error:
        found = content[error.start : error.start + 4]
        raise _refuse(where, offset + error.start, encoding, found) from error
    except UnicodeError as error:  # idna and punycode say no offset
        raise _refuse(where, offset, encoding, content[:4]) from error


def _join_surrogates(text: str, where: str, errors: str) -> str:
    """Returns decoded text with surrogate pairs joined; UTF-7 and the codecs of escapes leave halves behind."""
    if SURROGATE.search(text) is None:
        return text
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", errors)
    except UnicodeDecodeError as error:
        hint = "name its encoding with --set data.encoding=NAME, or use --set data.encoding_errors=replace"
        raise DataError(f"{where}: the text holds half of a surrogate pair, which is no character", hint) from error


def _refuse(where: str, offset: int, encoding: str, found: bytes) -> DataError:
    return DataError(
        f"{where}: byte {offset} is not valid {encoding.upper()} (found {found.hex(' ')})",
        "name its encoding with --set data.encoding=NAME, or use --set data.encoding_errors=replace",
    )


def _refuse_line(where: str) -> DataError:
    return DataError(f"{where}: a line is longer than {MAX_LINE_BYTES >> 20} MiB", "split it into lines or documents")
