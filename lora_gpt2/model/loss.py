"""Cross-entropy over a frozen head, a chunk of tokens at a time ("fused linear cross-entropy").

The logits of a whole batch never exist: each chunk's are computed, scored in float32, overwritten by their gradient
and multiplied into the gradient of the hidden states. The head gets no gradient, so nothing is computed twice, and the
extra memory is one chunk, `tokens * vocab_size` values, whatever the batch size. The adapters' contribution to the
logits is a product of two factors that is added to each chunk, and both factors get their gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lora_gpt2.data.blocks import IGNORE
from lora_gpt2.model.gpt2 import LowRankLogits

CPU_TOKENS, DEVICE_TOKENS = 256, 1024


def tokens_per_chunk(device: torch.device) -> int:
    """Returns the number of tokens whose logits fit a CPU's cache, or fill a GPU."""
    return CPU_TOKENS if device.type == "cpu" else DEVICE_TOKENS


def linear_nll(
    hidden: Float[Tensor, "tokens width"],
    head: Float[Tensor, "vocab width"],
    targets: Int[Tensor, " tokens"],
    update: LowRankLogits | None,
) -> Float[Tensor, " tokens"]:
    """Returns the negative log-likelihood of each target in nats, float32; 0 where the target is `IGNORE`.

    `update` is the adapters' contribution to the logits of these hidden states.
    """
    nll = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
    with torch.no_grad():
        chunks = _Chunks(hidden, head, update or _build_empty(hidden, head))
        for group, tokens in chunks.split():
            ids = targets[tokens].clamp_min(0)[:, None]
            logits = chunks.compute_logits(group, tokens)
            target_logits = logits.gather(1, ids)[:, 0]
            nll[tokens] = (logits.exp_().sum(1).log() - target_logits) * (targets[tokens] != IGNORE)
    return nll


def _build_empty(hidden: Tensor, head: Tensor) -> LowRankLogits:
    """Returns a contribution of rank 0."""
    return LowRankLogits(hidden.new_empty(len(hidden), 0), head.new_empty(1, 0, len(head)))


class _Chunks:
    """A buffer for the logits of one chunk, reused for each, because fresh memory costs as much as the arithmetic."""

    def __init__(self, hidden: Tensor, head: Tensor, update: LowRankLogits) -> None:
        self.hidden, self.head, self.update = hidden, head, update
        self.group_tokens = len(hidden) // len(update.b_t)
        self.num_tokens = min(tokens_per_chunk(hidden.device), self.group_tokens)
        self.logits_lowp = hidden.new_empty(self.num_tokens, len(head))
        is_float32 = self.logits_lowp.dtype == torch.float32
        self.logits = self.logits_lowp if is_float32 else self.logits_lowp.to(torch.float32)

    def split(self) -> Iterator[tuple[int, slice]]:
        """Yields the chunks: the group of the update, and the tokens, which are all of that group."""
        for first in range(0, len(self.hidden), self.group_tokens):
            end = first + self.group_tokens
            for start in range(first, end, self.num_tokens):
                yield first // self.group_tokens, slice(start, min(start + self.num_tokens, end))

    def compute_logits(self, group: int, tokens: slice) -> Tensor:
        """Returns the logits of some tokens in float32, minus the maximum of each; valid until the next call."""
        count = tokens.stop - tokens.start
        lowp, logits = self.logits_lowp[:count], self.logits[:count]
        torch.mm(self.hidden[tokens], self.head.T, out=lowp)
        lowp.addmm_(self.update.hidden_a[tokens], self.update.b_t[group])
        if self.logits is not self.logits_lowp:
            logits.copy_(lowp)
        return logits.sub_(logits.amax(1, keepdim=True))

    def cast_gradient(self, grad_logits: Tensor) -> Tensor:
        """Returns the gradient of the logits in the head's dtype."""
        if self.logits is self.logits_lowp:
            return grad_logits
        return self.logits_lowp[: len(grad_logits)].copy_(grad_logits)


class _FusedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        hidden_a: Tensor,
        head: Tensor,
        targets: Tensor,
        weights: Tensor,
        smoothing: float,
        update: LowRankLogits,
    ) -> tuple[Tensor, Tensor]:
        nll = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden, grad_hidden_a = torch.empty_like(hidden), torch.empty_like(hidden_a)
        grad_b_t = torch.zeros_like(update.b_t, dtype=torch.float32)
        chunks = _Chunks(hidden, head, update)
        for group, tokens in chunks.split():
            has_loss = targets[tokens] != IGNORE
            ids = targets[tokens].clamp_min(0)[:, None]
            factor = weights[tokens] * has_loss
            logits = chunks.compute_logits(group, tokens)
            target_logits, mean = logits.gather(1, ids)[:, 0], logits.mean(1) if smoothing else None
            normaliser = logits.exp_().sum(1)
            nll[tokens] = (normaliser.log() - target_logits) * has_loss
            loss += (1 - smoothing) * (nll[tokens] * factor).sum()
            grad_logits = logits.mul_((factor / normaliser)[:, None])  # softmax times factor, in place of the logits
            grad_logits.scatter_add_(1, ids, ((smoothing - 1) * factor)[:, None])
            if mean is not None:
                loss += smoothing * ((normaliser.log() - mean) * factor).sum()
                grad_logits.sub_((factor * (smoothing / logits.shape[1]))[:, None])
            grad_logits = chunks.cast_gradient(grad_logits)
            torch.mm(grad_logits, head, out=grad_hidden[tokens])
            torch.mm(grad_logits, update.b_t[group].T, out=grad_hidden_a[tokens])
            grad_b_t[group] += torch.mm(hidden_a[tokens].T, grad_logits)
        ctx.update = update
        ctx.save_for_backward(grad_hidden, grad_hidden_a, grad_b_t)
        return loss, nll

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_hidden_a, grad_b_t = ctx.saved_tensors
        factor = upstream[0].to(grad_hidden.dtype)
        if ctx.update.add_gradient is not None:
            ctx.update.add_gradient(grad_b_t.mul_(upstream[0]))  # in place: there may be many slots
        return grad_hidden * factor, grad_hidden_a * factor, None, None, None, None, None


def fused_linear_cross_entropy(
    hidden: Float[Tensor, "tokens width"],
    head: Float[Tensor, "vocab width"],
    targets: Int[Tensor, " tokens"],
    weights: Float[Tensor, " tokens"],
    smoothing: float,
    update: LowRankLogits | None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " tokens"]]:
    """Returns (sum of weight × loss, NLL per token) in nats; differentiable in `hidden` through the first.

    The loss is the NLL; with label smoothing ε it is the cross-entropy to (1 - ε) of the target and ε of the uniform
    distribution (Szegedy et al. 2015, arXiv:1512.00567, section 7).

    Args:
        hidden: hidden states; the tokens of each group of `update` are contiguous.
        head: the weight of the output projection, which gets no gradient.
        targets: token ids; `IGNORE` contributes nothing.
        weights: weight of each token. With 1/n_k on the n_k tokens of slot k, the sum is the sum over the slots of
            their mean NLL, so each slot's gradient is what it would be alone.
        smoothing: label smoothing ε.
        update: the adapters' contribution to the logits, whose factors get their gradients too.
    """
    update = update or _build_empty(hidden, head)
    loss, nll = _FusedLinearCrossEntropy.apply(hidden, update.hidden_a, head, targets, weights, smoothing, update)  # type: ignore[no-untyped-call]
    return loss, nll.detach()
