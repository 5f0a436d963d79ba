"""`merge`: several adapters into one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_gpt2.api.arguments import Settings, Source, choose_reporter, make_recipe, to_source
from lora_gpt2.data.read.texts import Texts
from lora_gpt2.evaluation.matrix import LabelledSource
from lora_gpt2.inference.mix import Mix
from lora_gpt2.merging import run
from lora_gpt2.merging.combine import MergeReport
from lora_gpt2.store.catalog import Store


def merge(
    mix: str | Mix | Mapping[str, float | int],
    name: str,
    *,
    texts: Mapping[str, Texts | Source] | None = None,
    search: bool = False,
    method: str | None = None,
    rank: int | None = None,
    base: str | None = None,
    settings: Settings = None,
    store: str | Path | None = None,
    progress: bool = True,
) -> MergeReport:
    """Combines the adapters of a mix into a new one, checks it against the unmerged computation, and publishes it.

    Args:
        mix: such as `law:0.6+code:0.4`, or `{"law": 0.6, "code": 0.4}`; without weights the shares are equal, and 1
            each for `ties` and `dare_ties`, which take a mean themselves.
        name: name of the new adapter.
        texts: by label, texts to measure the base, the parents and the result on, beside general English.
        search: find the weights and the method that are best over the texts; the mix is the first tried.
        method: `cat` (exact, the default), `linear`, `svd`, `task_arithmetic`, `ties`, `dare_linear`, `dare_ties` or
            `magnitude_prune`.
        rank: rank of the result; by default what the method needs.
        base: the base; by default that of the first adapter.
        settings: any other setting, such as `{"merge.density": 0.3}`.
        store: folder of the store; default `$LORA_GPT2_STORE` or `./adapters`.
        progress: show it.

    Returns:
        The new version, how far its logits are from those of the mix, and the perplexities (`cells`).

    Raises:
        NotFoundError: there is no such adapter.
        CheckFailed: the result does not compute what it should; nothing is published.
    """
    other: dict[str, Any] = {"base": base, "merge.method": method, "merge.rank": rank}
    recipe = make_recipe(settings, "merge", {}, other)
    result = run.merge(
        mix if isinstance(mix, Mix) else Mix.parse(mix, run.choose_weight(recipe.merge)),
        [LabelledSource(label, to_source(text)) for label, text in (texts or {}).items()],
        Store.find(store),
        recipe,
        choose_reporter(progress),
        name=name,
        search=search,
    )
    assert result.adapter is not None  # for it was named
    return result.adapter
