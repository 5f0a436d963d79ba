"""Rows of a Parquet file in bounded memory: a few kilobytes of it may stand for gigabytes.

Columns of texts are read as dictionaries, so that a value which a million rows share is there once; a batch has a size
limit, and a row that exceeds it alone is an error in its place. Columns of bytes (pictures) that nobody asked for are
not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import BufferedReader
from typing import IO, Any, cast

from lora_gpt2.core.errors import DataError
from lora_gpt2.core.printable import shorten
from lora_gpt2.data.read.parquet_sizes import ColumnPart, read_sizes
from lora_gpt2.data.read.records import FIX_HINT, PLACEHOLDER
from lora_gpt2.data.rejections import UnreadableRows
from lora_gpt2.recipe import DataSettings

BATCH_ROWS, BATCH_BYTES = 1024, 64 * 2**20
MAX_ROW_BYTES = 64 * 2**20
FREE_BYTES, LARGEST_RATIO = 64 * 2**20, 500
"""A column's part of a row group may unpack to so many bytes, or to so many times its size on disk."""


def iter_rows(file: BufferedReader, where: str, settings: DataSettings) -> Iterator[tuple[int, Any]]:
    """Yields each row's number, from 1, and the row as a dictionary, or a `DataError` in its place.

    Raises:
        DataError: it is not a Parquet file, or unpacks to far more than its size.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{where}: Parquet needs the package pyarrow", "pip install pyarrow") from error
    number = 0
    try:
        parts = read_sizes(cast("IO[bytes]", file))
        with parquet.ParquetFile(file) as opened:
            schema, metadata = opened.schema_arrow, opened.metadata
        texts = [field.name for field in schema if _is_text(field.type)]
        columns = _choose_columns(schema, settings)
        rows = _check_sizes(parts, where, texts)
        opened = parquet.ParquetFile(file, metadata=metadata, read_dictionary=texts, pre_buffer=False)
        for batch in opened.iter_batches(batch_size=rows, columns=columns, use_threads=False):
            if all(column.null_count == batch.num_rows for column in batch.columns):
                what = f"{where}:{number + 1}: this row and the {batch.num_rows - 1} after it hold no value"
                yield number + 1, UnreadableRows(what, FIX_HINT, batch.num_rows)
                number += batch.num_rows
                continue
            sizes = _measure_rows(batch)
            if sum(sizes) <= BATCH_BYTES:
                for number, row in enumerate(batch.to_pylist(), start=number + 1):  # noqa: B020
                    yield number, row
                continue
            for index, size in enumerate(sizes):
                number += 1
                if size > MAX_ROW_BYTES:
                    shown = f"{where}:{number}: a row of {size >> 20} MiB, at most {MAX_ROW_BYTES >> 20} are read"
                    yield number, DataError(shown, FIX_HINT)
                else:
                    yield number, batch.slice(index, 1).to_pylist()[0]
    except (pyarrow.ArrowException, ValueError, OverflowError, OSError, NotImplementedError) as error:
        raise DataError(f"{where} is not a Parquet file: {shorten(str(error), 200)}", "write it again") from error


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_string(kind) or types.is_large_string(kind))


def _choose_columns(schema: Any, settings: DataSettings) -> list[str]:
    """Returns the columns to read: all but those of bytes that no setting names."""
    from pyarrow import types

    templates = (settings.template, settings.prompt)
    named = {settings.text_field, *(name for text in templates for name in PLACEHOLDER.findall(text))}
    named |= {name.partition(".")[0] for name in named}

    def is_bytes(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind))

    return [field.name for field in schema if field.name in named or not is_bytes(field.type)]


def _check_sizes(parts: Sequence[ColumnPart], where: str, texts: list[str]) -> int:
    """Returns how many rows to read at once; raises `DataError` where a part unpacks to far more than its size.

    A value of a nested column is as large as its column's part at most, but each row may repeat it.
    """
    largest = 1
    for part in parts:
        if part.unpacked > FREE_BYTES and part.unpacked > LARGEST_RATIO * max(1, part.packed):
            text = f"{where}: the column {shorten(part.path)} unpacks to {part.unpacked >> 20} MiB, "
            times = part.unpacked // max(1, part.packed)
            raise DataError(f"{text}{times:,} times its size", "write it again, in smaller rows")
        if part.has_dictionary and part.path not in texts:
            largest = max(largest, part.unpacked)
    return max(1, min(BATCH_ROWS, BATCH_BYTES // largest))


def _measure_rows(batch: Any) -> list[int]:
    """Returns the bytes of each row, unpacked; where all together are few, zeros."""
    import numpy as np
    from pyarrow import compute, types

    sizes = np.zeros(batch.num_rows, np.int64)
    others = []
    for column in batch.columns:
        if types.is_dictionary(column.type) and _is_text(column.type.value_type):
            lengths = compute.binary_length(column.dictionary)
            found = compute.fill_null(compute.take(lengths, column.indices), 0)
            sizes += np.asarray(found, dtype=np.int64)
        else:
            others.append(column)
    if sum(column.nbytes for column in others) > BATCH_BYTES:
        for column in others:
            sizes += np.array([column.slice(row, 1).nbytes for row in range(batch.num_rows)], np.int64)
    return [int(size) for size in sizes]
