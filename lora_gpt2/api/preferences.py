"""`train_preferences`: what people preferred in, the next version of an adapter out."""

from __future__ import annotations

from pathlib import Path

from lora_gpt2.api.arguments import Settings, Source, choose_reporter, make_recipe, to_sources
from lora_gpt2.data.read.texts import Texts
from lora_gpt2.recipe_files import name_recipe
from lora_gpt2.store.catalog import Store
from lora_gpt2.training.preference_run import train_preferences as train
from lora_gpt2.training.publish_preferences import PreferenceReport


def train_preferences(
    preferences: Texts | Source | list[Path],
    init_from: str,
    *,
    name: str | None = None,
    base: str | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    beta: float | None = None,
    loss: str | None = None,
    seed: int | None = None,
    dtype: str | None = None,
    forget: float | None = None,
    settings: Settings = None,
    store: str | Path | None = None,
    resume: bool = False,
    fresh: bool = False,
    progress: bool = True,
) -> PreferenceReport:
    """Trains an adapter on choices between texts, and publishes it as the next version.

    Args:
        preferences: records with `prompt`, `chosen` and `rejected`, or for `kto` with `prompt`, `completion` and
            `label` (dicts, a `datasets.Dataset`, a `DataFrame`), a source as on the command line (a file, a round of
            `rate`, choices of `serve`), or a list of paths.
        init_from: the adapter of the store to start from, which is the reference: `law` or `law@2`.
        name: name of the adapter; by default that of `init_from`.
        base: the base, if it moved; by default that of the recipe.
        epochs: passes over the pairs; default 3.
        steps: optimizer steps; overrides `epochs`.
        learning_rate: peak of AdamW; by default a tenth of that of training on text.
        beta: how strongly the parent holds the new version back; default 0.05.
        loss: `dpo` (the default), `ipo`, `kto` or `orpo`.
        seed: of the order of the pairs.
        dtype: of the base's weights; default `auto`.
        forget: by how many nats per token general English may get less likely; by default there is no limit.
        settings: any other setting; see `lora-gpt2 recipes show`.
        store: folder of the store; default `$LORA_GPT2_STORE` or `./adapters`.
        resume: continue an interrupted run of the same adapter.
        fresh: set an interrupted run aside and begin anew.
        progress: show it; else it is logged by `logging.getLogger("lora_gpt2")`.

    Returns:
        The published version and its figures; `str()` of it is its reference, such as `law@2`.

    Raises:
        DataError: a record has no such fields, or fewer than 20 pairs are decided.
        NotFoundError: there is no such adapter, or no such file.
        TrainingDiverged: the loss is no longer finite; nothing is published.
        ConflictError: an interrupted run is there, and neither `resume` nor `fresh` says what becomes of it.
        Interrupted: Ctrl-C; nothing is published, the last step is kept, `resume=True` goes on from there.
    """
    everyday = {
        "epochs": epochs,
        "steps": steps,
        "learning_rate": learning_rate,
        "seed": seed,
        "dtype": dtype,
        "forget": forget,
    }
    other = {
        "base": base,
        "name": name,
        "lora.init_from": init_from,
        "preferences.sources": to_sources(preferences),
        "preferences.beta": beta,
        "preferences.loss": loss,
    }
    recipe = name_recipe(make_recipe(settings, "train", everyday, other))
    return train(recipe, Store.find(store), choose_reporter(progress), resume=resume, fresh=fresh)
