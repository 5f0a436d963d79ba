"""Training through a frozen projection: one autograd function for norm or GELU, frozen weights and adapters.

Its forward keeps the input of the norm or activation and the rank-wide product, nothing else; its backward computes
the norm or activation again (an element-wise pass) and never the large product. Per token of a block of width d that
leaves 20 d bytes in 16 bits where plain autograd over PEFT's modules keeps 76 d. Gradients of A and B are added into
the bank's float32 buffer directly, so accumulating over passes costs nothing. The frozen weights get no gradient.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_gpt2.model.bank import AdapterBank, BankSite
from lora_gpt2.model.config import HEAD
from lora_gpt2.model.gpt2 import LayerNorm, Linear, LowRankLogits, Prologue, apply_prologue


class TrainingAdapters:
    """Adapters for training: the batch holds the same number of rows for each of `slots`, in order.

    `places` is `slots` as a tensor on the device, for callers that must not copy to it now.
    `dropout` drops the adapters' inputs. Its masks are a function of `row_seeds`, one per row of the batch, and the
    site, so they are drawn again instead of kept, and do not depend on what else is in the batch.
    """

    def __init__(
        self,
        bank: AdapterBank,
        slots: Sequence[int],
        places: Tensor | None = None,
        dropout: float = 0.0,
        row_seeds: Sequence[int] = (),
    ) -> None:
        self.bank, self.dropout, self.row_seeds = bank, dropout, row_seeds
        self.num_slots = len(slots)
        if list(slots) == list(range(slots[0], slots[-1] + 1)):
            self.slots: Tensor | slice = slice(slots[0], slots[-1] + 1)  # a view: nothing is gathered
        else:
            self.slots = torch.tensor(slots, device=bank.flat.device) if places is None else places

    def project(
        self, site: str, linear: Linear, before: Prologue, x: Float[Tensor, "rows time inputs"]
    ) -> Float[Tensor, "rows time outputs"]:
        """Returns the projection of `before(x)` with each slot's update added to its own rows."""
        place = self.bank.sites.get(site)
        if place is None and not x.requires_grad:  # below the first adapted block nothing is kept
            frozen: Tensor = linear(apply_prologue(before, x))
            return frozen
        result: Tensor = _Projection.apply(x, self.bank.grad_trigger, self, site, linear, before, place)  # type: ignore[no-untyped-call]
        return result

    def low_rank_logits(self, hidden: Float[Tensor, "rows time width"]) -> LowRankLogits | None:
        """Returns what each slot adds to the logits of its own rows, or None if none changes the head."""
        place = self.bank.sites.get(HEAD)
        if place is None:
            return None
        inner: Tensor = _HeadInput.apply(hidden, self.bank.grad_trigger, self, place)  # type: ignore[no-untyped-call]

        outer, total = place.lora_b_t_cast[self.slots], place.grad_b_t
        if total is None:
            return LowRankLogits(inner.flatten(0, 1), outer)

        def add_gradient(gradient: Tensor) -> None:
            total[self.slots] += gradient

        return LowRankLogits(inner.flatten(0, 1), outer, add_gradient)

    def by_slot(self, x: Tensor) -> Tensor:
        """Returns `[rows, time, width]` as `[slots, rows / slots * time, width]`."""
        return x.reshape(self.num_slots, -1, x.shape[-1])

    def scaled(self, z: Tensor, place: BankSite) -> Tensor:
        """Returns `[slots, tokens, rank]` times each slot's scale, which is not rounded to 16 bits first."""
        return (z * place.scale[self.slots, None, None]).to(z.dtype)

    def draw_mask(self, site: str, like: Tensor) -> Tensor | None:
        """Returns the dropout mask of a site for an input `[rows, time, width]`: 0 or 1 / (1 - dropout)."""
        if not self.dropout:
            return None
        mask, generator = torch.empty_like(like), torch.Generator(like.device)
        for row, seed in enumerate(self.row_seeds):
            generator.manual_seed(zlib.crc32(f"{seed} {site}".encode()))
            mask[row].bernoulli_(1 - self.dropout, generator=generator)
        return mask.div_(1 - self.dropout)


class _Projection(torch.autograd.Function):
    """See the module's docstring; LoRA as in Hu et al. 2021, section 4.1.

    With h = before(x): y = h Wᵀ + b + z B̃ where z = s · h Aᵀ and B̃ = Bᵀ. Backward, for upstream dy:
    dz = s · dy B̃ᵀ, dB̃ = zᵀ dy, dA = dzᵀ h, dh = dy W + dz A, then through the norm or activation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        grad_trigger: Tensor,
        rows: TrainingAdapters,
        site: str,
        linear: Linear,
        before: Prologue,
        place: BankSite | None,
    ) -> Tensor:
        """Returns `[rows, time, out]`; `grad_trigger` only makes autograd call `backward`."""
        ctx.rows, ctx.site, ctx.linear, ctx.before, ctx.place = rows, site, linear, before, place
        h = apply_prologue(before, x)
        y: Tensor = linear(h)
        z = None
        if place is not None:
            mask = rows.draw_mask(site, h)
            kept = rows.by_slot(h if mask is None else h * mask)
            z = rows.scaled(torch.bmm(kept, place.lora_a_cast[rows.slots].mT), place)
            rows.by_slot(y).baddbmm_(z, place.lora_b_t_cast[rows.slots])
        ctx.save_for_backward(x, z)
        return y

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Adds the gradients of A and B to the bank's; returns that of x."""
        (dy,), (x, z), rows, place, before = upstream, ctx.saved_tensors, ctx.rows, ctx.place, ctx.before
        statistics: tuple[Tensor, ...] = ()
        dz = mask = None
        if isinstance(before, LayerNorm):
            h, *rest = torch.native_layer_norm(x, before.normalized_shape, before.weight, before.bias, before.eps)
            statistics = tuple(rest)
        elif place is not None:
            h = apply_prologue(before, x)
        if place is not None:
            mask = rows.draw_mask(ctx.site, h)
            kept, dy_slots = rows.by_slot(h if mask is None else h * mask), rows.by_slot(dy)
            dz = rows.scaled(torch.bmm(dy_slots, place.lora_b_t_cast[rows.slots].mT), place)
            place.grad_b_t[rows.slots] += torch.bmm(z.mT, dy_slots)
            place.grad_a[rows.slots] += torch.bmm(dz.mT, kept)
            del h, kept
        dx = None
        if ctx.needs_input_grad[0]:
            dh = torch.matmul(dy, ctx.linear.dense(dy.dtype))
            if place is not None and mask is None:
                rows.by_slot(dh).baddbmm_(dz, place.lora_a_cast[rows.slots])
            elif place is not None and dz is not None and mask is not None:
                dh.addcmul_(torch.bmm(dz, place.lora_a_cast[rows.slots]).view(dh.shape), mask)
            dx = _backward_before(before, dh, x, statistics)
        return dx, None, None, None, None, None, None


class _HeadInput(torch.autograd.Function):
    """The rank-wide product of the head's update, z = s · h Aᵀ; the loss has the rest (`loss.py`)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, grad_trigger: Tensor, rows: TrainingAdapters, place: BankSite) -> Tensor:
        """Returns `[slots, tokens, rank]`; `grad_trigger` only makes autograd call `backward`."""
        ctx.rows, ctx.place = rows, place
        ctx.save_for_backward(hidden)
        mask = rows.draw_mask(HEAD, hidden)
        kept = rows.by_slot(hidden if mask is None else hidden * mask)
        return rows.scaled(torch.bmm(kept, place.lora_a_cast[rows.slots].mT), place)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Adds the gradient of A to the bank's; returns that of the hidden states."""
        (hidden,), rows, place = ctx.saved_tensors, ctx.rows, ctx.place
        dz, mask = rows.scaled(upstream[0], place), rows.draw_mask(HEAD, hidden)
        kept = rows.by_slot(hidden if mask is None else hidden * mask)
        place.grad_a[rows.slots] += torch.bmm(dz.mT, kept)
        dh = torch.bmm(dz, place.lora_a_cast[rows.slots]).view(hidden.shape)
        return dh if mask is None else dh.mul_(mask), None, None, None


def _backward_before(before: Prologue, dh: Tensor, x: Tensor, statistics: tuple[Tensor, ...]) -> Tensor:
    """Returns the gradient of x through the norm (whose weights are constants) or the activation."""
    if isinstance(before, LayerNorm):
        mean, rstd = statistics
        shape, wanted = before.normalized_shape, [True, False, False]
        weight, bias = before.weight, before.bias
        dh = torch.ops.aten.native_layer_norm_backward(dh, x, shape, mean, rstd, weight, bias, wanted)[0]
    elif isinstance(before, nn.GELU):
        dh = torch.ops.aten.gelu_backward(dh, x, approximate=before.approximate)
    return dh
