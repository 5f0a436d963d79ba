"""Cross-entropy over a frozen head, a chunk of rows at a time.

The logits of a whole batch never exist: each chunk's are computed, scored in float32, overwritten by their gradient
and folded into the gradient of the hidden states. The head gets no gradient, so nothing is computed twice and the
extra memory is one chunk, `rows * vocabulary` numbers, whatever the batch is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lora_gpt2.data.blocks import IGNORE

CPU_ROWS, DEVICE_ROWS = 256, 1024


def rows_per_chunk(device: torch.device) -> int:
    """Rows whose logits fit a CPU's cache, or fill a GPU."""
    return CPU_ROWS if device.type == "cpu" else DEVICE_ROWS


def measure_nll(
    hidden: Float[Tensor, "tokens width"], head: Float[Tensor, "vocab width"], targets: Int[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """Returns the negative log-likelihood of each target in nats, float32; 0 where the target is `IGNORE`."""
    result = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
    with torch.no_grad():
        step = rows_per_chunk(hidden.device)
        for start in range(0, len(targets), step):
            logits = F.linear(hidden[start : start + step], head).float()
            wanted = targets[start : start + step]
            result[start : start + step] = F.cross_entropy(logits, wanted, ignore_index=IGNORE, reduction="none")
    return result


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        nll = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        step = min(rows_per_chunk(hidden.device), len(targets))
        narrow = hidden.new_empty(step, len(head))
        wide = narrow if narrow.dtype == torch.float32 else narrow.to(torch.float32)
        for start in range(0, len(targets), step):
            rows = slice(start, start + step)
            kept = targets[rows] != IGNORE
            wanted = targets[rows].clamp_min(0)[:, None]
            factor = weights[rows] * kept
            scores, logits = narrow[: len(wanted)], wide[: len(wanted)]
            torch.mm(hidden[rows], head.T, out=scores)
            if wide is not narrow:
                logits.copy_(scores)
            logits.sub_(logits.amax(1, keepdim=True))
            chosen, mean = logits.gather(1, wanted)[:, 0], logits.mean(1) if smoothing else None
            total = logits.exp_().sum(1)
            nll[rows] = (total.log() - chosen) * kept
            loss += (1 - smoothing) * (nll[rows] * factor).sum()
            slope = logits.mul_((factor / total)[:, None])  # softmax times factor, in place of the logits
            slope.scatter_add_(1, wanted, ((smoothing - 1) * factor)[:, None])
            if mean is not None:
                loss += smoothing * ((total.log() - mean) * factor).sum()
                slope.sub_((factor * (smoothing / logits.shape[1]))[:, None])
            if wide is not narrow:
                scores.copy_(slope)
            torch.mm(scores, head, out=gradient[rows])
        ctx.save_for_backward(gradient)
        return loss, nll

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None, None, None


def chunked_cross_entropy(
    hidden: Float[Tensor, "tokens width"],
    head: Float[Tensor, "vocab width"],
    targets: Int[Tensor, " tokens"],
    weights: Float[Tensor, " tokens"],
    smoothing: float = 0.0,
) -> tuple[Float[Tensor, ""], Float[Tensor, " tokens"]]:
    """Returns (sum of weight × loss, NLL per token), in nats; differentiable in `hidden` through the first.

    The loss is the NLL, with label smoothing ε the cross-entropy to (1 - ε) of the target and ε of all words alike.

    Targets equal to `IGNORE` count nothing. With weights 1/n_k on the tokens of domain k, the sum is the sum over the
    domains of their mean NLL, so each domain's gradient is what it would be alone.
    """
    loss, nll = _ChunkedCrossEntropy.apply(hidden, head, targets, weights, smoothing)  # type: ignore[no-untyped-call]
    return loss, nll.detach()
