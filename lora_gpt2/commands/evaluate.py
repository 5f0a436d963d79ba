"""`lora-gpt2 evaluate`: perplexity of adapters and the base on text."""

from __future__ import annotations

import click

from lora_gpt2.commands.shared import emit, format_matrix, session_options
from lora_gpt2.core.console import Reporter
from lora_gpt2.recipe_files import load_recipe
from lora_gpt2.store.catalog import Store


@click.command("evaluate")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--adapter", "adapters", multiple=True, metavar="N", help="Adapter, or 'all'; repeatable.")
@session_options
def command(
    reporter: Reporter, sources: tuple[str, ...], adapters: tuple[str, ...], base: str | None,
    overrides: tuple[str, ...], store: Store, as_json: bool,
) -> None:  # fmt: skip
    """Measure the perplexity of the base and of each adapter on each SOURCE (a path, or label=path).

    \b
    Examples:
      lora-gpt2 evaluate test.txt --adapter mine
      lora-gpt2 evaluate law=law.jsonl code=code.txt --adapter all --json
      lora-gpt2 evaluate test.txt --set evaluate.window=256 --set evaluate.stride=128
    """
    recipe = load_recipe(None, overrides, base=base)
    from lora_gpt2.evaluation.matrix import measure_matrix, read_sources
    from lora_gpt2.inference.open import open_session
    from lora_gpt2.inference.session import BASE, parse_mix

    read = read_sources(sources, recipe.data)
    session, references = open_session(store, adapters, recipe, recipe.evaluate.precision)
    session.open([name for name in references if name != BASE])
    rows = {name: session.for_rows(parse_mix([name])) for name in [BASE, *references]}
    cells = [cell.to_json() for cell in measure_matrix(session.base, rows, read, recipe.evaluate, reporter)]
    emit({"cells": cells}, as_json, lambda: format_matrix(cells))
