"""`lora-gpt2 bench`: what adapters are good for: domains, hyperparameters, data preparation."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from lora_gpt2.commands.shared import FiniteRange, emit, format_bytes, json_option, set_option, store_option
from lora_gpt2.core.console import Reporter
from lora_gpt2.core.tables import format_table
from lora_gpt2.evaluation.report import format_matrix
from lora_gpt2.store.catalog import Store


@click.command("domains")
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


@click.command("grid")
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FOLDER...")
@click.option(
    "--rate",
    "rates",
    multiple=True,
    type=FiniteRange(min=0, min_open=True),
    default=(1e-3, 3e-3, 6e-3),
    help="Learning rates.",
)
@click.option("--rank", "ranks", multiple=True, type=click.IntRange(1, 512), default=(4, 8, 16), help="Ranks.")
@click.option(
    "--targets",
    multiple=True,
    type=click.Choice(["all+head", "all", "attention", "c_attn", "q,v"]),
    default=("all+head", "all", "c_attn"),
    help="Projections, with the head or without.",
)
@click.option("--full", is_flag=True, help="Also fine-tune all weights, at four learning rates.")
@click.option("--keep", type=click.Path(path_type=Path), default=Path("grid.jsonl"), help="File of finished points.")
@set_option
@json_option
@click.pass_obj
def grid(
    reporter: Reporter,
    folders: tuple[Path, ...],
    rates: tuple[float, ...],
    ranks: tuple[int, ...],
    targets: tuple[str, ...],
    full: bool,
    keep: Path,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Train each FOLDER's adapter at every learning rate, rank and set of targets; rank the settings by validation.

    The table has perplexities on test text, by which nothing is chosen.

    \b
    Example:
      lora-gpt2 bench grid law/ code/ verse/ --rate 2e-3 --rate 6e-3 --rank 8 --set train.steps=150
    """
    from lora_gpt2.bench.grid import measure_grid, rank_settings

    points = measure_grid(folders, rates, ranks, targets, overrides, kept=keep, reporter=reporter, full=full)
    ranking = rank_settings(points)
    emit(
        {"points": [asdict(point) for point in points], "ranking": ranking},
        as_json,
        lambda: _render_grid([asdict(point) for point in points], ranking),
    )


def _render_grid(points: list[dict[str, Any]], ranking: list[Any]) -> str:
    domains = list(dict.fromkeys(point["domain"] for point in points))
    found = {(p["domain"], p["targets"], p["rank"], p["learning_rate"]): p["perplexity"] for p in points}
    rows = [
        [
            f"{name}, rank {rank}, {rate:g}",
            *(f"{found[domain, name, rank, rate]:.2f}" for domain in domains),
            f"{worst:.3f}",
            f"{mean:.3f}",
        ]
        for name, rank, rate, worst, mean in ranking
    ]
    for rate in sorted({p["learning_rate"] for p in points if p["targets"] == "full"}):
        figures = [f"{found.get((domain, 'full', 0, rate), float('nan')):.2f}" for domain in domains]
        rows.append([f"full fine-tune, {rate:g}", *figures, "", ""])
    return format_table(["test perplexity", *domains, "worst / best", "mean / best"], rows)


@click.command("prepare")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--processes", type=click.IntRange(1, 256), default=2, show_default=True, help="Processes that clean.")
@click.option("--planted", type=click.IntRange(1), default=1000, show_default=True, help="Near copies to plant.")
@set_option
@json_option
@click.pass_obj
def prepare(
    reporter: Reporter,
    sources: tuple[str, ...],
    processes: int,
    planted: int,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure time and memory of text preparation, and look for near-duplicates planted in the text.

    \b
    Example:
      lora-gpt2 bench prepare corpus.txt.gz
    """
    from lora_gpt2.bench.preparing import measure_preparing

    found = measure_preparing(sources, processes, planted, overrides, reporter)
    result = {**asdict(found), "megabytes_per_second": found.megabytes_per_second}
    rows = [
        ["text", f"{found.text_megabytes:,.1f} MB, {found.tokens:,} tokens"],
        ["time", f"{found.seconds:,.1f} s with {processes} processes: {found.megabytes_per_second:.2f} MB/s"],
        ["peak memory, all processes", format_bytes(found.peak_memory_bytes)],
        ["tokenising beside tokenizers alone", f"{found.tokenisation_share:.2f}x"],
        ["planted near copies found", f"{found.found:,} of {found.planted:,}; {found.false_pairs} taken for another's"],
    ]
    emit(result, as_json, lambda: format_table(["", ""], rows).lstrip())


COMMANDS = (
    domains,
    grid,
    prepare,
)
