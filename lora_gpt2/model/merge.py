"""The arithmetic of combining adapters, in the space of the updates ΔW that they add to the weights.

ΔW = scaling * B @ A. Weighted sums of such matrices are again low-rank and are represented exactly by stacking their
factors ("cat"); everything else (pruning, electing signs) works on ΔW itself and returns to a rank through its best
approximation (Eckart and Young 1936), whose error is returned, never hidden. Averaging A and B separately, as is often
done, is not offered: it adds cross terms that none of the parents has.

Sources: task arithmetic, Ilharco et al. 2023 (arXiv:2212.04089); TIES, Yadav et al. 2023 (arXiv:2306.01708, section
3); DARE, Yu et al. 2024 (arXiv:2311.03099, section 3.2). The numbers are those of PEFT's `merge_utils`, the reference
in the tests. Costs one eigendecomposition of a `[d, d]` matrix per pruned projection.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_gpt2.core.errors import UsageError
from lora_gpt2.model.config import HEAD
from lora_gpt2.model.gpt2 import Linear, LowRankLogits, Prologue, apply_prologue
from lora_gpt2.model.lora import Adapter, LoraUpdate
from lora_gpt2.recipe import MergeMethod


@dataclass(frozen=True, kw_only=True)
class Method:
    """The steps of a merge method: normalise the weights, prune the updates, elect a sign for each entry."""

    normalises: bool = False
    pruning: Literal["none", "magnitude", "dare"] = "none"
    elects_sign: bool = False

    @property
    def is_sum(self) -> bool:
        """True if the result is a weighted sum of the parents, and so equals a mix of them in a bank."""
        return self.pruning == "none" and not self.elects_sign


METHODS: dict[MergeMethod, Method] = {
    "cat": Method(),
    "linear": Method(normalises=True),
    "svd": Method(),
    "task_arithmetic": Method(),
    "ties": Method(pruning="magnitude", elects_sign=True),
    "dare_linear": Method(pruning="dare"),
    "dare_ties": Method(pruning="dare", elects_sign=True),
    "magnitude_prune": Method(pruning="magnitude"),
}
TRUNCATED = ("linear", "svd")
"""Sums that are truncated to the parents' maximum rank unless another rank is given."""


@dataclass(frozen=True, kw_only=True)
class CombinedAdapter:
    """A new adapter; `relative_error` is the norm of what truncation cut off, over that of the whole update."""

    adapter: Adapter
    relative_error: float


@dataclass(frozen=True, kw_only=True)
class MergeRule:
    """How several updates of one projection become one.

    Args:
        method: a key of `METHODS`.
        density: fraction of the entries that pruning keeps.
        seed: random seed of DARE.
    """

    method: MergeMethod = "cat"
    density: float = 0.5
    seed: int = 0

    @property
    def steps(self) -> Method:
        """The method's steps."""
        return METHODS[self.method]

    def scale_weights(self, weights: Sequence[float]) -> list[float]:
        """Returns the weights that the method uses; raises `UsageError` if it normalises and they sum to zero."""
        if not self.steps.normalises:
            return list(weights)
        if abs(total := sum(weights)) < 1e-6:
            raise UsageError("method linear divides by the sum of the weights, which is zero", "use --method cat")
        return [weight / total for weight in weights]

    def prune(self, delta: Tensor, generator: torch.Generator) -> Tensor:
        """Returns ΔW with only the entries that the method keeps."""
        if self.steps.pruning == "none" or self.density == 1:
            return delta
        if self.steps.pruning == "dare":
            return drop_and_rescale(delta, self.density, generator)
        return keep_largest(delta, self.density)

    def combine_site(
        self, adapters: Sequence[Adapter], weights: Sequence[float], site: str
    ) -> Float[Tensor, "outputs inputs"]:
        """Returns the combined ΔW of one projection, before it is truncated to a rank; `weights` are scaled ones."""
        deltas, present = [], []
        for index, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
            if site in adapter.updates:
                seed = zlib.crc32(f"{self.seed} {index} {site}".encode())
                deltas.append(self.prune(to_delta(adapter.updates[site]), torch.Generator().manual_seed(seed)))
                present.append(weight)
        stacked, scale = torch.stack(deltas), torch.tensor(present, dtype=torch.float32)
        return merge_agreeing(stacked, scale) if self.steps.elects_sign else torch.tensordot(scale, stacked, dims=1)


def combine_adapters(
    adapters: Sequence[Adapter], weights: Sequence[float], rule: MergeRule, *, rank: int = 0, max_error: float = 0.0
) -> CombinedAdapter:
    """Returns the combination of adapters whose ranks and targets may differ.

    Args:
        adapters: the parents.
        weights: one for each.
        rule: how they are combined.
        rank: rank of the result; 0 is exact for sums, except for `TRUNCATED`, and the sum of the ranks for others.
        max_error: instead of a rank, the maximum relative error per projection.

    Raises:
        UsageError: see `MergeRule.scale_weights`.
    """
    scaled = rule.scale_weights(weights)
    updates: dict[str, LoraUpdate] = {}
    lost = kept = 0.0
    for site in dict.fromkeys(site for adapter in adapters for site in adapter.updates):
        present = [adapter.updates[site] for adapter in adapters if site in adapter.updates]
        if rule.steps.is_sum:
            factors = [w for w, adapter in zip(scaled, adapters, strict=True) if site in adapter.updates]
            whole = concatenate_updates(present, factors)
            default = max(update.rank for update in present) if rule.method in TRUNCATED else whole.rank
            update, error = truncate_rank(whole, rank or default, max_error)
        else:
            delta = rule.combine_site(adapters, scaled, site)
            update, error = approximate(delta, rank or sum(update.rank for update in present), max_error)
        updates[site] = update
        lost += error**2
        kept += measure_norm(update) ** 2
    return CombinedAdapter(
        adapter=Adapter(updates=updates), relative_error=math.sqrt(lost / (lost + kept)) if lost else 0.0
    )


def concatenate_updates(updates: Sequence[LoraUpdate], weights: Sequence[float]) -> LoraUpdate:
    """Returns the weighted sum of updates of one projection, exactly: the factors side by side, scaling 1."""
    a = torch.cat([update.a for update in updates])
    b = torch.cat(
        [update.b * (weight * update.scaling) for update, weight in zip(updates, weights, strict=True)], dim=1
    )
    return LoraUpdate(a, b, float(a.shape[0]))


def to_delta(update: LoraUpdate) -> Float[Tensor, "outputs inputs"]:
    """Returns ΔW = scaling * B @ A."""
    return (update.b * update.scaling) @ update.a


def truncate_rank(update: LoraUpdate, rank: int, max_error: float) -> tuple[LoraUpdate, float]:
    """Returns the best approximation of an update at a lower rank, and the Frobenius norm of the error.

    Works on the factors: QR of both, then the SVD of a `[rank, rank]` matrix. If there is nothing to truncate, returns
    the update itself.
    """
    if not max_error and rank >= update.rank:
        return update, 0.0
    left, left_rest = torch.linalg.qr((update.b * update.scaling).double())
    right, right_rest = torch.linalg.qr(update.a.double().mT)
    u, values, vh = torch.linalg.svd(left_rest @ right_rest.mT, full_matrices=False)
    kept = choose_rank(values, rank, max_error)
    root = values[:kept].sqrt()
    b, a = left @ (u[:, :kept] * root), (root[:, None] * vh[:kept]) @ right.mT
    return LoraUpdate(a.float().contiguous(), b.float().contiguous(), float(kept)), float(values[kept:].norm())


def approximate(delta: Float[Tensor, "outputs inputs"], rank: int, max_error: float) -> tuple[LoraUpdate, float]:
    """Returns the best update of a rank for a dense ΔW, and the Frobenius norm of the error.

    The leading singular vectors of the shorter side are eigenvectors of a Gram matrix, in float64.
    """
    is_tall = delta.shape[0] > delta.shape[1]
    wide = delta.double().mT if is_tall else delta.double()
    squares, vectors = torch.linalg.eigh(wide @ wide.mT)
    values = squares.flip(0).clamp(min=0).sqrt()
    kept = choose_rank(values, rank, max_error)
    basis, root = vectors.flip(1)[:, :kept], values[:kept].sqrt().clamp(min=1e-12)
    left, right = basis * root, (basis.mT @ wide) / root[:, None]
    b, a = (right.mT, left.mT) if is_tall else (left, right)
    update = LoraUpdate(a.float().contiguous(), b.float().contiguous(), float(kept))
    return update, float((delta - to_delta(update)).double().norm())


def choose_rank(values: Float[Tensor, " rank"], rank: int, max_error: float) -> int:
    """Returns how many singular values to keep: as few as `max_error` allows, or `rank` where that is 0."""
    if not max_error:
        return min(rank, len(values))
    tails = values.square().flip(0).cumsum(0).flip(0).sqrt()  # the error if k singular values are kept
    return max(1, int((tails > max_error * values.norm()).sum()))


def keep_largest(delta: Tensor, density: float) -> Tensor:
    """Returns ΔW with all but the fraction `density` of its largest entries set to zero (TIES, "trim")."""
    count = int(density * delta.numel())
    flat = delta.flatten()
    mask = torch.zeros_like(flat)
    mask[flat.abs().topk(count).indices] = 1
    return (flat * mask).view_as(delta)


def drop_and_rescale(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Returns ΔW with each entry kept with probability `density` and divided by it (DARE)."""
    mask = torch.rand(delta.shape, generator=generator) < density
    return delta * mask / density


def merge_agreeing(
    deltas: Float[Tensor, "parents outputs inputs"], weights: Float[Tensor, " parents"]
) -> Float[Tensor, "outputs inputs"]:
    """Returns, at each entry, the weighted mean of the parents with the sign of their sum (TIES, "elect", "merge").

    As in PEFT, signs are elected before weighting, and the mean divides by the number of parents that agree.
    """
    sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    agrees = deltas.sign() == sign
    total: Tensor = torch.tensordot(weights, deltas * agrees, dims=1)
    return total / agrees.sum(0).clamp(min=1)


def measure_inner(one: LoraUpdate, other: LoraUpdate) -> float:
    """Returns the Frobenius inner product of two updates of one projection, from their factors."""
    b = (one.b.double() * one.scaling).mT @ (other.b.double() * other.scaling)
    return float((b * (one.a.double() @ other.a.double().mT)).sum())


def measure_norm(update: LoraUpdate) -> float:
    """Returns the Frobenius norm of an update, from its factors."""
    return math.sqrt(max(measure_inner(update, update), 0.0))


class DeltaAdapters:
    """Dense updates of the weights, each computed when it is needed: the reference that a merge must reproduce.

    `delta_of(site)` returns ΔW `[out, in]`, or None where there is none.
    """

    def __init__(self, delta_of: Callable[[str], Tensor | None]) -> None:
        self.delta_of = delta_of

    def project(
        self, site: str, linear: Linear, prologue: Prologue, x: Float[Tensor, "batch time inputs"]
    ) -> Float[Tensor, "batch time outputs"]:
        """Returns the projection of `prologue(x)` plus that by ΔW."""
        h = apply_prologue(prologue, x)
        y: Tensor = linear(h)
        delta = self.delta_of(site)
        return y if delta is None else y + F.linear(h, delta.to(h))

    def low_rank_logits(self, hidden: Float[Tensor, "batch time width"]) -> LowRankLogits | None:
        """Returns the contribution to the logits, as factors of which one is the hidden states."""
        delta = self.delta_of(HEAD)
        return None if delta is None else LowRankLogits(hidden.flatten(0, 1), delta.to(hidden).mT[None])
