"""Many adapters over one base, in one buffer.

For each site the bank stacks A `[slots, rank, in]` and B transposed `[slots, rank, out]`; lower ranks are padded with
zeros, which stay zero: their gradients vanish. One buffer holds it all, so an optimizer step is one kernel per
operation and loading an adapter is a copy. Two layouts of the same views:

- training, slot-major: `flat` is `[slots, parameters]`, one row per adapter (own norm, own learning rate);
- inference, site-major: A of a site is one `[slots * rank, in]` matrix, so K adapters cost two dense products
  whatever K is, and a row's weights may mix adapters freely ("masked-dense").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_gpt2.core.errors import CorruptError, MismatchError
from lora_gpt2.model.config import HEAD, GPT2Config
from lora_gpt2.model.gpt2 import Linear, LowRankLogits, Prologue, apply_prologue
from lora_gpt2.model.lora import Adapter, LoraUpdate, TargetPlan, target_of

Layout = Literal["training", "inference"]


@dataclass
class BankSite:
    """Views of one projection: `a` `[slots, rank, in]`, `bt` `[slots, rank, out]`, `scale` `[slots]`.

    For training also the copies to compute with, in the base's dtype (the same tensors where that is float32), and
    the gradients in float32.
    """

    a: Tensor
    bt: Tensor
    scale: Tensor
    lora_a_cast: Tensor
    lora_b_t_cast: Tensor
    grad_a: Tensor | None = None
    grad_b_t: Tensor | None = None


class AdapterBank:
    """K slots of adapters for one base.

    Args:
        config: the base's shape.
        ranks: largest rank at each site that any adapter will have.
        num_slots: K.
        layout: see the module's docstring.
        like: a weight of the base; its device is used, and its dtype for inference (training is float32).
    """

    @torch.inference_mode(False)  # or what is made while decoding could not be changed between two steps
    def __init__(
        self, config: GPT2Config, ranks: Mapping[str, int], num_slots: int, layout: Layout, like: Tensor
    ) -> None:
        self.config, self.ranks, self.num_slots, self.layout = config, dict(ranks), num_slots, layout
        shapes = {site: config.shape_of(target_of(site)) for site in ranks}
        self.num_parameters = sum(ranks[site] * sum(shapes[site]) for site in ranks)
        dtype = torch.float32 if layout == "training" else like.dtype
        self.flat = torch.zeros(num_slots, self.num_parameters, dtype=dtype, device=like.device)
        self.compute = self.flat if dtype == like.dtype else self.flat.to(like.dtype)
        self.grad_trigger = torch.zeros((), device=like.device)
        self.sites: dict[str, BankSite] = {}
        self.updates: list[dict[str, tuple[int, float, bool]]] = [{} for _ in range(num_slots)]
        self._spans: list[tuple[str, int, int]] = []
        offset = 0
        for site, rank in ranks.items():
            masters, copies = [], []
            for width in shapes[site]:
                masters.append(self._view(self.flat, offset, rank, width))
                copies.append(self._view(self.compute, offset, rank, width))
                self._spans.append((site, offset, width))
                offset += rank * width
            scale = torch.zeros(num_slots, device=like.device)
            self.sites[site] = BankSite(masters[0], masters[1], scale, copies[0], copies[1])

    def _view(self, flat: Tensor, offset: int, rank: int, width: int) -> Tensor:
        shape = (self.num_slots, rank, width)
        if self.layout == "training":
            return flat.as_strided(shape, (self.num_parameters, width, 1), offset)
        return flat.as_strided(shape, (rank * width, width, 1), offset * self.num_slots)

    def load(self, slot: int, adapter: Adapter) -> None:
        """Copies an adapter into a slot.

        Raises:
            MismatchError: its sites, shapes or ranks do not fit.
            CorruptError: a value is not finite in the bank's dtype; in a product with zero it would still reach the
                rows that do not use it.
        """
        for site, update in adapter.updates.items():
            place = self.sites.get(site)
            shapes = (tuple(update.a.shape), tuple(update.b.shape))
            if place is None or update.rank > self.ranks[site]:
                raise MismatchError(
                    f"the bank has no room for {site} at rank {update.rank}", "open the bank with all its adapters"
                )
            if shapes != ((update.rank, place.a.shape[2]), (place.bt.shape[2], update.rank)):
                raise MismatchError(f"{site}: {shapes} does not fit this base", "use the base it was trained on")
            self._check_finite(site, update)
        self.clear(slot)
        for site, update in adapter.updates.items():
            place = self.sites[site]
            place.a[slot, : update.rank] = update.a.to(place.a)
            place.bt[slot, : update.rank] = update.b.mT.to(place.bt)
            place.scale[slot] = update.scale
            self.updates[slot][site] = (update.rank, update.alpha, update.use_rslora)
        self.refresh()

    def _check_finite(self, site: str, update: LoraUpdate) -> None:
        dtype = self.flat.dtype
        if not all(torch.isfinite(factor.to(dtype)).all() for factor in (update.a, update.b)):
            name = str(dtype).removeprefix("torch.")
            raise CorruptError(f"the values of {site} are not finite in {name}", "use float32, or train again")

    def clear(self, slot: int) -> None:
        """Empties a slot: it then changes nothing."""
        for place in self.sites.values():
            place.a[slot] = 0
            place.bt[slot] = 0
            place.scale[slot] = 0
        self.updates[slot] = {}
        self.refresh()

    def refresh(self) -> None:
        """Brings the copies to compute with up to date after `flat` has changed."""
        if self.compute is not self.flat:
            self.compute.copy_(self.flat)

    def read(self, slot: int, flat: Tensor | None = None) -> Adapter:
        """Returns a slot's adapter as float32 copies on the CPU, from `flat` (a buffer of this layout) if given."""
        updates = {}
        views: dict[str, list[Tensor]] = {}
        for site, offset, width in self._spans:
            view = self._view(self.flat if flat is None else flat, offset, self.ranks[site], width)[slot]
            views.setdefault(site, []).append(view.detach().to("cpu", torch.float32))
        for site, (rank, alpha, use_rslora) in self.updates[slot].items():
            a, bt = views[site]
            updates[site] = LoraUpdate(
                a[:rank].clone(), bt[:rank].mT.clone(memory_format=torch.contiguous_format), alpha, use_rslora
            )
        return Adapter(updates)

    def enable_gradients(self) -> Tensor:
        """Lets `TrainingAdapters` add gradients into a buffer like `flat`, whose views each site gets; returns it."""
        gradient = torch.zeros_like(self.flat)
        self.grad_trigger.requires_grad_()
        for site, offset, width in self._spans:
            place = self.sites[site]
            view = self._view(gradient, offset, self.ranks[site], width)
            if offset == self._offset_of(site):
                place.grad_a = view
            else:
                place.grad_b_t = view
        return gradient

    def _offset_of(self, site: str) -> int:
        return next(offset for name, offset, _ in self._spans if name == site)

    def build_lr_multipliers(self, ratios: Sequence[float]) -> Tensor | None:
        """Returns a buffer like `flat` with each slot's ratio at its B and 1 at its A (LoRA+), or None if all are 1."""
        if all(ratio == 1 for ratio in ratios):
            return None
        lr_multipliers = torch.ones_like(self.flat)
        for site, offset, width in self._spans:
            if offset != self._offset_of(site):
                self._view(lr_multipliers, offset, self.ranks[site], width).mul_(
                    lr_multipliers.new_tensor(ratios)[:, None, None]
                )
        return lr_multipliers

    def build_mask(self, plans: Sequence[Sequence[TargetPlan]]) -> Tensor | None:
        """Returns a 0/1 buffer like `flat` that keeps the structural zeros of sliced targets, or None without any.

        `plans` gives the target plans of each slot.
        """
        if all(plan.blocks is None for slot in plans for plan in slot):
            return None
        mask = torch.ones_like(self.flat)
        for site, offset, width in self._spans:
            if offset == self._offset_of(site):
                continue
            view = self._view(mask, offset, self.ranks[site], width)
            for slot, plan in ((s, p) for s, slot_plans in enumerate(plans) for p in slot_plans):
                if plan.target == target_of(site) and plan.blocks is not None:
                    view[slot] = 0
                    for rows, columns in plan.blocks:
                        view[slot, columns, rows] = 1
        return mask


class InferenceAdapters:
    """Adapters for inference: `weights` `[rows, slots]` says how much of each adapter a row gets.

    One-hot picks an adapter, zero is the plain base, anything else mixes. A slot with weight zero is masked, not
    multiplied by zero, so a row does not depend on adapters that it does not use, whatever they compute (0 * inf is
    NaN). Slots that no row uses cost nothing, but for those between others that are: where these are fewer than the
    used ones, they are computed rather than skipped, because skipping takes a copy of the others. `span` takes the
    slots as they are.
    """

    def __init__(self, bank: AdapterBank, weights: Float[Tensor, "rows slots"], span: slice | None = None) -> None:
        self.span = _find_span(weights) if span is None else span
        self.bank, self.weights = bank, weights[:, self.span].to(bank.flat.device, torch.float32)
        self._parts: dict[str, _Factors] = {}

    def project(
        self, site: str, linear: Linear, before: Prologue, x: Float[Tensor, "rows time inputs"]
    ) -> Float[Tensor, "rows time outputs"]:
        """Returns the projection of `before(x)` with the weighted updates of each row added."""
        h = apply_prologue(before, x)
        y: Tensor = linear(h)
        if site in self.bank.sites:
            factors = self._find_factors(site)
            if factors.scale != 0:
                y.view(-1, y.shape[-1]).addmm_(self._shrink(h, factors), factors.bt, alpha=factors.scale)
        return y

    def low_rank_logits(self, hidden: Float[Tensor, "rows time width"]) -> LowRankLogits | None:
        """Returns what the adapters add to the logits, or None if none of them changes the head."""
        if HEAD not in self.bank.sites or (factors := self._find_factors(HEAD)).scale == 0:
            return None
        inner = self._shrink(hidden, factors)
        return LowRankLogits(inner if factors.scale == 1 else inner.mul_(factors.scale), factors.bt[None])

    def _shrink(self, h: Float[Tensor, "rows time inputs"], factors: _Factors) -> Float[Tensor, "tokens all_ranks"]:
        """Returns the product with A, weighted per row where rows differ; what a row does not use is exactly zero."""
        z = F.linear(h, factors.a)
        if factors.weights is not None:
            grouped = z.view(*h.shape[:2], factors.weights.shape[2], -1).mul_(factors.weights)
            if factors.unused is not None:
                grouped.masked_fill_(factors.unused, 0)
        return z.view(-1, len(factors.bt))

    def _find_factors(self, site: str) -> _Factors:
        """Returns the factors of one projection, the same object each time.

        On a CPU a weight that all rows share is a number: it costs no operation of its own.
        """
        if (found := self._parts.get(site)) is None:
            views = self.bank.sites[site]
            a, bt = views.a[self.span].flatten(0, 1), views.bt[self.span].flatten(0, 1)
            scaled = (self.weights * views.scale[self.span]).masked_fill_(self.weights == 0, 0)
            if self.weights.device.type == "cpu" and scaled.shape[1] == 1 and bool((scaled == scaled[0]).all()):
                found = _Factors(a, bt, float(scaled[0]))
            else:
                weights = scaled.to(a.dtype)[:, None, :, None]
                unused = weights == 0
                is_masked = unused.device.type != "cpu" or bool(unused.any())  # to ask a GPU would be to wait for it
                found = _Factors(a, bt, 1.0, weights, unused if is_masked else None)
            self._parts[site] = found
        return found


@dataclass(frozen=True)
class _Factors:
    """What a batch multiplies with at one projection: A and B transposed of its slots, `[slots * rank, ...]`.

    `weights` `[rows, 1, slots, 1]` differ between rows, `scale` is common to all; `unused` is where a row's weight is
    zero, None where every row uses every slot.
    """

    a: Tensor
    bt: Tensor
    scale: float
    weights: Tensor | None = None
    unused: Tensor | None = None


def _find_span(weights: Float[Tensor, "rows slots"]) -> slice | Tensor:
    """Returns the slots that any row uses: a slice, or their numbers where as many between them or more are idle."""
    used = weights.any(0).nonzero()[:, 0]
    if not len(used):
        return slice(0, 1)
    whole = slice(int(used[0]), int(used[-1]) + 1)
    return whole if whole.stop - whole.start < 2 * len(used) else used
