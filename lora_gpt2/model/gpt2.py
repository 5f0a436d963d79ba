"""A plain GPT-2 (Radford et al. 2019), equal to transformers' to rounding.

It gives up everything an inference over one frozen base does not need (cross-attention, head pruning, attention
outputs, training of its own weights) for a place in every projection where adapters take over, a static KV cache with
a length per row, and a hidden state that leaves before the head, so that a loss can be chunked.
Weights are stored `[out, in]`, transposed against the `Conv1D` of Hugging Face checkpoints.

What precedes a projection (LayerNorm, GELU or nothing) is handed to it as `before`, so that training can keep the
input of the norm or activation and compute its output again, instead of keeping both.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_gpt2.model.config import HEAD, GPT2Config

TARGETS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
ADAPTABLE = (*TARGETS, HEAD)


class _Uninitialised:
    """Leaves weights to the checkpoint: drawing them first takes time, and on `meta` imports half of torch (2 s)."""

    def reset_parameters(self) -> None:
        """Does nothing."""


class Linear(_Uninitialised, nn.Linear):
    """`nn.Linear` without random weights; quantised bases put another class in its place."""

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "outputs inputs"]:
        """Returns the weight as numbers to compute with."""
        return self.weight.to(dtype)

    def with_weight(self, weight: Float[Tensor, "outputs inputs"]) -> Linear:
        """Returns a projection with this weight, in this one's dtype, and the same bias."""
        made = copy.copy(self)
        made._parameters = dict(self._parameters)  # the copy's own
        made.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=False)
        return made


class Embedding(_Uninitialised, nn.Embedding):
    """`nn.Embedding` without random weights."""


class LayerNorm(_Uninitialised, nn.LayerNorm):
    """`nn.LayerNorm` whose weights are not set."""


Prologue = LayerNorm | nn.GELU | None


@dataclass(frozen=True)
class LowRankLogits:
    """What adapters add to the logits, as factors, because the sum for a whole batch would not fit.

    `inner` `[tokens, rank]` has the tokens of each group one after another, as many in each; `outer`
    `[groups, rank, vocab]`. `add_gradient` takes in the gradient of `outer`, where that is trained.
    """

    inner: Float[Tensor, "tokens rank"]
    outer: Float[Tensor, "groups rank vocab"]
    add_gradient: Callable[[Tensor], None] | None = None

    def pick(self, places: Int[Tensor, " picked"]) -> LowRankLogits:
        """Returns the update of some tokens; there is one group."""
        return LowRankLogits(self.inner[places], self.outer)


@runtime_checkable
class ActiveAdapters(Protocol):
    """What the network asks at each adapted projection."""

    def project(
        self, site: str, linear: Linear, before: Prologue, x: Float[Tensor, "rows time inputs"]
    ) -> Float[Tensor, "rows time outputs"]:
        """Returns the projection of `before(x)` plus the update of the adapters at `site`."""

    def low_rank_logits(self, hidden: Float[Tensor, "rows time width"]) -> LowRankLogits | None:
        """Returns what the adapters add to the logits of these hidden states."""


class KVCache:
    """Keys and values of a batch, allocated once, with a length per row.

    Rows may have different lengths: prompts are padded on the right, and what a row wrote beyond its length is
    masked until its own later tokens overwrite it. A mask hides finite values only (0 * NaN is NaN), so a row that is
    given up is zeroed, as far as it was written: whoever gets it next depends on nothing that was in it.
    """

    def __init__(self, config: GPT2Config, rows: int, max_tokens: int, like: Tensor) -> None:
        shape = (config.layers, 2, rows, config.heads, max_tokens, config.head_dim)
        self.buffer = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=like.device)
        self.places = torch.arange(rows, device=like.device)[:, None]
        self.used = 0
        self.written, self.first = [0] * rows, 0

    @property
    def capacity(self) -> int:
        """Tokens for which a row has room."""
        return self.buffer.shape[4]

    def write(self, layer: int, positions: Tensor, fresh: Float[Tensor, "rows time 2 heads head_dim"]) -> Tensor:
        """Stores keys and values at `positions` `[rows, time]`; returns all, `[2, rows, heads, used, head_dim]`."""
        store = self.buffer[layer]
        store[:, self.places, :, positions] = fresh
        return store[:, :, :, : self.used]

    def note_written(self, end: int) -> None:
        """Takes note that each row was written up to position `end` at most."""
        for row in range(self.first, self.first + self.buffer.shape[2]):
            self.written[row] = max(self.written[row], end)

    def view(self, begin: int, end: int, used: int) -> KVCache:
        """Returns the rows from `begin` to `end` in the same memory; `used` is the largest of their lengths."""
        part = copy.copy(self)
        part.buffer, part.lengths, part.used = self.buffer[:, :, begin:end], self.lengths[begin:end], used
        part.places, part.first = self.places[: end - begin], self.first + begin
        return part

    def keep_rows(self, rows: Tensor) -> None:
        """Makes these rows, in this order and perhaps more than once, the cache."""
        self.buffer, self.lengths = self.buffer[:, :, rows], self.lengths[rows]
        self.places = torch.arange(len(rows), device=rows.device)[:, None]
        self.written = [max(self.written)] * len(rows)

    def truncate(self, row: int, length: int) -> None:
        """Zeroes what a row wrote from position `length` on."""
        if self.written[row] > length:
            self.buffer[:, :, row, :, length : self.written[row]] = 0
        self.written[row] = length

    def move(self, source: int, target: int, length: int) -> None:
        """Moves a row, of which `length` tokens count, to another index; nothing of either row's past is left."""
        self.truncate(target, 0)
        self.buffer[:, :, target, :, :length] = self.buffer[:, :, source, :, :length]
        self.lengths[target] = self.lengths[source]
        self.written[target] = length
        self.truncate(source, 0)


@dataclass
class Context:
    """What one forward pass carries from block to block."""

    adapters: ActiveAdapters | None
    cache: KVCache | None
    positions: Tensor
    mask: Tensor | None


class Attention(nn.Module):
    """Causal self-attention (Vaswani et al. 2017, section 3.2) with fused q, k and v."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.c_attn = Linear(config.width, 3 * config.width)
        self.c_proj = Linear(config.width, config.width)
        self.layer, self.heads = layer, config.heads
        self.scale = 1 / math.sqrt(config.head_dim) / (layer + 1 if config.scale_by_layer else 1)

    def forward(
        self, x: Float[Tensor, "rows time width"], norm: LayerNorm, context: Context
    ) -> Float[Tensor, "rows time width"]:
        """Returns the attention's contribution to the residual stream `x`."""
        rows, time, width = x.shape
        fused = project(self.c_attn, f"h.{self.layer}.attn.c_attn", norm, x, context.adapters)
        parts = fused.view(rows, time, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        if context.cache is not None:
            cached = context.cache.write(self.layer, context.positions, parts[:, :, 1:])
            if context.mask is not None:
                k, v = cached
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=context.mask, is_causal=context.mask is None, scale=self.scale
        )
        mixed = mixed.transpose(1, 2).reshape(rows, time, width)
        return project(self.c_proj, f"h.{self.layer}.attn.c_proj", None, mixed, context.adapters)


class MLP(nn.Module):
    """Two projections with GELU between them; the tanh form is GPT-2's own (Hendrycks and Gimpel 2016)."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.c_fc = Linear(config.width, config.inner)
        self.c_proj = Linear(config.inner, config.width)
        self.layer, self.act = layer, nn.GELU(approximate=config.gelu)

    def forward(
        self, x: Float[Tensor, "rows time width"], norm: LayerNorm, context: Context
    ) -> Float[Tensor, "rows time width"]:
        """Returns the MLP's contribution to the residual stream `x`."""
        inner = project(self.c_fc, f"h.{self.layer}.mlp.c_fc", norm, x, context.adapters)
        return project(self.c_proj, f"h.{self.layer}.mlp.c_proj", self.act, inner, context.adapters)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.width, eps=config.epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = LayerNorm(config.width, eps=config.epsilon)
        self.mlp = MLP(config, layer)

    def forward(self, x: Float[Tensor, "rows time width"], context: Context) -> Float[Tensor, "rows time width"]:
        """Returns the residual stream after the block."""
        x = x + self.attn(x, self.ln_1, context)
        result: Tensor = x + self.mlp(x, self.ln_2, context)
        return result


class GPT2(nn.Module):
    """The frozen base. `forward` gives hidden states; `logits` applies the head to those that need it."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.wte = Embedding(config.vocab_size, config.width)
        self.wpe = Embedding(config.context, config.width)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.ln_f = LayerNorm(config.width, eps=config.epsilon)
        self.lm_head = None if config.tied else Linear(config.width, config.vocab_size, bias=False)
        self.prepacked_head: Linear | None = None

    def iter_linears(self) -> Iterator[Linear]:
        """Yields every projection of the blocks that an adapter may change."""
        for name, module in self.named_modules():
            if name.endswith(TARGETS) and isinstance(module, Linear):
                yield module

    @property
    def head(self) -> Float[Tensor, "vocab width"]:
        """The weight of the output projection: the token embeddings, unless the checkpoint unties them."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def add_to_head(self, delta: Float[Tensor, "vocab width"]) -> None:
        """Changes the head; the token embeddings stay as they are, also where they were the head."""
        weight = self.head.float() + delta.to(self.head.device)
        self.lm_head = Linear(delta.shape[1], delta.shape[0], bias=False, device="meta")
        self.lm_head.weight = nn.Parameter(weight.to(self.wte.weight.dtype), requires_grad=False)
        if self.prepacked_head is not None:
            self.prepacked_head = self.prepacked_head.with_weight(weight)

    def forward(
        self,
        tokens: Int[Tensor, "rows time"],
        adapters: ActiveAdapters | None = None,
        cache: KVCache | None = None,
        noise: Float[Tensor, "rows time width"] | None = None,
        checkpoint_blocks: bool = False,
        positions: Int[Tensor, "rows time"] | None = None,
    ) -> Float[Tensor, "rows time width"]:
        """Returns the hidden states after the last norm.

        `noise` is added to the token embeddings. `checkpoint_blocks` keeps only the input of each block for the
        backward pass, which computes the block again (Chen et al. 2016, arXiv:1604.06174).
        With a cache the tokens continue each row at its own length; the caller sets the lengths afterwards
        (`generate` does), because rows padded on the right grow by less than `time`. Positions beyond the
        context are the caller's error and raise `IndexError`.
        `positions` that begin anew at 0 within a row mark documents that do not see each other (no cache then).
        """
        time = tokens.shape[1]
        steps = torch.arange(time, device=tokens.device)
        if cache is None:
            if time > self.config.context:
                raise IndexError(f"{time} tokens exceed the context of {self.config.context}")
            if positions is None:
                context = Context(adapters, None, steps[None].expand(tokens.shape[0], -1), None)
            else:
                context = Context(adapters, None, positions, mask_documents(positions, self.wpe.weight.dtype))
        else:
            context = self._continue(steps, adapters, cache)
        x = self.wte(tokens) + self.wpe(context.positions)
        if noise is not None:
            x = x + noise.to(x)
        for block in self.h:
            if checkpoint_blocks:
                x = checkpoint(block, x, context, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, context)
        result: Tensor = self.ln_f(x)
        return result

    def _continue(self, steps: Tensor, adapters: ActiveAdapters | None, cache: KVCache) -> Context:
        positions = cache.lengths[:, None] + steps[None]
        fresh = cache.used == 0
        cache.used += steps.shape[0]
        if cache.used > cache.capacity:
            raise IndexError(f"{cache.used} tokens exceed the cache of {cache.capacity}")
        cache.note_written(cache.used)
        if fresh:
            return Context(adapters, cache, positions, None)
        keys = torch.arange(cache.used, device=steps.device)
        mask = build_mask(keys[None, None] <= positions[:, :, None], self.wpe.weight.dtype)
        return Context(adapters, cache, positions, mask)

    def logits(
        self, hidden: Float[Tensor, "rows time width"], adapters: ActiveAdapters | None
    ) -> Float[Tensor, "rows time vocab"]:
        """Returns the scores of the next token for each hidden state, under the adapters that it was computed with."""
        scores = F.linear(hidden, self.head) if self.prepacked_head is None else self.prepacked_head(hidden)
        if adapters is not None and (update := adapters.low_rank_logits(hidden)) is not None:
            groups = scores.view(len(update.outer), -1, scores.shape[-1])
            groups.baddbmm_(update.inner.view(*groups.shape[:2], -1), update.outer)
        return scores


def mask_documents(positions: Int[Tensor, "rows time"], dtype: torch.dtype) -> Float[Tensor, "rows 1 time time"]:
    """Returns what is added to the attention's scores: each token sees those before it in its own document."""
    document = (positions == 0).cumsum(1)
    return build_mask((document[:, :, None] == document[:, None, :]).tril_(), dtype)


def build_mask(seen: Bool[Tensor, "rows time keys"], dtype: torch.dtype) -> Float[Tensor, "rows 1 time keys"]:
    """Returns what is added to the attention's scores so that each token sees what it may.

    It is made once for all layers; a mask of booleans would be turned into this one in each.
    """
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)[:, None]


def apply_prologue(before: Prologue, x: Float[Tensor, "*shape width"]) -> Float[Tensor, "*shape width"]:
    """Returns the input of a projection: the norm or activation of `x`, or `x`."""
    return x if before is None else before(x)


def project(
    linear: Linear,
    site: str,
    before: Prologue,
    x: Float[Tensor, "rows time inputs"],
    adapters: ActiveAdapters | None,
) -> Float[Tensor, "rows time outputs"]:
    """Returns the frozen projection of `before(x)`, with the adapters' update where there are any."""
    if adapters is not None:
        return adapters.project(site, linear, before, x)
    result: Tensor = linear(apply_prologue(before, x))
    return result
