"""`lora-gpt2 train`: recipes or files in, adapters out."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from lora_gpt2.commands.shared import (
    base_option,
    emit,
    format_bytes,
    format_table,
    json_option,
    name_store,
    set_option,
    store_option,
)
from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import UsageError
from lora_gpt2.recipe import Recipe, load_recipe
from lora_gpt2.store.catalog import Store


@click.command("train")
@click.argument("recipes", nargs=-1, type=click.Path(path_type=Path), metavar="[RECIPE]...")
@click.option("--data", multiple=True, metavar="SOURCE", help="File, folder or glob of text; repeatable.")
@click.option("--name", metavar="N", help="Name of the adapter; else the recipe's, else the first file's.")
@base_option
@set_option
@click.option("--resume", is_flag=True, help="Go on with the interrupted run of the same recipes.")
@store_option
@json_option
@click.pass_obj
def command(
    reporter: Reporter, recipes: tuple[Path, ...], data: tuple[str, ...], name: str | None, base: str | None,
    overrides: tuple[str, ...], resume: bool, store: Store, as_json: bool,
) -> None:  # fmt: skip
    """Train one adapter, or several recipes together over one base.

    \b
    Examples:
      lora-gpt2 train --data my_text.txt --name mine
      lora-gpt2 train prose --data notes/ --name mine --set train.steps=100
      lora-gpt2 train a.yaml b.yaml c.yaml        three adapters, one pass over the base
      lora-gpt2 train a.yaml --resume             after an interruption
    """
    chosen = [
        name_recipe(load_recipe(path, overrides, data__sources=data, name=name, base=base))
        for path in recipes or [None]
    ]
    from lora_gpt2.training.run import train_recipes

    report = train_recipes(chosen, store, reporter, resume)
    emit({"adapters": [asdict(item) for item in report.adapters]}, as_json, lambda: _render(report.adapters))
    first = report.adapters[0].name
    where = name_store(store)
    reporter.message(f'next: lora-gpt2 generate "..." --adapter {first}{where}')
    reporter.message(f"or:   lora-gpt2 adapters show {first}{where}")


def name_recipe(recipe: Recipe) -> Recipe:
    """Returns the recipe with a name: its own, or one made of its first source's."""
    if recipe.name:
        return recipe
    if not recipe.data.sources:
        raise UsageError("there is nothing to train on", "give a recipe, or text with --data FILE")
    stem = re.sub(r"[^a-z0-9._-]+", "-", Path(recipe.data.sources[0]).stem.lower()).strip("-._")
    return recipe.model_copy(update={"name": stem[:64]})


def _render(adapters: list[Any]) -> str:
    rows = [
        [f"{a.name}@{a.version}", f"{a.steps}", f"{a.train_tokens:,}", f"{a.base_perplexity:.2f}",
         f"{a.validation_perplexity:.2f}", f"{a.best_step}", f"{a.tokens_per_second:,.0f}",
         format_bytes(a.peak_memory_bytes), f"{a.seconds:.0f} s"] for a in adapters
    ]  # fmt: skip
    header = ["adapter", "steps", "tokens", "base ppl", "validation ppl", "best step", "tokens/s", "peak", "time"]
    return format_table(header, rows)
