"""`lora-gpt2 tune`: many candidates trained together, the best one published."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from lora_gpt2.commands.settings import setting_options
from lora_gpt2.commands.shared import (
    RunOptions,
    base_option,
    data_option,
    emit,
    from_option,
    items_argument,
    json_option,
    run_options,
    set_option,
    skip_bad_option,
    store_option,
    suggest_next,
)
from lora_gpt2.core.console import Reporter
from lora_gpt2.core.durations import parse_seconds
from lora_gpt2.core.errors import UsageError
from lora_gpt2.core.tables import format_table
from lora_gpt2.recipe_files import list_items, load_recipe, name_recipe
from lora_gpt2.store.catalog import Store

if TYPE_CHECKING:
    from lora_gpt2.training.tune import TuneReport


@click.command("tune")
@items_argument
@data_option
@click.option("--name", metavar="N", help="Name of the adapter; else the recipe's, else the first file's.")
@base_option
@from_option
@click.option("--candidates", type=click.IntRange(2, 256), default=8, show_default=True, help="Number of candidates.")
@click.option("--slots", type=click.IntRange(1, 256), help="Candidates at a time on a device; else as memory allows.")
@click.option("--ray", metavar="ADDRESS", help="Search on the devices of a Ray cluster: auto, local, or its address.")
@click.option("--budget", metavar="TIME", help="Time for the whole search, such as 10min; it decides the steps.")
@setting_options("train")
@set_option
@skip_bad_option
@run_options
@store_option
@json_option
@click.pass_obj
def command(
    reporter: Reporter,
    items: tuple[str, ...],
    data: tuple[str, ...],
    name: str | None,
    base: str | None,
    init_from: str | None,
    candidates: int,
    slots: int | None,
    ray: str | None,
    budget: str | None,
    flags: dict[str, Any],
    overrides: tuple[str, ...],
    skip_bad: bool,
    run: RunOptions,
    store: Store,
    as_json: bool,
) -> None:
    """Search for the settings of one adapter, by successive halving on validation text.

    The recipe's own settings are the first candidate; the others are drawn from its section tune. The best one is
    published, with the table of all; test text is measured on once. Candidates that do not fit into memory together
    take turns.

    \b
    Examples:
      lora-gpt2 tune law.jsonl
      lora-gpt2 tune law.jsonl --candidates 16 --budget 10min
      lora-gpt2 tune law.jsonl --candidates 32 --ray auto   over the machines of a Ray cluster
      lora-gpt2 tune law.yaml --set tune.ranks=[4,16,64] --forget 0.1
    """
    chosen = list_items(items, data, name)
    if len(chosen) > 1:
        raise UsageError("a search is for one adapter at a time", "name one recipe, or text without labels")
    if ray and run.watch:
        raise UsageError("--ray cannot be combined with --watch", "leave one of them out")
    seconds = None if budget is None else parse_seconds(budget, "--budget")
    own = {**flags, "base": base, "data.skip_bad": skip_bad or None, "lora.init_from": init_from}
    item = chosen[0]
    recipe = load_recipe(item.recipe, overrides, {**own, **item.flags})
    from lora_gpt2.training.tune import tune

    with run.watching(reporter):
        report = tune(
            name_recipe(recipe),
            store,
            reporter,
            num_candidates=candidates,
            budget_seconds=seconds,
            num_slots=slots or 0,
            ray=ray or "",
            resume=run.resume,
            fresh=run.fresh,
        )
    result = {"adapter": asdict(report.adapter), "candidates": [asdict(each) for each in report.candidates]}
    emit(result, as_json, lambda: _render(report))
    reporter.message(f"{report.adapter}: {report.adapter.verdict}; {report.adapter.forgetting}")
    suggest_next(reporter, "adapters", "show", report.adapter.name, store=store)


def _render(report: TuneReport) -> str:
    is_bounded = any(candidate.divergence is not None for candidate in report.candidates)
    header = [
        "",
        "steps",
        "validation ppl (blocks)",
        "general ppl",
        *(["KL to base"] if is_bounded else []),
        "settings",
    ]
    rows = [
        [
            "best" if each.is_best else "",
            f"{each.steps}",
            f"{each.validation_perplexity:.2f}",
            "" if each.general_perplexity is None else f"{each.general_perplexity:.1f}",
            *([] if not is_bounded else ["" if each.divergence is None else f"{each.divergence:.4f}"]),
            " ".join(f"{key}={_show(value)}" for key, value in each.settings.items()) or "the recipe's own",
        ]
        for each in report.candidates
    ]
    return format_table(header, rows)


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
