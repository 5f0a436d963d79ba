"""Variants of LoRA as plain updates, with the base that they belong to.

PiSSA (Meng et al. 2024, arXiv:2404.02948) trains the leading singular part of each weight W; what it adds to the
untouched base is its update minus that part, of twice the rank and exact to rounding. DoRA (Liu et al. 2024,
arXiv:2402.09353, eq. 5) scales each output row of W + sBA to a learnt length; the change has full rank, so its best
approximation at a rank is taken and the error stated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_gpt2.core.errors import CorruptError, MismatchError
from lora_gpt2.model.base import Base
from lora_gpt2.model.config import HEAD
from lora_gpt2.model.gpt2 import Linear
from lora_gpt2.model.lora import Adapter, LoraUpdate
from lora_gpt2.model.merge import DeltaAdapters, approximate, concatenate_updates, measure_norm, to_delta
from lora_gpt2.model.probe import AdapterSelector, compute_logits, measure_difference
from lora_gpt2.store.peft.tensors import PeftContent

DORA_RANK = 64


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A plain adapter and how far it is from what was saved, by the norm of the updates and in the logits."""

    adapter: Adapter
    variant: str
    relative_error: float
    max_logit_difference: float


def convert_variant(content: PeftContent, base: Base, rank: int | None) -> Converted:
    """Returns DoRA or PiSSA as a plain adapter; `rank` is DoRA's (None: 64, or its own if larger).

    Raises:
        MismatchError: both at once.
        CorruptError: the result is not finite.
    """
    if content.spec.dora and content.spec.pissa:
        raise MismatchError("DoRA that starts from PiSSA is not supported", "save it as one of them")
    if content.spec.pissa:
        plain = _subtract_start(content.adapter, base)
        return Converted(
            adapter=plain,
            variant="pissa",
            relative_error=0.0,
            max_logit_difference=_measure(base, plain, lambda site: _change_of_pissa(content, base, site)),
        )
    updates: dict[str, LoraUpdate] = {}
    lost = kept = 0.0
    for site, update in content.adapter.updates.items():
        wanted = rank or max(DORA_RANK, update.rank)
        updates[site], error = approximate(_change_of_dora(content, base, site), wanted, 0.0)
        lost += error**2
        kept += measure_norm(updates[site]) ** 2
    relative_error = math.sqrt(lost / (lost + kept)) if lost else 0.0
    difference = _measure(base, Adapter(updates=updates), lambda site: _change_of_dora(content, base, site))
    return Converted(
        adapter=Adapter(updates=updates), variant="dora", relative_error=relative_error, max_logit_difference=difference
    )


def _measure(base: Base, plain: Adapter, change_of: Callable[[str], Tensor]) -> float:
    """Returns the largest difference of the logits under an adapter from those under the exact changes."""

    def select(delta_of: Callable[[str], Tensor]) -> AdapterSelector:
        return lambda choices: DeltaAdapters(lambda site: delta_of(site) if site in plain.updates else None)

    exact = compute_logits(base, select(change_of))
    return measure_difference(exact, compute_logits(base, select(lambda site: to_delta(plain.updates[site]))))


def weight_of(base: Base, site: str) -> Tensor:
    """Returns the weight `[out, in]` of a projection in float32 on the CPU."""
    if site == HEAD:
        return base.model.head.detach().to("cpu", torch.float32)
    module = base.model.get_submodule(site)
    assert isinstance(module, Linear)
    return module.dense(torch.float32).detach().cpu()


def _change_of_dora(content: PeftContent, base: Base, site: str) -> Tensor:
    weight = weight_of(base, site)
    changed = weight + to_delta(content.adapter.updates[site])
    lengths = torch.linalg.vector_norm(changed, dim=1)
    delta: Tensor = changed * (content.magnitudes[site] / lengths)[:, None] - weight
    if not torch.isfinite(delta).all():
        raise CorruptError(f"the change of {site} is not finite", "train again: it diverged")
    return delta


def _change_of_pissa(content: PeftContent, base: Base, site: str) -> Tensor:
    """Returns the update minus the leading singular part of the weight, as PEFT takes it: by a full SVD."""
    update = content.adapter.updates[site]
    u, values, vh = torch.linalg.svd(weight_of(base, site), full_matrices=False)
    start: Tensor = (u[:, : update.rank] * values[: update.rank]) @ vh[: update.rank]
    return to_delta(update) - start


def _subtract_start(adapter: Adapter, base: Base) -> Adapter:
    updates = {}
    for site, update in adapter.updates.items():
        start, _ = approximate(weight_of(base, site), update.rank, 0.0)
        updates[site] = concatenate_updates([update, start], [1.0, -1.0])
    return Adapter(updates=updates)
