"""Finds how much of each adapter makes the best mix on several texts at once.

A mix that is a weighted sum needs no merging to be measured: it is a row of weights in the bank, so a candidate costs
one forward pass over the texts. The search is deterministic: single adapters and even mixes first, then steps along
each weight that halve when none of them helps (pattern search, Hooke and Jeeves 1961), by the mean negative
log-likelihood over the texts, each text counting the same. At the best weights the methods that prune are tried too.
No single mix need be best everywhere, so all that no other beats on every text are shown (the Pareto front).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lora_gpt2.core.console import Reporter, Task
from lora_gpt2.core.errors import UsageError
from lora_gpt2.data.read.records import Document
from lora_gpt2.evaluation.matrix import Source
from lora_gpt2.evaluation.perplexity import Score, Text, measure_perplexity, split_prompt, to_perplexity
from lora_gpt2.inference.session import Mix, Session
from lora_gpt2.merging.combine import Parents, open_parents
from lora_gpt2.model.base import Base
from lora_gpt2.model.merge import METHODS_THAT_PRUNE, combine_adapters
from lora_gpt2.model.probe import AdaptersForRows
from lora_gpt2.recipe import EvaluateSettings, MergeMethod, MergeSettings

TRIED = "(tried)"
FIRST_STEP, LAST_STEP, LARGEST_WEIGHT = 0.25, 0.03, 2.0


@dataclass(frozen=True)
class Candidate:
    """A mix and what it scores: mean NLL in nats per token on each text, in the order of the texts."""

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


@dataclass(frozen=True)
class SearchReport:
    """All candidates, best first; `front` are those that no other beats on every text; `base` is no adapter at all."""

    candidates: list[Candidate]
    front: list[Candidate]
    base: Candidate

    @property
    def best(self) -> Candidate:
        """The candidate with the lowest mean."""
        return self.candidates[0]


def search_weights(
    session: Session,
    mix: Mix,
    sources: Sequence[Source],
    how: MergeSettings,
    settings: EvaluateSettings,
    reporter: Reporter,
) -> SearchReport:
    """Returns the mixes that were measured; the weights of `mix` are the first tried.

    Raises:
        UsageError: there are fewer than two adapters, no text, or settings that the search chooses.
    """
    if len(mix) < 2 or not sources:
        raise UsageError(
            "--search needs two adapters and text to measure them on",
            "such as: merge law code --search --on law=law.txt,code=code.txt --as both",
        )
    if how.method != "cat" or how.rank or how.max_error:
        raise UsageError(
            "--search chooses the method, and measures mixes at full rank", "leave --method and --rank out, or --search"
        )
    parents = open_parents(session, mix)
    texts = [cut_text(session.base, source, how.search_tokens) for source in sources]
    with reporter.task("searching", how.search_steps + len(METHODS_THAT_PRUNE), "mixes") as task:
        search = _Search(session, parents, texts, settings, task)
        base = Candidate("cat", (0.0,) * len(mix), search.measure(lambda rows: None))
        search.explore(how.search_steps)
        best = min(search.found, key=lambda candidate: candidate.mean)
        pruned = [search.try_method(method, best.weights, how) for method in METHODS_THAT_PRUNE]
    candidates = sorted([*search.found, *pruned], key=lambda candidate: candidate.mean)
    front = [one for one in candidates if not any(_beats(other, one) for other in candidates)]
    return SearchReport(candidates, front, base)


class _Search:
    """What has been measured so far, each mix once."""

    def __init__(
        self, session: Session, parents: Parents, texts: Sequence[list[Text]], settings: EvaluateSettings, task: Task
    ) -> None:
        self.session, self.parents, self.texts, self.settings, self.task = session, parents, texts, settings, task
        self.known: dict[tuple[float, ...], Candidate] = {}

    @property
    def found(self) -> list[Candidate]:
        return list(self.known.values())

    def measure(self, adapters_for: AdaptersForRows) -> tuple[float, ...]:
        """Returns the mean NLL on each text."""
        scores: list[Score] = [
            measure_perplexity(self.session.base, text, self.settings, adapters_for) for text in self.texts
        ]
        return tuple(n if math.isfinite(n := score.nll_nats_per_token) else math.inf for score in scores)

    def try_weights(self, weights: Sequence[float]) -> Candidate:
        """Measures a weighted sum, softly mixed in the bank."""
        key = tuple(round(weight, 4) for weight in weights)
        if key not in self.known:
            mix = tuple((ref, weight) for (ref, _), weight in zip(self.parents.mix, key, strict=True) if weight)
            self.known[key] = Candidate("cat", key, self.measure(self.session.for_rows(mix)))
            self.task.advance(1, f"best {min(c.mean for c in self.found):.4f} nats")
        return self.known[key]

    def try_method(self, method: MergeMethod, weights: tuple[float, ...], how: MergeSettings) -> Candidate:
        """Measures a method that has to be merged first."""
        kept = [place for place, weight in enumerate(weights) if weight]  # as the published merge will have it
        how = how.model_copy(update={"method": method})
        combined = combine_adapters([self.parents.adapters[k] for k in kept], [weights[k] for k in kept], how)
        self.session.add({TRIED: combined.adapter})
        self.task.advance(1, method)
        return Candidate(method, weights, self.measure(self.session.for_rows(((TRIED, 1.0),))))

    def explore(self, limit: int) -> None:
        """Measures up to `limit` weighted sums."""
        count = len(self.parents.mix)
        starts = [tuple(self.parents.weights), *(_single(count, place) for place in range(count))]
        starts += [(share,) * count for share in (1 / count, 0.5 * (1 + 1 / count), 1.0)]
        for weights in dict.fromkeys(starts):
            if len(self.known) < limit:
                self.try_weights(weights)
        step, best = FIRST_STEP, min(self.found, key=lambda candidate: candidate.mean)
        while step >= LAST_STEP and len(self.known) < limit:
            before = best
            for place in range(count):
                for change in (step, -step):
                    moved = list(best.weights)
                    moved[place] = min(LARGEST_WEIGHT, max(0.0, moved[place] + change))
                    if any(moved) and len(self.known) < limit:
                        best = min(best, self.try_weights(moved), key=lambda candidate: candidate.mean)
            if best is before:
                step /= 2


def _single(count: int, place: int) -> tuple[float, ...]:
    return tuple(1.0 if index == place else 0.0 for index in range(count))


def _beats(one: Candidate, other: Candidate) -> bool:
    return one.nll != other.nll and all(a <= b for a, b in zip(one.nll, other.nll, strict=True))


def cut_text(base: Base, source: Source, max_tokens: int) -> list[Text]:
    """Returns the first documents of a text, up to a number of scored tokens; the last one may be cut."""
    kept: list[Text] = []
    left = max_tokens
    for document in source.documents:
        prompt, text = split_prompt(document)
        ids = base.tokenizer.encode(text)
        kept.append(Document(text if len(ids) <= left else base.tokenizer.decode(ids[:left]), "", prompt))
        left -= len(ids)
        if left <= 0:
            break
    return kept
