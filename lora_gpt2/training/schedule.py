"""The learning rate at each step, as a share of its peak."""

from __future__ import annotations

import math

from lora_gpt2.recipe import TrainSettings

COSINE_FLOOR = 0.1


def lr_factor(step: int, num_steps: int, settings: TrainSettings) -> float:
    """Returns the share of the peak learning rate for `step` (0 is the first).

    Rises linearly over the warm-up, then falls along a half cosine to a tenth (Loshchilov and Hutter 2016,
    arXiv:1608.03983), linearly to zero, stays, or stays until the last `decay_fraction` of the steps and falls to zero
    (warm-up, stable, decay: Hu et al. 2024, arXiv:2404.06395).
    """
    warmup_steps = int(num_steps * settings.warmup_fraction)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    if settings.schedule == "cosine":
        return COSINE_FLOOR + (1 - COSINE_FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))
    if settings.schedule == "wsd":
        return min(1.0, (num_steps - step) / max(1.0, num_steps * settings.decay_fraction))
    return 1 - progress if settings.schedule == "linear" else 1.0
