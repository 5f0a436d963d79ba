"""What is sent with a task to another machine: prepared text, and the adapters that its recipes continue from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import UsageError
from lora_gpt2.core.names import AUTO
from lora_gpt2.core.printable import join_names
from lora_gpt2.data.prepared import PreparedData
from lora_gpt2.model.checkpoint import Checkpoint, name_everywhere
from lora_gpt2.model.stored_weights import fingerprint_base
from lora_gpt2.recipe import Recipe
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.exchange import read_version_files
from lora_gpt2.store.fetch import is_foreign
from lora_gpt2.store.manifest import MANIFEST, parse_manifest
from lora_gpt2.training.mailbox import Files, read_folder, write_folder
from lora_gpt2.training.replay import prepare_replay


@dataclass(frozen=True, kw_only=True)
class TaskInputs:
    """The files that a task needs besides the base.

    Args:
        texts: the prepared text of each recipe, or one for all.
        parents: the versions that the recipes continue from.
        replay: the prepared text of `train.replay`; None if there is none.
    """

    texts: Sequence[Files]
    parents: Sequence[Files] = ()
    replay: Files | None = None

    def unpack(self, recipes: Sequence[Recipe], store: Store, work: Path) -> dict[str, Any]:
        """Writes the texts into a folder and the parents into a store; returns the options of `train_recipes`."""
        folders = [write_folder(text, work / "text" / str(index)) for index, text in enumerate(self.texts)]
        for files in self.parents:
            _install(files, store)
        return {
            "texts": {recipe.name: folders[index % len(folders)] for index, recipe in enumerate(recipes)},
            "replay": write_folder(self.replay, work / "replay") if self.replay else None,
        }

    @property
    def parent_references(self) -> set[str]:
        """The versions that the recipes continue from."""
        return {parse_manifest(files[MANIFEST]).reference for files in self.parents}


def _install(files: Files, store: Store) -> None:
    """Writes a version into a store with the number that it has; it is in use unless a later one is."""
    manifest = parse_manifest(files[MANIFEST])
    folder = f"{manifest.name}/{manifest.version}"
    write_folder({f"{folder}/{name}": content for name, content in files.items()}, store.root)
    store.use_version(manifest.name, store.list_versions(manifest.name)[-1])


def collect_inputs(
    recipes: Sequence[Recipe], texts: Sequence[PreparedData], store: Store, reporter: Reporter
) -> TaskInputs:
    """Returns what a task with these recipes needs; `texts` as in `TaskInputs`.

    Raises what reading the parents and `train.replay` does.
    """
    replay = prepare_replay(recipes, Checkpoint.open(recipes[0].base).load_tokenizer(), reporter)
    references = dict.fromkeys(reference for recipe in recipes for reference in _list_parents(recipe, store))
    return TaskInputs(
        texts=[read_folder(data.path) for data in texts],
        parents=[read_version_files(store, reference)[1] for reference in references],
        replay=read_folder(replay.path) if replay else None,
    )


def _list_parents(recipe: Recipe, store: Store) -> Iterator[str]:
    """Yields the versions of the store that a recipe may continue from."""
    reference = recipe.lora.init_from
    if reference == AUTO:
        fingerprint = fingerprint_base(Checkpoint.open(recipe.base))
        yield from (manifest.reference for manifest in store.list_for_base(fingerprint))
    elif reference and not is_foreign(reference):
        yield reference


def check_sendable(recipes: Sequence[Recipe]) -> None:
    """Raises `UsageError` for recipes that need what is not sent to another machine."""
    if named := [recipe.name for recipe in recipes if recipe.train.trackers]:
        raise UsageError(
            f"{join_names(named)}: --ray does not send back the files of train.trackers",
            "leave them out, or train here without --ray",
        )
    if named := [recipe.name for recipe in recipes if _continues_from_disk(recipe)]:
        raise UsageError(
            f"{join_names(named)}: --ray sends adapters of the store, not of other folders",
            "import it first: lora-gpt2 adapters import",
        )


def _continues_from_disk(recipe: Recipe) -> bool:
    reference = recipe.lora.init_from
    return is_foreign(reference) and Path(reference).exists()


def name_base(recipe: Recipe) -> Recipe:
    """Returns the recipe with its base as other machines find it."""
    return recipe.model_copy(update={"base": name_everywhere(recipe.base)})
