"""Opens a session for adapters named by a user: finds their base, and what 'all' means."""

from __future__ import annotations

from collections.abc import Sequence

from lora_gpt2.inference.session import Session
from lora_gpt2.model.base import Base, load_base
from lora_gpt2.model.prepacked import prepack_weights
from lora_gpt2.model.runtime import choose_device, choose_runtime
from lora_gpt2.recipe import Recipe
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.listing import list_current
from lora_gpt2.store.manifest import Manifest
from lora_gpt2.store.references import BASE


def open_session(store: Store, references: Sequence[str], recipe: Recipe, dtype: str) -> tuple[Session, list[str]]:
    """Returns a session and the adapters meant; `all` is every adapter of this base, then the base.

    The base is the recipe's where it was set, else that of the first adapter's manifest, else the default.
    """
    named = [reference for reference in references if reference not in (BASE, "all")]
    base_name = recipe.base
    if named and "base" not in recipe.model_fields_set:
        base_name = store.read_manifest(named[0]).base.name
    base = load_for_inference(base_name, dtype)
    if "all" in references:
        found = [m for m in store.iter_current() if isinstance(m, Manifest) and m.base.fingerprint == base.fingerprint]
        references = [*(m.name for m in found), *(r for r in references if r not in ("all", BASE)), BASE]
    return Session(base, store), list(dict.fromkeys(references))


def open_store(store: Store, recipe: Recipe) -> Session:
    """Returns a session for whatever may be asked of a store.

    The base is the recipe's where it was set; else that of the store's adapters if they share one, else the default.
    """
    names = {row["base"] for row in list_current(store)[0]}
    chosen = names.pop() if len(names) == 1 and "base" not in recipe.model_fields_set else recipe.base
    return Session(load_for_inference(chosen, recipe.generate.dtype), store, recipe.serve.max_slots)


def load_for_inference(name: str, dtype: str) -> Base:
    """Returns a base to generate with; on a CPU `float16` packs the weights and computes in float32."""
    if dtype != "float16" or choose_device().type != "cpu":
        return load_base(name, choose_runtime(dtype))
    base = load_base(name, choose_runtime("float32"))
    prepack_weights(base.model)
    return base
