"""The adapters of a batch for inference: each sequence is the base's plus the updates of the adapters that it chose.

With weights w per sequence and slot, a projection is y = W h + b + sum_k w_k * scaling_k * B_k A_k h (Hu et al. 2021,
arXiv:2106.09685, section 4.1); "shrink" and "expand" name the two products, as in Punica (Chen et al. 2023,
arXiv:2310.18547). There are three ways to compute it:

- dense: A of all slots is one `[slots * rank, in]` matrix, so K adapters take two products whatever K is, and each
  sequence may mix adapters freely; what it does not use is masked;
- grouped, on a CPU where no sequence mixes: the sequences of each slot are multiplied by its own factors alone, which
  saves work where adapters are many (half of the time that eight of them cost eight rows of GPT-2 S);
- one kernel, for one token per sequence on a GPU: see `decode_kernel.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lora_gpt2.model.bank import AdapterBank
from lora_gpt2.model.config import HEAD
from lora_gpt2.model.gpt2 import Linear, LowRankLogits, Prologue, apply_prologue
from lora_gpt2.model.kernels import has_triton

LEAST_SAVING = 3
"""Dense products multiply every row by all slots, grouped ones each slot by as many rows as the largest group has. If
that is not so many times less work, dense ones are as fast, because they move no rows."""


class BatchAdapters:
    """The adapters of a batch for inference: `weights` `[batch, slots]` is the weight of each slot in each sequence.

    A one-hot row selects an adapter, a zero row is the plain base, any other row mixes. A slot with weight zero is
    masked, not multiplied by zero, so a sequence does not depend on adapters that it does not use, whatever they
    compute (0 * inf is NaN). Slots that no sequence uses cost nothing, except those between used ones: where they are
    fewer than the used ones they are computed rather than skipped, because skipping copies the others.

    Args:
        bank: the slots, in inference layout.
        weights: see above.
        slots: the slots to compute; by default those that are used.
    """

    def __init__(self, bank: AdapterBank, weights: Float[Tensor, "batch slots"], slots: slice | None = None) -> None:
        self.slots = _find_used_slots(weights) if slots is None else slots
        self.bank, self.weights = bank, weights[:, self.slots].to(bank.flat.device, torch.float32)
        self._has_kernel = self.weights.device.type == "cuda" and has_triton()
        self._stacked: dict[str, _StackedFactors] = {}
        self._grouped: dict[str, _GroupedFactors] = {}

    @cached_property
    def _scaled(self) -> dict[str, Tensor]:
        """The weights times the scaling of each site, `[batch, slots]`, of all sites at once."""
        scaled = self.weights * self.bank.scalings[:, None, self.slots]
        return dict(zip(self.bank.sites, scaled.masked_fill_(self.weights == 0, 0), strict=True))

    @cached_property
    def _unused(self) -> Tensor | None:
        """Marks zero weights, `[batch, 1, slots, 1]`; None on a CPU where there are none (asking a GPU would wait)."""
        unused = self.weights == 0
        return unused[:, None, :, None] if unused.device.type != "cpu" or unused.any() else None

    @cached_property
    def _is_common(self) -> bool:
        """True if there is one slot with one weight for all; never on a GPU, which would have to be asked."""
        is_cpu = self.weights.device.type == "cpu" and self.weights.shape[1] == 1
        return is_cpu and bool((self.weights == self.weights[0]).all())

    @cached_property
    def _grouping(self) -> _Grouping | None:
        """The rows of each slot; None where rows mix, little would be saved, or on a GPU, which would be asked."""
        if self.weights.device.type != "cpu" or self.weights.shape[1] == 1:
            return None
        return _group_rows(self.weights)

    def project(
        self, site: str, linear: Linear, prologue: Prologue, x: Float[Tensor, "batch time inputs"]
    ) -> Float[Tensor, "batch time outputs"]:
        """Returns the projection of `prologue(x)` plus each sequence's weighted updates."""
        h = apply_prologue(prologue, x)
        y: Tensor = linear(h)
        if self._has_kernel and h.shape[1] == 1 and (found := self.find_factors(site)) is not None:
            from lora_gpt2.model.decode_kernel import add_updates

            add_updates(h[:, 0].contiguous(), found.lora_a, found.lora_b_t, found.weights, y[:, 0])
        elif site in self.bank.sites and self._grouping is not None:
            self._add_by_group(h, y, self._grouping, self._stack_groups(site, self._grouping))
        elif site in self.bank.sites:
            factors = self._stack(site)
            if factors.scaling != 0:
                y.view(-1, y.shape[-1]).addmm_(self._shrink(h, factors), factors.lora_b_t, alpha=factors.scaling)
        return y

    def find_factors(self, site: str) -> SlotFactors | None:
        """Returns the factors of one site, slot by slot; None where no adapter changes it."""
        if (views := self.bank.sites.get(site)) is None:
            return None
        return SlotFactors(views.lora_a[self.slots], views.lora_b_t[self.slots], self._scaled[site])

    def low_rank_logits(self, hidden: Float[Tensor, "batch time width"]) -> LowRankLogits | None:
        """Returns the adapters' contribution to the logits, or None if none of them changes the head."""
        if HEAD not in self.bank.sites or (factors := self._stack(HEAD)).scaling == 0:
            return None
        hidden_a = self._shrink(hidden, factors)
        return LowRankLogits(
            hidden_a if factors.scaling == 1 else hidden_a.mul_(factors.scaling), factors.lora_b_t[None]
        )

    def _shrink(
        self, h: Float[Tensor, "batch time inputs"], factors: _StackedFactors
    ) -> Float[Tensor, "tokens all_ranks"]:
        """Returns h Aᵀ, weighted per sequence where weights differ; unused slots are exactly zero."""
        z = F.linear(h, factors.lora_a)
        if factors.weights is not None:
            grouped = z.view(*h.shape[:2], factors.weights.shape[2], -1).mul_(factors.weights)
            if factors.unused is not None:
                grouped.masked_fill_(factors.unused, 0)
        return z.view(-1, len(factors.lora_b_t))

    def _stack(self, site: str) -> _StackedFactors:
        """Returns the factors of one site, the same object each time.

        On a CPU a weight that all sequences share is a Python number, which costs no operation of its own.
        """
        if (stacked := self._stacked.get(site)) is None:
            views = self.bank.sites[site]
            a, b_t = views.lora_a[self.slots].flatten(0, 1), views.lora_b_t[self.slots].flatten(0, 1)
            scaled = self._scaled[site]
            if self._is_common:
                stacked = _StackedFactors(a, b_t, float(scaled[0]))
            else:
                stacked = _StackedFactors(a, b_t, 1.0, scaled[:, None, :, None], self._unused)
            self._stacked[site] = stacked
        return stacked

    def _stack_groups(self, site: str, grouping: _Grouping) -> _GroupedFactors:
        """Returns the factors of one site by slot, the same object each time."""
        if (factors := self._grouped.get(site)) is None:
            views, scaled = self.bank.sites[site], self._scaled[site].sum(1)  # each row has one weight at most
            used = scaled[grouping.rows]
            a_t, b_t = views.lora_a[self.slots].mT, views.lora_b_t[self.slots]
            if (used == used[0]).all():
                factors = _GroupedFactors(a_t, b_t, float(used[0]))
            else:
                factors = _GroupedFactors(a_t, b_t, 1.0, scaled[grouping.gather].view(len(a_t), -1, 1, 1))
            self._grouped[site] = factors
        return factors

    def _add_by_group(
        self,
        h: Float[Tensor, "batch time inputs"],
        y: Float[Tensor, "batch time outputs"],
        grouping: _Grouping,
        factors: _GroupedFactors,
    ) -> None:
        """Adds each sequence's update to `y`."""
        count, time = len(factors.lora_b_t), h.shape[1]
        chosen = h if grouping.is_in_order else h.index_select(0, grouping.gather)
        z = torch.bmm(chosen.reshape(count, -1, h.shape[2]), factors.lora_a_t)
        if factors.weights is not None:
            z.view(count, -1, time, z.shape[2]).mul_(factors.weights)
        if grouping.is_in_order:
            y.view(count, -1, y.shape[2]).baddbmm_(z, factors.lora_b_t, alpha=factors.scaling)
        else:
            update = torch.bmm(z, factors.lora_b_t).view(-1, time, y.shape[2])
            if len(grouping.rows) < len(update):
                update = update.index_select(0, grouping.found_at)
            y.index_add_(0, grouping.rows, update, alpha=factors.scaling)


@dataclass(frozen=True)
class SlotFactors:
    """The factors of a batch at one site: A `[slots, rank, in]`, B transposed `[slots, rank, out]`, contiguous.

    `weights` `[batch, slots]` in float32 are those of each slot in each row, times its scaling; 0 where it is not used.
    """

    lora_a: Tensor
    lora_b_t: Tensor
    weights: Tensor


@dataclass(frozen=True)
class _StackedFactors:
    """The factors of a batch at one site: A and B transposed of its slots, `[slots * rank, ...]`.

    `weights` `[batch, 1, slots, 1]` differ between sequences, `scaling` is common to all; `unused` marks zero weights,
    None where every sequence uses every slot.
    """

    lora_a: Tensor
    lora_b_t: Tensor
    scaling: float
    weights: Tensor | None = None
    unused: Tensor | None = None


@dataclass(frozen=True)
class _GroupedFactors:
    """The factors of a batch at one site, by slot: A transposed `[slots, in, rank]`, B transposed `[slots, rank, out]`.

    `weights` `[slots, most, 1, 1]` are those of the rows of each slot, None where all are `scaling`.
    """

    lora_a_t: Tensor
    lora_b_t: Tensor
    scaling: float
    weights: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class _Grouping:
    """The rows of a batch by slot.

    Args:
        gather: rows of each slot, `[slots * most]`, where a slot with fewer has one of its own again, or any.
        rows: those that have an adapter.
        found_at: where in `gather` these are.
        is_in_order: `gather` is all rows in their order.
    """

    gather: Int[Tensor, " padded"]
    rows: Int[Tensor, " rows"]
    found_at: Int[Tensor, " rows"]
    is_in_order: bool


def _group_rows(weights: Float[Tensor, "batch slots"]) -> _Grouping | None:
    """Returns the rows by slot; None if a row uses several, or too little would be saved."""
    used = weights != 0
    counts = used.sum(0)
    most, num_slots = int(counts.max()), weights.shape[1]
    if not most or (used.sum(1) > 1).any() or LEAST_SAVING * most > len(weights):
        return None
    slots, rows = used.T.nonzero(as_tuple=True)  # slot by slot, in each by row
    found_at = slots * most + torch.arange(len(rows)) - (counts.cumsum(0) - counts)[slots]
    first = torch.zeros(num_slots, dtype=torch.int64).scatter_reduce_(0, slots, rows, "amin", include_self=False)
    gather = first.repeat_interleave(most)
    gather[found_at] = rows
    is_in_order = len(gather) == len(weights) and bool((gather == torch.arange(len(weights))).all())
    return _Grouping(gather=gather, rows=rows, found_at=found_at, is_in_order=is_in_order and len(rows) == len(gather))


def _find_used_slots(weights: Float[Tensor, "batch slots"]) -> slice | Tensor:
    """Returns the slots that any sequence uses: a slice, or indices where at least as many in between are idle."""
    used = weights.any(0).nonzero()[:, 0]
    if not len(used):
        return slice(0, 1)
    whole = slice(int(used[0]), int(used[-1]) + 1)
    return whole if whole.stop - whole.start < 2 * len(used) else used
