"""What a training curve says in a sentence, and what an adapter forgot; and when there is too little to tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_gpt2.data.prepared import FEW_VALIDATION_TOKENS
from lora_gpt2.evaluation.bootstrap import MIN_DOCUMENTS, find_interval, resample_ratio
from lora_gpt2.evaluation.perplexity import Score, to_perplexity
from lora_gpt2.training.slot import TOLERANCE, TrainingSlot, find_excess

RISE = 0.02
STILL_FALLING = 0.005
LITTLE, MUCH = 0.1, 0.3
"""Nats per token of general English: 0.1 is 11 % of perplexity, 0.3 is 35 %."""


def diagnose_curve(
    records: Sequence[dict[str, Any]],
    num_steps: int,
    passes: float,
    validation_tokens: int,
    kept: int | None = None,
    *,
    exceeds: bool = False,
) -> str:
    """Returns whether a run over-fitted, stopped too early, or ended where it should, and what to do about it.

    `records` are those of the metrics file, `passes` how often the training text was seen. A rise of validation loss
    by 0.02 nats (2 % of perplexity) after its best counts, unless training loss rose too; a fall by 0.005 nats in the
    last interval counts as unfinished. A best that is the last point shows no end: a curve also flattens because the
    learning rate decays. Below one pass, or 2,000 tokens of validation text, nothing is claimed. `kept` is the step
    whose weights are published, if a budget of forgetting chose another one than the loss would have; where it
    `exceeds` the budget too, none was within it.
    """
    points = [(record["step"], record["validation_loss"]) for record in records if "validation_loss" in record]
    if validation_tokens < FEW_VALIDATION_TOKENS or len(points) < 3:
        few = f"{validation_tokens:,} tokens of validation text, under {FEW_VALIDATION_TOKENS:,}"
        return f"too little to judge: {'fewer than three validations' if len(points) < 3 else few}"
    best_step, best = min(points, key=lambda point: point[1])
    if kept is not None and kept != best_step:
        chosen = (
            "which exceeds the budget of forgetting least" if exceeds else "the best within the budget of forgetting"
        )
        return f"step {kept} is kept, {chosen}; without it, step {best_step} would be"
    last_step, last = points[-1]
    stopped = f" (stopped early, of {num_steps})" if last_step < num_steps else ""
    stopped += " (the adapter it continues from)" if best_step == 0 else ""
    if last - best >= RISE:
        fell = _mean_loss(records, points[-2][0], last_step) < _mean_loss(records, 0, best_step)
        why = "while training fell: more data or fewer steps" if fell else "with training: a smaller learning rate"
        return f"best at step {best_step}{stopped}; after it validation rose by {_percent(last - best)} {why}"
    if best_step == last_step:
        return _describe_last(last_step, points[-2][1] - last, stopped)
    if passes < 1:
        return f"too little to judge: the text was seen {passes:.2f} times; validation is no longer falling"
    return f"best at step {best_step}{stopped}; the curve is flat after it: about the right length"


def _describe_last(step: int, fall: float, stopped: str) -> str:
    """Returns what can be said of a run whose last validation is its best, by its fall in the last interval."""
    if stopped:
        return f"best at step {step}{stopped}, where it ended: more steps may help"
    if fall >= STILL_FALLING:
        return f"still improving at step {step}: more steps would help"
    return f"best at step {step}, where it ended; the learning rate had decayed, so a longer run may be better"


def diagnose_test(test_nll: tuple[float, float] | None, block_size: int, window: int) -> str:
    """Returns what is to be added to `diagnose_curve` where the adapter is no better than the base on test text.

    Args:
        test_nll: nats per token of the base and of the adapter; None without test text.
        block_size: tokens of a block in training.
        window: tokens of a window when test text is measured.
    """
    if test_nll is None or test_nll[1] < test_nll[0]:
        return ""
    base, adapted = map(to_perplexity, test_nll)
    said = f"; on test text it is no better than the base ({base:.2f} -> {adapted:.2f})"
    if block_size < window:
        said += f", which is read {window} tokens at a time: train on longer blocks than {block_size}"
    return said


def diagnose_forgetting(base: Score, adapted: Score) -> str:
    """Returns what became of general English under an adapter, in nats per token with its 95 % interval.

    The interval is from a bootstrap over the passages, with the same draws for both.
    """
    change = adapted.nll_nats_per_token - base.nll_nats_per_token
    shown = f"general English {base.perplexity:.1f} -> {adapted.perplexity:.1f}"
    if not math.isfinite(change):
        return f"{shown}: it is not predicted any more"
    nats, tokens = np.stack([base.per_document[0], adapted.per_document[0]]), base.per_document[1]
    interval = ""
    if len(tokens) >= MIN_DOCUMENTS:
        means = resample_ratio(nats, tokens)
        low, high = find_interval(means[:, 1] - means[:, 0], len(tokens))
        interval = f", {low:+.3f} to {high:+.3f}"
    much = "little" if change < LITTLE else "some of it" if change < MUCH else "much"
    return f"{shown} ({change:+.3f} nats per token{interval}): {much} is forgotten"


def describe_forgetting(slot: TrainingSlot, base: Score, adapted: Score) -> str:
    """Returns what became of general English under the adapter of a slot, and of its budget."""
    return diagnose_forgetting(base, adapted) + diagnose_budget(
        slot, adapted.nll_nats_per_token - base.nll_nats_per_token
    )


def diagnose_budget(slot: TrainingSlot, forgotten: float) -> str:
    """Returns what became of the budget of forgetting, to be added to `diagnose_forgetting`.

    Without one: where much is forgotten, what would keep it.
    """
    budget, divergence = slot.recipe.train.forget, slot.final_divergence
    if budget is None or divergence is None:
        return "" if forgotten < LITTLE else "; a budget (--forget 0.1) keeps most of it"
    if find_excess(divergence, budget):
        said = "exceeds the budget: more steps, or a larger train.replay_fraction"
    else:
        said = "is within it" if divergence <= budget else f"is within its tolerance of {TOLERANCE:.0%}"
    return f"; a divergence of {divergence:.3f} nats from the base, of {budget:g}, {said}"


def _mean_loss(records: Sequence[dict[str, Any]], after: int, until: int) -> float:
    losses = [r["loss"] for r in records if after < r["step"] <= until and r["loss"] is not None]
    return sum(losses) / len(losses) if losses else math.inf


def _percent(nats: float) -> str:
    return f"{100 * math.expm1(nats):.0f} %"
