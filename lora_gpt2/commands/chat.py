"""`lora-gpt2 chat`: talk to an adapter that was trained on chats."""

from __future__ import annotations

from typing import Any

import click

from lora_gpt2.commands.keyboard import open_loop, run_lines
from lora_gpt2.commands.settings import setting_options
from lora_gpt2.commands.shared import base_option, seed_option, set_option, store_option
from lora_gpt2.core.console import Reporter
from lora_gpt2.core.names import AUTO
from lora_gpt2.recipe_files import load_recipe
from lora_gpt2.store.catalog import Store


@click.command("chat")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="A[:W]",
    help="Adapter or mix that answers; by default auto: the adapter trained on chats that knows such a chat best.",
)
@click.option("--system", metavar="TEXT", help="Instructions that stand before the chat.")
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
    system: str | None,
    no_log: bool,
    seed: int | None,
    flags: dict[str, Any],
    base: str | None,
    overrides: tuple[str, ...],
    store: Store,
) -> None:
    """Talk to an adapter that was trained on chats: type a message, read its answer. /help lists the commands.

    Turns are written as they were in its training text; --set generate.chat_turns says it for other adapters. The
    oldest messages make room where a chat outgrows the context.

    \b
    Examples:
      lora-gpt2 chat --adapter support
      lora-gpt2 chat --adapter support --system "Be brief." --temperature 0.3
      printf 'I need a table for two.\\n/save chat.jsonl\\n' | lora-gpt2 chat --adapter support --seed 1
    """
    recipe = load_recipe(None, overrides, {**flags, "base": base})
    from lora_gpt2.inference.chat import Message
    from lora_gpt2.inference.chat_loop import ChatLoop

    loop = open_loop(ChatLoop, store, adapters or (AUTO,), recipe, reporter, seed=seed, is_logged=not no_log)
    loop.messages = (Message("system", system),) if system else ()
    run_lines(loop, reporter, is_echoed=False)
