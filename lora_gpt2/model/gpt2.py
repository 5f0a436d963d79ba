"""A plain GPT-2 (Radford et al. 2019), equal to transformers' to rounding.

It omits whatever inference over one frozen base does not need (cross-attention, head pruning, attention outputs,
training of its own weights). In exchange, adapters take over at every projection, the KV cache is static, and hidden
states leave before the head, so that a loss can be computed in chunks.
Weights are stored `[out, in]`, transposed with respect to the `Conv1D` of Hugging Face checkpoints.

The operation in front of a projection (LayerNorm, GELU or none) is passed to it as its `prologue`, so that training can
store the input of the norm or activation and recompute its output, instead of storing both.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from lora_gpt2.model.attention import attend_by_blocks
from lora_gpt2.model.config import HEAD, GPT2Config
from lora_gpt2.model.kv_cache import KVCache

TARGETS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
ADAPTABLE = (*TARGETS, HEAD)
HEAD_ROWS = 64


class _Uninitialised:
    """Leaves weights to the checkpoint: drawing them first takes time, and on `meta` imports half of torch (2 s)."""

    def reset_parameters(self) -> None:
        """Does nothing."""


class Linear(_Uninitialised, nn.Linear):
    """`nn.Linear` without random initialisation; quantized and prepacked bases replace it by a subclass."""

    padded: Tensor | None = None  # see `GPT2.pad_head`

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "outputs inputs"]:
        """Returns the weight in a dtype to compute in."""
        return self.weight.to(dtype)

    def with_weight(self, weight: Float[Tensor, "outputs inputs"]) -> Linear:
        """Returns a layer with this weight, in this layer's dtype, and the same bias."""
        replaced = copy.copy(self)
        replaced._parameters = dict(self._parameters)  # the copy's own
        replaced.weight, replaced.padded = nn.Parameter(weight.to(self.weight.dtype), requires_grad=False), None
        return replaced


class Embedding(_Uninitialised, nn.Embedding):
    """`nn.Embedding` without random initialisation."""

    padded: Tensor | None = None  # see `GPT2.pad_head`


class LayerNorm(_Uninitialised, nn.LayerNorm):
    """`nn.LayerNorm` without initialisation."""


Prologue = LayerNorm | nn.GELU | None
"""The operation that is applied to a projection's input first; None for the identity."""


@dataclass(frozen=True)
class LowRankLogits:
    """The adapters' contribution to the logits, `hidden_a @ b_t`, as factors: the product of a batch is too large.

    Args:
        hidden_a: hidden states times A, `[tokens, rank]`; the tokens of each group are contiguous and equally many.
        b_t: B transposed, `[groups, rank, vocab]`.
        add_gradient: accumulates the gradient of `b_t` where B is trained.
    """

    hidden_a: Float[Tensor, "tokens rank"]
    b_t: Float[Tensor, "groups rank vocab"]
    add_gradient: Callable[[Tensor], None] | None = None

    def select(self, tokens: Int[Tensor, " selected"]) -> LowRankLogits:
        """Returns the contribution for some of the tokens; there must be one group."""
        return LowRankLogits(self.hidden_a[tokens], self.b_t)


@runtime_checkable
class ActiveAdapters(Protocol):
    """The adapters of a batch: the network calls them at each adapted projection."""

    def project(
        self, site: str, linear: Linear, prologue: Prologue, x: Float[Tensor, "batch time inputs"]
    ) -> Float[Tensor, "batch time outputs"]:
        """Returns the projection of `prologue(x)` plus the update of the adapters at `site`."""

    def low_rank_logits(self, hidden: Float[Tensor, "batch time width"]) -> LowRankLogits | None:
        """Returns the adapters' contribution to the logits of these hidden states; None if there is none."""


@dataclass(frozen=True, kw_only=True)
class ForwardContext:
    """The state of one forward pass that all blocks share; `mask` is additive, None for plain causal attention."""

    adapters: ActiveAdapters | None
    cache: KVCache | None
    positions: Tensor
    mask: Tensor | None


class Attention(nn.Module):
    """Causal self-attention (Vaswani et al. 2017, section 3.2) with fused q, k and v."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.layer, self.n_head = layer, config.n_head
        self.scale = 1 / math.sqrt(config.head_dim) / (layer + 1 if config.scale_attn_by_inverse_layer_idx else 1)

    def forward(
        self, x: Float[Tensor, "batch time width"], norm: LayerNorm, context: ForwardContext
    ) -> Float[Tensor, "batch time width"]:
        """Returns the attention's contribution to the residual stream `x`."""
        batch, time, width = x.shape
        fused = project(self.c_attn, f"h.{self.layer}.attn.c_attn", norm, x, context.adapters)
        qkv = fused.view(batch, time, 3, self.n_head, width // self.n_head)
        if qkv.requires_grad and qkv.device.type == "cpu":
            attended = attend_by_blocks(qkv, self.scale, context.mask)
        else:
            attended = self._attend(qkv, context).transpose(1, 2)
        attended = attended.reshape(batch, time, width)
        return project(self.c_proj, f"h.{self.layer}.attn.c_proj", None, attended, context.adapters)

    def _attend(
        self, qkv: Float[Tensor, "batch time 3 heads head_width"], context: ForwardContext
    ) -> Float[Tensor, "batch heads time head_width"]:
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # whose gradients are put together as they lie
        if context.cache is not None:
            cached = context.cache.append(self.layer, context.positions, qkv[:, :, 1:])
            if context.mask is not None:
                k, v = cached
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=context.mask, is_causal=context.mask is None, scale=self.scale
        )


class MLP(nn.Module):
    """Two projections with GELU between them; the tanh form is GPT-2's own (Hendrycks and Gimpel 2016)."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.n_inner)
        self.c_proj = Linear(config.n_inner, config.n_embd)
        self.layer, self.act = layer, nn.GELU(approximate=config.gelu_approximate)

    def forward(
        self, x: Float[Tensor, "batch time width"], norm: LayerNorm, context: ForwardContext
    ) -> Float[Tensor, "batch time width"]:
        """Returns the MLP's contribution to the residual stream `x`."""
        inner = project(self.c_fc, f"h.{self.layer}.mlp.c_fc", norm, x, context.adapters)
        return project(self.c_proj, f"h.{self.layer}.mlp.c_proj", self.act, inner, context.adapters)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config, layer)

    def forward(
        self, x: Float[Tensor, "batch time width"], context: ForwardContext
    ) -> Float[Tensor, "batch time width"]:
        """Returns the residual stream after the block."""
        x = x + self.attn(x, self.ln_1, context)
        result: Tensor = x + self.mlp(x, self.ln_2, context)
        return result


class GPT2(nn.Module):
    """The frozen base. `forward` returns hidden states; `logits` applies the head to those that need it."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.wpe = Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.n_embd, config.vocab_size, bias=False)
        self.prepacked_head: Linear | None = None

    def iter_linears(self) -> Iterator[Linear]:
        """Yields every linear layer of the blocks that an adapter may change."""
        for name, module in self.named_modules():
            if name.endswith(TARGETS) and isinstance(module, Linear):
                yield module

    @property
    def head(self) -> Float[Tensor, "vocab width"]:
        """The weight of the output projection: the token embeddings, unless the checkpoint unties them."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    @property
    def padded_head(self) -> Float[Tensor, "padded_vocab width"]:
        """The head's weight, followed by rows of zeros where it was padded."""
        padded = (self.lm_head or self.wte).padded
        return self.head if padded is None else padded

    def pad_head(self) -> None:
        """Puts rows of zeros behind the head's, up to a multiple of 64: what cuBLAS needs to be fast."""
        module, (vocab_size, width) = self.lm_head or self.wte, self.head.shape
        module.padded = self.head.new_zeros(-(-vocab_size // HEAD_ROWS) * HEAD_ROWS, width)
        module.padded[:vocab_size] = self.head
        module.weight = nn.Parameter(module.padded[:vocab_size], requires_grad=False)

    def add_to_head(self, delta: Float[Tensor, "vocab width"]) -> None:
        """Adds to the head's weight, which is untied first: the token embeddings stay as they are."""
        weight, is_padded = self.head.float() + delta.to(self.head.device), self.padded_head is not self.head
        self.lm_head = Linear(delta.shape[1], delta.shape[0], bias=False, device="meta")
        self.lm_head.weight = nn.Parameter(weight.to(self.wte.weight.dtype), requires_grad=False)
        if is_padded:
            self.pad_head()
        if self.prepacked_head is not None:
            self.prepacked_head = self.prepacked_head.with_weight(weight)

    def forward(
        self,
        tokens: Int[Tensor, "batch time"],
        adapters: ActiveAdapters | None = None,
        cache: KVCache | None = None,
        noise: Float[Tensor, "batch time width"] | None = None,
        checkpoint_blocks: bool = False,
        *,
        positions: Int[Tensor, "batch time"] | None = None,
        num_tokens: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch time width"]:
        """Returns the hidden states after the last norm.

        Args:
            tokens: token ids. With a cache they continue each of its sequences, whose lengths the cache advances.
            adapters: the adapters of the batch; None for the plain base.
            cache: keys and values of what came before.
            noise: is added to the token embeddings.
            checkpoint_blocks: store only the input of each block for the backward pass, which recomputes the block
                (Chen et al. 2016, arXiv:1604.06174).
            positions: positions that restart at 0 within a row separate documents that do not attend to each other;
                not with a cache.
            num_tokens: with a cache, how many tokens of each row count; the others are padding on the right.

        Raises:
            IndexError: more tokens than the base has positions, or than the cache has room for.
        """
        batch, time = tokens.shape
        mask: Tensor | None = None
        if cache is not None:
            positions, visible = cache.begin(time)
            mask = None if visible is None else build_mask(visible, self.wpe.weight.dtype)
        elif time > self.config.n_positions:
            raise IndexError(f"{time} tokens exceed the context of {self.config.n_positions}")
        elif positions is not None:
            mask = mask_documents(positions, self.wpe.weight.dtype)
        else:
            positions = torch.arange(time, device=tokens.device)[None].expand(batch, -1)
        context = ForwardContext(adapters=adapters, cache=cache, positions=positions, mask=mask)
        x = self.wte(tokens) + self.wpe(positions)
        if noise is not None:
            x = x + noise.to(x)
        with _choose_attention(x):
            for block in self.h:
                if checkpoint_blocks:
                    x = checkpoint(block, x, context, use_reentrant=False, preserve_rng_state=False)
                else:
                    x = block(x, context)
        if cache is not None:
            cache.advance(time if num_tokens is None else num_tokens)
        result: Tensor = self.ln_f(x)
        return result

    def logits(
        self, hidden: Float[Tensor, "batch time width"], adapters: ActiveAdapters | None
    ) -> Float[Tensor, "batch time vocab"]:
        """Returns the logits of hidden states, under the adapters that they were computed with."""
        if self.prepacked_head is None:
            scores = F.linear(hidden, self.padded_head)[..., : self.config.vocab_size]
        else:
            scores = self.prepacked_head(hidden)
        if adapters is not None and (update := adapters.low_rank_logits(hidden)) is not None:
            groups = scores.view(len(update.b_t), -1, scores.shape[-1])
            groups.baddbmm_(update.hidden_a.view(*groups.shape[:2], -1), update.b_t)
        return scores


def _choose_attention(x: Tensor) -> AbstractContextManager[None]:
    """Leaves cuDNN's attention to training, whose shapes stay the same: for each new one it makes a plan (0.7 s)."""
    if x.device.type != "cuda" or torch.is_grad_enabled():
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def mask_documents(positions: Int[Tensor, "batch time"], dtype: torch.dtype) -> Float[Tensor, "batch 1 time time"]:
    """Returns the additive attention mask of packed documents: causal, and block-diagonal over the documents."""
    document = (positions == 0).cumsum(1)
    return build_mask((document[:, :, None] == document[:, None, :]).tril_(), dtype)


def build_mask(visible: Bool[Tensor, "batch time keys"], dtype: torch.dtype) -> Float[Tensor, "batch 1 time keys"]:
    """Returns an additive attention mask: 0 where a key is visible, -inf elsewhere.

    It is built once for all layers; `scaled_dot_product_attention` would convert a boolean mask in each.
    """
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -math.inf)[:, None]


def apply_prologue(prologue: Prologue, x: Float[Tensor, "*shape width"]) -> Float[Tensor, "*shape width"]:
    """Returns the input of a projection: the norm or activation of `x`, or `x` itself."""
    return x if prologue is None else prologue(x)


def project(
    linear: Linear,
    site: str,
    prologue: Prologue,
    x: Float[Tensor, "batch time inputs"],
    adapters: ActiveAdapters | None,
) -> Float[Tensor, "batch time outputs"]:
    """Returns the frozen projection of `prologue(x)`, plus the adapters' update if there are any."""
    if adapters is not None:
        return adapters.project(site, linear, prologue, x)
    result: Tensor = linear(apply_prologue(prologue, x))
    return result
