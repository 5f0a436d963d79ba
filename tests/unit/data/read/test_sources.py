import json
import os

import pytest

from lora_gpt2.core.errors import DataError, NotFoundError
from lora_gpt2.data.read import encoding, formats
from lora_gpt2.data.read.formats import read_documents
from lora_gpt2.data.read.sources import describe_unread, find_sources
from lora_gpt2.recipe import DataSettings

STRICT = DataSettings()


def texts(*paths, settings=STRICT):
    return [document.text for document in read_documents([str(path) for path in paths], settings)]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\n\ntwo\n", ["one\n\ntwo\n"]),
        ("a.txt", "one\n<|endoftext|>\ntwo\n<|endoftext|>\n", ["one", "two"]),
        ("a.txt", b"\xef\xbb\xbfbom", ["bom"]),
        ("a.txt", "utf-16 ä".encode("utf-16"), ["utf-16 ä"]),
        ("a.txt", b"\xfe\xff" + "big ä".encode("utf-16-be"), ["big ä"]),
        ("a.txt", "", [""]),
        ("a.md", "# t", ["# t"]),
        ("a.jsonl", '{"text": "x"}\n\n{"text": "y", "id": 1}\n"z"\n', ["x", "y", "z"]),
        ("a.jsonl", '{"text": "a", "n": NaN}', ["a"]),
        ("a.json", '["x", {"text": "y"}]', ["x", "y"]),
        ("a.json", '{"meta": 1, "rows": [{"text": "x"}]}', ["x"]),
        ("a.json", '{"text": "x"}', ["x"]),
        ("a.JSON", '{\n"text": "\\ud83d\\ude00"}', ["😀"]),
    ],
)
def test_every_format_reads(tmp_path, name, content, expected):
    assert texts(write(tmp_path / name, content)) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ok \xff\xfe no", "byte 3 is not valid UTF-8 (found ff fe"),
        ("a.txt", b"\x89PNG\r\n", "is a binary file"),
        ("a.txt", b"%PDF-1.7", "is a binary file"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl:2: byte"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b"', "a.jsonl:2: not JSON"),
        ("a.jsonl", '{"other": "a"}', "a.jsonl:1: no field 'text' (found: other)"),
        ("a.jsonl", '{"text": NaN}', "a.jsonl:1:text: expected text, found NaN"),
        ("a.jsonl", '{"text": null}', "a.jsonl:1:text: expected text, found NoneType"),
        ("a.jsonl", '{"text": ["a"]}', "a.jsonl:1:text: expected text, found list"),
        ("a.jsonl", '{"text": "\\ud800"}', "half of a surrogate pair"),
        ("a.jsonl", "[" * 100_000, "nested too deeply"),
        ("a.json", "{\n\n!}", "a.json:3: not JSON"),
        ("a.json", "3", "expected text, found int"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(tmp_path, name, content, message):
    with pytest.raises(DataError) as caught:
        texts(write(tmp_path / name, content))
    assert message in caught.value.message
    assert str(tmp_path) in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 3


def test_bad_bytes_may_be_replaced_and_the_field_renamed(tmp_path):
    replace = DataSettings(encoding_errors="replace", text_field="body")
    path = write(tmp_path / "a.jsonl", b'{"body": "a\xff"}')
    assert texts(path, settings=replace) == ["a\ufffd"]


def test_lines_and_files_have_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "MAX_LINE_BYTES", 10)
    monkeypatch.setattr(formats, "MAX_FILE_BYTES", 10)
    for name in ("a.jsonl", "a.txt", "a.json"):
        with pytest.raises(DataError) as caught:
            texts(write(tmp_path / name, json.dumps({"text": "x" * 50})))
        assert "than 0 MiB" in caught.value.message


def test_a_folder_says_what_in_it_is_not_read(tmp_path):
    for name in ("a.txt", "b.doc", "c.DOC", "sub/d.png", ".e.png", "LICENSE", "Makefile", "README.xyz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, "x")
    (line,) = describe_unread([str(tmp_path)], DataSettings())
    assert line == f"{tmp_path}: 4 files of other kinds not read: 2 .doc, 1 without an extension, 1 .png"
    assert describe_unread([str(tmp_path / "a.txt"), "hf:some/thing", "-", ""], DataSettings()) == []
    assert describe_unread([str(tmp_path)], DataSettings(format="text")) == []


def test_folders_and_globs_give_files_in_order_and_skip_hidden_ones(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b.txt", "a.md", "sub/c.json", ".git/d.txt", "e.png"):
        write(tmp_path / name, "x")
    names = [source.path.name for source in find_sources([str(tmp_path)], STRICT)]
    assert names == ["a.md", "b.txt", "c.json"]
    assert [source.path.name for source in find_sources([str(tmp_path / "*.txt")], STRICT)] == ["b.txt"]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: p / "none.txt", NotFoundError, "no file, folder or match"),
        (lambda p: p / "*.txt", NotFoundError, "no file, folder or match"),
        (lambda p: write(p / "a.rtf", "x"), DataError, "'.rtf' are not read"),
        (lambda p: (p / "empty").mkdir() or p / "empty", DataError, "holds no .txt"),
        (lambda p: os.mkfifo(p / "f.txt") or p / "f.txt", DataError, "not a regular file"),
    ],
)
def test_sources_that_are_no_files_are_refused(tmp_path, make, error, message):
    with pytest.raises(error) as caught:
        texts(make(tmp_path))
    assert message in caught.value.message


def test_a_file_that_may_not_be_read_is_a_data_error(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "x")

    def deny(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", deny)
    with pytest.raises(DataError, match="Permission denied"):
        texts(path)
