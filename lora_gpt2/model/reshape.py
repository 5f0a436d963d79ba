"""The adapter that training starts from, in the shape that it is to have: another adapter's update, or the base's own.

A higher rank is exact: the new columns of B are zero, and the new rows of A are those of a fresh adapter, so that they
can learn (where both are zero, neither gets a gradient). A lower rank is the best approximation of the update (Eckart
and Young 1936); what it cuts off, and what belongs to projections that are not adapted any more, is the error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_gpt2.model.config import HEAD, GPT2Config
from lora_gpt2.model.gpt2 import ADAPTABLE
from lora_gpt2.model.lora import (
    Adapter,
    LoraUpdate,
    TargetPlan,
    build_adapter,
    layer_of,
    plan_targets,
    target_of,
)
from lora_gpt2.model.merge import approximate, measure_norm, truncate_rank
from lora_gpt2.recipe import LoraSettings

SHAPE = ("rank", "alpha", "targets", "rank_pattern", "use_rslora", "first_layer")
"""The settings that decide the shape of an adapter."""


def describe_shape(ranks: Mapping[str, int], alpha: float, use_rslora: bool) -> dict[str, Any]:
    """Returns the `SHAPE` settings of an adapter with these ranks at its sites; of each target, the highest one.

    Args:
        ranks: rank by site; not empty.
        alpha: of an update with the lowest rank.
        use_rslora: see `LoraSettings`.
    """
    of_target: dict[str, int] = {}
    for site, rank in ranks.items():
        name = target_of(site).replace("attn.c_attn", "c_attn")
        of_target[name] = max(rank, of_target.get(name, 0))
    targets = [name for name in (target.replace("attn.c_attn", "c_attn") for target in ADAPTABLE) if name in of_target]
    of_blocks = [of_target[name] for name in targets if name != HEAD]
    rank = min(of_blocks) if of_blocks else max(1, of_target[HEAD] // 2)
    default = {name: rank * (2 if name == HEAD else 1) for name in targets}
    return {
        "rank": rank,
        "alpha": alpha,
        "targets": targets,
        "rank_pattern": {name: of_target[name] for name in targets if of_target[name] != default[name]},
        "use_rslora": use_rslora,
        "first_layer": min((layer for site in ranks if (layer := layer_of(site)) is not None), default=0),
    }


def reshape_adapter(parent: Adapter, config: GPT2Config, settings: LoraSettings, seed: int) -> tuple[Adapter, float]:
    """Returns an adapter of the shape in `settings` that changes what `parent` does, and the relative error of that.

    The error is the Frobenius norm of the part of the parent's update that is lost, over that of the whole update; 0
    means that the update is the parent's (bitwise, where alpha / rank are the same). `seed` is that of the fresh
    adapter, whose rows of A fill up a higher rank.
    """
    fresh = build_adapter(config, settings, seed)
    plans = {plan.target: plan for plan in plan_targets(config, settings)}
    lost = sum(measure_norm(update) ** 2 for site, update in parent.updates.items() if site not in fresh.updates)
    updates = dict(fresh.updates)
    for site in fresh.updates.keys() & parent.updates.keys():
        updates[site], error = _reshape_update(parent.updates[site], fresh.updates[site], plans[target_of(site)])
        lost += error**2
    whole = sum(measure_norm(update) ** 2 for update in parent.updates.values())
    return Adapter(updates=updates), math.sqrt(lost / whole) if lost else 0.0


def _reshape_update(parent: LoraUpdate, fresh: LoraUpdate, plan: TargetPlan) -> tuple[LoraUpdate, float]:
    """Returns an update like `fresh` that does what `parent` does, and the norm of the error."""
    a, b = fresh.a.clone(), fresh.b.clone()
    outside = torch.ones(len(b), dtype=torch.bool)
    lost = 0.0
    for rows, columns in plan.blocks or ((slice(None), slice(None)),):
        size = b[rows, columns].shape[1]
        kept, error = _fit_rank(_take_rows(parent, rows), size)
        first = columns.start or 0
        a[first : first + kept.rank] = kept.a
        b[rows, first : first + kept.rank] = kept.b * (kept.scaling / fresh.scaling)
        outside[rows] = False
        lost += error**2
    if outside.any():
        lost += measure_norm(_take_rows(parent, outside)) ** 2
    return LoraUpdate(a, b, fresh.alpha, fresh.use_rslora), math.sqrt(lost)


def _take_rows(update: LoraUpdate, rows: slice | Tensor) -> LoraUpdate:
    return LoraUpdate(update.a, update.b[rows], update.alpha, update.use_rslora)


def _fit_rank(update: LoraUpdate, rank: int) -> tuple[LoraUpdate, float]:
    """Returns an update of at most this rank, and the norm of the error; columns of B that are zero do not count."""
    if update.rank <= rank:
        return update, 0.0
    used = update.b.any(0)
    if 0 < int(used.sum()) <= rank:
        a, b = update.a[used], update.b[:, used] * update.scaling
        return LoraUpdate(a, b, float(len(a))), 0.0
    return truncate_rank(update, rank, 0.0)


def build_pissa(config: GPT2Config, settings: LoraSettings, weight_of: Callable[[str], Tensor]) -> Adapter:
    """Returns an adapter that changes nothing yet and trains the leading singular part of each weight.

    Its factors are doubled: the part that is trained, and, frozen and with the opposite sign, the same part as it was,
    because the base stays as it is (PiSSA, Meng et al. 2024, arXiv:2404.02948, section 3, trains the part with the rest
    of the weight as its base).

    Args:
        config: the base's shape.
        settings: with `init` `pissa`.
        weight_of: returns the weight `[out, in]` at a site.
    """
    updates = {}
    for site, fresh in build_adapter(config, settings, 0).updates.items():
        part, _ = approximate(weight_of(site), fresh.rank // 2, 0.0)
        a, b = (each / math.sqrt(fresh.scaling) for each in (part.a, part.b))  # as PEFT divides it
        updates[site] = LoraUpdate(a.repeat(2, 1), torch.cat([b, -b], 1), fresh.alpha, fresh.use_rslora)
    return Adapter(updates=updates)
