"""Rows of a data set saved by `datasets`, or of one on the hub, which is streamed and asked for only by `hf:NAME`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_gpt2.core.errors import DataError, ResourceError
from lora_gpt2.core.hub import wrap_hub_errors
from lora_gpt2.core.printable import shorten
from lora_gpt2.recipe import DataSettings

OFFLINE_HINT = "without the hub, use files, or a folder written by datasets' save_to_disk"


def find_commit(name: str) -> str:
    """Returns the commit of a data set on the hub; raises as `wrap_hub_errors`."""
    from huggingface_hub import HfApi

    with wrap_hub_errors(name, f"fetch the data set '{name}'", OFFLINE_HINT):
        return str(HfApi().dataset_info(name, timeout=10).sha)


def iter_rows(name: str, folder: Path | None, settings: DataSettings) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the rows of a data set, and their places; without a folder it is the hub's, and streamed.

    Raises:
        DataError, NotFoundError: it has no such split, or cannot be read.
        ResourceError: the hub cannot be reached, or `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ResourceError(f"{name} needs the package datasets", "pip install datasets") from error
    rows: Iterable[Mapping[str, Any]]
    if folder is None:
        with wrap_hub_errors(name, f"fetch the data set '{name}'", OFFLINE_HINT):
            rows = datasets.load_dataset(
                name,
                settings.dataset_config or None,
                split=settings.dataset_split,
                revision=find_commit(name),
                streaming=True,
            )
    else:
        rows = _load_saved(name, folder, settings.dataset_split)
    if folder is not None:
        rows = _refuse_damaged(name, rows)
    for number, row in enumerate(rows, start=1):
        yield f"{name}:{number}", row


def _load_saved(name: str, folder: Path, split: str) -> Iterable[Mapping[str, Any]]:
    import datasets

    if odd := [path for path in folder.rglob("*") if not path.is_file() and not path.is_dir()]:
        raise DataError(f"{odd[0]} is not a regular file", "save the data set again with save_to_disk")
    try:
        saved = datasets.load_from_disk(str(folder))
    except _find_damage() as error:
        raise _describe_damage(name, error) from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            hint = f"it has {', '.join(saved)}: --set data.dataset_split=NAME"
            raise DataError(f"{name} has no split '{split}'", hint)
        saved = saved[split]
    rows: Iterable[Mapping[str, Any]] = saved
    return rows


def _find_damage() -> tuple[type[Exception], ...]:
    """Returns what `datasets` raises at files that are not what it wrote: whatever its code stumbles over."""
    import pyarrow

    return (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
        ArithmeticError,
        ImportError,
        AssertionError,
        pyarrow.ArrowException,
    )


def _refuse_damaged(name: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yields the rows of a saved data set; raises `DataError` where one cannot be read."""
    try:
        yield from rows
    except _find_damage() as error:
        raise _describe_damage(name, error) from error


def _describe_damage(name: str, error: Exception) -> DataError:
    reason = shorten(str(error)) or type(error).__name__
    return DataError(f"{name} is not a saved data set, or damaged: {reason}", "save it again with save_to_disk")
