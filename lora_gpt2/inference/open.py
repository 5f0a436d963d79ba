"""Opens a session for adapters named by a user: finds their base, and what 'all' means."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext, suppress

from lora_gpt2.core.errors import ResourceError
from lora_gpt2.core.names import ALL
from lora_gpt2.inference.mix import Mix, read_manifests
from lora_gpt2.inference.session import Session
from lora_gpt2.model.base import Base, load_base
from lora_gpt2.model.prepacked import can_prepack, prepack_weights
from lora_gpt2.model.runtime import CPU_DTYPE, choose_device, choose_runtime
from lora_gpt2.recipe import Recipe
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.listing import list_current
from lora_gpt2.store.references import BASE


def open_session(store: Store, adapters: Sequence[str], recipe: Recipe, dtype: str) -> tuple[Session, list[Mix]]:
    """Returns a session and the mixes that are meant; see `find_base_name` and `list_mixes`.

    That every adapter is there is checked before the base is loaded.
    """
    base = load_for_inference(find_base_name(store, adapters, recipe), dtype)
    session = Session(base, store, prefix_bytes=recipe.generate.prefix_cache_bytes)
    return session, list_mixes(store, adapters, base.fingerprint)


def list_mixes(store: Store, adapters: Sequence[str], fingerprint: str) -> list[Mix]:
    """Returns the mixes that are meant; `all` is every adapter of the base with this fingerprint, then the base."""
    if ALL in adapters:
        adapters = [
            *(manifest.name for manifest in store.list_for_base(fingerprint)),
            *(spec for spec in adapters if spec not in (ALL, BASE)),
            BASE,
        ]
    return list(dict.fromkeys(map(Mix.parse, adapters)))


def find_base_name(store: Store, adapters: Sequence[str], recipe: Recipe) -> str:
    """Returns the recipe's base where it was set, else that of the first adapter, else the default.

    Raises what `Store.read_manifest` does for an adapter that is not there.
    """
    manifests = read_manifests(store, adapters)
    return manifests[0].base.name if manifests and "base" not in recipe.model_fields_set else recipe.base


def open_store(store: Store, recipe: Recipe) -> Session:
    """Returns a session for whatever may be asked of a store.

    The base is the recipe's where it was set; else that of the store's adapters if they share one, else the default.
    """
    names = {row["base"] for row in list_current(store)[0]}
    chosen = names.pop() if len(names) == 1 and "base" not in recipe.model_fields_set else recipe.base
    settings = recipe.generate
    base = load_for_inference(chosen, settings.dtype)
    return Session(base, store, recipe.serve.max_slots, settings.prefix_cache_bytes)


def load_for_inference(name: str, dtype: str) -> Base:
    """Returns a base to generate with; on a CPU `float16` packs the weights and computes in float32.

    That is the fastest there for any batch, so it is what `auto` does, unless `$LORA_GPT2_CPU_DTYPE` names a dtype.
    """
    is_best = dtype == "auto" and can_prepack() and not os.environ.get(CPU_DTYPE)
    if choose_device().type != "cpu" or not (dtype == "float16" or is_best):
        return load_base(name, choose_runtime(dtype))
    base = load_base(name, choose_runtime("float32"))
    with nullcontext() if dtype == "float16" else suppress(ResourceError):  # weights that are too large stay float32
        prepack_weights(base.model)
    return base
