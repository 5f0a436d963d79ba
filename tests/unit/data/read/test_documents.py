"""Books, office documents, PDF, subtitles, mail and archives of files become the text that people wrote in them."""

import io
import tarfile
import zipfile

import pytest

from lora_gpt2.core.console import SilentReporter
from lora_gpt2.core.errors import DataError, ResourceError
from lora_gpt2.data.pipeline import read_clean
from lora_gpt2.data.read import archives
from lora_gpt2.data.read.documents import READERS
from lora_gpt2.data.read.formats import ReadingLog, read_source
from lora_gpt2.data.read.sources import DOCUMENTS, find_sources, find_splits
from lora_gpt2.recipe import DataSettings

RAW = DataSettings(profile="raw")
TEXT = "The tenant pays the rent on the first day of the month."


def read(path, settings=RAW):
    log = ReadingLog()
    items = [item for source in find_sources([str(path)], settings) for item in read_source(source, settings, log)]
    return items, log


def read_texts(path):
    return [item.text for item in read(path)[0]]


def write_docx(path):
    import docx

    document = docx.Document()
    document.add_heading("Lease", 1)
    document.add_paragraph(TEXT)
    table = document.add_table(rows=2, cols=2)
    for row, cells in enumerate((("Rent", "900"), ("Deposit", "1,800"))):
        for column, cell in enumerate(cells):
            table.cell(row, column).text = cell
    document.add_paragraph("Signed.")
    document.save(path)
    return f"Lease\n\n{TEXT}\n\nRent\t900\nDeposit\t1,800\n\nSigned."


def write_odt(path):
    from odf import text
    from odf.opendocument import OpenDocumentText

    document = OpenDocumentText()
    document.text.addElement(text.H(outlinelevel=1, text="Lease"))
    items = text.List()
    item = text.ListItem()
    item.addElement(text.P(text="one"))
    items.addElement(item)
    for element in (text.P(text=TEXT), items, text.P(text="Signed.")):
        document.text.addElement(element)
    document.save(str(path))
    return f"Lease\n\n{TEXT}\n\none\n\nSigned."


def write_epub(path, **more):
    page = "<?xml version='1.0'?><html><head><title>x</title></head><body><h1>{}</h1><p>{}</p></body></html>"
    opf = """<package xmlns="http://www.idpf.org/2007/opf"><manifest>
    <item id="b" href="b%20two.xhtml"/><item id="a" href="../text/a.xhtml"/><item id="n" href="nav.xhtml"/></manifest>
    <spine><itemref idref="a"/><itemref idref="b"/><itemref idref="n" linear="no"/></spine></package>"""
    container = "<container><rootfiles><rootfile full-path='book/c.opf'/></rootfiles></container>"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("META-INF/container.xml", container)
        archive.writestr("book/c.opf", opf)
        archive.writestr("text/a.xhtml", page.format("One", TEXT))
        archive.writestr("book/b two.xhtml", page.format("Two", "Café ends."))
        archive.writestr("book/nav.xhtml", page.format("Contents", "1 2 3"))
        for name, content in more.items():
            archive.writestr(name, content)
    return f"One\n\n{TEXT}\n\nTwo\n\nCafé ends."


def write_pdf(path):
    import matplotlib.backends.backend_pdf
    import pypdf
    from matplotlib.figure import Figure

    pages = io.BytesIO()
    with matplotlib.rc_context({"pdf.fonttype": 42}), matplotlib.backends.backend_pdf.PdfPages(pages) as pdf:
        figure = Figure()
        for row, line in enumerate(("The landlord and the ten-", "ant agree on what", "follows. It is", "binding.")):
            figure.text(0.1, 0.9 - row / 20, line)
        pdf.savefig(figure)
    writer = pypdf.PdfWriter()
    writer.append(pypdf.PdfReader(pages))
    writer.add_blank_page()
    writer.add_blank_page()
    writer.write(path)
    return "The landlord and the tenant agree on what follows. It is binding."


def write_srt(path):
    path.write_text(
        "1\n00:00:01,000 --> 00:00:02,000\n<i>Hello</i> there.\n\n2\n00:00:02,000 --> 00:00:03,000\nHello there.\n\n"
        "3\n00:00:04,000 --> 00:00:05,000\nWho is\nit?\n"
    )
    return "Hello there.\nWho is it?"


def write_eml(path):
    path.write_bytes(
        b"From: a@b\r\nSubject: =?utf-8?q?Caf=C3=A9?=\r\nMIME-Version: 1.0\r\n"
        b"Content-Type: multipart/mixed; boundary=X\r\n\r\n--X\r\nContent-Type: text/plain; charset=latin-1\r\n\r\n"
        b"See you at the caf\xe9.\r\n--X\r\nContent-Type: image/png\r\n\r\nxxxx\r\n--X--\r\n"
    )
    return "Café\n\nSee you at the café."


WRITERS = {
    ".docx": write_docx,
    ".odt": write_odt,
    ".epub": write_epub,
    ".pdf": write_pdf,
    ".srt": write_srt,
    ".eml": write_eml,
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_document_is_its_text(tmp_path, suffix):
    path = tmp_path / f"own{suffix}"
    expected = WRITERS[suffix](path)
    items, log = read(path)
    assert [item.text for item in items] == [expected]
    assert items[0].origin == str(path)
    notes = {".pdf": [f"{path}: 2 of 3 pages have no text, as scans have none: 2-3"]}
    assert list(log.notes) == notes.get(suffix, [])
    packed = tmp_path / f"packed{suffix}.gz"
    import gzip

    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_texts(packed) == [expected]


def test_a_mailbox_is_its_messages(tmp_path):
    path = tmp_path / "own.mbox"
    path.write_bytes(
        b"From a@b Mon\nSubject: one\n\nFirst.\n>From here on.\n\nFrom c@d Tue\nSubject: two\n"
        b"Content-Type: text/html\n\n<p>Second <b>text</b>.</p>\n"
    )
    assert read_texts(path) == ["one\n\nFirst.\nFrom here on.", "two\n\nSecond text."]


def test_web_subtitles_are_read(tmp_path):
    path = tmp_path / "own.vtt"
    path.write_text("WEBVTT\n\nNOTE x\n\n00:01.000 --> 00:02.000 align:start\n<v Anna>Good morning.\n")
    assert read_texts(path) == ["Good morning."]


def test_what_is_damaged_or_something_else_is_an_error_that_names_the_file(tmp_path):
    for suffix, kind in DOCUMENTS.items():
        for content in (b"", b"\x00\xff" * 50, b"PK\x03\x04" + b"x" * 200, b"%PDF-1.7\n%%EOF", b"hello"):
            path = tmp_path / f"bad{suffix}"
            path.write_bytes(content)
            for item in read(path)[0]:
                if isinstance(item, DataError):
                    assert str(path) in item.message
                else:
                    assert kind in ("subtitles", "mail", "mailbox"), (suffix, content)
    book = tmp_path / "drm.epub"
    write_epub(book, **{"META-INF/rights.xml": "x"})
    assert "protected" in read(book)[0][0].message
    bomb = tmp_path / "bomb.docx"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", b" " * 50_000_000)
    assert "unpacks to 50,000,000 bytes" in read(bomb)[0][0].message
    entities = tmp_path / "entities.epub"
    container = '<!DOCTYPE a [<!ENTITY a "x"><!ENTITY b "&a;&a;">]><container>&b;</container>'
    with zipfile.ZipFile(entities, "w") as archive:
        archive.writestr("META-INF/container.xml", container)
    assert "cannot be read as epub" in read(entities)[0][0].message


def test_a_pdf_without_readable_text_is_refused(tmp_path):
    import pypdf

    writer = pypdf.PdfWriter()
    writer.add_blank_page(100, 100)
    writer.write(tmp_path / "scan.pdf")
    assert "1 of 1 pages have no text, as scans have none: 1" in read(tmp_path / "scan.pdf")[0][0].message
    write_pdf(tmp_path / "good.pdf")
    writer = pypdf.PdfWriter(clone_from=tmp_path / "good.pdf")
    for font in writer.pages[0]["/Resources"]["/Font"].values():
        font.get_object().pop("/ToUnicode", None)
    writer.write(tmp_path / "fonts.pdf")
    found = read(tmp_path / "fonts.pdf")[0][0]
    assert isinstance(found, DataError), "glyph numbers would be read as other letters"
    assert "fonts that name no characters: 1" in found.message


def test_an_encrypted_pdf_is_named(tmp_path):
    import pypdf

    writer = pypdf.PdfWriter()
    writer.add_blank_page(100, 100)
    writer.encrypt("secret", algorithm="RC4-128")
    writer.write(tmp_path / "own.pdf")
    assert "is encrypted" in read(tmp_path / "own.pdf")[0][0].message


def test_a_missing_library_says_what_to_install(tmp_path, monkeypatch):
    write_docx(tmp_path / "own.docx")
    monkeypatch.setitem(__import__("sys").modules, "docx", None)
    with pytest.raises(ResourceError, match="needs docx") as caught:
        read(tmp_path / "own.docx")
    assert caught.value.hint == "pip install 'lora-gpt2[documents]'"


def pack(path, files):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("name", ["own.zip", "own.tar.gz", "own.tgz"])
def test_an_archive_is_a_folder_of_its_files(tmp_path, name):
    path = tmp_path / name
    book = tmp_path / "b.epub"
    expected = write_epub(book)
    files = {
        "text/b.txt": b"B",
        "a.jsonl": b'{"text": "A"}\n',
        "c.epub": book.read_bytes(),
        "picture.png": b"\x89PNG",
        ".hidden.txt": b"no",
        "__MACOSX/._a.jsonl": b"no",
        "../../evil.txt": b"E",
        "/root.txt": b"R",
    }
    pack(path, files)
    items, _ = read(path)
    found = {item.origin.removeprefix(f"{path}/"): item.text for item in items}
    assert found == {
        "text/b.txt": "B",
        "a.jsonl:1": "A",
        "c.epub": expected,
        "evil.txt": "E",
        "root.txt": "R",
    }
    assert not (tmp_path.parent / "evil.txt").exists()
    folder = tmp_path / "folder"
    folder.mkdir()
    path.rename(folder / name)
    assert len(read(folder)[0]) == len(items)
    pack(folder / "splits.zip", {"train.txt": b"T", "test.txt": b"S"})
    assert {k: len(v) for k, v in find_splits([str(folder / "splits.zip")], RAW).items()} == {
        "train": 1,
        "validation": 0,
        "test": 1,
    }


def test_archives_that_cannot_be_unpacked_are_refused(tmp_path, monkeypatch):
    pack(tmp_path / "empty.zip", {"a.png": b"x"})
    with pytest.raises(DataError, match="holds no file that is read"):
        read(tmp_path / "empty.zip")
    for name in ("bad.zip", "bad.tar.gz", "bad.tar"):
        (tmp_path / name).write_bytes(b"nothing" * 100)
        with pytest.raises(DataError, match="cannot be unpacked"):
            read(tmp_path / name)
    pack(tmp_path / "cut.tgz", {"a.txt": bytes(range(256)) * 500})
    content = (tmp_path / "cut.tgz").read_bytes()
    (tmp_path / "cut.tgz").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="cannot be unpacked"):
        read(tmp_path / "cut.tgz")
    monkeypatch.setattr(archives, "SMALL", 1000)
    monkeypatch.setattr(archives, "MAX_RATIO", 10)
    pack(tmp_path / "bomb.zip", {"a.txt": b"a" * 100_000})
    with pytest.raises(DataError, match="unpacks to more than"):
        read(tmp_path / "bomb.zip")
    with tarfile.open(tmp_path / "links.tar", "w") as archive:
        member = tarfile.TarInfo("passwd.txt")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(DataError, match="holds no file"):
        read(tmp_path / "links.tar")


def test_documents_are_measured_as_they_are_trained(tmp_path):
    """The same receipts and rules as any other text."""
    write_pdf(tmp_path / "a.pdf")
    said = []

    class Reporter(SilentReporter):
        def message(self, text):
            said.append(text)

    clean = read_clean([str(tmp_path / "a.pdf")], DataSettings(), Reporter())
    assert len(clean.documents) == 1
    assert any("pages have no text" in line for line in said)
    assert set(READERS) == set(DOCUMENTS.values())
