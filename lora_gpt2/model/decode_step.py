"""A decode step, a token for each sequence: by the kernels of `layer_kernels` where they run, else like any pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lora_gpt2.model.bank import AdapterBank
from lora_gpt2.model.batch_adapters import BatchAdapters
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.gpt2 import GPT2, Block, Linear, Prologue
from lora_gpt2.model.kernels import check_kernels, has_triton
from lora_gpt2.model.kv_cache import KVCache
from lora_gpt2.model.scoring import next_logits

MAX_ROWS = 32
"""For more, plain products: they no longer wait for the weights alone."""
MAX_WIDTH, MAX_HEAD_WIDTH = 8192, 128
TENSOR_CORES = (8, 0)
"""The compute capability from which on Triton's products run on tensor cores."""


def decode_logits(
    model: GPT2, tokens: Int[Tensor, "batch 1"], adapters: BatchAdapters | None, cache: KVCache
) -> Float[Tensor, "batch vocab"]:
    """Returns the float32 logits of the token that follows each row.

    The new tokens are stored behind the lengths that `cache` has on the device. Its counts on the host are not to be
    relied on afterwards; see `KVCache.record_replay`.
    """
    if not can_use_kernels(model, len(tokens)):
        return next_logits(model, tokens, adapters, cache)[0]
    return model.logits(compute_hidden(model, tokens, adapters, cache), adapters)[:, 0].float()


def can_use_kernels(model: GPT2, num_rows: int) -> bool:
    """True if the kernels compute a step of so many rows: on a GPU that has them, with 16-bit weights as they are."""
    weight, config = model.wte.weight, model.config
    is_size = num_rows <= MAX_ROWS and config.n_embd <= MAX_WIDTH and config.head_dim <= MAX_HEAD_WIDTH
    is_kind = weight.element_size() == 2 and all(type(linear) is Linear for linear in model.iter_linears())
    return is_size and is_kind and weight.device.type == "cuda" and has_layer_kernels()


@lru_cache(maxsize=1)
def has_layer_kernels() -> bool:
    """True if the kernels run on this GPU, and compute what they should."""
    return (
        has_triton()
        and torch.cuda.get_device_capability() >= TENSOR_CORES
        and check_kernels(_are_right, "kernels of the decode step")
    )


@torch.inference_mode()
def _are_right(device: torch.device, width: int = 320, rows: int = 17, length: int = 150) -> bool:
    """Decodes a token with random weights, twice, and compares; in several blocks of inputs, rows and keys."""
    draw = torch.Generator().manual_seed(0)
    config = GPT2Config(
        vocab_size=16,
        n_positions=length + 1,
        n_embd=width,
        n_layer=1,
        n_head=width // 32,
        n_inner=4 * width,
        layer_norm_epsilon=1e-5,
        gelu_approximate="tanh",
        tie_word_embeddings=True,
        scale_attn_by_inverse_layer_idx=False,
        eos_id=0,
    )
    model = GPT2(config).to(device, torch.bfloat16)
    bank = AdapterBank(config, {"h.0.mlp.c_fc": 4}, 2, "inference", model.wte.weight)
    for tensor in (*model.parameters(), bank.flat, bank.scalings):
        tensor.copy_(torch.randn(tensor.shape, generator=draw) / width**0.25)
    weights = torch.tensor([[0.0, 1.0], [1.0, 0.5], [0.0, 0.0]])[[row % 3 for row in range(rows)]]
    adapters = BatchAdapters(bank, weights, slice(0, 2))
    prompt, token = (torch.randint(16, (rows, time), generator=draw).to(device) for time in (length, 1))

    def decode(compute: Callable[..., Tensor]) -> Tensor:
        cache = KVCache(config, rows, length + 1, model.wte.weight)
        model(prompt, adapters, cache)
        return compute(token, adapters, cache)

    return torch.allclose(decode(model), decode(partial(compute_hidden, model)), rtol=0.05, atol=0.05)


def compute_hidden(
    model: GPT2, tokens: Int[Tensor, "batch 1"], adapters: BatchAdapters | None, cache: KVCache
) -> Float[Tensor, "batch 1 width"]:
    """Returns the hidden states after the last norm, by the kernels."""
    from lora_gpt2.model import layer_kernels

    def project(site: str, linear: Linear, prologue: Prologue, x: Tensor, residual: Tensor | None = None) -> Tensor:
        factors = None if adapters is None else adapters.find_factors(site)
        h, z = layer_kernels.prepare(x, prologue, factors)
        return layer_kernels.project(h, linear, factors, z, residual)

    x = model.wte(tokens[:, 0]) + model.wpe(cache.lengths)
    for layer, stored in enumerate(cache.buffer):
        block = cast(Block, model.h[layer])
        attention, mlp, name = block.attn, block.mlp, f"h.{layer}"
        qkv = project(f"{name}.attn.c_attn", attention.c_attn, block.ln_1, x)
        heads = qkv.view(len(x), 3, attention.n_head, -1)
        attended = layer_kernels.attend(heads, stored, cache.lengths, attention.scale)
        x = project(f"{name}.attn.c_proj", attention.c_proj, None, attended, x)
        inner = project(f"{name}.mlp.c_fc", mlp.c_fc, block.ln_2, x)
        x = project(f"{name}.mlp.c_proj", mlp.c_proj, mlp.act, inner, x)
    hidden: Tensor = model.ln_f(x)[:, None]
    return hidden
