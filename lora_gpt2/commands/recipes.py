"""`lora-gpt2 recipes`: worked examples, and every setting."""

from __future__ import annotations

from pathlib import Path

import click

from lora_gpt2.commands.shared import CommandGroup, emit, json_option, set_option
from lora_gpt2.core.errors import ConflictError
from lora_gpt2.core.files import wrap_os_errors, write_atomic
from lora_gpt2.core.printable import printable
from lora_gpt2.core.tables import format_table
from lora_gpt2.recipe import describe_key, list_keys
from lora_gpt2.recipe_files import find_recipe, list_recipes, load_recipe


@click.group("recipes", cls=CommandGroup)
def command() -> None:
    """List, show, copy and check recipes."""


@command.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the recipes that come with the package.

    \b
    Example:
      lora-gpt2 recipes list
    """
    rows = [{"name": path.stem, "description": load_recipe(path).description} for path in list_recipes()]
    emit(
        {"recipes": rows}, as_json, lambda: format_table(["recipe", ""], [[r["name"], r["description"]] for r in rows])
    )


@command.command("show")
@click.argument("name", required=False)
@json_option
def show(name: str | None, as_json: bool) -> None:
    """Show a recipe, or, without NAME, every setting with its default and its meaning.

    \b
    Examples:
      lora-gpt2 recipes show prose
      lora-gpt2 recipes show
    """
    if name:
        path = find_recipe(name)
        emit(load_recipe(path).model_dump(mode="json"), as_json, lambda: path.read_text(encoding="utf-8").rstrip())
        return
    rows = {key: describe_key(key).partition(": ")[2] for key in list_keys()}
    emit({"settings": rows}, as_json, lambda: "\n".join(f"{key:<28} {text}" for key, text in rows.items()))


@command.command("copy")
@click.argument("name")
@click.argument("target", type=click.Path(path_type=Path))
def copy(name: str, target: Path) -> None:
    """Copy a recipe to TARGET, to change it.

    \b
    Example:
      lora-gpt2 recipes copy prose mine.yaml
    """
    path = find_recipe(name)
    if target.exists():
        raise ConflictError(f"{target} exists already", "choose another name, or remove it")
    with wrap_os_errors(f"write {target}"):
        write_atomic(target, path.read_bytes())
    click.echo(printable(f"wrote {target}"))


@command.command("check")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RECIPE...")
@set_option
@json_option
def check(paths: tuple[Path, ...], overrides: tuple[str, ...], as_json: bool) -> None:
    """Check recipes: every key, value and bound.

    \b
    Example:
      lora-gpt2 recipes check mine.yaml
    """
    valid = {str(path): load_recipe(path, overrides).model_dump(mode="json") for path in paths}
    emit({"recipes": valid}, as_json, lambda: [f"{path}: valid" for path in valid])
