"""What callers pass, turned into what the domain takes: settings, texts, the store, and where progress is shown."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from lora_gpt2.core.console import LoggingReporter, ProgressTask, Reporter, RichReporter
from lora_gpt2.core.errors import UsageError
from lora_gpt2.core.names import check_name
from lora_gpt2.core.suggest import suggest
from lora_gpt2.data.read.sources import KINDS
from lora_gpt2.data.read.texts import Texts, keep_texts
from lora_gpt2.inference.mix import Mix
from lora_gpt2.recipe import SECTIONS, Recipe
from lora_gpt2.recipe_files import EVERYDAY, build_from_values, check_agreement, check_read, set_values
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.fetch import FetchedAdapter, fetch_adapter, is_foreign

Settings = Mapping[str, Any] | Recipe | None
"""Settings without a keyword: by their dotted keys, such as `{"train.max_grad_norm": 0.5}`, or a whole recipe."""
Source = str | Path
"""A file, a folder, a glob or `hf:NAME`, as on the command line."""

Adapters = str | Path | Sequence[Any] | Mapping[str, str | Path]
"""Adapters of the store by name, folders that PEFT saved, archives and hub ids; or a mapping from names to them."""


def make_recipe(
    settings: Settings,
    command: str,
    keywords: Mapping[str, Any],
    other: Mapping[str, Any] | None = None,
    loaded: Mapping[str, Any] = MappingProxyType({}),
) -> Recipe:
    """Returns the recipe that keywords and settings describe; a keyword that is None is left out.

    Args:
        settings: see `Settings`.
        command: what the recipe is for, whose everyday settings the keywords are.
        keywords: by the last part of their key.
        other: further settings by their dotted keys.
        loaded: settings that a model was loaded with, which no others can be given for.

    Raises `RecipeError` that names the setting and the nearest valid one, and `UsageError` for one of another function.
    """
    if settings is not None and not isinstance(settings, Recipe | Mapping):
        hint = "pass a mapping such as {'lora.rank': 8, 'train.max_grad_norm': 0.5}, or a Recipe"
        raise UsageError(f"settings are no {type(settings).__name__}", hint)
    keys = _find_everyday(command)
    flags = {keys[name]: _to_plain(value) for name, value in keywords.items()}
    if isinstance(settings, Recipe):
        given = settings.model_dump(exclude_unset=True, exclude={"name"} if loaded else None)
    else:
        given = {key: _to_plain(value) for key, value in _flatten(settings or {}).items()}
        check_read(command, given)
        check_agreement(given, flags)
    _check_loaded(_flatten(given), loaded)
    if [] in (flags.get("generate.choice"), given.get("generate.choice")):
        raise UsageError("there is nothing to choose from: choice is empty", "pass at least one text, or None")
    fixed = {"generate.dtype": loaded.get("generate.dtype")} if command == "generate" else {}
    return build_from_values(set_values(set_values({}, given), {**flags, **fixed, **(other or {})}), "settings")


def _to_plain(value: Any) -> Any:
    """Returns an array, a number of numpy, a set or an iterator as what settings hold."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, set | frozenset | Iterator) else value


def _flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings by their dotted keys, where some are given by section."""
    found = dict[str, Any]()
    for key, value in settings.items():
        is_section = key in SECTIONS and isinstance(value, Mapping)
        found |= {f"{key}.{name}": each for name, each in value.items()} if is_section else {key: value}
    return found


def _check_loaded(given: Mapping[str, Any], loaded: Mapping[str, Any]) -> None:
    """Raises `UsageError` for a setting that decides how a model is loaded, and is another one for this model."""
    for key in ("base", "name", "generate.dtype") if loaded else ():
        if key in given and given[key] != loaded.get(key):
            raise UsageError(f"{key}={given[key]!r} changes nothing: the model is loaded", "pass it to load()")


def check_keywords(function: str, command: str, keywords: Iterable[str]) -> None:
    """Raises `TypeError` for a keyword that is no everyday setting, as Python does for one that a function lacks."""
    known = _find_everyday(command)
    for name in keywords:
        if name not in known:
            hint = suggest(name, known)
            raise TypeError(f"{function}() got an unexpected keyword argument '{name}'; {hint}".removesuffix("; "))


def _find_everyday(command: str) -> dict[str, str]:
    """Returns the keys of a command's everyday settings by their last parts."""
    return {key.rpartition(".")[2]: key for key in EVERYDAY.get("train" if command == "tune" else command, ())}


def to_source(texts: Texts | Source) -> str:
    """Returns what texts are read from: a source as it is, texts from where `keep_texts` keeps them.

    Raises `UsageError` for what is no text, or texts that are all names of files, and what `keep_texts` does.
    """
    if isinstance(texts, str | os.PathLike):
        return os.fspath(texts)
    if isinstance(texts, Mapping):
        raise UsageError("a mapping is not one text", "pass one of its values, such as the split data['test']")
    if not isinstance(texts, Iterable):
        raise UsageError(f"texts are expected, found {type(texts).__name__}", "pass a list of str, records or a source")
    if isinstance(texts, list | tuple) and texts and all(map(_is_file, texts)):
        if all(isinstance(item, str) for item in texts):
            raise UsageError(f"a name of a file instead of its text: '{texts[0]}'", "pass pathlib.Path for a file")
        raise UsageError("several files are not one text", "pass their folder, a glob, or data.sources in settings")
    return str(keep_texts(texts))


def to_sources(texts: Texts | Source | list[Path]) -> list[str]:
    """Returns the sources of texts: several paths, or one; see `to_source`."""
    if isinstance(texts, list | tuple) and texts and all(isinstance(item, os.PathLike) for item in texts):
        return [os.fspath(item) for item in texts]
    return [to_source(cast("Texts | Source", texts))]


def _is_file(item: object) -> bool:
    """True for a path, for the name of a file that is there, and for a word that ends as the name of one does."""
    if not isinstance(item, str | os.PathLike) or (isinstance(item, str) and (len(item) > 4096 or "\n" in item)):
        return False
    try:
        path, words = Path(item), str(item).split()
        return bool(words) and (path.exists() or (len(words) == 1 and path.suffix.lower() in KINDS))
    except (OSError, ValueError):
        return False


def sort_adapters(adapters: Adapters, store: Store) -> tuple[list[str], dict[str, FetchedAdapter]]:
    """Returns the names in the store, and by name what is not from there, which is a path or has a `/`."""
    if isinstance(adapters, Mapping):
        named: list[tuple[str | None, Any]] = list(adapters.items())
    else:
        listed = adapters.references if isinstance(adapters, Mix) else adapters
        named = [(None, item) for item in ([listed] if isinstance(listed, str | os.PathLike) else listed)]
    stored, foreign = list[str](), dict[str, FetchedAdapter]()
    for given, item in named:
        text = str(item)
        if not (isinstance(item, os.PathLike) or is_foreign(text)):
            if given is not None and given != text:
                raise UsageError(f"'{text}' is in the store and keeps its name", f"not '{given}'")
            stored.append(text)
            continue
        name = check_name(given or Path(text).name.removesuffix(".tar.gz").lower())
        if name in foreign:
            raise UsageError(f"two adapters are called '{name}'", "pass a mapping: {'name': 'path', …}")
        foreign[name] = fetch_adapter(text)
    return stored, foreign


def choose_reporter(progress: bool) -> Reporter:
    """Returns where progress is shown: a bar on a terminal, one in a notebook, else lines on stderr; else logging."""
    if not progress:
        return LoggingReporter()
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return NotebookReporter() if getattr(shell, "kernel", None) is not None else RichReporter()


class NotebookReporter(RichReporter):
    """Messages on stderr and bars of tqdm, which a notebook draws."""

    @contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[ProgressTask]:
        """Yields a task with a bar."""
        from tqdm.auto import tqdm

        with tqdm(total=total, desc=title, unit=f" {unit}", unit_scale=True, leave=False) as bar:

            class BarTask:
                """Forwards to the bar."""

                def advance(self, amount: int, note: str = "") -> None:
                    """Adds `amount` and shows the note."""
                    if note:
                        bar.set_postfix_str(note, refresh=False)
                    bar.update(amount)

            yield BarTask()
