"""Adapters × texts: the perplexity of each adapter, and of the plain base, on each text, with confidence intervals."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import UsageError
from lora_gpt2.data.pipeline import read_clean
from lora_gpt2.data.text_sketch import TextSketch
from lora_gpt2.evaluation.bootstrap import MIN_DOCUMENTS, Interval, find_interval, resample_ratio
from lora_gpt2.evaluation.perplexity import Score, ScoringWindows, Text, split_prompt, to_perplexity
from lora_gpt2.model.base import Base
from lora_gpt2.model.probe import AdapterSelector
from lora_gpt2.recipe import DataSettings, EvaluateSettings
from lora_gpt2.store.references import BASE


@dataclass(frozen=True, kw_only=True)
class EvaluationText:
    """A text to measure on.

    Args:
        label: its name in the matrix.
        documents: its documents.
        profile: the cleaning profile, if it is known.
        files: the sha256 of the files that it is from, if they are known.
    """

    label: str
    documents: Sequence[Text]
    profile: str = ""
    files: Sequence[Sequence[str]] = ()


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of the matrix.

    Args:
        adapter: the row.
        source: the column.
        score: what was measured.
        interval: 95 % bootstrap confidence interval of the perplexity, over documents; None for too few documents.
        ratio: perplexity over the base's on the same text; None without the base.
        ratio_interval: its confidence interval, from the same draws.
        profile: cleaning profile of the text.
        trained_on: number of documents that the adapter was trained on; None if its training text is not known.
        num_documents: number of documents, which protocol `stream` scores as one text.
    """

    adapter: str
    source: str
    score: Score
    interval: Interval | None = None
    ratio: float | None = None
    ratio_interval: Interval | None = None
    profile: str = ""
    trained_on: int | None = None
    num_documents: int = 0

    def to_json(self) -> dict[str, Any]:
        """Returns the entry with the key names of `evaluate --json`."""
        keys = ("tokens", "nll_nats_per_token", "perplexity", "word_perplexity", "bits_per_byte")
        return {
            "adapter": self.adapter,
            "source": self.source,
            **{key: getattr(self.score, key) for key in keys},
            "documents": self.num_documents,
            "perplexity_interval": self.interval,
            "ratio_to_base": self.ratio,
            "ratio_interval": self.ratio_interval,
            "profile": self.profile or None,
            "documents_trained_on": self.trained_on,
        }


@dataclass(frozen=True)
class LabelledSource:
    """What to read, and its name in the matrix."""

    label: str
    path: str

    @classmethod
    def parse(cls, spec: str) -> LabelledSource:
        """Returns what `path` or `label=path` means; a path that exists is one, with `=` in it or not."""
        label, separator, path = spec.partition("=")
        is_label = separator and not Path(spec).exists() and "/" not in label and os.sep not in label
        return cls(label, path) if is_label else cls(spec, spec)


def read_sources(
    wanted: Sequence[LabelledSource],
    settings: DataSettings,
    reporter: Reporter,
    find_own: Callable[[str, str], EvaluationText | None] = lambda label, name: None,
) -> list[EvaluationText]:
    """Reads sources, cleaned as training cleans them, so that a text has one number everywhere.

    One that is not a path is passed to `find_own`, which returns the text of that label and name, or None.
    """
    sources: list[EvaluationText] = []
    for label, path in ((source.label, source.path) for source in wanted):
        if label in (source.label for source in sources):
            raise UsageError(f"two sources are called '{label}'", "give each a label of its own: label=path")
        own = None if Path(path).exists() else find_own(label, path)
        if own is None:
            text = read_clean([path], settings, reporter)
            own = EvaluationText(label=label, documents=text.documents, profile=settings.profile, files=text.files)
        sources.append(own)
    return sources


def measure_matrix(
    base: Base,
    adapters: Mapping[str, AdapterSelector],
    sources: Sequence[EvaluationText],
    settings: EvaluateSettings,
    reporter: Reporter,
    *,
    together: AdapterSelector | None = None,
    sketches: Mapping[str, TextSketch] | None = None,
    keep_tokens: bool = False,
) -> list[Cell]:
    """Returns the cells source by source, one for each of `adapters` in their order, all in one pass over the base.

    Args:
        base: the base.
        adapters: a selector for each row of the matrix.
        sources: the texts.
        settings: protocol and windows.
        reporter: shows progress.
        together: one selector of all `adapters`, in their order, if a batch may contain several of them.
        sketches: the training texts of those adapters for which they are known.
        keep_tokens: see `ScoringWindows.measure`.
    """
    windows = ScoringWindows(base, [source.documents for source in sources], settings)
    one_each = list(adapters.values())
    select = together or (lambda choices: one_each[choices[0]]([0] * len(choices)))
    with reporter.task("measuring", windows.forward_tokens * len(adapters), "tokens") as task:
        scores = windows.measure(
            select, len(adapters), can_mix=together is not None, on_tokens=task.advance, keep_tokens=keep_tokens
        )
    return build_cells(list(adapters), sources, scores, sketches or {})


def build_cells(
    adapters: Sequence[str],
    sources: Sequence[EvaluationText],
    scores: Sequence[Sequence[Score]],
    sketches: Mapping[str, TextSketch],
) -> list[Cell]:
    """Returns the cells of scores `[adapters][sources]`, source by source; see `measure_matrix`."""
    cells = []
    for column, source in enumerate(sources):
        by_adapter = {name: row[column] for name, row in zip(adapters, scores, strict=True)}
        cells += _compare(source, by_adapter, sketches)
    return cells


def _compare(source: EvaluationText, scores: Mapping[str, Score], sketches: Mapping[str, TextSketch]) -> list[Cell]:
    """Returns the cells of one source, all resampled by the same draws."""
    texts = ["".join(split_prompt(document)) for document in source.documents]
    documents = _add_copies(np.stack([score.per_document for score in scores.values()]), texts)
    names, base = list(scores), scores.get(BASE)
    scored = documents[0, 1] > 0
    count = int(np.count_nonzero(scored))
    means = resample_ratio(documents[:, 0, scored], documents[0, 1, scored]) if count >= MIN_DOCUMENTS else None
    cells = []
    for row, (name, score) in enumerate(scores.items()):
        interval = ratio_interval = None
        if means is not None and math.isfinite(score.nll_nats):
            interval = _exp(find_interval(means[:, row], count))
            if base is not None and name != BASE:
                ratio_interval = _exp(find_interval(means[:, row] - means[:, names.index(BASE)], count))
        difference = score.nll_nats_per_token - base.nll_nats_per_token if base is not None else math.nan
        ratio = to_perplexity(difference) if base is not None else None
        seen = sketches[name].count_seen(texts) if name in sketches else None
        cells.append(
            Cell(
                adapter=name,
                source=source.label,
                score=score,
                interval=interval,
                ratio=ratio,
                ratio_interval=ratio_interval,
                profile=source.profile,
                trained_on=seen,
                num_documents=len(texts),
            )
        )
    return cells


def _add_copies(figures: NDArray[np.float64], texts: Sequence[str]) -> NDArray[np.float64]:
    """Returns figures `[adapters, 2, texts]` with those of equal texts added up: copies are not independent draws."""
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    if figures.shape[2] != len(texts) or len(numbers) == len(texts):  # a stream is one text
        return figures
    found = np.zeros((*figures.shape[:2], len(numbers)))
    for index, text in enumerate(texts):
        found[:, :, numbers[text]] += figures[:, :, index]
    return found


def _exp(interval: Interval) -> Interval:
    return to_perplexity(interval[0]), to_perplexity(interval[1])
