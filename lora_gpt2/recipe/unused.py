"""What is probably not meant: settings that change nothing beside the others, and held-out text that is shared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lora_gpt2.core.section import Section
from lora_gpt2.recipe import Recipe

OF_TEXT = (
    "batch_size",
    "batch_tokens",
    "drafter",
    "keep_best",
    "label_smoothing",
    "neftune_noise_alpha",
    "patience",
    "replay",
    "replay_fraction",
    "replay_tokens",
    "sample_prompt",
    "sample_tokens",
    "trackers",
    "validation_tokens",
)
"""Settings of section `train` that training on preferences has none of."""


def list_unused(recipes: Iterable[Recipe]) -> list[str]:
    """Returns a line for each setting of training or preferences that was given and needs another one."""
    found: dict[str, None] = {}
    for recipe in recipes:
        train, preferences = recipe.train, recipe.preferences
        budget = "a budget of forgetting, such as --forget 0.1"
        replays = train.forget is not None or bool(preferences.sources)  # which has none of it at all
        lines = _list("train", train, ("replay", "replay_tokens", "replay_fraction"), replays, budget)
        lines += _list("train", train, ("decay_fraction",), train.schedule == "wsd", "train.schedule=wsd")
        others = [name for name in type(preferences).model_fields if name != "sources"]
        plain = "text to train on: training on choices has none of it"
        lines += _list("lora", recipe.lora, ("dropout",), not preferences.sources, plain)
        lines += _list("train", train, OF_TEXT, not preferences.sources, plain)
        lines += _list("preferences", preferences, others, bool(preferences.sources), "choices, such as --preferences")
        lines += _list("preferences", preferences, ("smoothing",), preferences.loss == "dpo", "preferences.loss=dpo")
        found |= dict.fromkeys(lines)
    return list(found)


def list_shared(recipes: Sequence[Recipe]) -> list[str]:
    """Returns a line for held-out text that several adapters have in common, though they train on different text."""
    lines = []
    for split, verb in (("validation", "validated"), ("test", "tested")):
        groups: dict[tuple[str, ...], list[Recipe]] = {}
        for recipe in recipes:
            groups.setdefault(tuple(getattr(recipe.data, split)), []).append(recipe)
        for sources, group in groups.items():
            if sources and len({recipe.data.sources for recipe in group}) > 1:
                names = ", ".join(recipe.name for recipe in group)
                lines.append(f"{names} are all {verb} on {', '.join(sources)}; to give each its own, use recipes")
    return lines


def list_unused_by_merge(recipe: Recipe, *, is_search: bool, is_base: bool, is_adapter: bool) -> list[str]:
    """Returns a line for each setting of a merge that was given and that it does not read.

    What is written into the base (`is_base`) is the whole update, which no rank cuts off; `is_adapter`: what is
    published as an adapter; a search reads the settings of every method.
    """
    merge, random = recipe.merge, ("dare_linear", "dare_ties")
    pruning = ("ties", "magnitude_prune", *random)
    prunes, draws = is_search or merge.method in pruning, is_search or merge.method in random
    lines = _list("merge", merge, ("density",), prunes, f"a method that prunes: {', '.join(pruning)}")
    lines += _list("merge", merge, ("seed",), draws, f"DARE: {', '.join(random)}")
    lines += _list("merge", merge, ("search_steps", "search_tokens"), is_search, "--search")
    if is_base or is_adapter:
        lines += _list("merge", merge, ("rank", "max_error"), is_adapter, "--as: the whole update goes into the base")
        lines += _list("merge", merge, ("gguf", "dtype", "max_shard_bytes"), is_base, "--into-base")
    if is_base and not is_adapter and merge.method in ("svd", "linear") and not is_search:
        lines.append(f"method {merge.method} cuts nothing off with --into-base: the whole update goes into the base")
    return lines


def _list(section: str, values: Section, names: Sequence[str], is_used: bool, needed: str) -> list[str]:
    given = [name for name in names if name in values.model_fields_set and not is_used]
    return [f"{section}.{name} changes nothing without {needed}" for name in given]
