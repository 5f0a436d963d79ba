"""Cross-entropy over a frozen head, a chunk of tokens at a time ("fused linear cross-entropy").

The logits of a whole batch never exist: each chunk's are computed, scored in float32, overwritten by their gradient
and multiplied into the gradient of the hidden states. The head gets no gradient, so nothing is computed twice, and the
extra memory is one chunk, `tokens * vocab_size` values, whatever the batch size. The adapters' contribution to the
logits is a product of two factors that is added to each chunk, and both factors get their gradients.

On a GPU with Triton one kernel scores a chunk (`loss_kernel.py`), and the head may have rows of zeros behind those of
the vocabulary: cuBLAS takes six times as long for 50,257 rows as for 50,304.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lora_gpt2.data.blocks import IGNORE
from lora_gpt2.model.gpt2 import LowRankLogits
from lora_gpt2.model.kernels import has_triton

CPU_TOKENS, DEVICE_TOKENS = 256, 1024
CACHED_LOGITS = 1_600_000
"""Logits that a CPU scores at a time, in float32: several passes go over them, which its cache shall hold."""


def tokens_per_chunk(device: torch.device) -> int:
    """Returns the number of tokens whose logits are computed in one product."""
    return CPU_TOKENS if device.type == "cpu" else DEVICE_TOKENS


def measure_chunk(tokens: int, vocab_size: int, device: torch.device, item: int) -> int:
    """Returns the bytes of the logits of a chunk, where a value of the head takes `item`, and of their float32 copy."""
    size = min(tokens_per_chunk(device), tokens) * vocab_size
    if item == 4 or (device.type == "cuda" and has_triton()):
        return item * size
    return item * size + 4 * (min(size, CACHED_LOGITS) if device.type == "cpu" else size)


def linear_nll(
    hidden: Float[Tensor, "tokens width"],
    head: Float[Tensor, "padded_vocab width"],
    targets: Int[Tensor, " tokens"],
    update: LowRankLogits | None,
    vocab_size: int | None = None,
) -> Float[Tensor, " tokens"]:
    """Returns the negative log-likelihood of each target in nats, float32; 0 where the target is `IGNORE`.

    `update` is the adapters' contribution to the logits of these hidden states; see `fused_linear_cross_entropy` for
    the rest.
    """
    nll = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
    with torch.no_grad():
        chunks = _Chunks(hidden, head, update, vocab_size)
        for group, tokens in chunks.split():
            nll[tokens], _ = chunks.score(group, tokens, targets[tokens], None, 0.0)
    return nll


class _Chunks:
    """A buffer for the logits of one chunk, reused for each, because fresh memory costs as much as the arithmetic."""

    def __init__(self, hidden: Tensor, head: Tensor, update: LowRankLogits | None, vocab_size: int | None) -> None:
        self.hidden, self.head, self.update = hidden, head, update
        self.vocab_size = len(head) if vocab_size is None else vocab_size
        self.group_tokens = len(hidden) // (1 if update is None else len(update.b_t))
        self.num_tokens = min(tokens_per_chunk(hidden.device), self.group_tokens)
        self.padded = hidden.new_empty(self.num_tokens, len(head))
        self.has_kernel = hidden.device.type == "cuda" and has_triton()
        is_cpu = hidden.device.type == "cpu"
        self.num_rows = max(1, CACHED_LOGITS // self.vocab_size) if is_cpu else max(1, self.num_tokens)
        self.exact: Tensor | None = None
        if self.padded.dtype != torch.float32 and not self.has_kernel:
            rows = min(self.num_rows, self.num_tokens)
            self.exact = hidden.new_empty(rows, self.vocab_size, dtype=torch.float32)

    def split(self) -> Iterator[tuple[int, slice]]:
        """Yields the chunks: the group of the update, and the tokens, which are all of that group."""
        for first in range(0, len(self.hidden), self.group_tokens):
            end = first + self.group_tokens
            for start in range(first, end, self.num_tokens):
                yield first // self.group_tokens, slice(start, min(start + self.num_tokens, end))

    def score(
        self, group: int, tokens: slice, targets: Tensor, factors: Tensor | None, smoothing: float
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the NLL of some tokens and, with smoothing, the cross-entropy to the uniform distribution.

        With `factors` of the tokens, `padded` holds the gradient of the logits afterwards.
        """
        padded = self.padded[: len(targets)]
        torch.mm(self.hidden[tokens], self.head.T, out=padded)
        if self.update is not None:
            padded[:, : self.vocab_size].addmm_(self.update.hidden_a[tokens], self.update.b_t[group])
        if self.has_kernel:
            from lora_gpt2.model.loss_kernel import score_rows

            return score_rows(padded, self.vocab_size, targets, factors, smoothing)
        nll = torch.empty(targets.shape, dtype=torch.float32, device=padded.device)
        uniform = torch.empty_like(nll) if smoothing else None
        for first in range(0, len(targets), self.num_rows):
            rows = slice(first, first + self.num_rows)
            some = None if factors is None else factors[rows]
            nll[rows], mean = self._score_eagerly(padded[rows, : self.vocab_size], targets[rows], some, smoothing)
            if uniform is not None and mean is not None:
                uniform[rows] = mean
        return nll, uniform

    def compare(self, group: int, tokens: slice, reference: Tensor, has_loss: Tensor, factors: Tensor | None) -> Tensor:
        """Returns KL(reference || these logits) of some tokens, in nats; 0 where there is no loss.

        `reference` are the hidden states that the same head makes logits of. With `factors` of the tokens, `padded`
        holds the gradient of the logits afterwards.
        """
        lowp = self.padded[: len(reference), : self.vocab_size]
        base = torch.mm(reference, self.head[: self.vocab_size].T).float()
        torch.mm(self.hidden[tokens], self.head.T, out=self.padded[: len(reference)])
        if self.update is not None:
            lowp.addmm_(self.update.hidden_a[tokens], self.update.b_t[group])
        own = lowp if lowp.dtype == torch.float32 else lowp.float()
        own.sub_(own.logsumexp(1, keepdim=True))
        base.sub_(base.logsumexp(1, keepdim=True))
        ratio = base - own
        divergence: Tensor = torch.linalg.vecdot(base.exp_(), ratio) * has_loss
        if factors is not None:
            gradient = own.exp_().sub_(base).mul_((factors * has_loss)[:, None])
            if gradient.dtype != lowp.dtype:
                lowp.copy_(gradient)
        return divergence

    def _score_eagerly(
        self, lowp: Tensor, targets: Tensor, factors: Tensor | None, smoothing: float
    ) -> tuple[Tensor, Tensor | None]:
        """Does what `score_rows` does."""
        has_loss, ids = targets != IGNORE, targets.clamp_min(0)[:, None]
        logits = lowp if self.exact is None else self.exact[: len(targets)].copy_(lowp)
        logits.sub_(logits.amax(1, keepdim=True))
        target_logits, mean = logits.gather(1, ids)[:, 0], logits.mean(1) if smoothing else None
        normaliser = logits.exp_().sum(1)
        nll = (normaliser.log() - target_logits) * has_loss
        uniform = None if mean is None else (normaliser.log() - mean) * has_loss
        if factors is not None:
            factor = factors * has_loss
            gradient = logits.mul_((factor / normaliser)[:, None])  # softmax times factor, in place of the logits
            gradient.scatter_add_(1, ids, ((smoothing - 1) * factor)[:, None])
            if smoothing:
                gradient.sub_((factor * (smoothing / self.vocab_size))[:, None])
            if gradient.dtype != lowp.dtype:
                lowp.copy_(gradient)
        return nll, uniform


class _FusedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        hidden_a: Tensor | None,
        head: Tensor,
        targets: Tensor,
        weights: Tensor,
        smoothing: float,
        update: LowRankLogits | None,
        vocab_size: int | None,
        reference: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        nll = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
        loss = torch.zeros_like(nll)
        grad_hidden = torch.empty_like(hidden)
        grad_hidden_a = grad_b_t = None
        if update is not None:
            grad_hidden_a = torch.empty_like(update.hidden_a)
            grad_b_t = torch.zeros_like(update.b_t, dtype=torch.float32)
        chunks = _Chunks(hidden, head, update, vocab_size)
        for group, tokens in chunks.split():
            if reference is None:
                nll[tokens], uniform = chunks.score(group, tokens, targets[tokens], weights[tokens], smoothing)
            else:
                has_loss, uniform = targets[tokens] != IGNORE, None
                nll[tokens] = chunks.compare(group, tokens, reference[tokens], has_loss, weights[tokens])
            loss[tokens] = nll[tokens] if uniform is None else nll[tokens].lerp(uniform, smoothing)
            padded = chunks.padded[: tokens.stop - tokens.start]
            torch.mm(padded, head, out=grad_hidden[tokens])
            if update is not None and grad_hidden_a is not None and grad_b_t is not None:
                grad_logits = padded[:, : chunks.vocab_size]
                torch.mm(grad_logits, update.b_t[group].T, out=grad_hidden_a[tokens])
                grad_b_t[group] += torch.mm(update.hidden_a[tokens].T, grad_logits)
        ctx.update = update
        ctx.save_for_backward(grad_hidden, grad_hidden_a, grad_b_t)
        return loss.mul_(weights).sum(), nll

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_hidden_a, grad_b_t = ctx.saved_tensors
        factor = upstream[0].to(grad_hidden.dtype)
        if ctx.update is not None:
            if ctx.update.add_gradient is not None:
                ctx.update.add_gradient(grad_b_t.mul_(upstream[0]))  # in place: there may be many slots
            grad_hidden_a = grad_hidden_a * factor
        return grad_hidden * factor, grad_hidden_a, None, None, None, None, None, None, None


def fused_linear_cross_entropy(
    hidden: Float[Tensor, "tokens width"],
    head: Float[Tensor, "padded_vocab width"],
    targets: Int[Tensor, " tokens"],
    weights: Float[Tensor, " tokens"],
    smoothing: float,
    update: LowRankLogits | None,
    *,
    vocab_size: int | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " tokens"]]:
    """Returns (sum of weight × loss, NLL per token) in nats; differentiable in `hidden` through the first.

    The loss is the NLL; with label smoothing ε it is the cross-entropy to (1 - ε) of the target and ε of the uniform
    distribution (Szegedy et al. 2015, arXiv:1512.00567, section 7).

    Args:
        hidden: hidden states; the tokens of each group of `update` are contiguous.
        head: the weight of the output projection, which gets no gradient; rows behind the vocabulary's are zeros.
        targets: token ids; `IGNORE` contributes nothing.
        weights: weight of each token. With 1/n_k on the n_k tokens of slot k, the sum is the sum over the slots of
            their mean NLL, so each slot's gradient is what it would be alone.
        smoothing: label smoothing ε.
        update: the adapters' contribution to the logits, whose factors get their gradients too.
        vocab_size: number of rows of the head that are tokens; None for all.
    """
    hidden_a = None if update is None else update.hidden_a
    loss, nll = _FusedLinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, hidden_a, head, targets, weights, smoothing, update, vocab_size, None
    )
    return loss, nll.detach()


def fused_linear_kl_divergence(
    hidden: Float[Tensor, "tokens width"],
    head: Float[Tensor, "padded_vocab width"],
    targets: Int[Tensor, " tokens"],
    weights: Float[Tensor, " tokens"],
    update: LowRankLogits | None,
    reference: Float[Tensor, "tokens width"],
    *,
    vocab_size: int | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " tokens"]]:
    """Returns (sum of weight × divergence, divergence per token) in nats; differentiable in `hidden`.

    The divergence is KL(p || q) of the next token, p under the hidden states `reference` and q under `hidden` with
    `update`; 0 where the target is `IGNORE`. See `fused_linear_cross_entropy` for the other arguments.
    """
    hidden_a = None if update is None else update.hidden_a
    loss, divergence = _FusedLinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, hidden_a, head, targets, weights, 0.0, update, vocab_size, reference
    )
    return loss, divergence.detach()


def linear_kl_divergence(
    hidden: Float[Tensor, "tokens width"],
    head: Float[Tensor, "padded_vocab width"],
    targets: Int[Tensor, " tokens"],
    update: LowRankLogits | None,
    reference: Float[Tensor, "tokens width"],
    vocab_size: int | None = None,
) -> Float[Tensor, " tokens"]:
    """Returns the divergence per token; see `fused_linear_kl_divergence`."""
    divergence = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
    with torch.no_grad():
        chunks = _Chunks(hidden, head, update, vocab_size)
        for group, tokens in chunks.split():
            has_loss = targets[tokens] != IGNORE
            divergence[tokens] = chunks.compare(group, tokens, reference[tokens], has_loss, None)
    return divergence
