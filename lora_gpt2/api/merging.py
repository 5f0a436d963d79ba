"""`merge`: several adapters into one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_gpt2.api.arguments import Settings, choose_reporter, make_recipe
from lora_gpt2.core.names import check_name
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.open import open_session
from lora_gpt2.merging.combine import MergeReport, merge_adapters
from lora_gpt2.store.catalog import Store


def merge(
    mix: str | Mix,
    name: str,
    *,
    method: str | None = None,
    rank: int | None = None,
    base: str | None = None,
    settings: Settings = None,
    store: str | Path | None = None,
    progress: bool = True,
) -> MergeReport:
    """Combines the adapters of a mix into a new one, checks it against the unmerged computation, and publishes it.

    Args:
        mix: such as `law:0.6+code:0.4`; without weights the shares are equal.
        name: name of the new adapter.
        method: `cat` (exact, the default), `linear`, `svd`, `task_arithmetic`, `ties`, `dare_linear`, `dare_ties` or
            `magnitude_prune`.
        rank: rank of the result; by default what the method needs.
        base: the base; by default that of the first adapter.
        settings: any other setting, such as `{"merge.density": 0.3}`.
        store: folder of the store; default `$LORA_GPT2_STORE` or `./adapters`.
        progress: show it.

    Returns:
        The new version, and how far its logits are from those of the mix.

    Raises:
        NotFoundError: there is no such adapter.
        CheckFailed: the result does not compute what it should; nothing is published.
    """
    kept, wanted = Store.find(store), mix if isinstance(mix, Mix) else Mix.parse(mix)
    check_name(name)
    other: dict[str, Any] = {"base": base, "merge.method": method, "merge.rank": rank}
    recipe, reporter = make_recipe(settings, "train", {}, other), choose_reporter(progress)
    kept.check_writable()
    session, _ = open_session(kept, wanted.references, recipe, "float32")
    return merge_adapters(session, wanted, name, recipe.merge, [], evaluate=recipe.evaluate, reporter=reporter)
