"""Cross-entropy over a frozen head, a chunk of rows at a time.

The logits of a whole batch never exist: each chunk's are computed, scored in float32, overwritten by their gradient
and folded into the gradient of the hidden states. The head gets no gradient, so nothing is computed twice and the
extra memory is one chunk, `rows * vocabulary` numbers, whatever the batch is. What adapters add to the head is a
product of two factors, added to each chunk, and both get their gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lora_gpt2.data.blocks import IGNORE
from lora_gpt2.model.gpt2 import GPT2, ActiveAdapters, LowRankLogits

CPU_ROWS, DEVICE_ROWS = 256, 1024


def rows_per_chunk(device: torch.device) -> int:
    """Rows whose logits fit a CPU's cache, or fill a GPU."""
    return CPU_ROWS if device.type == "cpu" else DEVICE_ROWS


def token_nll(
    hidden: Float[Tensor, "tokens width"],
    head: Float[Tensor, "vocab width"],
    targets: Int[Tensor, " tokens"],
    update: LowRankLogits | None,
) -> Float[Tensor, " tokens"]:
    """Returns the negative log-likelihood of each target in nats, float32; 0 where the target is `IGNORE`.

    `update` is what the adapters add to the head for these hidden states.
    """
    nll = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
    with torch.no_grad():
        chunk = _Chunk(hidden, head, update or _build_empty(hidden, head))
        for group, rows in chunk.split():
            wanted = targets[rows].clamp_min(0)[:, None]
            logits = chunk.compute(group, rows)
            chosen = logits.gather(1, wanted)[:, 0]
            nll[rows] = (logits.exp_().sum(1).log() - chosen) * (targets[rows] != IGNORE)
    return nll


def score_tokens(
    model: GPT2,
    hidden: Float[Tensor, "rows time width"],
    adapters: ActiveAdapters | None,
    targets: Int[Tensor, " tokens"],
    places: Int[Tensor, " tokens"] | None = None,
) -> Float[Tensor, " tokens"]:
    """Returns `token_nll` of hidden states under the adapters that they were computed with.

    `places` picks some of the `rows * time` states, in any order; without it all of them are scored.
    """
    flat, update = hidden.flatten(0, 1), None if adapters is None else adapters.low_rank_logits(hidden)
    if places is not None:
        flat, update = flat[places], None if update is None else update.pick(places)
    return token_nll(flat, model.head, targets, update)


def _build_empty(hidden: Tensor, head: Tensor) -> LowRankLogits:
    """Returns an update of rank 0."""
    return LowRankLogits(hidden.new_empty(len(hidden), 0), head.new_empty(1, 0, len(head)))


class _Chunk:
    """Room for the logits of `rows` rows, used again for each chunk, because fresh memory costs as much as sums."""

    def __init__(self, hidden: Tensor, head: Tensor, update: LowRankLogits) -> None:
        self.hidden, self.head, self.update = hidden, head, update
        self.group_rows = len(hidden) // len(update.outer)
        self.rows = min(rows_per_chunk(hidden.device), self.group_rows)
        self.narrow = hidden.new_empty(self.rows, len(head))
        self.wide = self.narrow if self.narrow.dtype == torch.float32 else self.narrow.to(torch.float32)

    def split(self) -> Iterator[tuple[int, slice]]:
        """Yields the chunks: the group of the update, and the rows, which are all of that group."""
        for first in range(0, len(self.hidden), self.group_rows):
            for start in range(first, first + self.group_rows, self.rows):
                yield first // self.group_rows, slice(start, min(start + self.rows, first + self.group_rows))

    def compute(self, group: int, rows: slice) -> Tensor:
        """Returns the logits of some rows in float32, less the largest of each; valid until the next call."""
        count = rows.stop - rows.start
        scores, logits = self.narrow[:count], self.wide[:count]
        torch.mm(self.hidden[rows], self.head.T, out=scores)
        scores.addmm_(self.update.inner[rows], self.update.outer[group])
        if self.wide is not self.narrow:
            logits.copy_(scores)
        return logits.sub_(logits.amax(1, keepdim=True))

    def to_narrow(self, slope: Tensor) -> Tensor:
        """Returns what stands in the logits' place in the numbers of the head."""
        return slope if self.wide is self.narrow else self.narrow[: len(slope)].copy_(slope)


class _FusedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        inner: Tensor,
        head: Tensor,
        targets: Tensor,
        weights: Tensor,
        smoothing: float,
        update: LowRankLogits,
    ) -> tuple[Tensor, Tensor]:
        nll = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        inner_gradient = torch.empty_like(inner)
        outer_gradient = torch.zeros_like(update.outer, dtype=torch.float32)
        chunk = _Chunk(hidden, head, update)
        for group, rows in chunk.split():
            kept = targets[rows] != IGNORE
            wanted = targets[rows].clamp_min(0)[:, None]
            factor = weights[rows] * kept
            logits = chunk.compute(group, rows)
            chosen, mean = logits.gather(1, wanted)[:, 0], logits.mean(1) if smoothing else None
            total = logits.exp_().sum(1)
            nll[rows] = (total.log() - chosen) * kept
            loss += (1 - smoothing) * (nll[rows] * factor).sum()
            slope = logits.mul_((factor / total)[:, None])  # softmax times factor, in place of the logits
            slope.scatter_add_(1, wanted, ((smoothing - 1) * factor)[:, None])
            if mean is not None:
                loss += smoothing * ((total.log() - mean) * factor).sum()
                slope.sub_((factor * (smoothing / logits.shape[1]))[:, None])
            slope = chunk.to_narrow(slope)
            torch.mm(slope, head, out=gradient[rows])
            torch.mm(slope, update.outer[group].T, out=inner_gradient[rows])
            outer_gradient[group] += torch.mm(inner[rows].T, slope)
        ctx.update = update
        ctx.save_for_backward(gradient, inner_gradient, outer_gradient)
        return loss, nll

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, inner_gradient, outer_gradient = ctx.saved_tensors
        factor = upstream[0].to(gradient.dtype)
        if ctx.update.add_gradient is not None:
            ctx.update.add_gradient(outer_gradient.mul_(upstream[0]))  # in place: there may be many slots
        return gradient * factor, inner_gradient * factor, None, None, None, None, None


def fused_linear_cross_entropy(
    hidden: Float[Tensor, "tokens width"],
    head: Float[Tensor, "vocab width"],
    targets: Int[Tensor, " tokens"],
    weights: Float[Tensor, " tokens"],
    smoothing: float,
    update: LowRankLogits | None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " tokens"]]:
    """Returns (sum of weight × loss, NLL per token), in nats; differentiable in `hidden` through the first.

    The loss is the NLL, with label smoothing ε the cross-entropy to (1 - ε) of the target and ε of all words alike.

    `update` is what the adapters add to the head for these hidden states; it gets its gradients too.
    Targets equal to `IGNORE` count nothing. With weights 1/n_k on the tokens of domain k, the sum is the sum over the
    domains of their mean NLL, so each domain's gradient is what it would be alone.
    """
    update = update or _build_empty(hidden, head)
    loss, nll = _FusedLinearCrossEntropy.apply(hidden, update.inner, head, targets, weights, smoothing, update)  # type: ignore[no-untyped-call]
    return loss, nll.detach()
