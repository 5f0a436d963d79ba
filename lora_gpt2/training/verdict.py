"""What a training curve says, in a sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

RISE = 0.02
STILL_FALLING = 0.005
FORGOTTEN = 1.25


def judge_curve(records: Sequence[dict[str, Any]], num_steps: int) -> str:
    """Returns whether a run over-fitted, stopped too early, or ended where it should, and what to do about it.

    `records` are those of the metrics file. A rise of validation loss by 0.02 nats (2 % of perplexity) after its best
    counts, unless training loss rose too; a fall by 0.005 nats in the last interval counts as unfinished.
    """
    points = [(record["step"], record["validation_loss"]) for record in records if "validation_loss" in record]
    if len(points) < 3:
        return "too few validations to judge the curve"
    best_step, best = min(points, key=lambda point: point[1])
    last_step, last = points[-1]
    stopped = f" (stopped early, of {num_steps})" if last_step < num_steps else ""
    if last - best >= RISE:
        fell = _mean_loss(records, points[-2][0], last_step) < _mean_loss(records, 0, best_step)
        why = "while training fell: more data or fewer steps" if fell else "with training: a smaller learning rate"
        return f"best at step {best_step}{stopped}; after it validation rose by {_percent(last - best)} {why}"
    if best_step == last_step and points[-2][1] - last >= STILL_FALLING and not stopped:
        return f"still improving at step {last_step}: more steps would help"
    return f"best at step {best_step}{stopped}; the curve is flat after it: about the right length"


def judge_forgetting(base_perplexity: float, perplexity: float) -> str:
    """Returns what became of general English under an adapter."""
    change = f"general English {base_perplexity:.1f} -> {perplexity:.1f}"
    if perplexity > FORGOTTEN * base_perplexity:
        return f"{change}: much is forgotten; fewer steps, a smaller learning rate or rank keep more"
    return f"{change}: little is forgotten"


def _mean_loss(records: Sequence[dict[str, Any]], after: int, until: int) -> float:
    losses = [r["loss"] for r in records if after < r["step"] <= until and r["loss"] is not None]
    return sum(losses) / len(losses) if losses else math.inf


def _percent(nats: float) -> str:
    return f"{100 * math.expm1(nats):.0f} %"
