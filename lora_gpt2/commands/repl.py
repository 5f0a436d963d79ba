"""`lora-gpt2 repl`: write a text together with adapters."""

from __future__ import annotations

from typing import Any

import click

from lora_gpt2.commands.keyboard import open_loop, run_lines
from lora_gpt2.commands.settings import setting_options
from lora_gpt2.commands.shared import base_option, seed_option, set_option, store_option
from lora_gpt2.core.console import Reporter
from lora_gpt2.recipe_files import load_recipe
from lora_gpt2.store.catalog import Store


@click.command("repl")
@click.option(
    "--adapter", "adapters", multiple=True, metavar="A[:W]", help="Adapter or mix (a:0.6+b:0.4) to begin with."
)
@click.option("--no-log", is_flag=True, help="Keep no record of what is written; so does LORA_GPT2_LOG=off.")
@seed_option
@setting_options("generate")
@base_option
@set_option
@store_option
@click.pass_obj
def command(
    reporter: Reporter,
    adapters: tuple[str, ...],
    no_log: bool,
    seed: int | None,
    flags: dict[str, Any],
    base: str | None,
    overrides: tuple[str, ...],
    store: Store,
) -> None:
    """Write a text together with adapters: type, let one continue, try another, undo. /help lists the commands.

    GPT-2 continues text: for adapters that were trained on chats there is `chat`.

    \b
    Examples:
      lora-gpt2 repl --adapter shakespeare
      printf 'ROMEO:\\n/stats\\n' | lora-gpt2 repl --adapter shakespeare --seed 1
    """
    recipe = load_recipe(None, overrides, {**flags, "base": base})
    from lora_gpt2.inference.repl import Repl

    loop = open_loop(Repl, store, adapters, recipe, reporter, seed=seed, is_logged=not no_log)
    run_lines(loop, reporter, is_echoed=True)
