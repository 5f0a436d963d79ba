"""Recipes on disk and `--set`: from YAML and the command line to one validated `Recipe`. Never imports torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from lora_gpt2.core.errors import DataError, NotFoundError, RecipeError, UsageError
from lora_gpt2.core.printable import shorten
from lora_gpt2.core.strict_yaml import describe_problem, parse_yaml
from lora_gpt2.core.suggest import suggest
from lora_gpt2.core.user_files import read_user_text
from lora_gpt2.recipe import SECTIONS, Recipe, build_recipe, is_text, list_keys

MAX_RECIPE_BYTES = 2**20
EXAMPLES = "correct it; 'lora-gpt2 recipes show prose' shows one that is valid"


def parse_override(text: str) -> tuple[list[str], Any]:
    """Splits `section.key=value` into path and value: YAML, or for a free text as it is, with `\\n` for line ends."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise RecipeError(f"--set {shorten(text)}: expected section.key=value", "for example --set train.steps=300")
    path = key.strip().split(".")
    if is_text(key.strip()) and not value.startswith(('"', "'")):
        if any("\ud800" <= character <= "\udfff" for character in value):  # bytes that are not UTF-8
            raise RecipeError(f"--set {shorten(text)}: the value is not valid UTF-8", "type it in UTF-8")
        return path, value.replace("\\n", "\n").replace("\\t", "\t")
    try:
        return path, parse_yaml(value)
    except yaml.YAMLError as error:
        problem = shorten(describe_problem(error)[0])
        raise RecipeError(
            f"--set {shorten(text)}: the value is not valid YAML{f': {problem}' if problem else ''}",
            "quote it, for example 'a.b=\"x: y\"'",
        ) from error


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Returns a copy of the nested mapping with each `section.key=value` set."""
    result: dict[str, Any] = {
        key: dict(value or {}) if key in SECTIONS and isinstance(value, Mapping | None) else value
        for key, value in values.items()
    }
    for text in overrides:
        path, value = parse_override(text)
        node = result
        for part in path[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                known = suggest(".".join(path), list_keys())
                raise RecipeError(f"--set {shorten(text)}: '{shorten(part)}' is not a section", known)
        node[path[-1]] = value
    return result


def read_recipe(path: Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file, or in the bundled recipe of that name; sources are relative to its folder."""
    try:
        text = read_user_text(path, max_bytes=MAX_RECIPE_BYTES)
    except NotFoundError as error:
        if path.name in {recipe.name for recipe in list_recipes()} | {recipe.stem for recipe in list_recipes()}:
            return read_recipe(find_recipe(path.stem))
        raise NotFoundError(f"there is no recipe {path}", "see 'lora-gpt2 recipes list'") from error
    except (DataError, UsageError) as error:
        raise RecipeError(error.message, "a recipe is a YAML file in UTF-8; see 'lora-gpt2 recipes list'") from error
    try:
        values = parse_yaml(text)
    except yaml.YAMLError as error:
        problem, line = describe_problem(error)
        location, reason = f":{line}" if line else "", f": {shorten(problem)}" if problem else ""
        raise RecipeError(f"{path}{location}: not valid YAML{reason}", EXAMPLES) from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected settings, found {type(values).__name__}", EXAMPLES)
    data = values.get("data")
    if isinstance(data, dict):
        for key in ("sources", "validation", "test"):
            if isinstance(data.get(key), list):
                data[key] = [_place_source(source, path.parent) for source in data[key]]
    return values


def _place_source(source: Any, folder: Path) -> Any:
    """Returns a source relative to the recipe's folder (an absolute one stays), and what is not a path as it is."""
    if source == "" or isinstance(source, bool | list | dict | None):
        return source
    return str(folder / str(source))


def load_recipe(path: Path | None, overrides: Iterable[str] = (), **flags: Any) -> Recipe:
    """Returns the recipe of a file (or the defaults), with `--set` overrides and then named flags on top.

    `flags` are dotted keys with `.` written as `__`; None and empty tuples are left out.
    """
    values = read_recipe(path) if path else {}
    values = apply_overrides(values, overrides)
    for key, value in flags.items():
        if value is None or value == ():
            continue
        section, _, name = key.rpartition("__")
        target = values.setdefault(section, {}) if section else values
        if isinstance(target, dict):  # else `build_recipe` says what is wrong with the section
            target[name] = value
    return build_recipe(values, str(path) if path else "settings")


def _recipe_dirs() -> list[Path]:
    package = Path(__file__).parent
    return [folder for folder in (package / "_recipes", package.parent / "recipes") if folder.is_dir()]


def list_recipes() -> list[Path]:
    """Returns the recipes that come with the package."""
    return sorted(path for folder in _recipe_dirs()[:1] for path in folder.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """Returns the bundled recipe of that name; raises `NotFoundError` with the nearest."""
    known = {path.stem: path for path in list_recipes()}
    if name not in known:
        raise NotFoundError(f"there is no recipe '{name}'", suggest(name, known))
    return known[name]


def name_recipe(recipe: Recipe) -> Recipe:
    """Returns the recipe with a name: its own, or one made of its first source's."""
    if recipe.name:
        return recipe
    if not recipe.data.sources:
        raise UsageError("there is nothing to train on", "give a recipe, or text with --data FILE")
    stem = re.sub(r"[^a-z0-9._-]+", "-", Path(recipe.data.sources[0]).stem.lower()).strip("-._")
    return recipe.model_copy(update={"name": stem[:64]})
