"""What a shell may complete behind an option: names that are looked up, fast and without torch."""

from __future__ import annotations

from collections.abc import Callable

import click
from click.shell_completion import CompletionItem

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def add_completion(command: click.Command) -> None:
    """Makes a command, and those below it, complete adapters, recipes, bases and settings."""
    if isinstance(command, click.Group):
        for below in command.commands.values():
            add_completion(below)
    for param in command.params:
        if found := _choose_completer(param):
            param._custom_shell_complete = found  # what `shell_complete=` of each option would set


def _choose_completer(param: click.Parameter) -> Complete | None:
    by_option = {
        "--adapter": complete_adapters,
        "--compare": complete_adapters,
        "--base": complete_bases,
        "--set": complete_settings,
        "--recipe": complete_recipes,
    }
    metavar = param.metavar or ""
    if isinstance(param, click.Argument):
        return complete_adapters if "NAME[@VERSION]" in metavar else complete_recipes if "RECIPE" in metavar else None
    return next((by_option[name] for name in param.opts if name in by_option), None)


def _offer(words: list[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(word) for word in words if word.startswith(incomplete)]


def complete_adapters(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Returns the adapters of the store that was named, for the last part of a mix."""
    from lora_gpt2.store.catalog import Store

    found = ctx.params.get("store")
    store = found if isinstance(found, Store) else Store.find(found)
    done, separator, last = incomplete.rpartition("+")
    return _offer(
        [f"{done}{separator}{name}" for name in [*store.list_names(), "base", "all"]], f"{done}{separator}{last}"
    )


def complete_recipes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Returns the bundled recipes; files beside them are the shell's to complete."""
    from lora_gpt2.recipe_files import list_recipes

    names = _offer([path.stem for path in list_recipes()], incomplete)
    return [*names, CompletionItem(incomplete, type="file")]


def complete_bases(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Returns the bundled bases and the known names of the hub."""
    from lora_gpt2.model.checkpoint import HUB_NAMES, list_bundled

    return _offer([*list_bundled(), *HUB_NAMES], incomplete)


def complete_settings(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Returns the settings, with `=` behind them."""
    from lora_gpt2.recipe import list_keys

    return _offer([f"{key}=" for key in list_keys()], incomplete)
