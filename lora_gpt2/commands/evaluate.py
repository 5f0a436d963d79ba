"""`lora-gpt2 evaluate`: perplexity of adapters and the base on text, as a matrix with limits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_gpt2.commands.shared import emit, end_as_failed, format_matrix, format_table, session_options
from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import UsageError
from lora_gpt2.core.files import wrap_os_errors
from lora_gpt2.core.names import is_name
from lora_gpt2.core.user_files import check_output
from lora_gpt2.recipe import Recipe
from lora_gpt2.recipe_files import load_recipe
from lora_gpt2.store.audits import write_audit
from lora_gpt2.store.catalog import Store

if TYPE_CHECKING:
    from lora_gpt2.data.read.records import Document
    from lora_gpt2.evaluation.matrix import Cell, EvaluationText
    from lora_gpt2.evaluation.quality import Task
    from lora_gpt2.inference.session import Session

PICTURES = (".png", ".svg")
file_type = click.Path(path_type=Path, dir_okay=False)


@click.command("evaluate")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--adapter", "adapters", multiple=True, metavar="N", help="Adapter, or 'all'; repeatable.")
@click.option("--recipe", type=click.Path(path_type=Path), metavar="FILE", help="Take settings from a recipe.")
@click.option("--general/--no-general", default=True, help="Also measure what an adapter forgot of general English.")
@click.option("--keep", is_flag=True, help="Keep the figures with the adapters, for their cards.")
@click.option("--plot", type=file_type, metavar="FILE", help="Draw the matrix (.png or .svg).")
@click.option("--html", type=file_type, metavar="FILE", help="Write it all as a page.")
@click.option(
    "--generate",
    "num_texts",
    type=click.IntRange(1, 10_000),
    metavar="N",
    help="Also continue N documents of each source, and measure how that reads.",
)
@click.option("--fail-above", multiple=True, metavar="[SOURCE=]PPL", help="End with 9 if an adapter is above.")
@click.option("--baseline", type=file_type, metavar="FILE", help="End with 9 if worse than this earlier --json.")
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 10),
    default=0.01,
    show_default=True,
    help="Tolerated relative increase over --baseline.",
)
@session_options
def command(
    reporter: Reporter,
    sources: tuple[str, ...],
    adapters: tuple[str, ...],
    recipe: Path | None,
    general: bool,
    keep: bool,
    plot: Path | None,
    html: Path | None,
    num_texts: int | None,
    fail_above: tuple[str, ...],
    baseline: Path | None,
    tolerance: float,
    base: str | None,
    overrides: tuple[str, ...],
    store: Store,
    as_json: bool,
) -> None:
    """Measure the perplexity of the base and of each adapter on each SOURCE.

    A source is a file, folder, glob, - or hf:NAME, with a label if wanted (label=path), or the name of an adapter in
    the store, which means the text that was held out of its training. Figures have 95 % intervals over documents.

    \b
    Examples:
      lora-gpt2 evaluate test.txt --adapter mine
      lora-gpt2 evaluate law=law.jsonl code=code.txt --adapter all --html matrix.html --plot matrix.png
      lora-gpt2 evaluate law=law.jsonl --adapter law --json > before.json
      lora-gpt2 evaluate law=law.jsonl --adapter law --baseline before.json --fail-above law=40
      lora-gpt2 evaluate mine --adapter mine --generate 20
      lora-gpt2 evaluate test.txt --set evaluate.window=256 --set evaluate.stride=128
    """
    if plot and plot.suffix.lower() not in PICTURES:
        raise UsageError(f"--plot {plot}: pictures are {', '.join(PICTURES)}", "name the file matrix.png, for example")
    settings = load_recipe(recipe, overrides, base=base)
    from lora_gpt2.evaluation.general import GENERAL
    from lora_gpt2.evaluation.held_out import list_differences
    from lora_gpt2.evaluation.limits import check_limits, find_above, find_regressions, parse_limits, read_baseline
    from lora_gpt2.evaluation.perplexity import choose_window
    from lora_gpt2.evaluation.quality import build_task
    from lora_gpt2.inference.open import open_session

    limits, earlier = parse_limits(fail_above), read_baseline(baseline) if baseline else None
    for page in (plot, html):
        check_output(page)
    read = _read(sources, settings, store, reporter)
    check_limits(limits, [GENERAL, *(source.label for source in read)])
    session, references = open_session(store, adapters, settings, settings.evaluate.dtype)
    window, stride = choose_window(session.base, settings.evaluate)
    tasks = [build_task(source, session.base.tokenizer, num_texts) for source in read] if num_texts else []
    cells, forgetting = _measure(session, references, read, settings, general, reporter)
    result: dict[str, Any] = {
        "cells": [cell.to_json() for cell in cells],
        "forgetting": [cell.to_json() for cell in forgetting],
        "base": session.base.name,
        "protocol": settings.evaluate.protocol,
        "window": window,
        "stride": stride,
    }
    for line in list_differences(store, references, read, cells, result | {"dtype": session.base.runtime.dtype_name}):
        reporter.message(line)
    if tasks:
        result["generation"] = _generate(session, references, tasks, settings, reporter)
    if keep:
        _keep(result, references, store)
    _write_pages(result, plot, html)
    measured = [*cells, *forgetting]
    result["failures"] = find_above(measured, limits)
    if earlier:
        result["failures"] += find_regressions(measured, result, earlier, tolerance)
    emit(result, as_json, lambda: _render(result))
    if result["failures"]:
        hint = "train again, go back to a version (adapters rollback), or set new limits"
        end_as_failed("; ".join(result["failures"]), hint, as_json)


def _read(sources: Sequence[str], settings: Recipe, store: Store, reporter: Reporter) -> list[EvaluationText]:
    from lora_gpt2.evaluation.held_out import read_own_text
    from lora_gpt2.evaluation.matrix import EvaluationText, read_sources

    own_base = settings.base if "base" in settings.model_fields_set else None

    def find_held_out(label: str, name: str) -> EvaluationText | None:
        plain = name.partition("@")[0]
        if not (is_name(plain) and store.has_adapter(plain)):
            return None
        own = read_own_text(store, name, reporter, own_base)
        return EvaluationText(label, own.held_out, own.manifest.recipe["data"].get("profile", ""), own.test_files)

    return read_sources(sources, settings.data, reporter, find_held_out)


def _measure(
    session: Session,
    references: Sequence[str],
    sources: Sequence[EvaluationText],
    recipe: Recipe,
    general: bool,
    reporter: Reporter,
) -> tuple[list[Cell], list[Cell]]:
    """Returns the cells, and those on general English, where adapters are measured."""
    from lora_gpt2.evaluation.general import GENERAL, add_general
    from lora_gpt2.evaluation.held_out import read_sketches
    from lora_gpt2.evaluation.matrix import measure_matrix
    from lora_gpt2.inference.mix import Mix
    from lora_gpt2.store.references import BASE

    session.load([name for name in references if name != BASE])
    mixes = {name: Mix.parse([name]) for name in [BASE, *(name for name in references if name != BASE)]}
    columns = list(mixes.values())
    wants_general = general and len(mixes) > 1 and GENERAL not in [source.label for source in sources]
    cells = measure_matrix(
        session.base,
        {name: session.select(mix) for name, mix in mixes.items()},
        add_general(sources) if wants_general else sources,
        recipe.evaluate,
        reporter,
        together=session.select(*columns),
        sketches=read_sketches(session.store, [name for name in mixes if name != BASE]),
    )
    split = len(mixes) if wants_general else 0
    return cells[split:], cells[:split]


def _generate(
    session: Session,
    references: Sequence[str],
    tasks: Sequence[Task],
    recipe: Recipe,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    from lora_gpt2.core.interrupt import catch_signals
    from lora_gpt2.evaluation.perplexity import measure_perplexity
    from lora_gpt2.evaluation.quality import measure_quality
    from lora_gpt2.inference.generate import build_writer
    from lora_gpt2.inference.mix import Mix
    from lora_gpt2.store.references import BASE

    def judge(name: str, texts: Sequence[Document]) -> float:
        rows = session.select(Mix.parse([name]))
        return measure_perplexity(session.base, texts, recipe.evaluate, rows).perplexity

    names = [BASE, *(name for name in references if name != BASE)]
    with catch_signals() as stop:
        write = build_writer(session, reporter, stop)
        found = [measure_quality(task, name, recipe.generate, write, judge) for task in tasks for name in names]
    for line in (line for quality in found for line in quality.warnings):
        reporter.message(line)
    return [quality.to_json() for quality in found]


def _keep(result: dict[str, Any], references: Sequence[str], store: Store) -> None:
    how = {key: result[key] for key in ("protocol", "window", "stride")}
    for name in references:
        if name != "base":
            cells = [cell for cell in [*result["cells"], *result["forgetting"]] if cell["adapter"] == name]
            write_audit(store, store.read_manifest(name), "evaluation", {"cells": cells, **how})


def _write_pages(result: dict[str, Any], plot: Path | None, html: Path | None) -> None:
    from lora_gpt2.evaluation.report import build_matrix_page, draw_matrix

    with wrap_os_errors("write the picture or the page"):
        if plot:
            plot.write_bytes(draw_matrix([*result["cells"], *result["forgetting"]], plot.suffix.lower().lstrip(".")))
        if html:
            html.write_text(build_matrix_page(result), encoding="utf-8")


def _render(result: dict[str, Any]) -> str:
    from lora_gpt2.evaluation.report import describe_gain, find_own

    cells, forgetting = result["cells"], result["forgetting"]
    lines = [format_matrix([*cells, *forgetting])]
    lines += [
        f"! {cell['adapter']} was trained on {cell['documents_trained_on']:,} of {cell['documents']:,} documents of "
        f"{cell['source']}: that figure says nothing about new text"
        for cell in cells
        if cell["documents_trained_on"]
    ]
    lines += [f"{name} on its own text: {describe_gain(cell)}" for name, cell in find_own(cells).items()]
    lines += [
        f"{cell['adapter']} on general English: {describe_gain(cell)}"
        for cell in forgetting
        if cell["adapter"] != "base"
    ]
    if quality := result.get("generation"):
        lines += ["", _render_quality(quality)]
    return "\n".join(lines)


def _render_quality(rows: Sequence[dict[str, Any]]) -> str:
    """Returns a table with a line for each figure, which are many, and a column for each adapter and source."""
    keys = [key for key in rows[0] if key not in ("adapter", "source", "warnings", "samples")]
    lines = [[key, *("" if row[key] is None else f"{row[key]:.4g}" for row in rows)] for key in keys]
    return format_table(["generated texts", *(f"{row['adapter']} on {row['source']}" for row in rows)], lines)
