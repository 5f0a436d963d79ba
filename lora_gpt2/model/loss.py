"""Cross-entropy over a frozen head, a chunk of rows at a time.

The logits of a whole batch never exist: each chunk's are computed, scored in float32, overwritten by their gradient
and folded into the gradient of the hidden states. The head gets no gradient, so nothing is computed twice and the
extra memory is one chunk, `rows * vocabulary` numbers, whatever the batch is.
"""

from __future__ import annotations

from typing import Any

import torch
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
    nll = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
    with torch.no_grad():
        step = min(rows_per_chunk(hidden.device), len(targets))
        chunk = _Chunk(hidden, head, step)
        for start in range(0, len(targets), step):
            rows = slice(start, start + step)
            wanted = targets[rows].clamp_min(0)[:, None]
            logits = chunk.compute(hidden[rows])
            chosen = logits.gather(1, wanted)[:, 0]
            nll[rows] = (logits.exp_().sum(1).log() - chosen) * (targets[rows] != IGNORE)
    return nll


class _Chunk:
    """Room for the logits of `rows` rows, used again for each chunk, because fresh memory costs as much as sums."""

    def __init__(self, hidden: Tensor, head: Tensor, rows: int) -> None:
        self.head, self.narrow = head, hidden.new_empty(rows, len(head))
        self.wide = self.narrow if self.narrow.dtype == torch.float32 else self.narrow.to(torch.float32)

    def compute(self, hidden: Tensor) -> Tensor:
        """Returns the logits of some rows in float32, less the largest of each; valid until the next call."""
        scores, logits = self.narrow[: len(hidden)], self.wide[: len(hidden)]
        torch.mm(hidden, self.head.T, out=scores)
        if self.wide is not self.narrow:
            logits.copy_(scores)
        return logits.sub_(logits.amax(1, keepdim=True))

    def to_narrow(self, slope: Tensor) -> Tensor:
        """Returns what stands in the logits' place in the numbers of the head."""
        return slope if self.wide is self.narrow else self.narrow[: len(slope)].copy_(slope)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        nll = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        step = min(rows_per_chunk(hidden.device), len(targets))
        chunk = _Chunk(hidden, head, step)
        for start in range(0, len(targets), step):
            rows = slice(start, start + step)
            kept = targets[rows] != IGNORE
            wanted = targets[rows].clamp_min(0)[:, None]
            factor = weights[rows] * kept
            logits = chunk.compute(hidden[rows])
            chosen, mean = logits.gather(1, wanted)[:, 0], logits.mean(1) if smoothing else None
            total = logits.exp_().sum(1)
            nll[rows] = (total.log() - chosen) * kept
            loss += (1 - smoothing) * (nll[rows] * factor).sum()
            slope = logits.mul_((factor / total)[:, None])  # softmax times factor, in place of the logits
            slope.scatter_add_(1, wanted, ((smoothing - 1) * factor)[:, None])
            if mean is not None:
                loss += smoothing * ((total.log() - mean) * factor).sum()
                slope.sub_((factor * (smoothing / logits.shape[1]))[:, None])
            torch.mm(chunk.to_narrow(slope), head, out=gradient[rows])
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
