"""How far a figure over documents may be chance: the percentile bootstrap (Efron and Tibshirani 1993, chapter 13).

Documents are drawn with replacement, because tokens of one document are not independent of each other. All adapters are
measured on the same draws, so a difference between two of them is far surer than either figure.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
ROUNDS = 1000
AT_ONCE = 20_000_000
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


def find_interval(values: Floats | Sequence[float], level: float = LEVEL) -> Interval:
    """Returns what the middle `level` of some values lies between."""
    low, high = np.nanquantile(np.asarray(values, dtype=np.float64), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
