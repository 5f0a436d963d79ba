"""`lora-gpt2 evaluate`: perplexity of adapters and the base on text, as a matrix with limits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_gpt2.commands.settings import setting_options
from lora_gpt2.commands.shared import FiniteRange, emit, end_as_failed, session_options
from lora_gpt2.core.console import Reporter
from lora_gpt2.core.files import wrap_os_errors, write_user_file
from lora_gpt2.core.tables import format_table
from lora_gpt2.core.user_files import PICTURES, check_output
from lora_gpt2.evaluation.report import format_matrix
from lora_gpt2.recipe_files import load_recipe
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.references import BASE

if TYPE_CHECKING:
    from lora_gpt2.evaluation.run import Evaluation

FILES = {"plot": PICTURES, "html": (), "tokens": (".html", ".jsonl")}
"""The files that are written on request, and how their names end."""

file_type = click.Path(path_type=Path, dir_okay=False)


@click.command("evaluate")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option(
    "--adapter", "adapters", multiple=True, metavar="N", help="Adapter or mix (a:0.6+b:0.4), or 'all'; repeatable."
)
@click.option("--recipe", type=click.Path(path_type=Path), metavar="FILE", help="Take settings from a recipe.")
@click.option("--general/--no-general", default=True, help="Also measure what an adapter forgot of general English.")
@click.option("--keep", is_flag=True, help="Keep the figures with the adapters, for their cards.")
@click.option("--plot", type=file_type, metavar="FILE", help="Draw the matrix (.png or .svg).")
@click.option("--html", type=file_type, metavar="FILE", help="Write it all as a page.")
@click.option(
    "--tokens",
    type=file_type,
    metavar="FILE",
    help="Write the log-probability of each token: as a coloured page (.html) or as data (.jsonl).",
)
@click.option(
    "--generate",
    "num_texts",
    type=click.IntRange(1, 10_000),
    metavar="N",
    help="Also continue N documents of each source, and measure how that reads.",
)
@click.option("--ray", metavar="ADDRESS", help="Measure on the devices of a Ray cluster: auto, local, or its address.")
@click.option("--fail-above", multiple=True, metavar="[SOURCE=]PPL", help="End with 9 if an adapter is above.")
@click.option("--baseline", type=file_type, metavar="FILE", help="End with 9 if worse than this earlier --json.")
@click.option(
    "--tolerance",
    type=FiniteRange(0, 10),
    default=0.01,
    show_default=True,
    help="Tolerated relative increase over --baseline.",
)
@setting_options("evaluate")
@session_options
def command(
    reporter: Reporter,
    sources: tuple[str, ...],
    adapters: tuple[str, ...],
    recipe: Path | None,
    general: bool,
    keep: bool,
    num_texts: int | None,
    ray: str | None,
    fail_above: tuple[str, ...],
    baseline: Path | None,
    tolerance: float,
    flags: dict[str, Any],
    base: str | None,
    overrides: tuple[str, ...],
    store: Store,
    as_json: bool,
    **files: Path | None,
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
      lora-gpt2 evaluate mine --adapter mine --tokens tokens.html    which words it knows better than the base
      lora-gpt2 evaluate mine --adapter mine --generate 20
      lora-gpt2 evaluate law=law.jsonl --adapter all --ray auto   over the machines of a Ray cluster
      lora-gpt2 evaluate test.txt --set evaluate.window=256 --set evaluate.stride=128
    """
    for option, kinds in FILES.items():
        check_output(files[option], kinds)
    settings = load_recipe(recipe, overrides, {**flags, "base": base})
    from lora_gpt2.evaluation.general import GENERAL
    from lora_gpt2.evaluation.limits import check_limits, find_above, find_regressions, parse_limits, read_baseline
    from lora_gpt2.evaluation.matrix import LabelledSource
    from lora_gpt2.evaluation.run import evaluate_texts, read_texts
    from lora_gpt2.inference.mix import read_manifests

    limits, earlier = parse_limits(fail_above), read_baseline(baseline) if baseline else None
    wanted = [LabelledSource.parse(source) for source in sources]
    measured_too = [GENERAL] if general and set(adapters) - {BASE} else []
    check_limits(limits, [*measured_too, *(source.label for source in wanted)])
    read_manifests(store, adapters)
    texts = read_texts(wanted, store, settings, reporter)
    evaluation = evaluate_texts(
        texts,
        adapters,
        store,
        settings,
        reporter,
        general=general,
        num_texts=num_texts or 0,
        keep=keep,
        keep_tokens=files["tokens"] is not None,
        ray=ray or "",
    )
    result = evaluation.to_json()
    measured = [*evaluation.cells, *evaluation.forgetting]
    result["failures"] = find_above(measured, limits)
    if earlier:
        result["failures"] += find_regressions(measured, result, earlier, tolerance)
    emit(result, as_json, lambda: _render(result))
    _write_files(evaluation, **files)  # what was measured has been said, whatever becomes of them
    if result["failures"]:
        hint = "train again, go back to a version (adapters rollback), or set new limits"
        end_as_failed("; ".join(result["failures"]), hint, as_json)


def _write_files(evaluation: Evaluation, plot: Path | None, html: Path | None, tokens: Path | None) -> None:
    with wrap_os_errors("write the figures"):
        if plot:
            evaluation.plot(plot)
        if html:
            write_user_file(html, evaluation.to_html())
        if tokens and tokens.suffix.lower() == ".html":
            write_user_file(tokens, evaluation.tokens_to_html())
        elif tokens:
            lines = (json.dumps(each.to_json(), allow_nan=False) for each in evaluation.token_scores)
            write_user_file(tokens, "".join(f"{line}\n" for line in lines))


def _render(result: dict[str, Any]) -> str:
    from lora_gpt2.evaluation.report import describe_cells, describe_gain, describe_versions

    cells, forgetting = result["cells"], result["forgetting"]
    lines = [format_matrix([*cells, *forgetting])]
    lines += describe_cells(cells)
    lines += [
        f"{cell['adapter']} on general English: {describe_gain(cell)}"
        for cell in forgetting
        if cell["adapter"] != "base"
    ]
    lines += describe_versions(result["versions"])
    if quality := result.get("generation"):
        lines += ["", _render_quality(quality)]
    return "\n".join(lines)


def _render_quality(rows: Sequence[dict[str, Any]]) -> str:
    """Returns a table with a line for each figure, which are many, and a column for each adapter and source."""
    keys = [key for key in rows[0] if key not in ("adapter", "source", "warnings", "samples")]
    lines = [[key, *("" if row[key] is None else f"{row[key]:.4g}" for row in rows)] for key in keys]
    return format_table(["generated texts", *(f"{row['adapter']} on {row['source']}" for row in rows)], lines)
