"""Statistics of ratings: do people agree, who is preferred, and how many more ratings would tell.

Krippendorff's alpha (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability"), the Bradley-Terry model by
Newton's method (Hunter 2004, Annals of Statistics 32, for the model and when it has an estimate), and a sign test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Metric = Literal["nominal", "ordinal", "interval"]
Floats = NDArray[np.float64]
Z95 = 1.959964
SETTLED = 0.05
MAX_STEPS = 100
LARGEST_STEP = 1.0
PRECISION = 1e-9


def measure_alpha(units: Sequence[Sequence[float]], metric: Metric) -> float | None:
    """Returns Krippendorff's alpha of the values that each unit was given: 1 agreement, 0 chance.

    Missing values are left out; nominal values are any numbers that differ. None where no unit has two values, or
    all values are the same.
    """
    paired = [values for values in units if len(values) > 1]
    levels = sorted({value for values in paired for value in values})
    if len(levels) < 2:
        return None
    index_of = {value: index for index, value in enumerate(levels)}
    coincidences = np.zeros((len(levels), len(levels)))
    for values in paired:
        counts = np.bincount([index_of[value] for value in values], minlength=len(levels)).astype(np.float64)
        coincidences += (np.outer(counts, counts) - np.diag(counts)) / (len(values) - 1)
    totals = coincidences.sum(axis=1)
    distances = _measure_distances(np.array(levels), totals, metric)
    expected = (np.outer(totals, totals) - np.diag(totals)) / (totals.sum() - 1)
    return float(1 - (coincidences * distances).sum() / (expected * distances).sum())


def _measure_distances(levels: Floats, totals: Floats, metric: Metric) -> Floats:
    """Returns the squared difference of each two levels."""
    if metric == "nominal":
        return 1.0 - np.eye(len(levels))
    if metric == "interval":
        return np.subtract.outer(levels, levels) ** 2
    middles = np.cumsum(totals) - totals / 2  # ranks: all values between, and half of both ends
    distances: Floats = np.subtract.outer(middles, middles) ** 2
    return distances


def fit_bradley_terry(wins: Floats) -> Floats:
    """Returns log-strengths that sum to 0, such that i beats j with probability 1 / (1 + exp(s_j - s_i)).

    `wins[i, j]` is how often i beat j; a tie is half a win for both. Where one won or lost everything, whose strength
    would be infinite, half a tie is added to every pair that met. Those that met, also over others, are compared with
    each other alone and sum to 0; who met nobody has strength 0.
    """
    strengths = np.zeros(len(wins))
    groups = _reach(wins + wins.T > 0)
    for group in {tuple(np.flatnonzero(row).tolist()) for row in groups}:
        if len(group) > 1:
            strengths[list(group)] = _fit_played(wins[np.ix_(group, group)])
    return strengths


def find_bounded(wins: Floats) -> NDArray[np.bool_]:
    """Marks those whose strength, relative to another's, has a finite estimate: they beat it, and are beaten by it.

    Both also over others (Hunter 2004, assumption 1).
    """
    reach = _reach(wins > 0)
    bounded: NDArray[np.bool_] = (reach & reach.T).sum(axis=1) > 1
    return bounded


def _fit_played(wins: Floats) -> Floats:
    """Returns the log-strengths of adapters that have all met, also over others."""
    if not _reach(wins > 0).all():  # the estimate is finite if everyone can be reached from everyone over wins
        wins = wins + 0.25 * (wins + wins.T > 0)
    met, logs, one = wins + wins.T, np.zeros(len(wins)), np.ones((len(wins), len(wins)))
    for _ in range(MAX_STEPS):
        likely = 1 / (1 + np.exp(np.subtract.outer(logs, logs).T))
        slope = (wins - met * likely).sum(axis=1)
        spread = met * likely * (1 - likely)
        curvature = np.diag(spread.sum(axis=1)) - spread
        step = np.clip(np.linalg.solve(curvature + one, slope), -LARGEST_STEP, LARGEST_STEP)  # one: they sum to 0
        logs = logs + step
        if np.abs(step).max() < PRECISION:
            break
    logs -= logs.mean()
    return logs


def _reach(steps: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Returns who can be reached from whom, in any number of steps, `[number, number]`."""
    reach = steps | np.eye(len(steps), dtype=bool)
    for _ in range(len(steps)):
        reach = (reach.astype(int) @ reach.astype(int)) > 0
    return reach


def count_wins(outcomes: Mapping[tuple[int, int], Sequence[float]], number: int) -> Floats:
    """Returns wins `[number, number]` from outcomes of pairs: 1 the first is better, 0 the second, 0.5 a tie."""
    wins = np.zeros((number, number))
    for (first, second), values in outcomes.items():
        wins[first, second] += sum(values)
        wins[second, first] += len(values) - sum(values)
    return wins


def count_missing(outcomes: Sequence[float]) -> int | None:
    """Returns about how many more outcomes (1, 0, or between) would settle which is better, 0 if it is settled already.

    Settled is p < 0.05 of the two-sided sign test, ties left out; how many are needed is a normal approximation. None
    where no difference is seen, or nothing was judged.
    """
    wins, losses = sum(value > 0.5 for value in outcomes), sum(value < 0.5 for value in outcomes)
    if wins == losses:
        return None
    if compare_signs(wins, losses) < SETTLED:
        return 0
    number = wins + losses
    share = (max(wins, losses) + 1) / (number + 2)  # a few that agree prove little
    needed = Z95**2 * share * (1 - share) / (share - 0.5) ** 2
    return max(1, math.ceil(needed * len(outcomes) / number) - len(outcomes))


def compare_signs(wins: int, losses: int) -> float:
    """Returns the two-sided p of the sign test: how likely so uneven an outcome is if both are equally good."""
    number, most = wins + losses, max(wins, losses)
    tail: float = sum(math.comb(number, k) for k in range(most, number + 1)) / 2**number
    return min(1.0, 2 * tail)
