"""The arithmetic of combining adapters, in the space of what they add to the weights.

An adapter's change of a projection is a matrix Δ = scale·B·A. Weighted sums of such matrices are again low-rank and
are kept exactly by stacking their factors ("cat"); everything else (pruning, electing signs) works on Δ itself and
comes back to a rank through its best approximation (Eckart and Young 1936), whose error is returned, never hidden.
Averaging A and B separately, as is often done, is not offered: it adds cross terms that none of the parents has.

Sources: task arithmetic, Ilharco et al. 2023 (arXiv:2212.04089); TIES, Yadav et al. 2023 (arXiv:2306.01708, section
3); DARE, Yu et al. 2024 (arXiv:2311.03099, section 3.2). The numbers are those of PEFT's `merge_utils`, the reference
in the tests. Costs one eigendecomposition of a `[d, d]` matrix per pruned projection.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_gpt2.core.errors import UsageError
from lora_gpt2.model.config import HEAD
from lora_gpt2.model.gpt2 import Linear, LowRankLogits, Prologue, apply_prologue
from lora_gpt2.model.lora import Adapter, LoraUpdate
from lora_gpt2.recipe import MergeMethod, MergeSettings

METHODS_THAT_PRUNE: tuple[MergeMethod, ...] = ("ties", "dare_ties", "dare_linear", "magnitude_prune")
SUMS = ("linear", "cat", "svd", "task_arithmetic")
"""Methods whose result is a weighted sum of the parents, and so equals a soft mix of them in a bank."""


@dataclass(frozen=True)
class CombinedAdapter:
    """A new adapter; `relative_error` is the norm of what the rank cut off, over that of the whole update."""

    adapter: Adapter
    relative_error: float


def scale_weights(weights: Sequence[float], how: MergeSettings) -> list[float]:
    """Returns the weights that a method uses: `linear` divides them by their sum.

    Raises `UsageError` where that sum is zero.
    """
    if how.method != "linear":
        return list(weights)
    if abs(total := sum(weights)) < 1e-6:
        raise UsageError("method linear divides by the sum of the weights, which is zero", "use --method cat")
    return [weight / total for weight in weights]


def combine_adapters(adapters: Sequence[Adapter], weights: Sequence[float], how: MergeSettings) -> CombinedAdapter:
    """Returns the combination of adapters whose ranks and targets may differ; raises as `scale_weights`."""
    factors = scale_weights(weights, how)
    updates: dict[str, LoraUpdate] = {}
    lost = kept = 0.0
    for site in dict.fromkeys(site for adapter in adapters for site in adapter.updates):
        present = [adapter.updates[site] for adapter in adapters if site in adapter.updates]
        if how.method in SUMS:
            whole = concatenate_updates(
                present, [f for f, a in zip(factors, adapters, strict=True) if site in a.updates]
            )
            default = max(update.rank for update in present) if how.method in ("linear", "svd") else whole.rank
            update, error = cut_rank(whole, how.rank or default, how.max_error)
        else:
            delta = combine_site(adapters, factors, how, site)
            update, error = approximate(delta, how.rank or sum(update.rank for update in present), how.max_error)
        updates[site] = update
        lost += error**2
        kept += measure_norm(update) ** 2
    return CombinedAdapter(Adapter(updates), math.sqrt(lost / (lost + kept)) if lost else 0.0)


def combine_site(
    adapters: Sequence[Adapter], factors: Sequence[float], how: MergeSettings, site: str
) -> Float[Tensor, "outputs inputs"]:
    """Returns the combined change of one projection, as it is before it is brought back to a rank."""
    kept, weights = [], []
    for place, (adapter, factor) in enumerate(zip(adapters, factors, strict=True)):
        if site in adapter.updates:
            seed = zlib.crc32(f"{how.seed} {place} {site}".encode())
            kept.append(prune(to_delta(adapter.updates[site]), how, torch.Generator().manual_seed(seed)))
            weights.append(factor)
    deltas, scale = torch.stack(kept), torch.tensor(weights)
    return merge_agreeing(deltas, scale) if how.method.endswith("ties") else torch.tensordot(scale, deltas, dims=1)


def concatenate_updates(updates: Sequence[LoraUpdate], weights: Sequence[float]) -> LoraUpdate:
    """Returns the weighted sum of updates of one projection, exactly: the factors side by side, scale 1."""
    a = torch.cat([update.a for update in updates])
    b = torch.cat([update.b * (weight * update.scale) for update, weight in zip(updates, weights, strict=True)], dim=1)
    return LoraUpdate(a, b, float(a.shape[0]))


def to_delta(update: LoraUpdate) -> Float[Tensor, "outputs inputs"]:
    """Returns what an update adds to the weight."""
    return (update.b * update.scale) @ update.a


def cut_rank(update: LoraUpdate, rank: int, max_error: float) -> tuple[LoraUpdate, float]:
    """Returns the best approximation of an update at a lower rank, and the Frobenius norm of what was lost.

    Works on the factors: QR of both, then the singular values of a `[rank, rank]` matrix. Where there is nothing to
    cut, the update itself.
    """
    if not max_error and rank >= update.rank:
        return update, 0.0
    left, left_rest = torch.linalg.qr((update.b * update.scale).double())
    right, right_rest = torch.linalg.qr(update.a.double().mT)
    u, values, vh = torch.linalg.svd(left_rest @ right_rest.mT, full_matrices=False)
    kept = choose_rank(values, rank, max_error)
    root = values[:kept].sqrt()
    b, a = left @ (u[:, :kept] * root), (root[:, None] * vh[:kept]) @ right.mT
    return LoraUpdate(a.float().contiguous(), b.float().contiguous(), float(kept)), float(values[kept:].norm())


def approximate(delta: Float[Tensor, "outputs inputs"], rank: int, max_error: float) -> tuple[LoraUpdate, float]:
    """Returns the best update of a rank for a dense change, and the Frobenius norm of what was lost.

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
    tails = values.square().flip(0).cumsum(0).flip(0).sqrt()  # the norm of what is lost if k are kept
    return max(1, int((tails > max_error * values.norm()).sum()))


def prune(delta: Tensor, how: MergeSettings, generator: torch.Generator) -> Tensor:
    """Returns a change with the entries that a method keeps."""
    if how.method in SUMS or how.density == 1:
        return delta
    dares = how.method.startswith("dare")
    return drop_and_rescale(delta, how.density, generator) if dares else keep_largest(delta, how.density)


def keep_largest(delta: Tensor, density: float) -> Tensor:
    """Returns the change with all but its `density` largest entries set to zero (TIES, "trim")."""
    count = int(density * delta.numel())
    flat = delta.flatten()
    mask = torch.zeros_like(flat)
    mask[flat.abs().topk(count).indices] = 1
    return (flat * mask).view_as(delta)


def drop_and_rescale(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Returns the change with each entry kept by chance `density` and divided by it (DARE)."""
    mask = torch.rand(delta.shape, generator=generator) < density
    return delta * mask / density


def merge_agreeing(
    deltas: Float[Tensor, "parents outputs inputs"], weights: Float[Tensor, " parents"]
) -> Float[Tensor, "outputs inputs"]:
    """Returns, at each entry, the weighted mean of the parents whose sign is that of the sum (TIES, "elect", "merge").

    As in PEFT the signs are elected before the weights come in, and the mean divides by the number that agree.
    """
    sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    agrees = deltas.sign() == sign
    total: Tensor = torch.tensordot(weights, deltas * agrees, dims=1)
    return total / agrees.sum(0).clamp(min=1)


def measure_inner(one: LoraUpdate, other: LoraUpdate) -> float:
    """Returns the inner product of two changes of one projection, from their factors."""
    b = (one.b.double() * one.scale).mT @ (other.b.double() * other.scale)
    return float((b * (one.a.double() @ other.a.double().mT)).sum())


def measure_norm(update: LoraUpdate) -> float:
    """Returns the Frobenius norm of a change, from its factors."""
    return math.sqrt(max(measure_inner(update, update), 0.0))


class DeltaAdapters:
    """Changes of the weights, added as they are, each computed when it is needed: what a merge must reproduce.

    `delta_of(site)` returns a change `[out, in]`, or None where there is none.
    """

    def __init__(self, delta_of: Callable[[str], Tensor | None]) -> None:
        self.delta_of = delta_of

    def project(
        self, site: str, linear: Linear, before: Prologue, x: Float[Tensor, "rows time inputs"]
    ) -> Float[Tensor, "rows time outputs"]:
        """Returns the projection of `before(x)` plus the change's."""
        h = apply_prologue(before, x)
        y: Tensor = linear(h)
        delta = self.delta_of(site)
        return y if delta is None else y + F.linear(h, delta.to(h))

    def low_rank_logits(self, hidden: Float[Tensor, "rows time width"]) -> LowRankLogits | None:
        """Returns the change of the head, as factors of which one is the hidden states."""
        delta = self.delta_of(HEAD)
        return None if delta is None else LowRankLogits(hidden.flatten(0, 1), delta.to(hidden).mT[None])
