"""A folder of domains: each sub-folder, file or recipe in it is the text of one adapter, and names it."""

from __future__ import annotations

import re
from pathlib import Path

from lora_gpt2.core.errors import DataError, NotFoundError, UsageError
from lora_gpt2.core.names import is_name, make_name
from lora_gpt2.core.printable import is_unicode
from lora_gpt2.data.read.sources import SPLIT_WORDS, find_splits, is_readable
from lora_gpt2.recipe import DataSettings
from lora_gpt2.recipe_files import TrainingItem, read_recipe

RECIPES = (".yaml", ".yml")
ENDING = re.compile(r"(\.[^.]+\.gz|\.tar\.[^.]+|\.[^.]+)$", re.IGNORECASE)  # .txt, .txt.gz, .tar.xz
SPLITS = {"sources": SPLIT_WORDS["train"], "validation": SPLIT_WORDS["validation"], "test": SPLIT_WORDS["test"]}
"""The settings of section `data`, and the names of the files in a sub-folder that they take."""


def list_domains(folder: Path) -> list[TrainingItem]:
    """Returns the adapters of a folder of domains, by name.

    A sub-folder whose files are all named for a split is divided by them, as `find_splits` does; one with `train.*`
    among others also gives `valid.*` and `test.*`, where they are; any other is a text as a whole. A recipe keeps its
    name. Hidden files, and those of `list_left_out`, are left out.

    Raises:
        NotFoundError: there is no such folder.
        DataError: there is no domain in it.
        UsageError: two domains have the same name.
    """
    if not folder.is_dir():
        raise NotFoundError(f"there is no folder {folder}", "--all takes a folder with a folder, file or recipe each")
    entries = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    found = [_describe(path) for path in entries if _is_domain(path)]
    if not found:
        raise DataError(f"{folder} holds no domain", "put a folder, a file of text or a recipe for each into it")
    names = dict[str, TrainingItem]()
    for item, path in zip(found, filter(_is_domain, entries), strict=True):
        assert item.name is not None
        if not is_name(item.name):
            raise UsageError(f"{path} gives its adapter no name", "rename it, in letters a to z and figures")
        if names.setdefault(item.name, item) is not item:
            raise UsageError(f"two domains in {folder} are called '{item.name}'", "rename one of them")
    return sorted(found, key=lambda item: item.name or "")


def list_left_out(folder: Path) -> list[str]:
    """Returns the names of files in a folder of domains that are none: about the data, not read, or not in Unicode."""
    return [path.name for path in sorted(folder.iterdir()) if not path.name.startswith(".") and not _is_domain(path)]


def _is_domain(path: Path) -> bool:
    return is_unicode(str(path)) and (path.is_dir() or path.suffix.lower() in RECIPES or is_readable(path))


def _describe(path: Path) -> TrainingItem:
    stem = path.name if path.is_dir() else ENDING.sub("", path.name)
    name = make_name(stem)
    if path.suffix.lower() in RECIPES and path.is_file():
        return TrainingItem(recipe=path, name=str(read_recipe(path).get("name") or name))
    train, validation, test = (find_split(path, stems) if path.is_dir() else () for stems in SPLITS.values())
    if not train:
        return TrainingItem(name=name, sources=(str(path),))
    if splits := find_splits([str(path)], DataSettings()):  # as `train FOLDER` reads it
        found = {split: tuple(source.name for source in sources) for split, sources in splits.items()}
        if not all(Path(source).exists() for sources in found.values() for source in sources):  # within an archive
            return TrainingItem(name=name, sources=(str(path),))
        train, validation, test = found["train"], found["validation"], found["test"]
    return TrainingItem(name=name, sources=train, validation=validation, test=test)


def find_split(folder: Path, stems: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the files of a split in a domain's folder: those whose names are `stem.*`."""
    files = (path for stem in stems for path in sorted(folder.glob(f"{stem}.*")))
    return tuple(str(path) for path in files if is_readable(path))
