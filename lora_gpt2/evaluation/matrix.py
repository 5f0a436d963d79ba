"""Adapters × sources: the perplexity of each adapter, and of the plain base, on each text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import UsageError
from lora_gpt2.data.formats import read_documents
from lora_gpt2.evaluation.perplexity import Score, choose_window, measure_perplexity
from lora_gpt2.model.base import Base
from lora_gpt2.model.probe import AdaptersForRows
from lora_gpt2.recipe import DataSettings, EvaluateSettings


@dataclass(frozen=True)
class Source:
    """A text to measure on, under the name that the matrix shows."""

    label: str
    documents: list[str]


@dataclass(frozen=True)
class Cell:
    """One entry of the matrix."""

    adapter: str
    source: str
    score: Score

    def to_json(self) -> dict[str, str | int | float]:
        """Returns the entry with the key names of `evaluate --json`."""
        keys = ("tokens", "nll_nats_per_token", "perplexity", "word_perplexity", "bits_per_byte")
        return {"adapter": self.adapter, "source": self.source, **{key: getattr(self.score, key) for key in keys}}


def read_sources(specs: Sequence[str], settings: DataSettings) -> list[Source]:
    """Reads `path` or `label=path` items, decoded but not cleaned, so every adapter sees the same characters."""
    sources: list[Source] = []
    for spec in specs:
        label, separator, path = spec.partition("=")
        if not separator or Path(spec).exists():
            label = path = spec
        if label in (source.label for source in sources):
            raise UsageError(f"two sources are called '{label}'", "give each a label of its own: label=path")
        sources.append(Source(label, [d.prompt + d.text for d in read_documents([path], settings)]))
    return sources


def measure_matrix(
    base: Base,
    adapters: Mapping[str, AdaptersForRows],
    sources: Sequence[Source],
    settings: EvaluateSettings,
    reporter: Reporter,
) -> list[Cell]:
    """Returns the cells source by source, one for each of `adapters` in their order; the base is loaded once."""
    choose_window(base, settings)
    cells = []
    with reporter.task("measuring", len(sources) * len(adapters), "cells") as task:
        for source in sources:
            for name, adapters_for in adapters.items():
                score = measure_perplexity(base, source.documents, settings, adapters_for)
                cells.append(Cell(name, source.label, score))
                task.advance(1, f"{source.label} {name} {score.perplexity:.2f}")
    return cells
