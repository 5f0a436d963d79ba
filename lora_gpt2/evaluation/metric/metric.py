"""Perplexity of texts under GPT-2 and an adapter, as a module of Hugging Face's `evaluate`.

`evaluate.load` copies this file and runs the copy, so it imports the installed package, one name per line.
"""

from typing import Any

import datasets
import evaluate

DESCRIPTION = "Perplexity: total negative log-likelihood over all tokens, divided by their number, each scored once."
INPUTS = """
Args:
    predictions: texts, each a document.
    prompts: what precedes each text and is not scored, if anything does.
    base, adapter, store: as on the command line; an adapter may be a mapping from names to weights too, and without
        one the base is measured; without a store, it is $LORA_GPT2_STORE or ./adapters.
    window, stride, protocol: the settings `evaluate.*`; 0 is the default of each.
    profile: how texts are cleaned first, as in `data.profile`; "raw" measures them as they are.

Returns:
    tokens, nll_nats_per_token, perplexity, word_perplexity, bits_per_byte, documents_trained_on: those of
        `lora-gpt2 evaluate --json`.
"""


class PerplexityMetric(evaluate.Metric):  # type: ignore[misc]
    """The command's figures for texts."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(
        self,
        predictions: list[str],
        prompts: list[str] | None = None,
        base: str | None = None,
        adapter: Any = "base",
        store: str | None = None,
        **settings: int | str,
    ) -> dict[str, float | int | None]:
        from lora_gpt2.core.console import LoggingReporter
        from lora_gpt2.data.pipeline import clean_documents
        from lora_gpt2.data.read.records import Document
        from lora_gpt2.evaluation.held_out import read_sketches
        from lora_gpt2.evaluation.matrix import Cell
        from lora_gpt2.evaluation.perplexity import measure_perplexity
        from lora_gpt2.inference.mix import Mix
        from lora_gpt2.inference.session import Session
        from lora_gpt2.model.base import load_base
        from lora_gpt2.model.runtime import choose_runtime
        from lora_gpt2.recipe_files import load_recipe
        from lora_gpt2.store.catalog import Store

        kept = Store.find(store)
        profile = settings.pop("profile", "prose")
        overrides = [f"evaluate.{key}={value}" for key, value in settings.items()]
        recipe = load_recipe(None, [f"data.profile={profile}", *overrides])
        mix = Mix() if adapter is None else adapter if isinstance(adapter, Mix) else Mix.parse(adapter)
        manifests = [kept.read_manifest(reference) for reference in mix.references]
        name = base or (manifests[0].base.name if manifests else recipe.base)
        model = load_base(name, choose_runtime(recipe.evaluate.dtype))
        pairs = zip(prompts or [""] * len(predictions), predictions, strict=True)
        given = [Document(text, f"[{number}]", prompt) for number, (prompt, text) in enumerate(pairs, start=1)]
        documents = clean_documents(given, recipe.data, LoggingReporter())
        session = Session(model, kept)
        score = measure_perplexity(model, documents, recipe.evaluate, session.select(session.resolve(mix)))
        sketch = read_sketches(kept, {"": [manifest.reference for manifest in manifests]}).get("")
        seen = None if sketch is None else sketch.count_seen([d.prompt + d.text for d in documents])
        keys = ("tokens", "nll_nats_per_token", "perplexity", "word_perplexity", "bits_per_byte")
        return {
            **{key: Cell(adapter=str(mix), source="", score=score).to_json()[key] for key in keys},
            "documents_trained_on": seen,
        }
