"""Books, office documents, PDF, subtitles and mail as plain text, each through a library of the extra `documents`.

Each reader takes the bytes of a file and yields texts; what a library raises becomes a `DataError`.
"""

from __future__ import annotations

import io
import posixpath
import re
import zipfile
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

from lora_gpt2.core.errors import DataError, LoraGpt2Error, ResourceError
from lora_gpt2.data.clean.html import extract_text
from lora_gpt2.data.read.layouts import Note

MAX_UNPACKED_BYTES, MAX_RATIO = 2**30, 200
"""Of a book or an office document, which are archives: a larger one, or one packed more tightly, is no document."""
MAX_NAMED = 20
HYPHEN = re.compile(r"(\w)-\n(?=[a-z])")
WRAPPED = re.compile(r"(?<![.!?:;\n])\n(?=[a-z(])")
CONTAINER = "META-INF/container.xml"
EXTRA = "pip install 'lora-gpt2[documents]'"
Texts = Iterator[str]


def read_pdf(content: bytes, where: str, note: Note) -> Texts:
    """Yields the text layer of a PDF, lines that belong together joined; names the pages that have none."""
    import pypdf

    reader = pypdf.PdfReader(io.BytesIO(content))
    if reader.is_encrypted and not reader.decrypt(""):
        raise DataError(f"{where} is encrypted", "save it without a password")
    pages = ["" if _has_unmapped_font(page) else page.extract_text().strip() for page in reader.pages]
    unmapped = [number for number, page in enumerate(reader.pages, start=1) if _has_unmapped_font(page)]
    empty = [number for number, text in enumerate(pages, start=1) if not text and number not in unmapped]
    reasons = ((empty, "have no text, as scans have none"), (unmapped, "have fonts that name no characters"))
    said = [f"{len(found)} of {len(pages)} pages {why}: {_list_ranges(found)}" for found, why in reasons if found]
    if not any(pages):
        raise DataError(
            f"{where}: {'; '.join(said) or 'it has no pages'}", "recognise its text first: ocrmypdf --force-ocr"
        )
    for line in said:
        note(f"{where}: {line}")
    text = "\n\n".join(page for page in pages if page)
    yield WRAPPED.sub(" ", HYPHEN.sub(r"\1", text))


def _has_unmapped_font(page: Any) -> bool:
    """True if a font of a page has glyphs by number and no map to characters, so that its text would be nonsense."""
    resources = page.get("/Resources")
    fonts = resources.get_object().get("/Font") if resources is not None else None
    return any(_is_unmapped(font.get_object()) for font in (fonts.get_object().values() if fonts is not None else ()))


def _is_unmapped(font: Any) -> bool:
    if font.get("/Subtype") != "/Type0" or not str(font.get("/Encoding")).startswith("/Identity"):
        return False
    characters = font.get("/ToUnicode")
    return characters is None or b"beginbf" not in characters.get_object().get_data()


def read_docx(content: bytes, where: str, note: Note) -> Texts:
    """Yields the paragraphs and tables of a Word document, in their order."""
    import docx
    from docx.table import Table

    _check_archive(content, where)
    blocks = []
    for block in docx.Document(io.BytesIO(content)).iter_inner_content():
        if isinstance(block, Table):
            blocks.append("\n".join("\t".join(cell.text.strip() for cell in row.cells) for row in block.rows))
        else:
            blocks.append(block.text.strip())
    yield "\n\n".join(block for block in blocks if block.strip())


def read_odt(content: bytes, where: str, note: Note) -> Texts:
    """Yields the headings and paragraphs of an OpenDocument text."""
    from odf import opendocument, teletype
    from odf.element import Element

    _check_archive(content, where)

    def walk(element: Any) -> Iterator[str]:
        for child in element.childNodes:
            if isinstance(child, Element) and child.qname[1] in ("h", "p"):
                yield teletype.extractText(child).strip()
            elif isinstance(child, Element):
                yield from walk(child)

    body = opendocument.load(io.BytesIO(content)).text
    yield "\n\n".join(text for text in walk(body) if text)


def read_epub(content: bytes, where: str, note: Note) -> Texts:
    """Yields the text of a book, its chapters in reading order."""
    from defusedxml import ElementTree

    archive = _check_archive(content, where)
    if "META-INF/rights.xml" in archive.namelist():
        raise DataError(f"{where} is protected (DRM)", "use a copy without protection")
    package = ElementTree.fromstring(archive.read(CONTAINER)).find(".//{*}rootfile").get("full-path")
    tree = ElementTree.fromstring(archive.read(package))
    folder = posixpath.dirname(package)
    paths = {item.get("id"): item.get("href") for item in tree.iterfind(".//{*}manifest/{*}item")}
    order = [item.get("idref") for item in tree.iterfind(".//{*}spine/{*}itemref") if item.get("linear") != "no"]
    chapters = []
    for name in order:
        page = archive.read(posixpath.normpath(posixpath.join(folder, unquote(paths[name]))))
        chapters.append(extract_text(page.decode("utf-8-sig", errors="replace")).strip())
    yield "\n\n".join(chapter for chapter in chapters if chapter)


def read_subtitles(content: bytes, where: str, note: Note) -> Texts:
    """Yields what is said in subtitles, a line for each, without times and markup; one that stays is taken once."""
    import pysubs2

    events = pysubs2.SSAFile.from_string(content.decode("utf-8-sig", errors="replace"))
    lines = [" ".join(event.plaintext.split()) for event in events if not event.is_comment]
    yield "\n".join(line for index, line in enumerate(lines) if line and line != (lines[index - 1] if index else ""))


def read_mail(content: bytes, where: str, note: Note) -> Texts:
    """Yields the subject and the text of a message (.eml), without headers and attachments."""
    from email import message_from_bytes
    from email.policy import default

    yield _extract_message(message_from_bytes(content, policy=default))


def read_mailbox(content: bytes, where: str, note: Note) -> Texts:
    """Yields each message of a mailbox (.mbox)."""
    from email import message_from_bytes
    from email.policy import default

    for message in re.split(rb"(?:\A|\r?\n)From [^\n]*\n", content)[1:]:
        yield _extract_message(message_from_bytes(message.replace(b"\n>From ", b"\nFrom "), policy=default))


def _extract_message(message: Any) -> str:
    body = message.get_body(("plain", "html"))
    try:
        text = str(body.get_content()) if body is not None else ""
    except LookupError:  # a charset that Python does not know
        text = body.get_payload(decode=True).decode("utf-8", "replace")
    if body is not None and body.get_content_subtype() == "html":
        text = extract_text(text if text.lstrip().lower().startswith(("<html", "<!doctype")) else f"<html>{text}")
    return f"{message['subject'] or ''}\n\n{text.strip()}".strip()


READERS: dict[str, Callable[[bytes, str, Note], Texts]] = {
    "pdf": read_pdf,
    "docx": read_docx,
    "odt": read_odt,
    "epub": read_epub,
    "subtitles": read_subtitles,
    "mail": read_mail,
    "mailbox": read_mailbox,
}
"""Readers by kind of source."""


def read_document(kind: str, content: bytes, where: str, note: Note) -> Texts:
    """Yields the texts of a document.

    Raises:
        DataError: it is damaged, encrypted, or of another kind than its name says.
        ResourceError: its library is not installed.
    """
    try:
        yield from READERS[kind](content, where, note)
    except ImportError as error:
        raise ResourceError(f"reading {where} needs {error.name}, which is not installed", EXTRA) from error
    except LoraGpt2Error:
        raise
    except RecursionError as error:
        raise DataError(f"{where} is nested too deeply", "convert it to text") from error
    except MemoryError:
        raise
    except Exception as error:  # whatever a library makes of bytes that are something else
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{where} cannot be read as {kind}: {reason}", "convert it to text, or leave it out") from error


def _check_archive(content: bytes, where: str) -> zipfile.ZipFile:
    archive = zipfile.ZipFile(io.BytesIO(content))
    unpacked = sum(item.file_size for item in archive.infolist())
    if unpacked > MAX_UNPACKED_BYTES or unpacked > MAX_RATIO * len(content):
        raise DataError(f"{where} unpacks to {unpacked:,} bytes", "that is no document; leave it out")
    return archive


def _list_ranges(numbers: list[int]) -> str:
    """Returns numbers as people write them: 1, 3-5, 9; the first few of many."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    shown = [f"{first}" if first == last else f"{first}-{last}" for first, last in ranges[:MAX_NAMED]]
    return ", ".join([*shown, "…"] if len(ranges) > MAX_NAMED else shown)
