"""`lora-gpt2 merge`: several adapters into one, or adapters into the base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from lora_gpt2.commands.shared import SAMPLE_PROMPT, emit, format_bytes, session_options, suggest_next
from lora_gpt2.core.console import Reporter
from lora_gpt2.core.printable import printable
from lora_gpt2.core.tables import format_table
from lora_gpt2.evaluation.report import format_matrix
from lora_gpt2.recipe import MergeMethod
from lora_gpt2.recipe_files import load_recipe
from lora_gpt2.store.catalog import Store

if TYPE_CHECKING:
    from lora_gpt2.evaluation.matrix import Cell
    from lora_gpt2.merging.combine import MergeReport
    from lora_gpt2.merging.into_base import MergedBaseReport
    from lora_gpt2.merging.run import MergeResult
    from lora_gpt2.merging.search import SearchReport


@click.command("merge")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:W]...")
@click.option("--as", "name", metavar="NAME", help="Publish the combination as an adapter.")
@click.option("--into-base", type=click.Path(path_type=Path), metavar="DIR", help="Write a plain GPT-2 to DIR.")
@click.option("--method", type=click.Choice(get_args(MergeMethod)), help="How to combine.  [default: cat]")
@click.option("--rank", type=click.IntRange(1, 4096), help="Rank of the combination; else the method's own.")
@click.option("--on", "texts", multiple=True, metavar="[LABEL=]PATH,...", help="Texts to measure parents and merge on.")
@click.option("--search", is_flag=True, help="Find the weights and method that are best over the texts of --on.")
@session_options
def command(
    reporter: Reporter,
    adapters: tuple[str, ...],
    name: str | None,
    into_base: Path | None,
    method: str | None,
    rank: int | None,
    texts: tuple[str, ...],
    search: bool,
    base: str | None,
    overrides: tuple[str, ...],
    store: Store,
    as_json: bool,
) -> None:
    """Combine adapters into a new one, or write them into the base; verify the result before saving it.

    Verification: the largest difference of the logits from the unmerged computation, and the perplexity of the base,
    the parents and the merge on general English and on each text of --on.

    \b
    Examples:
      lora-gpt2 merge law:0.6 code:0.4 --as both --on law=law.txt,code=code.txt
      lora-gpt2 merge law code --search --on law=law.txt,code=code.txt --as both
      lora-gpt2 merge law code --as both --method ties --rank 32 --set merge.density=0.3
      lora-gpt2 merge law --into-base ./gpt2-law --set merge.dtype=float16
    """
    recipe = load_recipe(None, overrides, {"base": base, "merge.method": method, "merge.rank": rank})
    from lora_gpt2.evaluation.matrix import LabelledSource
    from lora_gpt2.inference.mix import Mix
    from lora_gpt2.merging.run import choose_weight, merge

    mix = Mix.parse(adapters, choose_weight(recipe.merge))
    wanted = [item for text in texts for item in text.split(",") if item]

    def show_search(found: SearchReport) -> None:  # at once: what follows may fail
        if not as_json:
            click.echo(printable(_render_search(found, mix.references), keep_lines=True) + "\n")

    result = merge(
        mix,
        [LabelledSource.parse(item) for item in wanted],
        store,
        recipe,
        reporter,
        name=name,
        into_base=into_base,
        search=search,
        on_search=show_search,
    )
    if as_json or name or into_base:
        emit(result.to_json(), as_json, lambda: _render(result))
    if name or into_base:
        which = ("--adapter", name) if name else ("--base", str(into_base))
        suggest_next(reporter, "generate", SAMPLE_PROMPT, *which, store=store if name else None)


def _render(result: MergeResult) -> str:
    lines = []
    if result.adapter:
        lines += [_render_matrix(result.adapter.cells), _render_merge(result.adapter)]
    if result.base:
        lines += [_render_matrix(result.base.cells), _render_base(result.base)]
    return "\n\n".join(lines)


def _render_matrix(cells: Sequence[Cell]) -> str:
    return format_matrix([cell.to_json() for cell in cells])


def _render_merge(merged: MergeReport) -> str:
    return (
        f"merged {merged.name}@{merged.version} by {merged.method}: rank up to {merged.largest_rank}, "
        f"{merged.relative_error:.2%} of the update cut off, logits differ by at most "
        f"{merged.max_logit_difference:.1e} from the unmerged computation, by {merged.effect:.1e} from the base"
    )


def _render_base(written: MergedBaseReport) -> str:
    where = printable(str(written.path))
    return (
        f"wrote {where} ({written.dtype}, {format_bytes(written.size_bytes)}): logits differ by at most "
        f"{written.max_logit_difference:.1e} from the unmerged computation, by {written.effect:.1e} from the base"
    )


def _render_search(report: SearchReport, names: Sequence[str]) -> str:
    rows = [
        [
            candidate.method + ("*" if candidate is report.best else ""),
            *(f"{weight:g}" for weight in candidate.weights),
            *(f"{value:,.2f}" for value in candidate.perplexities),
            f"{candidate.mean:,.4f}",
        ]
        for candidate in report.front
    ]
    rows.append(["base", *("" for _ in names), *(f"{value:,.2f}" for value in report.base.perplexities), ""])
    table = format_table(["method", *names, *(f"ppl {label}" for label in report.labels), "mean nats"], rows)
    return f"{len(report.candidates)} mixes measured; those that no other beats on every text (* lowest mean):\n{table}"
