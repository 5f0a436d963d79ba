"""Weights of a mix that minimise a loss: single adapters and even mixes first, then steps along each weight.

Pattern search (Hooke and Jeeves 1961), deterministic: the steps halve when none of them helps. Weights lie between 0
and `LARGEST_WEIGHT`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

FIRST_STEP, LAST_STEP, LARGEST_WEIGHT = 0.25, 0.03, 2.0
Weights = tuple[float, ...]


def search_weights_of(count: int, measure: Callable[[Weights], float], first: Sequence[Weights], limit: int) -> Weights:
    """Returns the best weights of a mix of `count` adapters.

    Args:
        count: number of adapters.
        measure: returns the loss of some weights; called once for each.
        first: weights that are tried before all others.
        limit: maximum number of calls.
    """
    known: dict[Weights, float] = {}

    def try_weights(weights: Sequence[float]) -> Weights:
        key = tuple(round(weight, 4) for weight in weights)
        if key not in known:
            known[key] = measure(key)
        return key

    starts = [*first, *(_one_hot(count, index) for index in range(count))]
    starts += [(share,) * count for share in (1 / count, 0.5 * (1 + 1 / count), 1.0)]
    for weights in dict.fromkeys(starts):
        if len(known) < limit:
            try_weights(weights)
    step, best = FIRST_STEP, min(known, key=known.__getitem__)
    while step >= LAST_STEP and len(known) < limit:
        before = best
        for index in range(count):
            for change in (step, -step):
                moved = list(best)
                moved[index] = min(LARGEST_WEIGHT, max(0.0, moved[index] + change))
                if any(moved) and len(known) < limit:
                    best = min(best, try_weights(moved), key=known.__getitem__)
        if best is before:
            step /= 2
    return best


def _one_hot(count: int, hot: int) -> Weights:
    return tuple(1.0 if index == hot else 0.0 for index in range(count))
