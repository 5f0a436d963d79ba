"""The logits that two computations of the same thing are compared on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from lora_gpt2.core.errors import CorruptError
from lora_gpt2.model.bank import AdapterBank, InferenceAdapters
from lora_gpt2.model.base import Base
from lora_gpt2.model.gpt2 import ActiveAdapters
from lora_gpt2.model.lora import Adapter

AdaptersForRows = Callable[[int], ActiveAdapters | None]
"""From a number of rows to what the network adds in a batch of so many; None is the plain base."""

PROBE_ROWS, PROBE_TOKENS = 4, 128
SAFE_NORM = 1e6
"""No chain of projections whose updates are within it leaves float32: an input of a norm is at most some 1e15."""


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


def bind_adapter(base: Base, adapter: Adapter) -> AdaptersForRows:
    """Returns the adapters of a batch in which every row has this one, in a bank of its own.

    Raises `MismatchError` or `CorruptError` as `AdapterBank.load` does.
    """
    bank = AdapterBank(base.config, adapter.ranks, 1, "inference", base.model.wte.weight)
    bank.load(0, adapter)
    return lambda rows: InferenceAdapters(bank, torch.ones(rows, 1))


def check_finite_logits(base: Base, adapter: Adapter, where: str) -> None:
    """Raises `CorruptError` if an adapter's logits on the probe are not finite.

    Values may each be finite and their products not. The pass is left out where the norms of the updates show that
    nothing can overflow: there it would only take time.
    """
    norms = [float(u.a.norm()) * float(u.b.norm()) * abs(u.scale) for u in adapter.updates.values()]
    if all(norm <= SAFE_NORM for norm in norms) and base.runtime.dtype != torch.float16:
        return
    if not torch.isfinite(compute_logits(base, bind_adapter(base, adapter))).all():
        raise CorruptError(
            f"{where}: its logits are not finite on this base (the norm of its largest update is {max(norms):.1e})",
            "train it again with a smaller train.learning_rate, or use an older version: name@N",
        )
