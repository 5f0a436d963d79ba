"""Recipes on disk and `--set`: from YAML and the command line to one validated `Recipe`. Never imports torch."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from pydantic import BaseModel

from lora_gpt2.core.errors import DataError, NotFoundError, RecipeError, UsageError
from lora_gpt2.core.names import HUB, STDIN, is_name, make_name
from lora_gpt2.core.printable import shorten
from lora_gpt2.core.strict_json import load_json
from lora_gpt2.core.strict_yaml import describe_problem, parse_yaml
from lora_gpt2.core.suggest import suggest
from lora_gpt2.core.user_files import read_user_text
from lora_gpt2.recipe import SECTIONS, Recipe, build_recipe, find_field, list_keys

MAX_RECIPE_BYTES = 2**20
EVERYDAY: dict[str, tuple[str, ...]] = {
    "train": (
        "train.epochs",
        "train.steps",
        "train.learning_rate",
        "train.batch_size",
        "train.seed",
        "train.dtype",
        "train.quantize",
        "train.forget",
        "lora.rank",
        "lora.alpha",
        "lora.targets",
        "lora.dropout",
        "data.block_size",
        "data.profile",
    ),
    "generate": (
        "generate.max_new_tokens",
        "generate.temperature",
        "generate.top_k",
        "generate.top_p",
        "generate.min_p",
        "generate.repetition_penalty",
        "generate.num_beams",
        "generate.stop",
        "generate.choice",
        "generate.regex",
        "generate.json_schema",
    ),
    "evaluate": ("evaluate.window", "evaluate.stride", "evaluate.protocol", "data.profile"),
}
"""The settings that have an option of their own on the command line, and a keyword in Python, by the last part of
their key; every other one is set by `--set` and `settings=`."""
_TRAINED = ("data", "lora", "train", "preferences", "evaluate", "generate")
_WRITTEN = ("generate", "serve")
_MEASURED = ("data", "evaluate", *_WRITTEN)
READS: dict[str, tuple[str, ...]] = {
    "train": _TRAINED,
    "plan": _TRAINED,
    "tune": (*_TRAINED, "tune"),
    "prepare": _TRAINED,  # what it names as the next command takes the same settings
    "evaluate": _MEASURED,
    "audit": _MEASURED,
    "merge": ("merge", *_MEASURED),
    "generate": _WRITTEN,
    "repl": _WRITTEN,
    "rate": _WRITTEN,
    "serve": _WRITTEN,
}
"""The sections of a recipe that a command reads. A recipe may have all of them, for it is for several commands."""
PATHS = (
    ("data", "sources"),
    ("data", "validation"),
    ("data", "test"),
    ("train", "replay"),
    ("preferences", "sources"),
)
"""The settings that hold sources, which are relative to the folder of their recipe."""
VERBATIM = ("generate.regex", "generate.grammar")
"""Free texts that are taken as they were typed, because `\\` means something in them."""
SCHEMA = ("generate", "json_schema")
EXAMPLES = "correct it; 'lora-gpt2 recipes show prose' shows one that is valid"


def parse_override(text: str) -> tuple[list[str], Any]:
    """Splits `section.key=value` into path and value: YAML, or for a free text as it is, with `\\n` for line ends."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise RecipeError(f"--set {shorten(text)}: expected section.key=value", "for example --set train.steps=300")
    return key.strip().split("."), parse_value(key.strip(), value, f"--set {shorten(text)}")


def parse_value(key: str, value: str, where: str) -> Any:
    """Returns what a user typed for a setting: YAML, or for a free text as it is, with `\\n` for line ends.

    YAML 1.1 reads `1e-3` as a text; that it is a number is found out where the recipe is validated.
    """
    field = find_field(key)
    is_quoted = value.startswith(('"', "'")) and key not in VERBATIM
    if field is not None and field.annotation is str and not is_quoted:
        if any("\ud800" <= character <= "\udfff" for character in value):  # bytes that are not UTF-8
            raise RecipeError(f"{where}: the value is not valid UTF-8", "type it in UTF-8")
        return value if key in VERBATIM else value.replace("\\n", "\n").replace("\\t", "\t")
    try:
        return parse_yaml(value)
    except yaml.YAMLError as error:
        problem = shorten(describe_problem(error)[0])
        raise RecipeError(
            f"{where}: the value is not valid YAML{f': {problem}' if problem else ''}",
            "quote it, for example 'a.b=\"x: y\"'",
        ) from error


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Returns a copy of the nested mapping with each `section.key=value` set."""
    result = _copy_values(values)
    for text in overrides:
        path, value = parse_override(text)
        _set_value(result, path, value, f"--set {shorten(text)}")
    return result


def _copy_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of a recipe's values; a section with nothing in it is an empty mapping."""
    return {key: {} if key in SECTIONS and value is None else copy.deepcopy(value) for key, value in values.items()}


def _set_value(values: dict[str, Any], path: Sequence[str], value: Any, where: str) -> None:
    node = values
    for part in path[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise RecipeError(f"{where}: '{shorten(part)}' is not a section", suggest(".".join(path), list_keys()))
    node[path[-1]] = value


def check_read(command: str, keys: Iterable[str]) -> None:
    """Raises `UsageError` for settings that a command does not read: they were given for it, and change nothing."""
    for key in keys:
        section = key.partition(".")[0]
        if section in SECTIONS and section not in READS.get(command, SECTIONS):
            readers = ", ".join(name for name, sections in READS.items() if section in sections)
            raise UsageError(f"{shorten(key)} changes nothing in '{command}'", f"'{section}' is for {readers}")


def check_agreement(given: Mapping[str, Any], again: Mapping[str, Any]) -> None:
    """Raises `UsageError` for a setting that is given in two ways and with two values; None is not given."""
    for key, value in again.items():
        if value is not None and given.get(key, value) != value:
            message = f"{key} is given twice, as {shorten(str(given[key]))} and as {shorten(str(value))}"
            raise UsageError(message, "give it once")


def read_recipe(path: Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file, or in the bundled recipe of that name; sources are relative to its folder."""
    values = _read_values(path)
    lora = values.get("lora")
    for name, key in PATHS:
        section = values.get(name)
        if isinstance(section, dict) and isinstance(section.get(key), list):
            section[key] = [_place_source(source, path.parent) for source in section[key]]
    generate, key = values.get(SCHEMA[0]), SCHEMA[1]
    if isinstance(generate, dict) and isinstance(generate.get(key), str):
        generate[key] = str(path.parent / generate[key])
    if isinstance(lora, dict) and _is_beside(lora.get("init_from"), path):
        lora["init_from"] = str(path.parent / lora["init_from"])
    return values


def _read_values(path: Path) -> dict[str, Any]:
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
    return values


def _is_beside(parent: Any, path: Path) -> bool:
    """True if an adapter to continue from is a path that leads from the recipe's folder to something."""
    return isinstance(parent, str) and "/" in parent and (path.parent / parent).exists()


def _place_source(source: Any, folder: Path) -> Any:
    """Returns a source relative to the recipe's folder (an absolute one stays), and what is not a path as it is."""
    if source in ("", STDIN) or isinstance(source, bool | list | dict | None) or str(source).startswith(HUB):
        return source
    return str(folder / str(source))


def load_recipe(
    path: Path | None, overrides: Iterable[str] = (), flags: Mapping[str, Any] = MappingProxyType({})
) -> Recipe:
    """Returns the recipe of a file (or the defaults), with `--set` overrides and then flags on top.

    `flags` have dotted keys, such as `train.steps`; None and empty tuples are left out.
    """
    values, overrides = read_recipe(path) if path else {}, list(overrides)
    set_by_key = {".".join(keys): value for keys, value in map(parse_override, overrides)}
    check_agreement(set_by_key, {key: value for key, value in flags.items() if not _is_left_out(value)})
    values = set_values(apply_overrides(values, overrides), flags)
    return build_from_values(values, str(path) if path else "settings")


def build_from_values(values: Mapping[str, Any], where: str) -> Recipe:
    """Returns the recipe of these values, with the JSON schema that a file holds instead of its path.

    A schema may also be a class of pydantic. Raises what `build_recipe` does, and `RecipeError` for the file.
    """
    section, key = SCHEMA
    own = values.get(section)
    own = own if isinstance(own, Mapping) else {}
    schema = own.get(key)
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        schema = _close_objects(schema.model_json_schema())
    elif isinstance(schema, str | Path):
        schema = _read_schema(Path(schema))
    return build_recipe(values if schema is None else {**values, section: {**own, key: schema}}, where)


def _close_objects(schema: Any) -> Any:
    """Returns pydantic's schema without the further properties that its objects may have and nobody wants."""
    if isinstance(schema, list):
        return [_close_objects(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _close_objects(value) for key, value in schema.items()}
    return (
        {"additionalProperties": False, **closed}
        if closed.get("type") == "object" and "properties" in closed
        else closed
    )


def _read_schema(path: Path) -> dict[str, Any]:
    try:
        schema = load_json(read_user_text(path, max_bytes=MAX_RECIPE_BYTES))
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is not JSON: {str(error)[:200]}", "a schema is a JSON object") from error
    if not isinstance(schema, dict):
        raise RecipeError(f"{path} holds no JSON schema", "a schema is a JSON object")
    return schema


def _is_left_out(value: Any) -> bool:
    return value is None or (isinstance(value, tuple) and not value)


def set_values(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of a recipe's values with those under dotted keys set; None and empty tuples are left out."""
    result = _copy_values(values)
    for key, value in changes.items():
        if not _is_left_out(value):
            _set_value(result, key.split("."), value, key)
    return result


@dataclass(frozen=True, kw_only=True)
class TrainingItem:
    """One adapter that a command line names: its recipe, and what goes over it."""

    recipe: Path | None = None
    name: str | None = None
    sources: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()

    @property
    def flags(self) -> dict[str, Any]:
        """What it sets in a recipe, by dotted key."""
        splits = {"data.sources": self.sources, "data.validation": self.validation, "data.test": self.test}
        return {"name": self.name, **splits}


def list_items(words: Sequence[str], data: Sequence[str], name: str | None) -> list[TrainingItem]:
    """Returns the adapters that `train` and `plan` were asked for.

    A word is a recipe (a .yaml file, or the name of a bundled one), a source of text, or `label=SOURCE`, which names an
    adapter; the same label again adds to its text. One recipe may stand beside text, and then is for all of it.

    Raises `UsageError` where words do not go together.
    """
    recipes = [Path(word) for word in words if _is_recipe(word)]
    others = [word for word in words if not _is_recipe(word)]
    pairs = [(word.partition("=")[0], word.partition("=")[2]) for word in others if _is_labelled(word)]
    plain = [*data, *(word for word in others if not _is_labelled(word))]
    recipe = recipes[0] if recipes else None
    if pairs:
        if plain or name or len(recipes) > 1:
            raise UsageError("label=SOURCE names adapters, and so does the rest", "give every source a label, or none")
        labels = dict.fromkeys(label for label, _ in pairs)
        return [
            TrainingItem(recipe=recipe, name=each, sources=tuple(s for label, s in pairs if label == each))
            for each in labels
        ]
    if len(recipes) > 1:
        if [word for word in others if not _is_labelled(word)]:
            raise UsageError(f"several recipes, and text: {others[0]}", "name the text in the recipes, or with labels")
        return [TrainingItem(recipe=each, name=name, sources=tuple(plain)) for each in recipes]
    return [TrainingItem(recipe=recipe, name=name, sources=tuple(plain))]


def _is_recipe(word: str) -> bool:
    if Path(word).suffix in (".yaml", ".yml"):
        return True
    return word in {recipe.stem for recipe in list_recipes()} and not Path(word).exists()


def _is_labelled(word: str) -> bool:
    label, separator, path = word.partition("=")
    return bool(separator and path) and is_name(label) and not Path(word).exists()


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
    """Returns the recipe with a name: its own, that of the adapter it continues, or one made of its first source's."""
    if recipe.name:
        return recipe
    if not recipe.data.sources and not recipe.preferences.sources:
        raise UsageError("there is nothing to train on", "name a file or a folder of text, or a recipe")
    if recipe.lora.parent_name:
        return recipe.model_copy(update={"name": recipe.lora.parent_name})
    source = (*recipe.data.sources, *recipe.preferences.sources)[0]
    return recipe.model_copy(update={"name": make_name(Path(source).stem)})
