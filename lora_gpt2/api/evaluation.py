"""`evaluate`: adapters, mixes and the base on texts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_gpt2.api.arguments import Settings, Source, choose_reporter, make_recipe, to_source
from lora_gpt2.api.requests import to_spec
from lora_gpt2.core.errors import UsageError
from lora_gpt2.data.read.texts import Texts
from lora_gpt2.evaluation.matrix import LabelledSource
from lora_gpt2.evaluation.run import Evaluation, evaluate_texts, read_texts
from lora_gpt2.inference.mix import Mix, read_manifests
from lora_gpt2.store.catalog import Store


def evaluate(
    texts: Mapping[str, Texts | Source] | Texts | Source,
    adapters: Any = "all",
    *,
    base: str | None = None,
    window: int | None = None,
    stride: int | None = None,
    protocol: str | None = None,
    profile: str | None = None,
    general: bool = True,
    tokens: bool = False,
    ray: str | None = None,
    settings: Settings = None,
    store: str | Path | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measures the perplexity of adapters, mixes and the base on texts.

    Args:
        texts: by label, texts as `train` takes them, a source, or the name of an adapter, which means the text that was
            held out of its training; or one of these, whose label is `text`, or the source.
        adapters: `all` for every adapter of the base in the store, a name, a version or a mix (a mapping from names to
            weights is one), None for the base alone, or a list of them.
        base: the base; by default that of the first adapter.
        window: tokens of context; by default the base's maximum.
        stride: tokens between windows; by default half the window.
        protocol: `document` (the default) or `stream`.
        profile: how texts are cleaned first; `prose` is the default, `raw` leaves them as they are.
        general: also measure general English, to show what was forgotten.
        tokens: also return the log-probability of each token, in `token_scores`.
        ray: address of a Ray cluster on whose devices to measure: `auto`, `local` or `host:port`.
        settings: any other setting.
        store: folder of the store; default `$LORA_GPT2_STORE` or `./adapters`.
        progress: show it.

    Returns:
        The matrix, with intervals; `to_pandas()`, `plot()`, `to_html()`, and a table as `str()`.

    Raises:
        NotFoundError: there is no such adapter or source.
        DataError: a text cannot be read, or holds nothing to score.
        UsageError: window and stride do not fit the base, or tokens are asked for with protocol `stream`.
    """
    keywords = {"window": window, "stride": stride, "protocol": protocol, "profile": profile}
    recipe = make_recipe(settings, "evaluate", keywords, {"base": base})
    is_one = adapters is None or isinstance(adapters, str | Mix | Mapping)
    specs = [to_spec(item) for item in ([adapters] if is_one else adapters)]
    kept, reporter = Store.find(store), choose_reporter(progress)
    read_manifests(kept, specs)
    if isinstance(texts, Mapping):
        if not texts:
            raise UsageError("there is no text to measure", "pass texts by their labels: {'law': …}")
        wanted = [LabelledSource(label, to_source(text)) for label, text in texts.items()]
    else:
        path = to_source(texts)
        wanted = [LabelledSource(path if isinstance(texts, str | Path) else "text", path)]
    found = read_texts(wanted, kept, recipe, reporter)
    return evaluate_texts(found, specs, kept, recipe, reporter, general=general, keep_tokens=tokens, ray=ray or "")
