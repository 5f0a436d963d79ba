"""AdamW over a bank: one row of parameters per adapter, each with its own rate, decay and gradient norm.

`torch.optim` has no learning rate per row of one tensor; this has, in a dozen tensor operations for any number of
adapters and sites. Checked against `torch.optim.AdamW` and `clip_grad_norm_` in the tests.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


class SlotAdamW:
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101, algorithm 2) on `flat` `[slots, parameters]`."""

    def __init__(self, flat: Float[Tensor, "slots parameters"]) -> None:
        self.flat = flat
        self.mean = torch.zeros_like(flat)
        self.square = torch.zeros_like(flat)
        self.num_steps = 0

    @torch.no_grad()
    def step(
        self,
        gradient: Float[Tensor, "slots parameters"],
        rates: Float[Tensor, " slots"],
        decays: Float[Tensor, " slots"],
    ) -> None:
        """Updates every slot with its own learning rate and weight decay; a rate of zero leaves it as it is."""
        self.num_steps += 1
        rate = rates[:, None]
        self.mean.lerp_(gradient, 1 - BETA_1)
        self.square.lerp_(gradient.square(), 1 - BETA_2)
        size = (self.square / (1 - BETA_2**self.num_steps)).sqrt_().add_(EPSILON)
        self.flat.mul_(1 - rate * decays[:, None])
        self.flat.sub_(rate * (self.mean / (1 - BETA_1**self.num_steps)) / size)


@torch.no_grad()
def clip_slots(gradient: Float[Tensor, "slots parameters"], limits: Float[Tensor, " slots"]) -> Float[Tensor, " slots"]:
    """Scales each slot's gradient down to its limit (infinite: no clipping); returns the norms before."""
    norms: Tensor = torch.linalg.vector_norm(gradient, dim=1)
    gradient.mul_((limits / (norms + 1e-6)).clamp(max=1.0)[:, None])
    return norms
