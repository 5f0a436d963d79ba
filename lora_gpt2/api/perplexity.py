"""What `Model.perplexity` measures, and the figure that it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_gpt2.api.arguments import to_source
from lora_gpt2.core.console import Reporter
from lora_gpt2.data.pipeline import read_clean
from lora_gpt2.data.read.texts import Texts
from lora_gpt2.evaluation.matrix import Cell, EvaluationText
from lora_gpt2.recipe import Recipe


def read_text(texts: Texts | str | Path, recipe: Recipe, reporter: Reporter) -> EvaluationText:
    """Returns what is measured, cleaned as training does it; a `str` is a text."""
    source = to_source([texts] if isinstance(texts, str) else texts)
    clean = read_clean([source], recipe.data, reporter)
    return EvaluationText(label="text", documents=clean.documents, profile=recipe.data.profile, files=clean.files)


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """The perplexity of texts; `float()` of it is the figure.

    Args:
        perplexity: exp of `nll_nats_per_token`.
        nll_nats_per_token: mean negative log-likelihood of a token.
        low, high: 95 % bootstrap confidence interval of the perplexity over documents; None for too few documents.
        tokens, documents: what was scored; a prompt is not.
        word_perplexity: per whitespace-separated word of the original text.
        bits_per_byte: comparable between tokenizers.
        adapter: the mix, or `base`.
        versions: the versions of its adapters, such as `law@2`; a name for one in memory.
        dtype: of the base's weights.
        documents_trained_on: of the documents, those that the adapter was trained on; None if that is not known.
    """

    perplexity: float
    nll_nats_per_token: float
    low: float | None
    high: float | None
    tokens: int
    documents: int
    word_perplexity: float
    bits_per_byte: float
    adapter: str
    versions: tuple[str, ...]
    dtype: str
    documents_trained_on: int | None

    @classmethod
    def from_cell(cls, cell: Cell, dtype: str, versions: Sequence[str]) -> Perplexity:
        """Returns the figure of a cell of the matrix, measured with weights of this dtype and these versions."""
        low, high = cell.interval or (None, None)
        figures = cell.to_json()
        keys = (
            "perplexity",
            "nll_nats_per_token",
            "tokens",
            "documents",
            "word_perplexity",
            "bits_per_byte",
            "adapter",
        )
        return cls(
            **{key: figures[key] for key in keys},
            low=low,
            high=high,
            versions=tuple(versions),
            dtype=dtype,
            documents_trained_on=cell.trained_on,
        )

    def __float__(self) -> float:
        return self.perplexity

    def __str__(self) -> str:
        """Returns the figure with its interval, and says so if the text was trained on."""
        interval = "" if self.low is None or self.high is None else f" ({self.low:,.2f} to {self.high:,.2f})"
        seen = self.documents_trained_on
        warning = f"; trained on {seen:,} of {self.documents:,} documents" if seen else ""
        return f"{self.perplexity:,.2f}{interval}{warning}"
