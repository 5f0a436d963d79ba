"""A merged base as GGUF, for llama.cpp: its names, its metadata, and GPT-2's tokenizer.

Names and keys are those of llama.cpp's GPT-2 architecture (`gguf.constants`). Matrices are stored `[out, in]`;
norms, biases and positions in float32, as llama.cpp's own conversion does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_gpt2.core.errors import CheckFailed, MismatchError, ResourceError
from lora_gpt2.model.base import TRANSPOSED, Base
from lora_gpt2.model.config import GPT2Config

NAMES = {
    "transformer.wte.weight": "token_embd.weight",
    "transformer.wpe.weight": "position_embd.weight",
    "transformer.ln_f.weight": "output_norm.weight",
    "transformer.ln_f.bias": "output_norm.bias",
    "lm_head.weight": "output.weight",
}
MODULES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def check_gguf(config: GPT2Config) -> None:
    """Raises `ResourceError` without the package gguf, `MismatchError` for a base that llama.cpp would run wrongly."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ResourceError(
            "writing GGUF needs the package gguf, which is not installed", "pip install gguf"
        ) from error
    if config.gelu_approximate != "tanh" or config.scale_attn_by_inverse_layer_idx:
        raise MismatchError(
            "llama.cpp's GPT-2 has GELU by tanh and unscaled layers; this base has not", "leave GGUF out"
        )


def write_gguf(path: Path, state: Mapping[str, Tensor], base: Base) -> None:
    """Writes the tensors of a merged base, with everything llama.cpp needs to run it, into one file; reads it back.

    Raises `CheckFailed` if the file does not hold what was written.
    """
    import gguf

    config = base.config
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_name(base.name)
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    tokens, merges = base.tokenizer.list_vocabulary()
    padding = [f"[PAD{index}]" for index in range(len(tokens), config.vocab_size)]
    tokens += padding
    kinds = [gguf.TokenType.NORMAL] * len(tokens)
    kinds[len(kinds) - len(padding) :] = [gguf.TokenType.UNUSED] * len(padding)
    kinds[config.eos_id] = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config.eos_id)
    writer.add_eos_token_id(config.eos_id)
    named = {name_tensor(name): tensor.mT if name.endswith(TRANSPOSED) else tensor for name, tensor in state.items()}
    named.setdefault("output.weight", named["token_embd.weight"])
    arrays: dict[str, Any] = {}
    for name, tensor in named.items():
        is_matrix = tensor.ndim == 2 and name != "position_embd.weight"
        dtype = torch.float16 if is_matrix and tensor.dtype == torch.float16 else torch.float32
        arrays[name] = tensor.to(dtype).contiguous().numpy()
        writer.add_tensor(name, arrays[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    if set(found) != set(arrays) or not all(np.array_equal(found[name], array) for name, array in arrays.items()):
        raise CheckFailed(f"{path} does not hold what was written", "check the disk")


def name_tensor(name: str) -> str:
    """Returns llama.cpp's name of a tensor: `transformer.h.3.ln_1.bias` → `blk.3.attn_norm.bias`."""
    if name in NAMES:
        return NAMES[name]
    layer, _, rest = name.removeprefix("transformer.h.").partition(".")
    part, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{MODULES[part]}.{kind}"
