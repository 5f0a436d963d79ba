"""How far a figure over documents may be chance: the percentile bootstrap (Efron and Tibshirani 1993, chapter 13).

Documents are drawn with replacement, because tokens of one document are not independent of each other. All adapters are
measured on the same draws, so a difference between two of them is far surer than either figure. With few documents
percentiles lie too close together, because a sample spreads less than what it is from: they are moved outwards as
Student's t asks (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", section 4.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
ROUNDS = 1000
AT_ONCE = 20_000_000
NEARLY_NORMAL = 1000  # degrees of freedom beyond which Student's t changes by less than 0.2 %
MIN_DOCUMENTS = 5  # fewer cannot show how much documents differ
Floats = NDArray[np.float64]
Interval = tuple[float, float]


def draw_counts(num_documents: int, rounds: int = ROUNDS, seed: int = 0) -> Floats:
    """Returns how often each document is drawn, `[rounds, documents]`."""
    generator = np.random.default_rng(seed)
    draws = (generator.integers(num_documents, size=num_documents) for _ in range(rounds))
    return np.stack([np.bincount(draw, minlength=num_documents) for draw in draws]).astype(np.float64)


def resample_ratio(totals: Floats, sizes: Floats) -> Floats:
    """Returns sum of totals over sum of sizes on each draw, `[rounds, rows]`; totals `[rows, documents]`.

    Rounds are drawn some at a time, so that a million documents take no more memory than twenty thousand.
    """
    at_once = max(1, AT_ONCE // max(1, len(sizes)))
    parts = []
    for start in range(0, ROUNDS, at_once):
        counts = draw_counts(len(sizes), min(at_once, ROUNDS - start), seed=start)
        denominator = counts @ sizes
        parts.append((counts @ totals.T) / np.where(denominator == 0, np.nan, denominator)[:, None])
    return np.concatenate(parts)


def find_interval(values: Floats | Sequence[float], count: int, level: float = LEVEL) -> Interval:
    """Returns the interval of a figure from its values on draws of `count` documents (two or more)."""
    tail = NormalDist().cdf(-math.sqrt(count / (count - 1)) * find_t_quantile((1 + level) / 2, count - 1))
    low, high = np.nanquantile(np.asarray(values, dtype=np.float64), [tail, 1 - tail])
    return float(low), float(high)


@cache
def find_t_quantile(share: float, freedom: int) -> float:
    """Returns Student's t below which a share of at least a half lies; by bisection of its distribution function."""
    freedom, low, high = min(freedom, NEARLY_NORMAL), 0.0, 1e6
    while high - low > 1e-9 * max(1.0, high):
        middle = (low + high) / 2
        low, high = (low, middle) if _integrate_t(middle, freedom) > 2 * share - 1 else (middle, high)
    return high


def _integrate_t(value: float, freedom: int) -> float:
    """Returns how likely |t| is below a value (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan2(value, math.sqrt(freedom))
    cosine, is_odd = math.cos(angle), freedom % 2
    term, total = (cosine, 0.0) if is_odd else (1.0, 0.0)
    for number in range(2 + is_odd, freedom + 1, 2):
        total, term = total + term, term * cosine**2 * (number - 1) / number
    return 2 / math.pi * (angle + math.sin(angle) * total) if is_odd else math.sin(angle) * total
