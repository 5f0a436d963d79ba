"""Options for everyday settings, made from the recipe's fields: name, type, help and default exist there alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

import click
from pydantic_core import PydanticUndefined

from lora_gpt2.recipe import find_field
from lora_gpt2.recipe_files import EVERYDAY, parse_value

SHORT = {"train.learning_rate": ("--lr",), "generate.max_new_tokens": ("--max-tokens",)}
"""Second names that everybody types."""
METAVARS = {"generate.choice": "A,B", "generate.regex": "REGEX", "generate.json_schema": "FILE"}


def setting_options(*groups: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds an option for each everyday setting of some groups, and passes their values as `flags`, by dotted key."""
    keys = list(dict.fromkeys(key for group in groups for key in EVERYDAY[group]))

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*arguments: Any, **values: Any) -> Any:
            flags = {key: values.pop(_parameter_name(key)) for key in keys}
            return function(*arguments, flags=flags, **values)

        command: Callable[..., Any] = wrapped
        for key in reversed(keys):
            command = _build_option(key)(command)
        return command

    return decorate


def _parameter_name(key: str) -> str:
    return f"set_{key.rpartition('.')[2]}"


def _build_option(key: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    field = find_field(key)
    assert field is not None
    name = "--" + key.rpartition(".")[2].replace("_", "-")
    choices, is_list = _list_choices(field.annotation), get_origin(field.annotation) is tuple
    is_free = is_list and not choices and key not in METAVARS
    default = field.default
    shown = "" if default in (None, (), "", PydanticUndefined) or is_list else f"  [default: {default}]"
    return click.option(
        name,
        *SHORT.get(key, ()),
        _parameter_name(key),
        type=click.Choice(choices) if choices and not is_list else str,
        metavar=METAVARS.get(key) or _name_values(bool(choices), is_list),
        multiple=is_free,
        callback=functools.partial(_parse, key, is_list and not is_free),
        help=f"{field.description}{shown}",
    )


def _name_values(has_choices: bool, is_list: bool) -> str | None:
    """Returns what stands for a value in the help."""
    if has_choices:
        return "A,B" if is_list else None
    return "TEXT" if is_list else "N"


def _parse(key: str, is_split: bool, ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """Returns a value as `--set` reads it; bounds are checked with the recipe."""
    if value is None or isinstance(value, tuple):
        return value and tuple(text.replace("\\n", "\n").replace("\\t", "\t") for text in value)
    return value.split(",") if is_split else parse_value(key, value, (param.opts or [key])[0])


def _list_choices(annotation: Any) -> list[str]:
    """Returns the words that a setting, or each item of its list, may be."""
    if get_origin(annotation) is Literal:
        return [str(word) for word in get_args(annotation)]
    return next((found for item in get_args(annotation) if (found := _list_choices(item))), [])
