"""`lora-gpt2 merge`: several adapters into one, or adapters into the base."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from lora_gpt2.commands.shared import SAMPLE_PROMPT, emit, format_bytes, session_options, suggest_next
from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import ConflictError, UsageError
from lora_gpt2.core.names import check_name
from lora_gpt2.core.printable import printable
from lora_gpt2.core.tables import format_table
from lora_gpt2.evaluation.report import format_matrix
from lora_gpt2.recipe import MergeMethod
from lora_gpt2.recipe_files import load_recipe
from lora_gpt2.store.catalog import Store

if TYPE_CHECKING:
    from lora_gpt2.merging.combine import MergeReport
    from lora_gpt2.merging.into_base import MergedBaseReport
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
    _check_target(name, into_base, search, store)
    recipe = load_recipe(None, overrides, {"base": base, "merge.method": method, "merge.rank": rank})
    from lora_gpt2.evaluation.matrix import LabelledSource, read_sources
    from lora_gpt2.inference.mix import Mix, read_manifests
    from lora_gpt2.inference.open import open_session
    from lora_gpt2.merging.combine import merge_adapters
    from lora_gpt2.merging.into_base import merge_into_base
    from lora_gpt2.merging.search import search_weights

    mix, settings = Mix.parse(adapters), recipe.merge
    wanted = [LabelledSource.parse(item) for text in texts for item in text.split(",") if item]
    read_manifests(store, adapters)
    sources = read_sources(wanted, recipe.data, reporter)
    session, _ = open_session(store, mix.references, recipe, "float32")
    result: dict[str, Any] = {"method": settings.method}
    if search:
        report = search_weights(session, mix, sources, settings, recipe.evaluate, reporter)
        labels = [source.label for source in sources]
        result["search"] = _describe_search(report, labels)
        if not as_json:  # at once: what follows may fail
            shown = _render_search(report, mix.references, labels)
            click.echo(printable(shown, keep_lines=True) + "\n")
        best = report.best
        mix = Mix((name, weight) for name, weight in zip(mix.references, best.weights, strict=True) if weight)
        settings = settings.model_copy(update={"method": best.method})
    lines: list[str] = []
    if name:
        merged = merge_adapters(session, mix, name, settings, sources, evaluate=recipe.evaluate, reporter=reporter)
        result |= asdict(merged) | {"cells": [cell.to_json() for cell in merged.cells]}
        lines += [format_matrix(result["cells"]), _render_merge(merged)]
    if into_base:
        written = merge_into_base(
            session, mix, into_base, settings, sources, evaluate=recipe.evaluate, reporter=reporter
        )
        result |= asdict(written) | {"cells": [cell.to_json() for cell in written.cells]}
        lines += [format_matrix(result["cells"]), _render_base(written)]
    if as_json or lines:
        emit(result, as_json, lambda: "\n\n".join(lines))
    if name or into_base:
        which = ("--adapter", name) if name else ("--base", str(into_base))
        suggest_next(reporter, "generate", SAMPLE_PROMPT, *which, store=store if name else None)


def _check_target(name: str | None, into_base: Path | None, search: bool, store: Store) -> None:
    """Finds out now, not after the work, whether the result has a place."""
    if bool(name) + bool(into_base) > 1 or not (name or into_base or search):
        raise UsageError("say where the merge goes", "--as NAME for an adapter, --into-base DIR for a plain GPT-2")
    if name:
        check_name(name)
        store.check_writable()
    if into_base and (into_base.exists() or into_base.is_symlink()):
        raise ConflictError(f"{into_base} exists", "choose a new folder, or remove it first")


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


def _describe_search(report: SearchReport, labels: list[str]) -> dict[str, Any]:
    def describe(candidate: Any) -> dict[str, Any]:
        perplexity = dict(zip(labels, candidate.perplexities, strict=True))
        return {"method": candidate.method, "weights": list(candidate.weights), "perplexity": perplexity}

    return {
        "measured": len(report.candidates),
        "best": describe(report.best),
        "front": list(map(describe, report.front)),
        "base_perplexity": describe(report.base)["perplexity"],
    }


def _render_search(report: SearchReport, names: list[str], labels: list[str]) -> str:
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
    table = format_table(["method", *names, *(f"ppl {label}" for label in labels), "mean nats"], rows)
    return f"{len(report.candidates)} mixes measured; those that no other beats on every text (* lowest mean):\n{table}"
