"""What people's answers say: who is preferred, how surely, how far raters agree, and how many more would settle it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from lora_gpt2.evaluation.bootstrap import MIN_DOCUMENTS, draw_counts, find_interval
from lora_gpt2.rating.agreement import (
    count_missing,
    count_wins,
    find_bounded,
    fit_bradley_terry,
    measure_alpha,
)
from lora_gpt2.rating.rounds import Answer, Mode, Round
from lora_gpt2.rating.votes import Marks, Vote

VALUES = {"first": 1.0, "second": 0.0, "tie": 0.5}
ROUNDS = 300


@dataclass(frozen=True, kw_only=True)
class RankedAdapter:
    """An adapter's place in a ranking.

    Args:
        adapter: the adapter, the mix, or `base`.
        score: its Bradley-Terry strength (log-odds, mean 0; 0 without answers), or its mean mark on the scale (None
            without any).
        interval: 95 % bootstrap interval of the score over prompts; None where there are too few answers, or nothing
            bounds the score, because all comparisons were won or all lost.
        preferred: share of its comparisons that it won, ties as halves; None on a scale or without comparisons.
        judgements: number of comparisons, or of marks.
    """

    adapter: str
    score: float | None
    interval: tuple[float, float] | None
    preferred: float | None = None
    judgements: int


@dataclass(frozen=True, kw_only=True)
class PairOutcome:
    """What is known of two adapters: on how many tasks they were compared, and how often `a` was preferred.

    `more` is about how many more such tasks would settle which is better: 0 if it is settled, None if no difference is
    seen.
    """

    a: str
    b: str
    ratings: int
    a_preferred: float | None
    more: int | None


@dataclass(frozen=True, kw_only=True)
class RatingReport:
    """What raters' answers say.

    Args:
        mode: `pairwise` or `scale`.
        criteria: what was judged.
        raters: who answered.
        tasks, answers: their numbers.
        agreement: Krippendorff's alpha for each criterion and `overall`; None where nobody shared a task.
        ranking: the adapters, best first.
        by_criterion: the same from the answers to one criterion.
        missing: each pair of adapters.
    """

    mode: Mode
    criteria: tuple[str, ...]
    raters: tuple[str, ...]
    tasks: int
    answers: int
    agreement: dict[str, float | None]
    ranking: list[RankedAdapter]
    by_criterion: dict[str, list[RankedAdapter]]
    missing: list[PairOutcome]

    @property
    def score_name(self) -> str:
        """What an adapter's score is."""
        return "strength" if self.mode == "pairwise" else "mean"

    def to_json(self) -> dict[str, Any]:
        """Returns the report with the keys of `rate --json`."""
        by_criterion = {name: list(map(self._row_to_json, rows)) for name, rows in self.by_criterion.items()}
        return asdict(self) | {"ranking": list(map(self._row_to_json, self.ranking)), "by_criterion": by_criterion}

    def _row_to_json(self, row: RankedAdapter) -> dict[str, Any]:
        preferred = {"preferred": row.preferred} if self.mode == "pairwise" else {}
        values = {"adapter": row.adapter, self.score_name: row.score, "interval": row.interval}
        return {**values, **preferred, "judgements": row.judgements}


def summarize_round(round_: Round, answers: Sequence[Answer]) -> RatingReport:
    """Returns what the answers of a round say so far."""
    rank = _rank_pairs if round_.mode == "pairwise" else _rank_scales
    return RatingReport(
        mode=round_.mode,
        criteria=round_.criteria,
        raters=tuple(sorted({a.rater for a in answers})),
        tasks=len(round_.tasks),
        answers=len(answers),
        agreement=measure_agreement(round_, answers),
        ranking=rank(round_, answers),
        by_criterion={c: rank(round_, [a for a in answers if a.criterion == c]) for c in round_.criteria},
        missing=find_missing(round_, answers),
    )


def rank_votes(votes: Sequence[Vote]) -> RatingReport:
    """Returns the ranking of models by blind votes.

    Who was chosen is preferred to each other model of the same page; a vote is one draw of the bootstrap.
    """
    bases = {vote.base for vote in votes}

    def label(vote: Vote, model: str) -> str:
        return model if len(bases) == 1 else f"{model} on {vote.base}"

    names = sorted({label(vote, model) for vote in votes for model in vote.models})
    outcomes: list[dict[tuple[int, int], list[float]]] = []
    for vote in votes:
        best = names.index(label(vote, vote.chosen))
        others = [names.index(label(vote, other)) for other in vote.models if other != vote.chosen]
        outcomes.append({(best, other): [1.0] for other in others})
    missing = []
    for (first, a), (second, b) in combinations(enumerate(names), 2):
        values = [1.0 for found in outcomes if (first, second) in found]
        values += [0.0 for found in outcomes if (second, first) in found]
        missing.append(_describe_pair(a, b, values))
    return RatingReport(
        mode="pairwise",
        criteria=("best",),
        raters=("the web page",),
        tasks=len(votes),
        answers=len(votes),
        agreement={},
        ranking=_rank_wins(names, outcomes),
        by_criterion={},
        missing=missing,
    )


def rank_marks(given: Sequence[Marks]) -> RatingReport:
    """Returns the ranking of models by marks from 1 to 5; those of one prompt are one draw of the bootstrap.

    Two models are compared where both have marks for the same prompt.
    """
    bases = {each.base for each in given}
    labels = [[m if len(bases) == 1 else f"{m} on {each.base}" for m in each.models] for each in given]
    names = sorted({name for row in labels for name in row})
    criteria = tuple(dict.fromkeys(criterion for each in given for criterion in each.marks))

    def average(chosen: Sequence[str]) -> list[dict[str, float]]:
        """Returns, of each prompt, the mean mark of each model over some criteria."""
        found = []
        for each, row in zip(given, labels, strict=True):
            marks = {name: [each.marks[c][i] for c in chosen if c in each.marks] for i, name in enumerate(row)}
            known = {name: [mark for mark in some if mark is not None] for name, some in marks.items()}
            found.append({name: float(np.mean(some)) for name, some in known.items() if some})
        return found

    def rank(chosen: Sequence[str]) -> list[RankedAdapter]:
        found = average(chosen)
        means = [np.array([marks[name] for marks in found if name in marks]) for name in names]
        return _rank_means(names, means, [len(each) for each in means])

    overall = average(criteria)
    missing = []
    for a, b in combinations(names, 2):
        met = [marks for marks in overall if a in marks and b in marks]
        missing.append(_describe_pair(a, b, [0.5 + 0.5 * float(np.sign(marks[a] - marks[b])) for marks in met]))
    return RatingReport(
        mode="scale",
        criteria=criteria,
        raters=("the web page",),
        tasks=sum(len(marks) for marks in overall),
        answers=sum(mark is not None for each in given for marks in each.marks.values() for mark in marks),
        agreement={},
        ranking=rank(criteria),
        by_criterion={criterion: rank([criterion]) for criterion in criteria},
        missing=missing,
    )


def measure_agreement(round_: Round, answers: Sequence[Answer]) -> dict[str, float | None]:
    """Returns Krippendorff's alpha for each criterion and over all: nominal for pairs, ordinal for 1 to 5.

    Of every other task the sides are turned round: if one adapter were always named first, and were the better, chance
    alone would seem to agree.
    """
    units: dict[tuple[int, str], list[float]] = {}
    for answer in answers:
        value = _to_number(answer)
        value = 1 - value if round_.mode == "pairwise" and answer.task % 2 else value
        units.setdefault((answer.task, answer.criterion), []).append(value)
    metric: Literal["nominal", "ordinal"] = "nominal" if round_.mode == "pairwise" else "ordinal"
    found = {c: measure_alpha([v for (_, name), v in units.items() if name == c], metric) for c in round_.criteria}
    return {**found, "overall": measure_alpha(list(units.values()), metric)}


def _to_number(answer: Answer) -> float:
    """Returns 1 for the first of a pair, 0 for the second, or the mark."""
    return VALUES[answer.value] if isinstance(answer.value, str) else float(answer.value)


def _collect(round_: Round, answers: Sequence[Answer]) -> dict[int, list[float]]:
    """Returns for each task its judgements, the mean over the criteria of each rater: 1 is the first adapter."""
    judged: dict[tuple[int, str], list[float]] = {}
    for answer in answers:
        judged.setdefault((answer.task, answer.rater), []).append(_to_number(answer))
    found: dict[int, list[float]] = {}
    for (task, _), values in judged.items():
        found.setdefault(task, []).append(float(np.mean(values)))
    return found


def _rank_pairs(round_: Round, answers: Sequence[Answer]) -> list[RankedAdapter]:
    """Returns the adapters by Bradley-Terry strength, with intervals from a bootstrap over prompts.

    The tasks of a prompt have texts in common, so they are one draw; of a prompt that is repeated, each time is one.
    """
    tasks = {task.number: task for task in round_.tasks}
    index_of = {name: index for index, name in enumerate(round_.adapters)}
    outcomes: dict[int, dict[tuple[int, int], list[float]]] = {}
    for number, values in _collect(round_, answers).items():
        first, second = (index_of[name] for name in tasks[number].adapters)
        outcomes.setdefault(tasks[number].prompt_index, {}).setdefault((first, second), []).extend(values)
    return _rank_wins(round_.adapters, list(outcomes.values()))


def _rank_wins(
    names: Sequence[str], outcomes: Sequence[Mapping[tuple[int, int], Sequence[float]]]
) -> list[RankedAdapter]:
    """Returns names by strength from the outcomes of each draw of the bootstrap, by the indices of two names.

    Who only won, or only lost, has no interval: that strength is a convention.
    """
    number = len(names)
    table = np.array([count_wins(found, number) for found in outcomes]).reshape(-1, number, number)
    wins = table.sum(axis=0)
    strengths = fit_bradley_terry(wins)
    draws = draw_counts(len(table), ROUNDS) if is_varied(table) else np.zeros((0, len(table)))
    resampled = [fit_bradley_terry(np.tensordot(counts, table, axes=1)) for counts in draws]
    has_interval = find_bounded(wins) if resampled else np.zeros(number, dtype=bool)
    rows = []
    for index, name in enumerate(names):
        games = wins[index].sum() + wins[:, index].sum()
        rows.append(
            RankedAdapter(
                adapter=name,
                score=float(strengths[index]),
                interval=find_interval([s[index] for s in resampled], len(table)) if has_interval[index] else None,
                preferred=float(wins[index].sum() / games) if games else None,
                judgements=round(float(games)),
            )
        )
    return sorted(rows, key=lambda row: -(row.score or 0.0))


def is_varied(values: np.ndarray) -> bool:
    """True if a bootstrap says something: there are some draws, and not all the same."""
    return len(values) >= MIN_DOCUMENTS and bool((values != values[:1]).any())


def _rank_scales(round_: Round, answers: Sequence[Answer]) -> list[RankedAdapter]:
    """Returns the adapters by their mean, with intervals from a bootstrap over tasks."""
    tasks, judged = {task.number: task for task in round_.tasks}, _collect(round_, answers)
    of = {name: [v for t, v in judged.items() if tasks[t].adapters[0] == name] for name in round_.adapters}
    means = [np.array([np.mean(values) for values in of[name]]) for name in round_.adapters]
    return _rank_means(round_.adapters, means, [sum(map(len, of[name])) for name in round_.adapters])


def _rank_means(names: Sequence[str], means: Sequence[np.ndarray], counts: Sequence[int]) -> list[RankedAdapter]:
    """Returns names by the mean of their tasks' means, with intervals from a bootstrap over tasks."""
    rows = []
    for name, values, count in zip(names, means, counts, strict=True):
        draws = draw_counts(len(values), ROUNDS) @ values / len(values) if is_varied(values) else None
        rows.append(
            RankedAdapter(
                adapter=name,
                score=float(values.mean()) if len(values) else None,
                interval=find_interval(draws, len(values)) if draws is not None else None,
                judgements=count,
            )
        )
    return sorted(rows, key=lambda row: -(row.score or 0.0))


def find_missing(round_: Round, answers: Sequence[Answer]) -> list[PairOutcome]:
    """Returns for each two adapters how often the first is preferred, and about how many more ratings would settle it.

    A rating is the mean of all raters on one task: raters of one text are not independent of each other. On a scale,
    two texts of one prompt are compared that the same rater has judged.
    """
    return [_describe_pair(a, b, _compare(round_, answers, a, b)) for a, b in combinations(round_.adapters, 2)]


def _describe_pair(a: str, b: str, outcomes: Sequence[float]) -> PairOutcome:
    share = float(np.mean(outcomes)) if outcomes else None
    return PairOutcome(a=a, b=b, ratings=len(outcomes), a_preferred=share, more=count_missing(outcomes))


def _compare(round_: Round, answers: Sequence[Answer], a: str, b: str) -> list[float]:
    tasks = {task.number: task for task in round_.tasks}
    if round_.mode == "pairwise":
        judged = _collect(round_, answers)
        return [float(np.mean(values)) for t, values in judged.items() if tasks[t].adapters == (a, b)]
    given: dict[tuple[str, int], Mapping[str, list[float]]] = {}
    for answer in answers:
        task = tasks[answer.task]
        marks = given.setdefault((answer.rater, task.prompt_index), {a: [], b: []})
        if task.adapters[0] in marks:
            marks[task.adapters[0]].append(float(answer.value))
    found: dict[int, list[float]] = {}
    for (_, prompt), marks in given.items():
        if marks[a] and marks[b]:
            outcome = 0.5 + 0.5 * float(np.sign(np.mean(marks[a]) - np.mean(marks[b])))
            found.setdefault(prompt, []).append(outcome)
    return [float(np.mean(outcomes)) for outcomes in found.values()]
