"""Adapters × sources: the perplexity of each adapter, and of the plain base, on each text, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import UsageError
from lora_gpt2.data.pipeline import read_clean
from lora_gpt2.data.text_sketch import TextSketch
from lora_gpt2.evaluation.bootstrap import MIN_DOCUMENTS, Interval, find_interval, resample_ratio
from lora_gpt2.evaluation.perplexity import AdaptersForColumns, Jobs, Score, Text, split_prompt, to_perplexity
from lora_gpt2.model.base import Base
from lora_gpt2.model.probe import AdaptersForRows
from lora_gpt2.recipe import DataSettings, EvaluateSettings

BASE = "base"


@dataclass(frozen=True)
class Source:
    """A text to measure on, under the name that the matrix shows.

    `profile` says how it was cleaned, `files` which files it is from, by sha256; both where they are known.
    """

    label: str
    documents: Sequence[Text]
    profile: str = ""
    files: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class Cell:
    """One entry of the matrix.

    `interval` is what the perplexity lies within (95 %, bootstrap over documents), `ratio` the perplexity over the
    base's on the same text, with its own interval; None where there are too few documents, or no base. `trained_on`
    counts the documents that the adapter was trained on; None where its training text is not known.
    """

    adapter: str
    source: str
    score: Score
    interval: Interval | None = None
    ratio: float | None = None
    ratio_interval: Interval | None = None
    profile: str = ""
    trained_on: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the entry with the key names of `evaluate --json`."""
        keys = ("tokens", "nll_nats_per_token", "perplexity", "word_perplexity", "bits_per_byte")
        return {
            "adapter": self.adapter,
            "source": self.source,
            **{key: getattr(self.score, key) for key in keys},
            "documents": self.score.per_document.shape[1],
            "perplexity_interval": self.interval,
            "ratio_to_base": self.ratio,
            "ratio_interval": self.ratio_interval,
            "profile": self.profile or None,
            "documents_trained_on": self.trained_on,
        }


def read_sources(
    specs: Sequence[str],
    settings: DataSettings,
    reporter: Reporter,
    find_own: Callable[[str, str], Source | None] = lambda label, name: None,
) -> list[Source]:
    """Reads `path` or `label=path` items, cleaned as training cleans them, so that a text has one number everywhere.

    What is no path is given to `find_own`, which returns the source of that label and name, or None if it knows none.
    """
    sources: list[Source] = []
    for spec in specs:
        label, separator, path = spec.partition("=")
        if not separator or Path(spec).exists():
            label = path = spec
        if label in (source.label for source in sources):
            raise UsageError(f"two sources are called '{label}'", "give each a label of its own: label=path")
        own = None if Path(path).exists() else find_own(label, path)
        if own is None:
            text = read_clean([path], settings, reporter)
            own = Source(label, text.documents, settings.profile, text.files)
        sources.append(own)
    return sources


def measure_matrix(
    base: Base,
    adapters: Mapping[str, AdaptersForRows],
    sources: Sequence[Source],
    settings: EvaluateSettings,
    reporter: Reporter,
    together: AdaptersForColumns | None = None,
    sketches: Mapping[str, TextSketch] | None = None,
) -> list[Cell]:
    """Returns the cells source by source, one for each of `adapters` in their order, all in one pass over the base.

    `sketches` are the training texts of the adapters for which they are known. With `together`, which takes the
    places of the adapters of a batch's rows, a batch may hold several of them.
    """
    jobs = Jobs(base, [source.documents for source in sources], settings)
    one_each = list(adapters.values())
    adapters_for = together or (lambda columns: one_each[columns[0]](len(columns)))
    with reporter.task("measuring", jobs.forward_tokens * len(adapters), "tokens") as task:
        scores = jobs.measure(adapters_for, len(adapters), mixes=together is not None, on_tokens=task.advance)
    cells = []
    for place, source in enumerate(sources):
        cells += _compare(
            source, {name: row[place] for name, row in zip(adapters, scores, strict=True)}, sketches or {}
        )
    return cells


def _compare(source: Source, scores: Mapping[str, Score], sketches: Mapping[str, TextSketch]) -> list[Cell]:
    """Returns the cells of one source, all resampled by the same draws."""
    texts = ["".join(split_prompt(document)) for document in source.documents]
    documents = np.stack([score.per_document for score in scores.values()])
    names, base = list(scores), scores.get(BASE)
    scored = documents[0, 1] > 0
    is_sure = np.count_nonzero(scored) >= MIN_DOCUMENTS
    means = resample_ratio(documents[:, 0, scored], documents[0, 1, scored]) if is_sure else None
    cells = []
    for row, (name, score) in enumerate(scores.items()):
        interval = ratio_interval = None
        if means is not None and math.isfinite(score.nll_nats):
            interval = _exp(find_interval(means[:, row]))
            if base is not None and name != BASE:
                ratio_interval = _exp(find_interval(means[:, row] - means[:, names.index(BASE)]))
        difference = score.nll_nats_per_token - base.nll_nats_per_token if base is not None else math.nan
        ratio = to_perplexity(difference) if base is not None else None
        seen = sketches[name].count_seen(texts) if name in sketches else None
        cells.append(Cell(name, source.label, score, interval, ratio, ratio_interval, source.profile, seen))
    return cells


def _exp(interval: Interval) -> Interval:
    return to_perplexity(interval[0]), to_perplexity(interval[1])
