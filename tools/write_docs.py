"""Writes the generated pages of the documentation: commands, settings, Python, cleaning rules; `--check` compares.

They are plain Markdown, so that they read as well in the repository as on the site.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import griffe
from pydantic import BaseModel

from lora_gpt2.cli import COMMANDS, cli
from lora_gpt2.data.clean.report import DESCRIPTIONS
from lora_gpt2.data.clean.rules import PROFILES, RULES
from lora_gpt2.recipe import describe_key, list_keys
from lora_gpt2.recipe_files import load_recipe

DOCS = Path(__file__).parent.parent / "docs"
GENERATED = "<!-- written by 'make docs' -->\n\n"
SETTINGS_TEXT = """
Settings are in a recipe file (YAML) or on the command line as `--set section.key=value`. The command line overrides the
recipe, the recipe the defaults. Unknown keys are refused, and the nearest valid one is named.

"""


def write_commands() -> str:
    """Returns one section per command: what it does, its usage, options and examples."""
    context = click.Context(cli, info_name="lora-gpt2")
    parts = []
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            group = click.Context(command, parent=context, info_name=name)
            for child in command.list_commands(group):
                parts.append(show(command.get_command(group, child), f"{name} {child}", group, child))
        else:
            parts.append(show(command, name, context, name))
    return "\n".join(parts)


def show(command: click.Command | None, title: str, parent: click.Context, name: str) -> str:
    """Returns a command's help as a Markdown section."""
    assert command is not None
    context = click.Context(command, parent=parent, info_name=name, max_content_width=96, terminal_width=96)
    return f"## {title}\n\n```text\n{command.get_help(context)}\n```\n"


def _join(values: list[Any]) -> str:
    """Returns a list as text; lists in it are separated by semicolons."""
    is_nested = any(isinstance(value, list) for value in values)
    return ("; " if is_nested else ", ").join(_join(v) if isinstance(v, list) else str(v) for v in values)


def write_settings() -> str:
    """Returns a table of every setting with its default and meaning."""
    recipe = load_recipe(None).model_dump(mode="json")
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for key in list_keys():
        section, _, name = key.rpartition(".")
        value = recipe[section][name] if section else recipe[name]
        shown = _join(value) if isinstance(value, list) else value
        if shown is None or isinstance(shown, dict):
            shown = ""
        elif isinstance(shown, bool):
            shown = str(shown).lower()
        meaning = describe_key(key).partition(": ")[2].replace("|", "\\|").replace("\n", " ")
        rows.append(f"| `{key}` | {shown} | {meaning} |")
    return "\n".join(rows) + "\n"


def write_rules() -> str:
    """Returns a table of the cleaning rules: modes, profiles that have them on, and what each gives."""
    rows = ["| rule | modes | on in | gives |", "|---|---|---|---|"]
    for name, meaning in DESCRIPTIONS.items():
        modes = ", ".join(RULES[name].modes) if name in RULES else "on"
        profiles = ", ".join(profile for profile, names in PROFILES.items() if name in names)
        rows.append(f"| `{name}` | {modes} | {profiles} | {meaning} |")
    return "\n".join(rows) + "\n"


def write_python() -> str:
    """Returns the reference of Python: the template with each `::: name` replaced by what the docstring says."""
    template = (Path(__file__).parent / "python_reference.md").read_text(encoding="utf-8")
    return re.sub(r"^::: (\S+)$", lambda match: "\n".join(describe_name(match[1])), template, flags=re.MULTILINE)


def describe_name(path: str) -> Iterator[str]:
    """Yields the lines of a function, a class with its methods, or a module with its classes."""
    found = load_name(path)
    if isinstance(found, ModuleType):
        yield from describe_docstring(found)
        return
    yield from describe_object(path.removeprefix("lora_gpt2.").rpartition(".")[2], found, "###")
    if inspect.isclass(found):
        for name, member in vars(found).items():
            is_callable = inspect.isroutine(member) or isinstance(member, property | classmethod | staticmethod)
            if is_callable and not name.startswith("_") and inspect.getdoc(getattr(found, name)):
                yield from describe_object(f"{found.__name__}.{name}", getattr(found, name), "####")


def load_name(path: str) -> Any:
    """Returns the module or the object of a dotted path."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


def describe_object(title: str, found: Any, heading: str) -> Iterator[str]:
    """Yields the heading, the signature and the docstring of a function, class, method or property."""
    yield f"{heading} {title}\n"
    is_class = inspect.isclass(found) and issubclass(found, BaseException | BaseModel)
    is_plain = is_class or isinstance(found, property | cached_property)
    if not is_plain:
        yield f"```python\n{show_signature(title, inspect.signature(found))}\n```\n"
    yield from describe_docstring(found)


class Verbatim(str):
    """An annotation that is shown as it is written."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def show_signature(title: str, signature: inspect.Signature) -> str:
    """Returns a call as it is declared, on one line, or with a line for each parameter where that is too long."""
    shown, last = list[str](), None
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and last not in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL):
            shown.append("*")
        last = parameter.kind
        if inspect.isroutine(parameter.default):
            parameter = parameter.replace(default=Verbatim("…"))
        is_typed = parameter.annotation is not parameter.empty
        shown.append(str(parameter.replace(annotation=Verbatim(parameter.annotation)) if is_typed else parameter))
    result = signature.return_annotation
    ending = "" if result is signature.empty or result in ("None", None) else f" -> {Verbatim(result)}"
    whole = f"{title}({', '.join(shown)}){ending}"
    if len(whole) <= 100:
        return whole
    lines = ",\n    ".join(shown)
    return f"{title}(\n    {lines},\n){ending}"


def describe_docstring(found: Any) -> Iterator[str]:
    """Yields the sections of a docstring in Google's style."""
    options = {"warn_missing_types": False, "warn_unknown_params": False, "returns_multiple_items": False}
    text = inspect.getdoc(found) or ""
    for section in griffe.Docstring(text, parser="google", parser_options=options).parsed:
        if section.kind is griffe.DocstringSectionKind.text:
            yield f"{section.value}\n"
            continue
        yield f"*{(section.title or section.kind.value).capitalize()}*\n"
        for item in section.value:
            name = getattr(item, "name", "") or (item.annotation if section.kind.value == "raises" else "")
            meaning = " ".join(item.description.split())
            yield f"- `{name}`: {meaning}" if name else f"- {meaning}"
        yield ""


def fill(text: str, marker: str, content: str) -> str:
    """Returns the text with the part between a marker's two comments replaced."""
    begin, end = f"<!-- {marker}: written by 'make docs' -->\n", f"<!-- end of {marker} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    assert found and closed, f"there is no part {marker}"  # noqa: PT018
    return f"{before}{begin}\n{content}\n{end}{after}"


def build_pages() -> dict[Path, str]:
    """Returns the content of every page that is generated, or has a generated part."""
    data = DOCS / "data.md"
    return {
        DOCS / "reference" / "commands.md": f"{GENERATED}# Commands\n\n{write_commands()}",
        DOCS / "reference" / "python.md": f"{GENERATED}{write_python()}",
        DOCS / "reference" / "settings.md": f"{GENERATED}# Settings\n{SETTINGS_TEXT}{write_settings()}",
        data: fill(data.read_text(encoding="utf-8"), "rules", write_rules()),
    }


def main() -> None:
    """Writes the pages, or with --check exits with 1 if one would change."""
    for path, content in build_pages().items():
        if "--check" not in sys.argv:
            path.write_text(content, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != content:
            sys.exit(f"{path.relative_to(DOCS.parent)} is not up to date: run 'make docs'")


if __name__ == "__main__":
    main()
