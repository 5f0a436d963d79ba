"""The logits that two computations of the same thing are compared on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from lora_gpt2.model.base import Base
from lora_gpt2.model.gpt2 import ActiveAdapters

AdaptersForRows = Callable[[int], ActiveAdapters | None]
"""From a number of rows to what the network adds in a batch of so many; None is the plain base."""

PROBE_ROWS, PROBE_TOKENS = 4, 128


def build_probe(base: Base) -> Int[Tensor, "rows time"]:
    """Returns the tokens to compare on: random ones, so that every part of the vocabulary may come; always the same."""
    time = min(PROBE_TOKENS, base.config.context)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(base.config.vocab_size, (PROBE_ROWS, time), generator=generator)
    return tokens.to(base.runtime.device)


@torch.inference_mode()
def compute_logits(base: Base, adapters_for: AdaptersForRows = lambda rows: None) -> Tensor:
    """Returns the logits `[rows, time, vocab]` on the probe, in float32."""
    probe = build_probe(base)
    adapters = adapters_for(len(probe))
    return base.model.logits(base.model(probe, adapters), adapters).float()


def measure_difference(one: Tensor, other: Tensor) -> float:
    """Returns the largest difference of two sets of logits."""
    return float((one - other).abs().max())


def allow_rounding(logits: Tensor) -> float:
    """Returns how far float32 logits may be apart by rounding alone: 1e-5 of the largest, plus 1e-4."""
    return 1e-4 + 1e-5 * float(logits.abs().max())
