"""Options that several commands share, and the two ways a result leaves: a table for people, JSON for programs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from lora_gpt2.store.catalog import Store

F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Write one JSON document on stdout.")
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting, such as train.steps=300."
)
base_option = click.option("--base", metavar="B", help="Base: nano, gpt2, gpt2-medium, …, a hub id or a folder.")
seed_option = click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Makes the run repeatable.")


def _open_store(ctx: click.Context, param: click.Parameter, value: str | None) -> Store:
    return Store(Path(value or os.environ.get("LORA_GPT2_STORE") or "adapters"))


store_option = click.option(
    "--store", metavar="DIR", callback=_open_store, help="Store; else $LORA_GPT2_STORE, else ./adapters."
)


def name_store(store: Store) -> str:
    """Returns the option that a suggested command needs to find the store: nothing where it is the default one."""
    default = os.environ.get("LORA_GPT2_STORE") or "adapters"
    return "" if str(store.root) == default else f" --store {store.root}"


def emit(result: dict[str, Any], as_json: bool, render: Callable[[], str]) -> None:
    """Writes a result on stdout: as JSON, in which what is not finite is null, or as `render` shows it."""
    click.echo(json.dumps(_finite(result), indent=1, allow_nan=False) if as_json else render())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns columns aligned by width, the first to the left, the others to the right."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = []
    for row in table:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def format_matrix(cells: Sequence[dict[str, Any]]) -> str:
    """Returns perplexities as adapters × sources; `*` marks the best of each column."""
    sources = list(dict.fromkeys(cell["source"] for cell in cells))
    adapters = list(dict.fromkeys(cell["adapter"] for cell in cells))
    values = {(cell["adapter"], cell["source"]): cell["perplexity"] for cell in cells}
    best = {source: min(values[adapter, source] for adapter in adapters) for source in sources}
    rows = []
    for adapter in adapters:
        marks = ["*" if values[adapter, s] == best[s] and len(adapters) > 1 else " " for s in sources]
        rows.append([adapter, *(f"{values[adapter, s]:,.2f}{mark}" for s, mark in zip(sources, marks, strict=True))])
    return format_table(["perplexity", *(f"{source} " for source in sources)], rows)


def format_bytes(count: int) -> str:
    """Returns a number of bytes with a unit: 1.2 MB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
