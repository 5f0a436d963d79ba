"""`load`: a base and adapters over it, from the store or from elsewhere, as a `Model`."""

from __future__ import annotations

from pathlib import Path

from lora_gpt2.api.arguments import Adapters, choose_reporter, make_recipe, sort_adapters
from lora_gpt2.api.model import Model
from lora_gpt2.core.names import ALL
from lora_gpt2.inference.open import open_session
from lora_gpt2.store.catalog import Store


def load(
    base: str | None = None,
    *,
    adapters: Adapters = (),
    store: str | Path | None = None,
    dtype: str = "auto",
    max_slots: int | None = None,
    progress: bool = True,
) -> Model:
    """Loads a base, and adapters over it.

    Args:
        base: `nano`, `gpt2`, …, a hub id or a folder; by default that of the first adapter, else `nano`.
        adapters: names or versions in the store (`law`, `law@2`), folders that PEFT saved, archives or hub ids, which
            get the last part of their path as their name; `all` for every adapter of this base in the store; or a
            mapping from names to any of these.
        store: folder of the store; default `$LORA_GPT2_STORE` or `./adapters`.
        dtype: of the base's weights: `auto`, `float32`, `bfloat16` or `float16`.
        max_slots: number of adapters to keep loaded; default 64.
        progress: show it; else it is logged.

    Raises:
        NotFoundError: there is no such base or adapter.
        CorruptError, MismatchError: a file is damaged, or the adapter is of another base.
        ResourceError: the hub cannot be reached.
    """
    kept = Store.find(store)
    other = {"base": base, "generate.dtype": dtype, "serve.max_slots": max_slots}
    recipe = make_recipe(None, "generate", {}, other)
    stored, foreign = sort_adapters(adapters, kept)
    if base is None and foreign and not [name for name in stored if name != ALL]:
        guessed = next(iter(foreign.values())).guess_base()
        recipe = make_recipe(None, "generate", {}, {**other, "base": guessed or None})
    session, mixes = open_session(kept, stored, recipe, recipe.generate.dtype)
    session.slots.max_slots = recipe.serve.max_slots
    model = Model(session, recipe, choose_reporter(progress))
    session.load([name for mix in mixes for name in session.resolve(mix).references][: recipe.serve.max_slots])
    model.adapters += [reference for mix in mixes for reference in mix.references]
    for name, source in foreign.items():
        model.add_adapter(name, source)
    return model
