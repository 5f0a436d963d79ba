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
    base, adapter, store: as on the command line; without an adapter, the base is measured.
    window, stride, protocol: the settings `evaluate.*`; 0 is the default of each.

Returns:
    tokens, nll_nats_per_token, perplexity, word_perplexity, bits_per_byte: those of `lora-gpt2 evaluate --json`.
"""


class Perplexity(evaluate.Metric):  # type: ignore[misc]
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
        store: str = "adapters",
        **settings: int | str,
    ) -> dict[str, float]:
        from pathlib import Path

        from lora_gpt2.data.records import Document
        from lora_gpt2.evaluation.matrix import Cell
        from lora_gpt2.evaluation.perplexity import measure_perplexity
        from lora_gpt2.model.base import load_base
        from lora_gpt2.model.probe import bind_adapter
        from lora_gpt2.model.runtime import choose_runtime
        from lora_gpt2.recipe_files import load_recipe
        from lora_gpt2.store.catalog import Store
        from lora_gpt2.store.files import load_adapter

        kept = Store(Path(store))
        recipe = load_recipe(None, [f"evaluate.{key}={value}" for key, value in settings.items()])
        name = base or (recipe.base if adapter == "base" else kept.read_manifest(adapter).base.name)
        model = load_base(name, choose_runtime(recipe.evaluate.precision))
        pairs = zip(prompts or [""] * len(predictions), predictions, strict=True)
        documents = [Document(text, "", prompt) for prompt, text in pairs]
        if adapter == "base":
            score = measure_perplexity(model, documents, recipe.evaluate)
        else:
            loaded = load_adapter(kept, adapter, model)[1]
            score = measure_perplexity(model, documents, recipe.evaluate, bind_adapter(model, loaded))
        keys = ("tokens", "nll_nats_per_token", "perplexity", "word_perplexity", "bits_per_byte")
        return {key: Cell(adapter, "", score).to_json()[key] for key in keys}
