"""The probe: the logits that two computations of the same thing are compared on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lora_gpt2.core.errors import CorruptError
from lora_gpt2.model.bank import AdapterBank
from lora_gpt2.model.base import Base
from lora_gpt2.model.batch_adapters import BatchAdapters
from lora_gpt2.model.gpt2 import ActiveAdapters
from lora_gpt2.model.lora import Adapter

PROBE_SEQUENCES, PROBE_TOKENS = 4, 128
SAFE_NORM = 1e6
"""No chain of projections whose updates are within it leaves float32: an input of a norm is at most some 1e15."""


@runtime_checkable
class AdapterSelector(Protocol):
    """Builds the adapters of a batch.

    `choices` has, for each sequence, the index of one of the selector's adapters or mixes (a column of a matrix of
    results); a selector with a single one ignores the indices and uses their number. None is the plain base.
    """

    def __call__(self, choices: Sequence[int], /) -> ActiveAdapters | None:
        """Returns the adapters of a batch of `len(choices)` sequences."""


def select_base(choices: Sequence[int]) -> None:
    """Selects no adapter for any batch: the plain base."""


def build_probe(base: Base) -> Int[Tensor, "batch time"]:
    """Returns the tokens to compare on: random ones, so that any of the vocabulary may occur; always the same."""
    time = min(PROBE_TOKENS, base.config.n_positions)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(base.config.vocab_size, (PROBE_SEQUENCES, time), generator=generator)
    return tokens.to(base.runtime.device)


@torch.inference_mode()
def compute_logits(base: Base, select: AdapterSelector = select_base) -> Float[Tensor, "batch time vocab"]:
    """Returns the logits on the probe, in float32."""
    probe = build_probe(base)
    adapters = select([0] * len(probe))
    return base.model.logits(base.model(probe, adapters), adapters).float()


def measure_difference(one: Tensor, other: Tensor) -> float:
    """Returns the maximum absolute difference of two tensors of logits."""
    return float((one - other).abs().max())


def rounding_tolerance(logits: Tensor) -> float:
    """Returns how much float32 logits may differ by rounding alone: 1e-4, plus 1e-5 of the largest."""
    return 1e-4 + 1e-5 * float(logits.abs().max())


def select_adapter(base: Base, adapter: Adapter) -> AdapterSelector:
    """Returns a selector of one adapter for every sequence, in a bank of its own.

    Raises `MismatchError` or `CorruptError` as `AdapterBank.load` does.
    """
    bank = AdapterBank(base.config, adapter.ranks, 1, "inference", base.model.wte.weight)
    bank.load(0, adapter)
    return lambda choices: BatchAdapters(bank, torch.ones(len(choices), 1))


def check_finite_logits(base: Base, adapter: Adapter, where: str) -> None:
    """Raises `CorruptError` if an adapter's logits on the probe are not finite.

    Values may each be finite and their products not. The pass is skipped where the norms of the updates show that
    nothing can overflow.
    """
    norms = [float(u.a.norm()) * float(u.b.norm()) * abs(u.scaling) for u in adapter.updates.values()]
    if all(norm <= SAFE_NORM for norm in norms) and base.runtime.dtype != torch.float16:
        return
    if not torch.isfinite(compute_logits(base, select_adapter(base, adapter))).all():
        raise CorruptError(
            f"{where}: its logits are not finite on this base (the norm of its largest update is {max(norms):.1e})",
            "train it again with a smaller train.learning_rate, or use an older version: name@N",
        )
