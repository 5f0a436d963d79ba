"""What a model that prefers the wrong text loses, and how much each text's log-likelihood counts in the gradient.

Every loss here is a function of the log-likelihoods of whole texts, so its gradient is that of their sum weighted by
its derivatives; the weights are known once the texts are scored, and the rest is the loss of a language model.
Margin: h = log π(chosen) / ref(chosen) - log π(rejected) / ref(rejected).
`dpo`: -(1 - ε) log σ(β h) - ε log σ(-β h) (Rafailov et al. 2023, arXiv:2305.18290, equation 7; with ε, the share of
choices taken to be wrong, Mitchell 2023). `ipo`: (h - 1 / (2 β))², h per token (Azar et al. 2023, arXiv:2310.12036).
`kto`: (1 - σ(β (r - z))) / 2 for a text that is desirable and (1 - σ(β (z - r))) / 2 for one that is not, with
r = log π / ref of each text and z, how far the policy is from the reference, at least 0, part of the reference that it
is given (Ethayarajh et al. 2024, arXiv:2402.01306, both labels weighing alike); h is the difference of r.
`orpo`: the NLL of the chosen text per token, plus -β log σ of the difference of both texts' log odds, where a text's
odds are those of its mean log-likelihood per token; no reference (Hong et al. 2024, arXiv:2403.07691, equations 6, 7).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

MOST_MEAN = -1e-6  # nats: the odds of a text that is certain are infinite


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss:
    """A loss of pairs; `beta` weighs the reference, or with `orpo` the odds ratio; `smoothing` is ε of `dpo`."""

    kind: Literal["dpo", "ipo", "kto", "orpo"] = "dpo"
    beta: float = 0.1
    smoothing: float = 0.0

    def measure(
        self, logps: Float[Tensor, " rows"], reference: Float[Tensor, " rows"], num_targets: Int[Tensor, " rows"]
    ) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"], Float[Tensor, " rows"]]:
        """Returns the loss of each pair, its margin h in nats, and the derivative of its loss by each row's `logps`.

        Args:
            logps: log-likelihood of each text in nats; chosen and rejected in turn.
            reference: those under the reference.
            num_targets: number of tokens that were scored.
        """
        if self.kind == "orpo":
            return self._measure_odds(logps, reference, num_targets)
        ratio = logps - reference
        lengths = num_targets.clamp_min(1).to(ratio.dtype) if self.kind == "ipo" else torch.ones_like(ratio)
        pairs = (ratio / lengths).view(-1, 2)
        margin = pairs[:, 0] - pairs[:, 1]
        if self.kind == "ipo":
            distance = margin - 1 / (2 * self.beta)
            losses, slope = distance.square(), 2 * distance
        elif self.kind == "kto":
            signs = torch.tensor([1.0, -1.0], dtype=ratio.dtype, device=ratio.device)
            value = torch.sigmoid(self.beta * signs * pairs)
            return (1 - value).mean(1), margin, (-0.5 * self.beta * signs * value * (1 - value)).flatten()
        else:
            reward, kept = self.beta * margin, 1 - self.smoothing
            losses = -kept * F.logsigmoid(reward) - self.smoothing * F.logsigmoid(-reward)
            slope = self.beta * (self.smoothing * torch.sigmoid(reward) - kept * torch.sigmoid(-reward))
        return losses, margin, torch.stack([slope, -slope], 1).flatten() / lengths

    def _measure_odds(
        self, logps: Float[Tensor, " rows"], reference: Float[Tensor, " rows"], num_targets: Int[Tensor, " rows"]
    ) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"], Float[Tensor, " rows"]]:
        """Returns the same of `orpo`; the margin is how far the log odds ratio exceeds the reference's."""
        lengths = num_targets.clamp_min(1).to(logps.dtype)
        means, of_reference = ((each / lengths).clamp_max(MOST_MEAN).view(-1, 2) for each in (logps, reference))
        odds, odds_of_reference = (each - torch.log(-torch.expm1(each)) for each in (means, of_reference))
        difference = odds[:, 0] - odds[:, 1]
        losses = -means[:, 0] - self.beta * F.logsigmoid(difference)
        pull = -self.beta * torch.sigmoid(-difference)
        slopes = torch.stack([pull, -pull], 1) / -torch.expm1(means)  # the derivative of log odds is 1 / (1 - p)
        slopes[:, 0] -= 1
        return losses, difference - (odds_of_reference[:, 0] - odds_of_reference[:, 1]), slopes.flatten() / lengths
