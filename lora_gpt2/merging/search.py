"""Finds how much of each adapter makes the best mix on several texts at once.

A mix that is a weighted sum needs no merging to be measured: it is a row of weights in the bank, so a candidate costs
one forward pass over the texts. The search (`evaluation/weight_search.py`) goes by the mean negative log-likelihood
over the texts, each text counting the same. At the best weights the methods that prune are tried too.
No single mix need be best everywhere, so all that no other beats on every text are shown (the Pareto front).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_gpt2.core.console import ProgressTask, Reporter
from lora_gpt2.core.errors import UsageError
from lora_gpt2.data.read.records import Document
from lora_gpt2.evaluation.matrix import EvaluationText
from lora_gpt2.evaluation.perplexity import Score, Text, measure_perplexity, split_prompt, to_perplexity
from lora_gpt2.evaluation.weight_search import search_weights_of
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.session import Session
from lora_gpt2.merging.combine import Parents, open_parents
from lora_gpt2.model.base import Base
from lora_gpt2.model.merge import METHODS, MergeRule, combine_adapters
from lora_gpt2.model.probe import AdapterSelector, select_base
from lora_gpt2.recipe import EvaluateSettings, MergeMethod, MergeSettings

TRIED = "(tried)"
PRUNING_METHODS: list[MergeMethod] = [name for name, method in METHODS.items() if method.pruning != "none"]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A mix and its mean NLL in nats per token on each text, in the order of the texts."""

    method: MergeMethod
    weights: tuple[float, ...]
    nll: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over the texts."""
        return sum(self.nll) / len(self.nll)

    @property
    def perplexities(self) -> tuple[float, ...]:
        """Perplexity on each text."""
        return tuple(map(to_perplexity, self.nll))


@dataclass(frozen=True, kw_only=True)
class SearchReport:
    """All mixes that were measured on the texts called `labels`, best first; `base` is no adapter at all.

    `front` are those that no other beats on every text.
    """

    labels: list[str]
    candidates: list[Candidate]
    front: list[Candidate]
    base: Candidate

    @property
    def best(self) -> Candidate:
        """The candidate with the lowest mean."""
        return self.candidates[0]

    def to_json(self) -> dict[str, Any]:
        """Returns the search with the keys of `merge --search --json`."""
        return {
            "measured": len(self.candidates),
            "best": self._describe(self.best),
            "front": list(map(self._describe, self.front)),
            "base_perplexity": self._describe(self.base)["perplexity"],
        }

    def _describe(self, candidate: Candidate) -> dict[str, Any]:
        perplexity = dict(zip(self.labels, candidate.perplexities, strict=True))
        return {"method": candidate.method, "weights": list(candidate.weights), "perplexity": perplexity}


def search_weights(
    session: Session,
    mix: Mix,
    texts: Sequence[EvaluationText],
    settings: MergeSettings,
    evaluate: EvaluateSettings,
    reporter: Reporter,
) -> SearchReport:
    """Returns the mixes that were measured; the weights of `mix` are the first tried.

    Raises:
        UsageError: there are fewer than two adapters, no text, or settings that the search chooses.
    """
    if len(mix) < 2 or not texts:
        raise UsageError(
            "--search needs two adapters and text to measure them on",
            "such as: merge law code --search --on law=law.txt,code=code.txt --as both",
        )
    if settings.method != "cat" or settings.rank or settings.max_error:
        raise UsageError(
            "--search chooses the method, and measures mixes at full rank", "leave --method and --rank out, or --search"
        )
    parents = open_parents(session, mix)
    documents = [cut_text(session.base, text, settings.search_tokens) for text in texts]
    with reporter.task("searching", settings.search_steps + len(PRUNING_METHODS), "mixes") as task:
        search = _Search(session, parents, documents, evaluate, task)
        base = Candidate(method="cat", weights=(0.0,) * len(mix), nll=search.measure(select_base))
        search.explore(settings.search_steps)
        best = min(search.found, key=lambda candidate: candidate.mean)
        rules = [MergeRule(method=name, density=settings.density, seed=settings.seed) for name in PRUNING_METHODS]
        pruned = [search.try_rule(rule, best.weights) for rule in rules]
    candidates = sorted([*search.found, *pruned], key=lambda candidate: candidate.mean)
    front = [one for one in candidates if not any(_beats(other, one) for other in candidates)]
    return SearchReport(labels=[text.label for text in texts], candidates=candidates, front=front, base=base)


class _Search:
    """The mixes that have been measured so far."""

    def __init__(
        self,
        session: Session,
        parents: Parents,
        texts: Sequence[list[Text]],
        settings: EvaluateSettings,
        task: ProgressTask,
    ) -> None:
        self.session, self.parents, self.texts, self.settings, self.task = session, parents, texts, settings, task
        self.found: list[Candidate] = []

    def measure(self, select: AdapterSelector) -> tuple[float, ...]:
        """Returns the mean NLL on each text."""
        scores: list[Score] = [
            measure_perplexity(self.session.base, text, self.settings, select) for text in self.texts
        ]
        return tuple(n if math.isfinite(n := score.nll_nats_per_token) else math.inf for score in scores)

    def try_weights(self, weights: Sequence[float]) -> Candidate:
        """Measures a weighted sum, softly mixed in the bank."""
        references = self.parents.mix.references
        mix = Mix((ref, weight) for ref, weight in zip(references, weights, strict=True) if weight)
        candidate = Candidate(method="cat", weights=tuple(weights), nll=self.measure(self.session.select(mix)))
        self.found.append(candidate)
        self.task.advance(1, f"best {min(c.mean for c in self.found):.4f} nats")
        return candidate

    def try_rule(self, rule: MergeRule, weights: tuple[float, ...]) -> Candidate:
        """Measures a method whose result is not a weighted sum, so that it has to be merged first.

        `weights` are those of a sum; where a method takes a mean, they are larger by as many as there are to it.
        """
        kept = [index for index, weight in enumerate(weights) if weight]  # as the published merge will have it
        weights = tuple(weight * (len(kept) if rule.steps.elects_sign else 1) for weight in weights)
        combined = combine_adapters([self.parents.adapters[k] for k in kept], [weights[k] for k in kept], rule)
        self.session.load_in_memory({TRIED: combined.adapter})
        self.task.advance(1, rule.method)
        nll = self.measure(self.session.select(Mix.single(TRIED)))
        return Candidate(method=rule.method, weights=weights, nll=nll)

    def explore(self, limit: int) -> None:
        """Measures up to `limit` weighted sums."""
        first = [tuple(self.parents.weights)]
        search_weights_of(len(self.parents.mix), lambda weights: self.try_weights(weights).mean, first, limit)


def _beats(one: Candidate, other: Candidate) -> bool:
    return one.nll != other.nll and all(a <= b for a, b in zip(one.nll, other.nll, strict=True))


def cut_text(base: Base, text: EvaluationText, max_tokens: int) -> list[Text]:
    """Returns documents from all over a text, up to a number of scored tokens; one of them may be cut."""
    kept: dict[int, Text] = {}
    left = max_tokens
    for index in np.random.default_rng(0).permutation(len(text.documents)).tolist():
        prompt, scored = split_prompt(text.documents[index])
        ids = base.tokenizer.encode(scored)
        kept[index] = Document(scored if len(ids) <= left else base.tokenizer.decode(ids[:left]), "", prompt)
        left -= len(ids)
        if left <= 0:
            break
    return [kept[index] for index in sorted(kept)]
