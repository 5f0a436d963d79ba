"""Where an adapter comes from, generation by generation, and how two differ on paper; never imports torch."""

from __future__ import annotations

from typing import Any

from lora_gpt2.core.errors import LoraGpt2Error
from lora_gpt2.core.fingerprint import flatten_json
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.manifest import Manifest, Parent

MOST_GENERATIONS = 100


def describe_lineage(store: Store, manifest: Manifest) -> dict[str, Any]:
    """Returns a version's origin: how it was made, its text, and its parents', as far as this store knows them.

    Keys: `reference`, `made`, `sources`, `data_fingerprint`, `parents` (each with `weight` and `found`, which is
    where the parent's weights are now, or None). Of a version that comes twice, and of ancestors beyond a hundred
    generations, only `reference`, `weight` and `found` are said the second time.
    """
    return _describe(store, manifest, (), set())


def _describe(store: Store, manifest: Manifest, children: tuple[str, ...], described: set[str]) -> dict[str, Any]:
    parents = []
    children = (*children, manifest.reference)
    described.add(manifest.reference)
    for parent in manifest.parents:
        found = find_parent(store, parent, children)
        entry: dict[str, Any] = {"reference": found.reference if found else parent.reference}
        if found and found.reference not in described and len(children) < MOST_GENERATIONS:
            entry = _describe(store, found, children, described)
        parents.append({**entry, "weight": parent.weight, "found": found.reference if found else None})
    return {
        "reference": manifest.reference,
        "made": manifest.provenance or {"by": "train"},
        "sources": manifest.data.get("sources", []),
        "data_fingerprint": manifest.data.get("fingerprint"),
        "parents": parents,
    }


def find_parent(store: Store, parent: Parent, children: tuple[str, ...]) -> Manifest | None:
    """Returns the version whose weights a parent names, under its name or another one, but none of its children."""
    names = dict.fromkeys([parent.reference.partition("@")[0], *store.list_names()])
    references = [parent.reference, *(f"{name}@{number}" for name in names for number in store.list_versions(name))]
    for reference in (reference for reference in references if reference not in children):
        try:
            manifest = store.read_manifest(reference)
        except LoraGpt2Error:
            continue
        if manifest.digest == parent.digest:
            return manifest
    return None


def compare_manifests(one: Manifest, other: Manifest) -> dict[str, dict[str, tuple[Any, Any]]]:
    """Returns what differs, by section (`base`, `recipe`, `data`, `figures`, `made`) and key: both values."""
    sections = {
        "base": (vars(one.base), vars(other.base)),
        "recipe": (one.recipe, other.recipe),
        "data": (one.data, other.data),
        "figures": (one.figures, other.figures),
        "made": (one.provenance, other.provenance),
    }
    found = {}
    for section, (left, right) in sections.items():
        flat_left, flat_right = flatten_json(left), flatten_json(right)
        keys = [key for key in {**flat_left, **flat_right} if flat_left.get(key) != flat_right.get(key)]
        if keys:
            found[section] = {key: (flat_left.get(key), flat_right.get(key)) for key in keys}
    return found
