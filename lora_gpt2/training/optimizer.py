"""AdamW over a bank: one row of parameters per adapter, each with its own rate, decay, gradient norm and step count.

`torch.optim` has no learning rate per row of one tensor; this has, in a dozen tensor operations for any number of
adapters and sites. Nothing here waits for the device, so a GPU can record it. Checked against `torch.optim.AdamW` and
`clip_grad_norm_` in the tests.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8
START_SCALE, GROWTH_STEPS, LARGEST_SCALE = 2.0**16, 500, 2.0**24


class SlotAdamW:
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101, algorithm 2) on `flat` `[slots, parameters]`."""

    def __init__(self, flat: Float[Tensor, "slots parameters"]) -> None:
        self.flat = flat
        self.exp_avg = torch.zeros_like(flat)
        self.exp_avg_sq = torch.zeros_like(flat)
        self.steps = torch.zeros(flat.shape[0], 1, device=flat.device)

    @torch.no_grad()
    def step(
        self,
        gradient: Float[Tensor, "slots parameters"],
        rates: Float[Tensor, " slots"],
        decays: Float[Tensor, " slots"],
        is_applied: Bool[Tensor, " slots"],
        lr_multipliers: Float[Tensor, "slots parameters"] | None = None,
    ) -> None:
        """Updates the slots that `is_applied` marks, each with its own rate and decay; leaves the others bitwise.

        `lr_multipliers` scales the learning rate of single parameters. `gradient` is overwritten; nothing of the size
        of the bank is allocated.
        """
        move = is_applied[:, None]
        gradient.masked_fill_(~move, 0.0)  # what is not finite must not reach the moments, not even times zero
        self.steps += move
        steps = self.steps.clamp_min(1)
        self.exp_avg.lerp_(gradient, (1 - BETA_1) * move)
        self.exp_avg_sq.lerp_(gradient.square_(), (1 - BETA_2) * move)
        torch.div(self.exp_avg_sq, 1 - BETA_2**steps, out=gradient).sqrt_().add_(EPSILON)
        update = torch.div(self.exp_avg, gradient, out=gradient).div_(1 - BETA_1**steps)
        update.addcmul_(self.flat, decays[:, None]).mul_(rates[:, None] * move)
        self.flat.sub_(update if lr_multipliers is None else update.mul_(lr_multipliers))


@torch.no_grad()
def clip_slots(gradient: Float[Tensor, "slots parameters"], limits: Float[Tensor, " slots"]) -> Float[Tensor, " slots"]:
    """Scales each slot's gradient down to its limit (infinite: no clipping); returns the norms before."""
    norms: Tensor = torch.linalg.vector_norm(gradient, dim=1)
    gradient.mul_((limits / (norms + 1e-6)).clamp(max=1.0)[:, None])
    return norms


class GradScaler:
    """Dynamic loss scaling for float16, one scale per slot (Micikevicius et al. 2017, arXiv:1710.03740, section 3.2).

    Gradients below 2⁻²⁴ vanish in float16, so the loss is multiplied by a large power of two and the gradient divided
    by it. Where that overflows, the step is skipped and the scale halved; after 500 good steps it doubles.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self.values = torch.full((num_slots,), START_SCALE, device=device)
        self.good = torch.zeros(num_slots, device=device)

    def reset(self, slot_id: int) -> None:
        """Begins anew with a slot."""
        self.values[slot_id], self.good[slot_id] = START_SCALE, 0

    @torch.no_grad()
    def update(self, finite: Bool[Tensor, " slots"], active: Bool[Tensor, " slots"]) -> None:
        """Halves the scale of active slots that overflowed, doubles it for those that have been good for long."""
        self.good.copy_(torch.where(finite, self.good + active, torch.zeros_like(self.good)))
        is_grown = self.good >= GROWTH_STEPS
        factor = torch.where(is_grown, 2.0, torch.where(finite | ~active, 1.0, 0.5))
        self.values.mul_(factor).clamp_(1.0, LARGEST_SCALE)
        self.good.mul_(~is_grown)
