"""`train` and `prepare`: text in, adapters or blocks of tokens out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_gpt2.api.arguments import Settings, Source, check_keywords, choose_reporter, make_recipe, to_sources
from lora_gpt2.core.errors import UsageError
from lora_gpt2.data.blocks import IGNORE
from lora_gpt2.data.prepared import SPLITS, prepare_data
from lora_gpt2.data.read.texts import Texts
from lora_gpt2.model.checkpoint import Checkpoint
from lora_gpt2.recipe import LoraSettings, Recipe
from lora_gpt2.recipe_files import name_recipe
from lora_gpt2.store.catalog import Store
from lora_gpt2.training.events import Callback
from lora_gpt2.training.publish import AdapterReport
from lora_gpt2.training.ray_training import train_on_ray
from lora_gpt2.training.run import train_recipes
from lora_gpt2.training.tune import TuneReport
from lora_gpt2.training.tune import tune as search

if TYPE_CHECKING:
    import datasets

Data = Texts | Source | list[Path] | None


def train(  # noqa: PLR0913 - the everyday settings, for completion and type checkers
    data: Data = None,
    *,
    name: str | None = None,
    base: str | None = None,
    init_from: str | Path | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    dropout: float | None = None,
    block_size: int | None = None,
    profile: str | None = None,
    seed: int | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    forget: float | None = None,
    validation: Data = None,
    test: Data = None,
    settings: Settings = None,
    store: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    fresh: bool = False,
    progress: bool = True,
) -> AdapterReport:
    """Trains an adapter and publishes it in the store.

    Args:
        data: texts (strings, records as dicts, a `datasets.Dataset` or `DatasetDict`, a `DataFrame`), a source as on
            the command line (a file, a folder, a glob, `hf:NAME`), or a list of paths. None takes `data.sources` of the
            settings.
        name: name of the adapter; with a source, or an adapter of the store in `init_from`, it may be left out.
        base: `nano` (the default), `gpt2`, …, a hub id or a folder.
        init_from: an adapter to continue training from: `law`, `law@2`, a folder that PEFT saved, an archive or a hub
            id; `auto` is the mix of the store's adapters under which the text is most likely.
        epochs: passes over the training text; default 3.
        steps: optimizer steps; overrides `epochs`.
        learning_rate: peak of AdamW; by default it follows from the base's width.
        batch_size: blocks per optimizer step; by default 4,096 tokens.
        rank: of each update; default 16.
        alpha: updates are scaled by `alpha / rank`; default twice the rank.
        targets: modules to adapt, such as `["c_attn", "mlp.c_proj"]`.
        dropout: on the adapter's input; default 0.
        block_size: tokens per block; default 512.
        profile: cleaning rules: `prose` (the default), `code` or `raw`.
        seed: of initialisation, data order and dropout.
        dtype: of the base's weights; default `auto`.
        quantize: `int8` or `nf4` for a quantized base.
        forget: maximum KL divergence from the base on general text, in nats per token; by default there is no limit.
        validation: text to validate on; by default a fraction is held out.
        test: text to test on; by default a fraction is held out.
        settings: any other setting; see `lora-gpt2 recipes show`.
        store: folder of the store; default `$LORA_GPT2_STORE` or `./adapters`.
        callbacks: functions that receive a `TrainingEvent` at each step, validation, checkpoint and end.
        resume: continue an interrupted run of the same adapters.
        fresh: set an interrupted run aside and begin anew.
        progress: show it; else it is logged by `logging.getLogger("lora_gpt2")`.

    Returns:
        The published version and its figures; `str()` of it is its reference, such as `law@1`.

    Raises:
        DataError, NotFoundError: the text cannot be read, or there is too little of it.
        RecipeError: a setting does not exist or is out of bounds.
        UsageError: the adapter has no name, or one that is no name.
        ConflictError: an interrupted run is there, and neither `resume` nor `fresh` says what becomes of it.
        ResourceError: it does not fit into memory or on the disk.
        TrainingDiverged: the loss is no longer finite.
        Interrupted: Ctrl-C; the last checkpoint is kept, `resume=True` goes on from there.
    """
    keywords = {
        "epochs": epochs,
        "steps": steps,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "rank": rank,
        "alpha": alpha,
        "targets": targets,
        "dropout": dropout,
        "block_size": block_size,
        "profile": profile,
        "seed": seed,
        "dtype": dtype,
        "quantize": quantize,
        "forget": forget,
    }
    other = {"base": base, **_name_parent(init_from), **_name_parts(data, name, validation, test, init_from)}
    found = _train_recipes([make_recipe(settings, "train", keywords, other)], store, callbacks, resume, fresh, progress)
    return found[0]


def train_together(
    data: Mapping[str, Data],
    *,
    base: str | None = None,
    settings: Settings = None,
    store: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    fresh: bool = False,
    progress: bool = True,
    slots: int | None = None,
    ray: str | None = None,
    **everyday: Any,
) -> dict[str, AdapterReport]:
    """Trains several adapters in one pass over the base, which costs hardly more than one of them.

    Args:
        data: from names of adapters to what `train` takes, or to texts by split: `train`, `validation`, `test`.
        base: see `train`, as for everything else; `everyday` are its settings with a keyword, such as `epochs`.
        settings: any other setting; all adapters have the same.
        store: folder of the store.
        callbacks: functions that receive the events of all adapters.
        resume: continue an interrupted run.
        fresh: set an interrupted run aside.
        progress: show it.
        slots: how many are trained at a time, 0 for as many as memory has room for; each is published when it is done,
            and its slot taken by the next. None trains all of them together.
        ray: address of a Ray cluster over whose devices they are divided: `auto`, `local` or `host:port`.
        everyday: `epochs`, `rank`, …

    Returns:
        The published versions by name.

    Raises what `train` does.
    """
    check_keywords("train_together", "train", everyday)
    if not data:
        raise UsageError("there is nothing to train on", "pass texts by the adapters' names: {'law': …, 'code': …}")
    recipes = [
        make_recipe(settings, "train", everyday, {"base": base, **_name_parts(texts, name, None, None)})
        for name, texts in data.items()
    ]
    if ray:
        if callbacks:
            raise UsageError("callbacks are not called from other machines", "leave them out, or train without ray")
        named, reporter = [name_recipe(recipe) for recipe in recipes], choose_reporter(progress)
        found = train_on_ray(
            named, Store.find(store), reporter, ray, resume=resume, fresh=fresh, num_slots=slots or 0
        ).adapters
    else:
        found = _train_recipes(recipes, store, callbacks, resume, fresh, progress, num_slots=slots)
    return {report.name: report for report in found}


def tune(
    data: Data = None,
    *,
    name: str | None = None,
    base: str | None = None,
    init_from: str | Path | None = None,
    candidates: int = 8,
    seconds: float | None = None,
    slots: int | None = None,
    ray: str | None = None,
    validation: Data = None,
    test: Data = None,
    settings: Settings = None,
    store: str | Path | None = None,
    resume: bool = False,
    fresh: bool = False,
    progress: bool = True,
    **everyday: Any,
) -> TuneReport:
    """Searches for the settings of an adapter in one run, by successive halving, and publishes the best.

    Args:
        data: see `train`, as for everything that is not named here.
        name: name of the adapter.
        base: the base.
        init_from: an adapter to continue training from.
        candidates: how many settings are tried; the first are those given here, the others come from the section
            `tune` of the settings.
        seconds: time for the whole search; it decides the number of steps.
        slots: candidates that a device trains at a time; by default as many as fit into its memory.
        ray: address of a Ray cluster over whose devices the candidates are divided: `auto`, `local` or `host:port`.
        validation: text on which candidates are compared; by default a fraction is held out.
        test: text that is measured once, with the best.
        settings: any other setting.
        store: folder of the store.
        resume: continue an interrupted search.
        fresh: set an interrupted search aside.
        progress: show it.
        everyday: `steps`, `rank`, …

    Returns:
        The published version as `adapter`, and all `candidates`, the best first.

    Raises what `train` does.
    """
    check_keywords("tune", "tune", everyday)
    other = {"base": base, **_name_parent(init_from), **_name_parts(data, name, validation, test, init_from)}
    return search(
        name_recipe(make_recipe(settings, "tune", everyday, other)),
        Store.find(store),
        choose_reporter(progress),
        num_candidates=candidates,
        budget_seconds=seconds,
        num_slots=slots or 0,
        ray=ray or "",
        resume=resume,
        fresh=fresh,
    )


def _train_recipes(
    recipes: Sequence[Recipe],
    store: str | Path | None,
    callbacks: Sequence[Callback],
    resume: bool,
    fresh: bool,
    progress: bool,
    *,
    num_slots: int | None = None,
) -> list[AdapterReport]:
    callbacks = [callbacks] if callable(callbacks) else callbacks
    if wrong := [each for each in callbacks if not callable(each)]:
        raise UsageError(f"a callback is a function, found {type(wrong[0]).__name__}", "pass functions of an event")
    return train_recipes(
        [name_recipe(recipe) for recipe in recipes],
        Store.find(store),
        choose_reporter(progress),
        resume=resume,
        fresh=fresh,
        callbacks=callbacks,
        num_slots=num_slots,
    ).adapters


def _has_splits(data: object) -> bool:
    """True for a mapping from splits to texts; a `DatasetDict` is told by its class, without importing `datasets`."""
    if isinstance(data, Mapping) and "train" in data and set(data) <= set(SPLITS):
        return True
    return any(kind.__name__ in ("DatasetDict", "IterableDatasetDict") for kind in type(data).__mro__)


def _name_parent(init_from: str | Path | None) -> dict[str, Any]:
    """Returns what a recipe says about the adapter that it continues, by dotted keys."""
    return {} if init_from is None else {"lora.init_from": os.fspath(init_from)}


def _name_parts(
    data: Any, name: str | None, validation: Data, test: Data, init_from: str | Path | None = None
) -> dict[str, Any]:
    """Returns what a recipe says about its name and text, by dotted keys."""
    if isinstance(data, Mapping) and not _has_splits(data):
        raise UsageError("a mapping is not one text", "several adapters: train_together({'law': …, 'code': …})")
    splits: dict[str, Any] = {"train": data, "validation": validation, "test": test}
    if _has_splits(data):
        splits |= {split: data[split] for split in SPLITS if split in data}
        if "train" not in data:
            raise UsageError(f"the data set has no split 'train', but {', '.join(data)}", "pass one of them")
    is_kept = splits["train"] is not None and not isinstance(splits["train"], str | Path)
    has_name = name is not None or (init_from is not None and LoraSettings(init_from=os.fspath(init_from)).parent_name)
    if is_kept and not has_name:
        raise UsageError("the adapter has no name", "pass name='…'")
    keys = {"train": "data.sources", "validation": "data.validation", "test": "data.test"}
    found = {keys[split]: to_sources(texts) for split, texts in splits.items() if texts is not None}
    return {"name": name, **found}


def prepare(
    data: Data = None,
    *,
    base: str | None = None,
    block_size: int | None = None,
    profile: str | None = None,
    validation: Data = None,
    test: Data = None,
    settings: Settings = None,
    progress: bool = True,
) -> datasets.DatasetDict:
    """Reads, cleans, splits and tokenises text as `train` does; its arguments are those of `train`.

    Returns:
        A data set with the splits `train`, `validation` and `test` (those that are not empty), a row for each block:
        `input_ids` and `labels`, both `[block_size]`, as models and `Trainer` of transformers take them: they shift
        the labels themselves. -100 is where there is no loss; with `data.layout=packed` there are `position_ids` too.
    """
    import datasets

    parts = _name_parts(data, "texts", validation, test)
    keywords = {"block_size": block_size, "profile": profile}
    recipe: Recipe = make_recipe(settings, "train", keywords, {"base": base, **parts})
    tokenizer = Checkpoint.open(recipe.base).load_tokenizer()
    prepared = prepare_data(recipe.data, tokenizer, choose_reporter(progress))
    found = {}
    for split in SPLITS:
        blocks = getattr(prepared, split)
        if blocks.num_blocks:
            rows = blocks.read(range(blocks.num_blocks))
            labels = np.roll(rows.targets, 1, axis=1)  # what follows the last token of a block is left out
            labels[:, 0] = IGNORE
            columns = {"input_ids": rows.inputs, "labels": labels}
            columns |= {} if rows.positions is None else {"position_ids": rows.positions}
            found[split] = datasets.Dataset.from_dict(columns)
    return datasets.DatasetDict(found)
