"""Many adapters over one base, in one buffer.

For each site (an adapted projection) the bank stacks A `[slots, rank, in]` and B transposed `[slots, rank, out]`. Lower
ranks are padded with zeros, which stay zero because their gradients vanish. One buffer holds everything, so an
optimizer step is one kernel per operation and loading an adapter is a copy. Two layouts of the same views:

- training, slot-major: `flat` is `[slots, parameters]`, one row per adapter (own gradient norm, own learning rate);
- inference, site-major: A of a site is one `[slots * rank, in]` matrix; see `batch_adapters.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lora_gpt2.core.errors import CorruptError, MismatchError
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.lora import Adapter, LoraUpdate, TargetPlan, list_sites, target_of

Layout = Literal["training", "inference"]


@dataclass(kw_only=True)
class BankSite:
    """Views of one site: `lora_a` `[slots, rank, in]`, `lora_b_t` `[slots, rank, out]`, `scaling` `[slots]`.

    For training also casts of both in the base's dtype (the same tensors where that is float32), and the gradients in
    float32.
    """

    lora_a: Tensor
    lora_b_t: Tensor
    scaling: Tensor
    lora_a_cast: Tensor
    lora_b_t_cast: Tensor
    grad_a: Tensor | None = None
    grad_b_t: Tensor | None = None


class _Span(NamedTuple):
    """Where one factor of a site lies in the buffer: `[slots, rank, width]` at an offset."""

    site: str
    half: Literal["a", "b"]
    offset: int
    rank: int
    width: int


@dataclass(frozen=True, kw_only=True)
class _Hyperparameters:
    """What a slot's update needs besides its factors, so that it can be read back."""

    rank: int
    alpha: float
    use_rslora: bool


def check_fits(adapter: Adapter, config: GPT2Config, dtype: torch.dtype) -> None:
    """Raises `MismatchError` unless a base has an adapter's sites in their shapes, `CorruptError` if not finite."""
    known = set(list_sites(config))
    for site, update in adapter.updates.items():
        if site not in known:
            raise MismatchError(f"this base has no {site}", "use the base it was trained on")
        inputs, outputs = config.shape_of(target_of(site))
        if tuple(update.a.shape) != (update.rank, inputs) or tuple(update.b.shape) != (outputs, update.rank):
            shapes = (tuple(update.a.shape), tuple(update.b.shape))
            raise MismatchError(f"{site}: {shapes} does not fit this base", "use the base it was trained on")
        if not all(part.to(dtype).isfinite().all() for part in (update.a, update.b)):
            name = str(dtype).removeprefix("torch.")
            raise CorruptError(f"the values of {site} are not finite in {name}", "use float32, or train again")


class AdapterBank:
    """K slots of adapters for one base.

    Args:
        config: the base's shape.
        ranks: the maximum rank at each site of any adapter to be loaded.
        num_slots: K.
        layout: see the module's docstring.
        like: a weight of the base, for the device, and for inference the dtype (training is float32).
    """

    @torch.inference_mode(False)  # tensors created while decoding could not be changed between two steps
    def __init__(
        self, config: GPT2Config, ranks: Mapping[str, int], num_slots: int, layout: Layout, like: Tensor
    ) -> None:
        self.config, self.ranks, self.num_slots, self.layout = config, dict(ranks), num_slots, layout
        self._spans = list(_iter_spans(config, ranks))
        self.num_parameters = sum(span.rank * span.width for span in self._spans)
        dtype = torch.float32 if layout == "training" else like.dtype
        self.flat = torch.zeros(num_slots, self.num_parameters, dtype=dtype, device=like.device)
        self.flat_cast = self.flat if dtype == like.dtype else self.flat.to(like.dtype)
        self.grad_trigger = torch.zeros((), device=like.device)
        self._loaded: list[dict[str, _Hyperparameters]] = [{} for _ in range(num_slots)]
        masters, casts = self._view_all(self.flat), self._view_all(self.flat_cast)
        self.scalings = torch.zeros(len(ranks), num_slots, device=like.device)
        self.sites = {
            site: BankSite(
                lora_a=masters[site, "a"],
                lora_b_t=masters[site, "b"],
                scaling=scaling,
                lora_a_cast=casts[site, "a"],
                lora_b_t_cast=casts[site, "b"],
            )
            for site, scaling in zip(ranks, self.scalings, strict=True)
        }

    def _view(self, flat: Tensor, span: _Span) -> Tensor:
        shape = (self.num_slots, span.rank, span.width)
        if self.layout == "training":
            return flat.as_strided(shape, (self.num_parameters, span.width, 1), span.offset)
        return flat.as_strided(shape, (span.rank * span.width, span.width, 1), span.offset * self.num_slots)

    def _view_all(self, flat: Tensor) -> dict[tuple[str, str], Tensor]:
        """Returns the factors of all sites in a buffer, by site and half."""
        return {(span.site, span.half): self._view(flat, span) for span in self._spans}

    def load(self, slot: int, adapter: Adapter) -> None:
        """Copies an adapter into a slot.

        Raises:
            MismatchError: its sites, shapes or ranks do not fit.
            CorruptError: a value is not finite in the bank's dtype.
        """
        for site, update in adapter.updates.items():
            self._check_fits(site, update)
        row = self._pack(adapter)
        torch._foreach_copy_(self._view_slot(slot), _split(row.to(self.flat.device, non_blocking=True), self._spans))
        scalings = [adapter.updates[site].scaling if site in adapter.updates else 0.0 for site in self.sites]
        self.scalings[:, slot] = torch.tensor(scalings)
        self._loaded[slot] = {
            site: _Hyperparameters(rank=update.rank, alpha=update.alpha, use_rslora=update.use_rslora)
            for site, update in adapter.updates.items()
        }
        self.refresh_casts()

    def _pack(self, adapter: Adapter) -> Float[Tensor, " parameters"]:
        """Returns an adapter as one row on the host; raises `CorruptError` if a value is not finite."""
        row = torch.zeros(self.num_parameters, dtype=self.flat.dtype, pin_memory=self.flat.device.type == "cuda")
        for span, part in zip(self._spans, _split(row, self._spans), strict=True):
            if update := adapter.updates.get(span.site):
                part[: update.rank] = update.a if span.half == "a" else update.b.mT
                if not part.isfinite().all():
                    name = str(row.dtype).removeprefix("torch.")
                    hint = "use float32, or train again"
                    raise CorruptError(f"the values of {span.site} are not finite in {name}", hint)
        return row

    def _view_slot(self, slot: int) -> list[Tensor]:
        """Returns the factors of one slot, as many as there are spans."""
        return [self._view(self.flat, span)[slot] for span in self._spans]

    def _check_fits(self, site: str, update: LoraUpdate) -> None:
        views = self.sites.get(site)
        if views is None or update.rank > self.ranks[site]:
            raise MismatchError(
                f"the bank has no room for {site} at rank {update.rank}", "open the bank with all its adapters"
            )
        shapes = (tuple(update.a.shape), tuple(update.b.shape))
        if shapes != ((update.rank, views.lora_a.shape[2]), (views.lora_b_t.shape[2], update.rank)):
            raise MismatchError(f"{site}: {shapes} does not fit this base", "use the base it was trained on")

    def clear(self, slot: int) -> None:
        """Empties a slot: it then changes nothing."""
        torch._foreach_zero_(self._view_slot(slot))
        self.scalings[:, slot] = 0
        self._loaded[slot] = {}
        self.refresh_casts()

    def write(self, slot: int, parameters: Float[Tensor, " parameters"]) -> None:
        """Copies a row in the layout of `flat` into a slot."""
        self.flat[slot] = parameters
        self.refresh_casts()

    def refresh_casts(self) -> None:
        """Updates the casts in the base's dtype after `flat` has changed."""
        if self.flat_cast is not self.flat:
            self.flat_cast.copy_(self.flat)

    def read(self, slot: int, flat: Tensor | None = None) -> Adapter:
        """Returns a slot's adapter as float32 copies on the CPU, from `flat` (a buffer of this layout) if given."""
        views = self._view_all(self.flat if flat is None else flat)
        updates = {}
        for site, known in self._loaded[slot].items():
            a, b_t = (views[site, half][slot].detach().to("cpu", torch.float32)[: known.rank] for half in ("a", "b"))
            b = b_t.mT.clone(memory_format=torch.contiguous_format)
            updates[site] = LoraUpdate(a.clone(), b, known.alpha, known.use_rslora)
        return Adapter(updates=updates)

    def enable_gradients(self) -> Tensor:
        """Lets `TrainingAdapters` accumulate gradients in a buffer like `flat`, viewed at each site; returns it."""
        gradient = torch.zeros_like(self.flat)
        self.grad_trigger.requires_grad_()
        for (site, half), view in self._view_all(gradient).items():
            setattr(self.sites[site], "grad_a" if half == "a" else "grad_b_t", view)
        return gradient

    def build_lr_multipliers(self, ratios: Sequence[float], mask: Tensor | None) -> Tensor | None:
        """Returns a buffer like `flat` with each slot's ratio at its B and 1 at its A (LoRA+), or None if all are 1.

        Where `mask` (see `build_mask`) is 0, the multiplier is too, so that weight decay does not reach it either.
        """
        if all(ratio == 1 for ratio in ratios):
            return mask
        multipliers = torch.ones_like(self.flat) if mask is None else mask.clone()
        for span in self._spans:
            if span.half == "b":
                self._view(multipliers, span).mul_(multipliers.new_tensor(ratios)[:, None, None])
        return multipliers

    def build_mask(self, plans: Sequence[Sequence[TargetPlan]]) -> Tensor | None:
        """Returns a 0/1 buffer like `flat` with 0 at what is not trained, or None if everything is.

        Not trained are the structural zeros of sliced targets and frozen ranks; `plans` are the target plans of each
        slot.
        """
        if all(plan.blocks is None and not plan.frozen_rank for slot in plans for plan in slot):
            return None
        mask = torch.ones_like(self.flat)
        for span in self._spans:
            view = self._view(mask, span)
            for slot, plan in ((s, p) for s, slot_plans in enumerate(plans) for p in slot_plans):
                if plan.target != target_of(span.site):
                    continue
                if span.half == "b" and plan.blocks is not None:
                    view[slot] = 0
                    for rows, columns in plan.blocks:
                        view[slot, columns, rows] = 1
                view[slot, plan.rank - plan.frozen_rank : plan.rank] = 0
        return mask


def _split(row: Float[Tensor, " parameters"], spans: Sequence[_Span]) -> list[Tensor]:
    """Returns the factors in a row, `[rank, width]` each."""
    return [row[s.offset : s.offset + s.rank * s.width].view(s.rank, s.width) for s in spans]


def _iter_spans(config: GPT2Config, ranks: Mapping[str, int]) -> Iterator[_Span]:
    """Yields the factors of a bank in the order of its buffer: A and B of each site."""
    offset = 0
    for site, rank in ranks.items():
        inputs, outputs = config.shape_of(target_of(site))
        yield _Span(site, "a", offset, rank, inputs)
        yield _Span(site, "b", offset + rank * inputs, rank, outputs)
        offset += rank * (inputs + outputs)
