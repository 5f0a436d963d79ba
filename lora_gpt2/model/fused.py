"""Training through a frozen projection: one autograd function for norm or GELU, frozen weights and adapters.

The forward pass stores the input of the norm or activation and the rank-wide product, nothing else; the backward pass
recomputes the norm or activation (element-wise) and never the large product. Per token of a block of width d that is
20 d bytes in 16 bits, where plain autograd over PEFT's modules stores 76 d. Gradients of A and B are accumulated in the
bank's float32 buffer directly, so gradient accumulation is free. The frozen weights get no gradient.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lora_gpt2.model import gelu
from lora_gpt2.model.bank import AdapterBank, BankSite
from lora_gpt2.model.config import HEAD
from lora_gpt2.model.counter_random import draw_dropout_mask
from lora_gpt2.model.gpt2 import LayerNorm, Linear, LowRankLogits, Prologue, apply_prologue

HAS_OUT_DTYPE = hasattr(torch.ops.aten.baddbmm, "dtype_out") and torch.cuda.is_available()
"""True if products of 16-bit factors can be had, and added up, in float32 (torch 2.8 and newer, CUDA alone)."""


class TrainingAdapters:
    """The adapters of a batch for training, which has the same number of sequences for each of `slots`, in order.

    Args:
        bank: the slots, in training layout.
        slots: the slots of the batch.
        slot_ids: `slots` as a tensor on the device, for callers that must not copy to it now.
        dropout: dropout rate of the adapters' inputs. Masks are a function of the sequence's seed and the site, so they
            are drawn again in the backward pass instead of stored, and do not depend on the rest of the batch.
        seeds: the seed of each sequence of the batch.
    """

    def __init__(
        self,
        bank: AdapterBank,
        slots: Sequence[int],
        slot_ids: Tensor | None = None,
        dropout: float = 0.0,
        seeds: Int[Tensor, " batch"] | None = None,
    ) -> None:
        self.bank, self.dropout, self.seeds = bank, dropout, seeds
        self.num_slots = len(slots)
        if list(slots) == list(range(slots[0], slots[-1] + 1)):
            self.slots: Tensor | slice = slice(slots[0], slots[-1] + 1)  # a view: nothing is gathered
        else:
            self.slots = torch.tensor(slots, device=bank.flat.device) if slot_ids is None else slot_ids

    def project(
        self, site: str, linear: Linear, prologue: Prologue, x: Float[Tensor, "batch time inputs"]
    ) -> Float[Tensor, "batch time outputs"]:
        """Returns the projection of `prologue(x)` plus each slot's update in its own sequences."""
        views = self.bank.sites.get(site)
        if views is None and not x.requires_grad:  # below the first adapted block nothing is stored
            frozen: Tensor = linear(apply_prologue(prologue, x))
            return frozen
        result: Tensor = _Projection.apply(x, self.bank.grad_trigger, self, site, linear, prologue, views)  # type: ignore[no-untyped-call]
        return result

    def low_rank_logits(self, hidden: Float[Tensor, "batch time width"]) -> LowRankLogits | None:
        """Returns each slot's contribution to the logits of its own sequences, or None if none changes the head."""
        views = self.bank.sites.get(HEAD)
        if views is None:
            return None
        hidden_a: Tensor = _HeadInput.apply(hidden, self.bank.grad_trigger, self, views)  # type: ignore[no-untyped-call]

        b_t, accumulated = views.lora_b_t_cast[self.slots], views.grad_b_t
        if accumulated is None:
            return LowRankLogits(hidden_a.flatten(0, 1), b_t)

        def add_gradient(gradient: Tensor) -> None:
            accumulated[self.slots] += gradient

        return LowRankLogits(hidden_a.flatten(0, 1), b_t, add_gradient)

    def by_slot(self, x: Tensor) -> Tensor:
        """Returns `[batch, time, width]` as `[slots, batch / slots * time, width]`."""
        return x.reshape(self.num_slots, -1, x.shape[-1])

    def scale_(self, z: Tensor, views: BankSite) -> Tensor:
        """Multiplies `[slots, tokens, rank]` by each slot's scaling, which is not rounded to 16 bits first."""
        return z.mul_(views.scaling[self.slots, None, None])

    def add_product(self, gradient: Tensor, x: Tensor, y: Tensor) -> None:
        """Adds `x @ y`, `[slots, rank, width]`, to the float32 gradient of these slots.

        A GPU does not round the product of thousands of tokens to 16 bits first.
        """
        is_there = HAS_OUT_DTYPE and gradient.device.type == "cuda"
        if is_there and isinstance(self.slots, slice) and x.dtype != torch.float32:
            total = gradient[self.slots]
            torch.baddbmm(total, x, y, out_dtype=torch.float32, out=total)
        else:
            gradient[self.slots] += torch.bmm(x, y)

    def draw_mask(self, site: str, like: Tensor) -> Tensor | None:
        """Returns the dropout mask of a site for an input `[batch, time, width]`: 0 or 1 / (1 - dropout)."""
        if not self.dropout or self.seeds is None:
            return None
        return draw_dropout_mask(self.seeds, zlib.crc32(site.encode()), like, self.dropout)


class _Projection(torch.autograd.Function):
    """See the module's docstring; LoRA as in Hu et al. 2021, section 4.1.

    With h = prologue(x): y = h Wᵀ + b + z B̃ where z = s · h Aᵀ and B̃ = Bᵀ. Backward, for upstream dy:
    dz = s · dy B̃ᵀ, dB̃ = zᵀ dy, dA = dzᵀ h, dh = dy W + dz A, then through the prologue.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        grad_trigger: Tensor,
        adapters: TrainingAdapters,
        site: str,
        linear: Linear,
        prologue: Prologue,
        views: BankSite | None,
    ) -> Tensor:
        """Returns `[batch, time, out]`; `grad_trigger` only makes autograd call `backward`."""
        ctx.adapters, ctx.site, ctx.linear, ctx.prologue, ctx.views = adapters, site, linear, prologue, views
        h = gelu.compute_gelu(x) if gelu.applies(prologue, x) else apply_prologue(prologue, x)
        y: Tensor = linear(h)
        z = None
        if views is not None:
            mask = adapters.draw_mask(site, h)
            lora_input = adapters.by_slot(h if mask is None else h * mask)
            z = adapters.scale_(torch.bmm(lora_input, views.lora_a_cast[adapters.slots].mT), views)
            adapters.by_slot(y).baddbmm_(z, views.lora_b_t_cast[adapters.slots])
        ctx.save_for_backward(x, z)
        return y

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Adds the gradients of A and B to the bank's; returns that of x."""
        (dy,), (x, z), adapters, views, prologue = upstream, ctx.saved_tensors, ctx.adapters, ctx.views, ctx.prologue
        saved: Sequence[Tensor] = ()
        dz = mask = None
        if isinstance(prologue, LayerNorm):
            h, *rest = torch.native_layer_norm(
                x, prologue.normalized_shape, prologue.weight, prologue.bias, prologue.eps
            )
            saved = rest
        elif views is not None and gelu.applies(prologue, x):
            h, *saved = gelu.compute_gelu_and_derivative(x)
        elif views is not None:
            h = apply_prologue(prologue, x)
        if views is not None:
            mask = adapters.draw_mask(ctx.site, h)
            lora_input, dy_slots = adapters.by_slot(h if mask is None else h * mask), adapters.by_slot(dy)
            dz = adapters.scale_(torch.bmm(dy_slots, views.lora_b_t_cast[adapters.slots].mT), views)
            adapters.add_product(views.grad_b_t, z.mT, dy_slots)
            adapters.add_product(views.grad_a, dz.mT, lora_input)
            del h, lora_input
        dx = None
        if ctx.needs_input_grad[0]:
            dh = torch.matmul(dy, ctx.linear.dense(dy.dtype))
            if views is not None and mask is None:
                adapters.by_slot(dh).baddbmm_(dz, views.lora_a_cast[adapters.slots])
            elif views is not None and dz is not None and mask is not None:
                dh.addcmul_(torch.bmm(dz, views.lora_a_cast[adapters.slots]).view(dh.shape), mask)
            dx = _backward_prologue(prologue, dh, x, saved)
        return dx, None, None, None, None, None, None


class _HeadInput(torch.autograd.Function):
    """The rank-wide product of the head's update, z = s · h Aᵀ; the loss has the rest (`loss.py`)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, grad_trigger: Tensor, adapters: TrainingAdapters, views: BankSite) -> Tensor:
        """Returns `[slots, tokens, rank]`; `grad_trigger` only makes autograd call `backward`."""
        ctx.adapters, ctx.views = adapters, views
        ctx.save_for_backward(hidden)
        mask = adapters.draw_mask(HEAD, hidden)
        lora_input = adapters.by_slot(hidden if mask is None else hidden * mask)
        return adapters.scale_(torch.bmm(lora_input, views.lora_a_cast[adapters.slots].mT), views)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Adds the gradient of A to the bank's; returns that of the hidden states."""
        (hidden,), adapters, views = ctx.saved_tensors, ctx.adapters, ctx.views
        dz, mask = adapters.scale_(upstream[0].clone(), views), adapters.draw_mask(HEAD, hidden)
        lora_input = adapters.by_slot(hidden if mask is None else hidden * mask)
        adapters.add_product(views.grad_a, dz.mT, lora_input)
        dh = torch.bmm(dz, views.lora_a_cast[adapters.slots]).view(hidden.shape)
        return dh if mask is None else dh.mul_(mask), None, None, None


def _backward_prologue(prologue: Prologue, dh: Tensor, x: Tensor, saved: Sequence[Tensor]) -> Tensor:
    """Returns the gradient of x through the norm (whose weights are constants) or the activation.

    `saved` is what computing it again has left: the norm's statistics, or the activation's derivative.
    """
    if isinstance(prologue, LayerNorm):
        mean, rstd = saved
        shape, output_mask = prologue.normalized_shape, [True, False, False]
        weight, bias = prologue.weight, prologue.bias
        dh = torch.ops.aten.native_layer_norm_backward(dh, x, shape, mean, rstd, weight, bias, output_mask)[0]
    elif saved:
        dh.mul_(saved[0])
    elif isinstance(prologue, nn.GELU):
        dh = torch.ops.aten.gelu_backward(dh, x, approximate=prologue.approximate)
    return dh
