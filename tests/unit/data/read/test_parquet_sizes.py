"""Damage on which PyArrow ends the process is an error in its place, and the next file is read."""

import io
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from lora_gpt2.core.errors import DataError
from lora_gpt2.data.read.formats import read_documents
from lora_gpt2.data.read.parquet_sizes import read_sizes
from lora_gpt2.recipe import DataSettings

DAMAGED = Path(__file__).with_name("damaged_metadata.parquet")


def pack(rows, **options):
    out = io.BytesIO()
    parquet.write_table(pyarrow.table(rows), out, **options)
    return out


def test_sizes_are_those_of_the_metadata():
    file = pack({"text": ["a" * 1000] * 100, "n": list(range(100))}, row_group_size=50)
    metadata = parquet.read_metadata(file)
    parts = read_sizes(file)
    assert [(part.path, part.has_dictionary) for part in parts] == [("text", True), ("n", True)] * 2
    column = metadata.row_group(1).column(0)
    assert (parts[2].unpacked, parts[2].packed) == (column.total_uncompressed_size, column.total_compressed_size)


def test_metadata_that_ends_the_reader_is_an_error_and_the_next_file_is_read(tmp_path):
    (tmp_path / "a.parquet").write_bytes(DAMAGED.read_bytes())
    (tmp_path / "b.parquet").write_bytes(pack({"text": ["one", "two"]}).getvalue())
    for _ in range(2):
        with pytest.raises(DataError, match=r"a\.parquet is not a Parquet file: its metadata is damaged"):
            list(read_documents([str(tmp_path / "a.parquet")], DataSettings()))
        found = list(read_documents([str(tmp_path / "b.parquet")], DataSettings()))
        assert [document.text for document in found] == ["one", "two"]


@pytest.mark.parametrize(
    "content",
    [b"", b"PAR1", b"PAR1PAR1", b"PAR1" + b"\xff" * 4 + b"PAR1", b"x" * 100, b"PAR1\x15\x00\x01\x00\x00\x00PAR1"],
)
def test_what_is_no_parquet_file_is_a_value_error(content):
    with pytest.raises(ValueError, match=r"."):
        read_sizes(io.BytesIO(content))
