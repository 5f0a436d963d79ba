"""Formats and encodings beyond plain text and JSON lines: see also test_sources."""

import gzip
import io
import json
import subprocess
import sys
import time

import datasets
import pytest

from lora_gpt2.core.errors import DataError, NotFoundError, ResourceError, UsageError
from lora_gpt2.data.read import hub_dataset as rows
from lora_gpt2.data.read import sources, tables
from lora_gpt2.data.read.formats import ReadingLog, read_documents, read_source
from lora_gpt2.data.read.sources import find_sources
from lora_gpt2.recipe import DataSettings

KOREAN = "<!DOCTYPE html><meta charset=euc-kr>한국"
GERMAN = "Käse, Öl und Brötchen – „gut“ für 3 €"


def read(path, **settings):
    chosen = DataSettings(**settings)
    return [
        document.prompt + "|" + document.text if document.prompt else document.text
        for document in read_documents([str(path)], chosen)
    ]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "settings", "expected"),
    [
        ("a.csv", 'text,n\r\n"a, ""b""\nc",1\r\nd,2\r\n', {}, ['a, "b"\nc', "d"]),
        ("a.csv", "text;n\na;1\n", {}, ["a"]),
        ("a.csv", "body\nx\ny\n", {}, ["x", "y"]),
        ("a.tsv", "text\tn\na, b\t1\n", {}, ["a, b"]),
        ("a.csv", "q,a\n1+1,2\n", {"prompt": "Q: {q}\nA:", "text_field": "a"}, ["Q: 1+1\nA:|2"]),
        ("a.csv", "prompt,completion\np,c\n", {}, ["p|c"]),
        ("a.jsonl", '{"prompt": "p", "completion": "c"}', {}, ["p|c"]),
        ("a.jsonl", '{"q": "x", "n": 3}', {"template": "{q} {n}"}, ["x 3"]),
        ("a.jsonl", '{"a": {"b": [{"t": "x"}, {"t": "y"}]}}', {"text_field": "a.b.t"}, ["x", "y"]),
        ("a.jsonl", '{"a.b": "x"}', {"text_field": "a.b"}, ["x"]),
        (
            "a.jsonl",
            '{"m": [{"role": "user", "content": "hi"}, {"role": "bot", "content": "ho"}]}',
            {"template": "{m}"},
            ["user: hi\nbot: ho"],
        ),
        ("a.jsonl", '[{"text": "x"}, {"text": "y"}]', {}, ["x", "y"]),
        ("a.json", '{"data": [{"q": "x", "a": "y"}]}', {"template": "{q} {a}"}, ["x y"]),
        ("a.json", '{"data": [{"q": "x", "a": "y"}], "v": 1}', {"prompt": "{q}:", "text_field": "a"}, ["x:|y"]),
        ("a.json", '{"q": "x", "tags": ["y"]}', {"template": "{q}"}, ["x"]),
        ("a.txt", "Ä\rÖ".encode("latin-1"), {"encoding": "latin-1", "unit": "line"}, ["Ä", "Ö"]),
        ("a.json", '{"text": "x"}\n{"text": "y"}\n', {}, ["x", "y"]),
        ("a.txt", "p||c\nq||d\n", {"unit": "line", "separator": "||"}, ["p|||c", "q|||d"]),
        ("a.txt", "one\ntwo\r\n\n \n\nthree\n", {"unit": "paragraph"}, ["one\ntwo", "three"]),
        ("a.txt", "one\n\ntwo", {"unit": "line"}, ["one", "two"]),
        ("a.py", "x = 1\n", {"format": "text"}, ["x = 1\n"]),
        ("a.txt", GERMAN.encode("cp1252"), {}, [GERMAN]),
        ("a.txt", f"{GERMAN}\n".encode() + GERMAN.encode("cp1252"), {}, [f"{GERMAN}\n{GERMAN}"]),
        ("a.txt", GERMAN.encode("utf-16-le"), {}, [GERMAN]),
        ("a.txt", "Привет".encode("cp1251"), {"encoding": "cp1251"}, ["Привет"]),
        ("a.txt", ("Привет мир\n" * 50).encode("utf-16"), {}, ["Привет мир\n" * 50]),
        ("a.txt", "cut off é".encode()[:-1], {}, ["cut off "]),
        ("a.txt", "cut off “".encode()[:-1], {}, ["cut off "]),
        ("a.txt", "ça cut off â".encode()[:-1], {}, ["ça cut off "]),
        ("a.txt", "ça\ncut off ”".encode()[:-2], {}, ["ça\ncut off "]),
        ("a.txt", "un café".encode("cp1252"), {}, ["un café"]),
        ("a.txt", "ça\nun café".encode("cp1252"), {}, ["ça\nun café"]),
        ("a.rst", "Title\n=====\n", {}, ["Title\n=====\n"]),
        ("a.csv", "one two three four five six\nx\n", {}, ["x"]),
        ("a.csv", f"{'x' * 64}\nx\n", {}, ["x"]),
        ("a.html", "<p>x</p>", {}, ["<!doctype html>\n<p>x</p>"]),
        ("a.html", "<p>x</p>", {"profile": "raw"}, ["<p>x</p>"]),
        ("a.htm", KOREAN.encode("euc-kr"), {}, [KOREAN]),
        ("a.txt.gz", gzip.compress(b"packed", mtime=0), {}, ["packed"]),
        ("a.jsonl.gz", gzip.compress(b'{"text": "packed"}', mtime=0), {}, ["packed"]),
    ],
)
def test_every_format_and_form_reads(tmp_path, name, content, settings, expected):
    assert read(write(tmp_path / name, content), **settings) == expected


@pytest.mark.parametrize(
    ("name", "content", "settings", "message"),
    [
        ("a.csv", "a,b\n1,2\n", {}, "a.csv: no column 'text' (columns: a, b)"),
        ("a.csv", "text,b\n1\n", {}, "a.csv:2: 1 cells, expected 2"),
        ("a.csv", "one two three four five six seven\nx\n", {}, "the first row looks like text"),
        ("a.csv", f"{'x' * 65}\nx\n", {}, "the first row looks like text"),
        ("a.csv", 'text,b\n"1,2\n', {}, "not a row of the table"),
        ("a.txt", "Привет, мир".encode("cp1251"), {}, "a.txt:1: byte 0 is not valid UTF-8"),
        ("a.txt", "p c", {"separator": "||"}, "the separator '||' is not in it"),
        ("a.txt.gz", gzip.compress(b"x" * 1000, mtime=0)[:-20], {}, "a.txt.gz is damaged"),
        ("a.parquet", b"no", {}, "is not a Parquet file"),
        ("a.jsonl", '{"q": "x"}', {"template": "{q} {z}"}, "a.jsonl:1: no field 'z' (found: q)"),
        ("a.json", '{"a": [1], "b": [2]}', {}, "no field 'text' (found: a, b)"),
        ("a.txt", b"\1\2\3\4 ab", {}, "is a binary file"),
        ("a.pdf", b"%PDF", {}, "a.pdf cannot be read as pdf"),
        ("a.rtf", b"{\\rtf1}", {}, "files of kind '.rtf' are not read"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(tmp_path, name, content, settings, message):
    with pytest.raises(DataError) as caught:
        read(write(tmp_path / name, content), **settings)
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("settings", "is_said"),
    [({}, False), ({"separator": "e"}, False), ({"text_field": "body"}, True), ({"prompt": "{q}"}, True)],
    ids=str,
)
def test_settings_of_fields_are_said_to_change_nothing_in_a_text(tmp_path, settings, is_said):
    for name in ("a.txt", "b.py"):
        write(tmp_path / name, "some text\n")
    log = ReadingLog()
    for source in find_sources([str(tmp_path)], DataSettings(**settings)):
        list(read_source(source, DataSettings(**settings), log))
    assert [count for text, count in log.notes.items() if "data.text_field" in text] == [2] * is_said


def test_an_encoding_that_does_not_exist_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no text encoding 'klingon'"):
        read(write(tmp_path / "a.txt", "x"), encoding="klingon")


def test_bad_rows_are_yielded_where_they_stand_and_the_others_are_read(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "\xff\xff\xff"}\n{no\n{"text": 3}\n{"text": "b"}\n')
    (source,) = find_sources([str(path)], DataSettings())
    items = list(read_source(source, DataSettings()))
    assert [getattr(item, "text", None) for item in items] == ["a", None, None, None, "b"]
    for item, place in zip(items[1:4], ("a.jsonl:2: byte 24", "a.jsonl:3: not JSON", "a.jsonl:4:text"), strict=True):
        assert place in item.message


def test_one_bad_line_of_a_table_or_of_lines_costs_no_other(tmp_path):
    table = b"text,n\n" + b"".join(b"row %d,1\n" % i for i in range(9)) + b"\x81\x81\x8d bad,1\n" + b"last,1\n"
    for name, settings in (("a.csv", {}), ("a.txt", {"unit": "line"})):
        (source,) = find_sources([str(write(tmp_path / name, table))], DataSettings())
        items = list(read_source(source, DataSettings(**settings)))
        assert sum(isinstance(item, DataError) for item in items) == 1
        assert [item.text for item in items if not isinstance(item, DataError)][-1].startswith("last")


def test_long_documents_come_in_pieces_that_lose_nothing(tmp_path):
    text = "\n\n".join(f"paragraph {i} " + "x" * 50 for i in range(200))
    (source,) = find_sources([str(write(tmp_path / "a.txt", text))], DataSettings())
    pieces = list(read_source(source, DataSettings(), piece=1000))
    assert "".join(piece.text for piece in pieces) == text
    assert len(pieces) > 8
    assert [piece.continues for piece in pieces] == [False] + [True] * (len(pieces) - 1)


def test_a_line_of_a_gigabyte_is_refused_without_reading_it_whole(tmp_path):
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        file.truncate(2**30)
    with path.open("r+b") as file:
        file.write(b"x" * 10_000)
    code = (
        "import sys, resource; resource.setrlimit(resource.RLIMIT_AS, (3 << 29, 3 << 29))\n"
        "from lora_gpt2.data.read.formats import read_documents; from lora_gpt2.recipe import DataSettings\n"
        "list(read_documents([sys.argv[1]], DataSettings()))"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert "a line is longer than 64 MiB" in done.stderr


@pytest.mark.parametrize(
    ("content", "encoding"),
    [(b"+2AA- abc", "utf-7"), (b"\\ud800 abc", "raw_unicode_escape")],
)
@pytest.mark.parametrize("name", ["a.txt", "a.html", "a.jsonl", "a.json", "a.csv"])
def test_half_characters_of_a_decoder_are_an_error_of_the_data(tmp_path, name, content, encoding):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        read(path, encoding=encoding)
    assert "half of a surrogate pair" in caught.value.message
    assert "encoding_errors=replace" in caught.value.hint
    assert caught.value.exit_code == 3


def test_whole_characters_of_a_decoder_stay_and_halves_may_be_replaced(tmp_path):
    path = write(tmp_path / "a.txt", b"+2D3eAA- abc")
    assert read(path, encoding="utf-7") == ["\U0001f600 abc"]
    write(path, b"\\ud83d\\ude00")
    assert read(path, encoding="raw_unicode_escape") == ["\U0001f600"]
    write(path, b"a" * 200_000 + b"+2AA-")
    with pytest.raises(DataError, match="half of a surrogate pair"):
        read(path, encoding="utf-7")
    write(path, b"+2AA- abc")
    assert read(path, encoding="utf-7", encoding_errors="replace") == ["\ufffd abc"]


def test_codecs_that_say_no_place_are_an_error_of_the_data(tmp_path):
    for name in ("a.txt", "a.html"):
        with pytest.raises(DataError, match="not valid IDNA"):
            read(write(tmp_path / name, b"xn--\xff" + b"a" * 100), encoding="idna")


def test_a_damaged_saved_data_set_is_an_error_of_the_data(shared, tmp_path):
    junk = {"": ("[]", "{}"), "b": ('{"_data_files": 3}', "{}"), "c": ("null", "null"), "d": ("{", "")}
    for name, (state, info) in junk.items():
        folder = tmp_path / f"saved{name}"
        folder.mkdir()
        (folder / "state.json").write_text(state)
        (folder / "dataset_info.json").write_text(info)
    for folder in [*tmp_path.glob("saved*"), shared / "cases" / "hostile" / "saved-junk"]:
        with pytest.raises(DataError, match="is not a saved data set, or damaged") as caught:
            read(folder)
        assert caught.value.hint == "save it again with save_to_disk"


def test_stdin_is_read_once_and_looked_into(monkeypatch, tmp_path):
    for content, kind in (("plain", "text"), ('{"text": "plain"}', "jsonl"), ("<html>plain", "html")):
        sources._spool_stdin.cache_clear()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
        (source,) = find_sources(["-"], DataSettings())
        assert (source.kind, source.name) == (kind, "<stdin>")
        assert find_sources(["-"], DataSettings())[0].fingerprint() == source.fingerprint()
        assert "plain" in read("-")[0]
    sources._spool_stdin.cache_clear()
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="nothing on stdin"):
        find_sources(["-"], DataSettings())


def test_parquet_and_saved_data_sets_are_read(tmp_path):
    rows = datasets.Dataset.from_list([{"text": "a", "n": 1}, {"text": "b", "n": 2}])
    rows.to_parquet(tmp_path / "a.parquet")
    rows.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"dev": rows}).save_to_disk(str(tmp_path / "several"))
    assert read(tmp_path / "a.parquet") == ["a", "b"]
    assert read(tmp_path / "saved") == ["a", "b"]
    assert read(tmp_path / "several", dataset_split="dev", template="{text}{n}") == ["a1", "b2"]
    with pytest.raises(DataError) as caught:
        read(tmp_path / "several")
    assert "no split 'train'" in caught.value.message
    assert "dev" in caught.value.hint


def test_the_hub_is_asked_by_name_alone_and_its_absence_is_said(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((ResourceError, NotFoundError)) as caught:
        read("hf:someone/nothing")
    assert "someone/nothing" in caught.value.message
    assert caught.value.hint
    asked = []
    monkeypatch.setattr(rows, "find_commit", lambda name: asked.append(name) or "abc")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or iter([{"text": "x"}]))
    assert read("hf:someone/small", dataset_config="en") == ["x"]
    assert asked[0] == "someone/small"
    assert asked[1] == (("someone/small", "en"), {"split": "train", "revision": "abc", "streaming": True})


def test_a_json_bomb_is_refused(tmp_path):
    with pytest.raises(DataError, match="nested too deeply"):
        read(write(tmp_path / "a.json", "[" * 100_000 + "]" * 100_000))
    assert json.loads("[]") == []


@pytest.mark.parametrize("name", ["a.txt", "a.html", "a.json"])
def test_an_encoding_that_is_named_is_the_encoding(tmp_path, name):
    content = {"a.json": '{"text": "café!"}'}.get(name, "café!")
    path = write(tmp_path / name, content.encode("cp1252"))
    assert "café!" in read(path)[0], "by evidence"
    with pytest.raises(DataError, match=r"(?i)utf-8"):
        read(path, encoding="utf-8")


def test_a_quote_that_is_never_closed_costs_its_own_row_alone(tmp_path):
    rows = [f"{number}\tHello number {number}" for number in range(1000)]
    rows[10] = rows[10].replace("Hello", '"Hello')
    path = write(tmp_path / "a.tsv", "n\ttext\n" + "\n".join(rows) + "\n")
    found = list(read_source(find_sources([str(path)], DataSettings())[0], DataSettings()))
    errors = [item for item in found if isinstance(item, DataError)]
    assert [error.message.split(":")[1] for error in errors] == ["12"]
    assert [item.text for item in found if not isinstance(item, DataError)] == [
        f"Hello number {number}" for number in range(1000) if number != 10
    ]


@pytest.mark.parametrize(
    ("record", "prompt", "text"),
    [
        ({"instruction": "When?", "context": "In 2000.", "response": "Then"}, "When?\nIn 2000.\n", "Then"),
        ({"context": "In 2000.", "question": "When?", "answer": "Then"}, "In 2000.\nWhen?\n", "Then"),
        ({"instruction": "Add", "input": "1 2", "response": "3"}, "Add\n1 2\n", "3"),
        ({"question": "When?", "context": "", "answer": "Then"}, "When?\n", "Then"),
        ({"prompt": "When?", "response": "Then", "system": "Be brief."}, "Be brief.\nWhen?\n", "Then"),
        ({"input": "When?", "output": "Then", "system": "Be brief."}, "Be brief.\nWhen?\n", "Then"),
        (
            {"system": "Be kind.", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "system: Be kind.\nuser: a\nassistant:",
            " b",
        ),
        (
            {"system": "Be kind.", "instruction": "Add", "output": "3"},
            "Be kind.\n\n### Instruction:\nAdd\n\n### Response:\n",
            "3",
        ),
    ],
)
def test_context_belongs_to_the_prompt(tmp_path, record, prompt, text):
    path = write(tmp_path / "a.jsonl", json.dumps(record) + "\n")
    (document,) = read_documents([str(path)], DataSettings())
    assert (document.prompt, document.text) == (prompt, text)


@pytest.mark.parametrize("names", [("question", "answer"), ("prompt", "completion")])
def test_fields_that_are_not_read_are_named(tmp_path, names):
    record = {**dict.fromkeys(names, "text"), "id": "7", "notes": "some longer words", "history": [["a", "b"]]}
    log = ReadingLog()
    path = write(tmp_path / "a.jsonl", json.dumps(record) + "\n")
    list(read_source(find_sources([str(path)], DataSettings())[0], DataSettings(), log))
    assert any("not read: notes, history" in note for note in log.notes)


@pytest.mark.parametrize("columns", [("title", "text"), ("text",)])
def test_a_cell_of_a_table_may_hold_a_book(tmp_path, columns):
    book = "\n".join(f"line {number} of it" for number in range(12_000))
    rows = "".join(",".join(["x"] * (len(columns) - 1) + [f'"{book}"']) + "\n" for _ in range(2))
    path = write(tmp_path / "a.csv", f"{','.join(columns)}\n{rows}")
    assert [document.text for document in read_documents([str(path)], DataSettings())] == [book] * 2


def test_quotes_that_are_never_closed_are_looked_for_a_limited_time(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_SPENT_CHARACTERS", 100_000)
    path = write(tmp_path / "a.csv", "a,text\n" + 'x","y\n' * 20_000 + "x,the end\n")
    started = time.perf_counter()
    found = list(read_source(find_sources([str(path)], DataSettings())[0], DataSettings(), ReadingLog()))
    assert time.perf_counter() - started < 5
    assert sum(isinstance(item, DataError) for item in found) == 20_000
    assert [item.text for item in found if not isinstance(item, DataError)] == ["the end"]
