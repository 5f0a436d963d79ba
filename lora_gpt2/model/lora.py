"""The maths of one adapter: which projections it changes, how it is initialised, how it is scaled.

The update of a projection with weight W `[out, in]` is ΔW = scaling * B @ A with A `[rank, in]`, B `[out, rank]` and
scaling = alpha / rank (Hu et al. 2021, arXiv:2106.09685, section 4.1) or alpha / sqrt(rank) (rsLoRA, Kalajdzievski
2023, arXiv:2312.03732).
Adapting only some of q, k and v at rank r is exactly a c_attn update of rank n·r whose B is zero outside n blocks
(rows of the slice × columns of its own), with alpha raised so that the scaling stays: any PEFT loader can run it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_gpt2.core.errors import UsageError
from lora_gpt2.model.config import HEAD, GPT2Config
from lora_gpt2.model.gpt2 import ADAPTABLE, TARGETS
from lora_gpt2.recipe import LoraSettings

SLICES = ("c_attn.q", "c_attn.k", "c_attn.v")


@dataclass(frozen=True)
class LoraUpdate:
    """The update of one projection, ΔW = scaling * B @ A.

    Args:
        a: A, `[rank, in]`, float32.
        b: B, `[out, rank]`, float32.
        alpha: the numerator of the scaling (PEFT's `lora_alpha`).
        use_rslora: divide alpha by sqrt(rank) instead of rank.
    """

    a: Tensor
    b: Tensor
    alpha: float
    use_rslora: bool = False

    @property
    def rank(self) -> int:
        """Rows of `a`."""
        return self.a.shape[0]

    @property
    def scaling(self) -> float:
        """The factor of B @ A."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The updates of one adapter by site, such as `h.0.attn.c_attn`, or `lm_head`."""

    updates: Mapping[str, LoraUpdate]

    @property
    def ranks(self) -> dict[str, int]:
        """Rank at each site."""
        return {site: update.rank for site, update in self.updates.items()}


@dataclass(frozen=True, kw_only=True)
class TargetPlan:
    """How one target is adapted: PEFT's rank and alpha, and the non-zero blocks of B (None: all of it).

    The last `frozen_rank` rows of A and columns of B are not trained.
    """

    target: str
    rank: int
    alpha: float
    blocks: tuple[tuple[slice, slice], ...] | None = None
    frozen_rank: int = 0


def list_sites(config: GPT2Config, targets: tuple[str, ...] = ADAPTABLE) -> list[str]:
    """Returns the site names of the targets, layer by layer, and last the head."""
    sites = [f"h.{layer}.{target}" for layer in range(config.n_layer) for target in targets if target != HEAD]
    return [*sites, HEAD] if HEAD in targets else sites


def target_of(site: str) -> str:
    """Returns the target of a site: `h.3.mlp.c_fc` → `mlp.c_fc`; the head is its own."""
    return site if site == HEAD else site.split(".", 2)[2]


def layer_of(site: str) -> int | None:
    """Returns the block of a site: `h.3.mlp.c_fc` → 3; the head is in none."""
    return None if site == HEAD else int(site.split(".", 2)[1])


def plan_targets(config: GPT2Config, settings: LoraSettings) -> list[TargetPlan]:
    """Returns how each adapted projection is built, in the order of `TARGETS`, and last the head.

    Raises `UsageError` if `first_layer` leaves no block to adapt.
    """
    if settings.first_layer >= config.n_layer:
        raise UsageError(
            f"lora.first_layer {settings.first_layer} leaves nothing to adapt: the base has {config.n_layer} blocks",
            f"use at most {config.n_layer - 1}",
        )
    plans = []
    slices = [s for s in SLICES if s in settings.targets]
    for target in ADAPTABLE:
        name = "c_attn" if target == "attn.c_attn" else target
        if name in settings.targets:
            rank, alpha = settings.rank_of(name), settings.alpha_of(name)
            if settings.init == "pissa":  # what is trained, and with the opposite sign what it started from
                alpha *= math.sqrt(2) if settings.use_rslora else 2
                plans.append(TargetPlan(target=target, rank=2 * rank, alpha=alpha, frozen_rank=rank))
            else:
                plans.append(TargetPlan(target=target, rank=rank, alpha=alpha))
        elif name == "c_attn" and slices:
            rank, count, d = settings.rank_of(slices[0]), len(slices), config.n_embd
            alpha = settings.alpha_of(slices[0]) * (math.sqrt(count) if settings.use_rslora else count)
            blocks = tuple(
                (slice(SLICES.index(s) * d, (SLICES.index(s) + 1) * d), slice(i * rank, (i + 1) * rank))
                for i, s in enumerate(slices)
            )
            plans.append(TargetPlan(target=target, rank=rank * count, alpha=alpha, blocks=blocks))
    return plans


def build_ranks(config: GPT2Config, settings: LoraSettings) -> dict[str, int]:
    """Returns the rank at each adapted site, in the order of the network."""
    ranks = {plan.target: plan.rank for plan in plan_targets(config, settings)}
    sites = list_sites(config)[settings.first_layer * len(TARGETS) :]
    return {site: ranks[target_of(site)] for site in sites if target_of(site) in ranks}


def merge_ranks(each: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Returns the ranks of a bank that has room for all of these: the largest at each site."""
    ranks: dict[str, int] = {}
    for some in each:
        for site, rank in some.items():
            ranks[site] = max(rank, ranks.get(site, 0))
    return ranks


def build_adapter(config: GPT2Config, settings: LoraSettings, seed: int) -> Adapter:
    """Returns a fresh adapter, which changes nothing: B is zero, A uniform in ±1/sqrt(in) as PEFT draws it."""
    generator = torch.Generator().manual_seed(seed)
    plans = {plan.target: plan for plan in plan_targets(config, settings)}
    updates = {}
    for site, rank in build_ranks(config, settings).items():
        plan = plans[target_of(site)]
        inputs, outputs = config.shape_of(plan.target)
        a = torch.empty(rank, inputs).uniform_(-1, 1, generator=generator) / math.sqrt(inputs)
        updates[site] = LoraUpdate(a, torch.zeros(outputs, rank), plan.alpha, settings.use_rslora)
    return Adapter(updates=updates)


def count_parameters(config: GPT2Config, settings: LoraSettings) -> int:
    """Returns the number of trainable parameters, without the structural zeros of sliced targets."""
    total = 0
    for plan in plan_targets(config, settings):
        inputs, outputs = config.shape_of(plan.target)
        rank = plan.rank - plan.frozen_rank
        if plan.blocks is None:
            trained = outputs * rank
        else:
            trained = sum((r.stop - r.start) * (c.stop - c.start) for r, c in plan.blocks)
        total += (inputs * rank + trained) * (1 if plan.target == HEAD else config.n_layer - settings.first_layer)
    return total
