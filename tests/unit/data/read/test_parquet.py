"""Parquet files that are small on disk and large in memory, and those that are as they should be."""

import subprocess
import sys

import pyarrow
from pyarrow import parquet

from lora_gpt2.core.errors import DataError
from lora_gpt2.data.read import parquet as reader
from lora_gpt2.data.read.formats import read_source
from lora_gpt2.data.read.sources import find_sources
from lora_gpt2.data.rejections import UnreadableRows
from lora_gpt2.recipe import DataSettings


def write(path, columns, **options):
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def read(path, **settings):
    chosen = DataSettings(**settings)
    return [item for source in find_sources([str(path)], chosen) for item in read_source(source, chosen)]


def test_rows_of_every_layout_are_read(tmp_path):
    texts = ["one", "two", "one", "three"] * 700
    for options in ({}, {"use_dictionary": False}, {"row_group_size": 100}, {"data_page_size": 64}):
        found = read(write(tmp_path / "a.parquet", {"text": texts, "n": list(range(2800))}, **options))
        assert [document.text for document in found] == texts
        assert found[2799].origin.endswith(":2800")
    nested = {"chat": [[{"content": "a"}, {"content": "b"}], [{"content": "c"}]]}
    found = read(write(tmp_path / "b.parquet", nested), text_field="chat.content")
    assert [document.text for document in found] == ["a", "b", "c"]
    assert read(write(tmp_path / "c.parquet", {"q": ["x"], "a": [2]}), template="{q}={a}")[0].text == "x=2"


def test_columns_of_bytes_are_read_only_where_they_are_named(tmp_path):
    path = write(tmp_path / "a.parquet", {"text": ["a"], "picture": [b"\xff"]})
    assert [document.text for document in read(path)] == ["a"]
    assert "expected text, found bytes" in read(path, text_field="picture")[0].message


def test_a_column_that_unpacks_to_far_more_than_its_size_is_refused(tmp_path, shared):
    bomb = write(tmp_path / "a.parquet", {"text": ["x" * 100_000_000]}, compression="zstd")
    assert bomb.stat().st_size < 20_000
    for path in (bomb, shared / "cases" / "hostile" / "cell200MB.parquet"):
        (error,) = read(path)
        assert isinstance(error, DataError)
        assert "times its size" in error.message
        assert error.hint == "write it again, in smaller rows"


def test_a_value_that_many_rows_share_is_there_once(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "BATCH_BYTES", 2_500_000)
    path = write(tmp_path / "a.parquet", {"text": ["y" * 1_000_000] * 5})
    assert [len(document.text) for document in read(path)] == [1_000_000] * 5
    nested = write(tmp_path / "b.parquet", {"text": [["z" * 1_000_000]] * 5})
    assert len(read(nested)) == 5


def test_a_row_that_is_too_large_is_an_error_in_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "BATCH_BYTES", 1000)
    monkeypatch.setattr(reader, "MAX_ROW_BYTES", 2000)
    texts = ["a", "b" * 3000, "c", "d" * 1500]
    for options in ({}, {"use_dictionary": False}):
        found = read(write(tmp_path / "a.parquet", {"text": texts}, **options))
        assert [getattr(item, "text", None) for item in found] == ["a", None, "c", "d" * 1500]
        assert "a.parquet:2: a row of" in found[1].message
    found = read(write(tmp_path / "b.parquet", {"text": [[text] for text in texts]}), text_field="text")
    assert "a row of" in found[1].message


def test_rows_without_any_value_are_one_error_with_their_number(tmp_path):
    path = write(tmp_path / "a.parquet", {"text": pyarrow.array([None] * 5000 + ["a"], pyarrow.string())})
    *bad, last = read(path)
    whole = [item for item in bad if isinstance(item, UnreadableRows)]
    assert sum(getattr(item, "count", 1) for item in bad) == 5000
    assert len(whole) >= 4
    assert last.text == "a"


def test_twenty_million_empty_rows_are_set_aside_in_little_memory_and_time(tmp_path, shared):
    """Took 1.6 GB."""
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "document {"x" * i} of some words"}}\n' for i in range(60)))
    code = (
        "import re, sys; from lora_gpt2 import cli; "
        "code = cli.run(['prepare', *sys.argv[1:], '--skip-bad', '--set', 'data.near_duplicate_threshold=0']); "
        "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(shared / "cases" / "hostile" / "nulls.parquet"), str(tmp_path / "a.jsonl")],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "rejected: 20,000,000 unreadable" in done.stdout
    assert int(done.stdout.split()[-1]) < 400_000  # kB
