"""Perplexity of texts under GPT-2 and an adapter, as a module of Hugging Face's `evaluate`.

`evaluate.load` copies this file and runs the copy, so it imports the installed package, one name per line.
"""

import datasets
import evaluate

DESCRIPTION = "Perplexity: total negative log-likelihood over all tokens, divided by their number, each scored once."
INPUTS = """
Args:
    predictions: texts, each a document.
    prompts: what precedes each text and is not scored, if anything does.
    base, adapter, store: as on the command line; without an adapter, the base is measured; without a store, it is
        $LORA_GPT2_STORE or ./adapters.
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
        adapter: str = "base",
        store: str | None = None,
        **settings: int | str,
    ) -> dict[str, float | int | None]:
        from lora_gpt2.core.console import LoggingReporter
        from lora_gpt2.data.pipeline import clean_documents
        from lora_gpt2.data.read.records import Document
        from lora_gpt2.evaluation.held_out import read_sketch
        from lora_gpt2.evaluation.matrix import Cell
        from lora_gpt2.evaluation.perplexity import measure_perplexity
        from lora_gpt2.model.base import load_base
        from lora_gpt2.model.probe import select_adapter
        from lora_gpt2.model.runtime import choose_runtime
        from lora_gpt2.recipe_files import load_recipe
        from lora_gpt2.store.catalog import Store
        from lora_gpt2.store.files import load_adapter

        kept = Store.find(store)
        profile = settings.pop("profile", "prose")
        overrides = [f"evaluate.{key}={value}" for key, value in settings.items()]
        recipe = load_recipe(None, [f"data.profile={profile}", *overrides])
        name = base or (recipe.base if adapter == "base" else kept.read_manifest(adapter).base.name)
        model = load_base(name, choose_runtime(recipe.evaluate.dtype))
        pairs = zip(prompts or [""] * len(predictions), predictions, strict=True)
        given = [Document(text, f"[{number}]", prompt) for number, (prompt, text) in enumerate(pairs, start=1)]
        documents = clean_documents(given, recipe.data, LoggingReporter())
        if adapter == "base":
            score, sketch = measure_perplexity(model, documents, recipe.evaluate), None
        else:
            manifest, loaded = load_adapter(kept, adapter, model)
            score = measure_perplexity(model, documents, recipe.evaluate, select_adapter(model, loaded))
            sketch = read_sketch(kept, manifest.reference)
        seen = None if sketch is None else sketch.count_seen([d.prompt + d.text for d in documents])
        keys = ("tokens", "nll_nats_per_token", "perplexity", "word_perplexity", "bits_per_byte")
        return {
            **{key: Cell(adapter=adapter, source="", score=score).to_json()[key] for key in keys},
            "documents_trained_on": seen,
        }
