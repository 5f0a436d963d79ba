"""`lora-gpt2 bench`: measurements on this machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from lora_gpt2.commands.shared import emit, format_matrix, format_table, json_option, set_option, store_option
from lora_gpt2.core.console import Reporter
from lora_gpt2.store.catalog import Store


@click.group("bench")
def command() -> None:
    """Measure this machine: quality over domains, start-up times."""


@command.command("domains")
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FOLDER...")
@set_option
@store_option
@json_option
@click.pass_obj
def domains(
    reporter: Reporter, folders: tuple[Path, ...], overrides: tuple[str, ...], store: Store, as_json: bool
) -> None:
    """Train an adapter for each FOLDER (train.*, valid.*, test.*), together, and measure each on every test text.

    \b
    Example:
      lora-gpt2 bench domains law/ code/ verse/ --set train.steps=300
    """
    from lora_gpt2.bench.domains import measure_domains

    report = measure_domains(folders, store, overrides, reporter)
    cells = [cell.to_json() for cell in report.cells]
    winners = report.winners()
    result = {"adapters": [asdict(a) for a in report.adapters], "cells": cells, "winners": winners}
    own = sum(adapter == source for source, adapter in winners.items())
    emit(
        result, as_json, lambda: f"{format_matrix(cells)}\n{own} of {len(winners)} adapters are best on their own text"
    )


@command.command("startup")
@click.option("--runs", type=click.IntRange(1, 100), default=5, show_default=True)
@json_option
def startup(runs: int, as_json: bool) -> None:
    """Time commands from the shell, as whole processes.

    \b
    Example:
      lora-gpt2 bench startup
    """
    from lora_gpt2.bench.startup import measure_startup

    medians = measure_startup(runs)
    emit(
        {"seconds": medians},
        as_json,
        lambda: format_table(["", "seconds"], [[k, f"{v:.2f}"] for k, v in medians.items()]),
    )
