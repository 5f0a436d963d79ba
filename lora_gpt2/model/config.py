"""The shape of a GPT-2, from a Hugging Face `config.json`; never imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_gpt2.core.errors import MismatchError

ACTIVATIONS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh", "gelu": "none"}
HEAD = "lm_head"
MAX_SIZE = 1_048_576  # beyond any GPT-2: a damaged or hostile configuration


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2; `context` is the largest number of positions."""

    vocab_size: int
    context: int
    width: int
    layers: int
    heads: int
    inner: int
    epsilon: float
    gelu: str
    tied: bool
    scale_by_layer: bool
    eos_id: int

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    def shape_of(self, target: str) -> tuple[int, int]:
        """Returns (inputs, outputs) of one of `TARGETS`, or of the head."""
        d, i = self.width, self.inner
        blocks = {"attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d), "mlp.c_fc": (d, i), "mlp.c_proj": (i, d)}
        return (d, self.vocab_size) if target == HEAD else blocks[target]


def parse_config(values: Mapping[str, Any], where: str) -> GPT2Config:
    """Returns the shape described by a Hugging Face `config.json`; raises `MismatchError` for what we cannot run."""
    hint = "use a GPT-2 checkpoint: 'lora-gpt2 bases list'"
    if values.get("model_type") != "gpt2":
        raise MismatchError(f"{where}: model_type is {values.get('model_type')!r}, expected 'gpt2'", hint)
    if values.get("quantization_config"):
        raise MismatchError(f"{where}: the checkpoint is quantised", "use the 16- or 32-bit one it was made from")
    if values.get("add_cross_attention") or values.get("scale_attn_weights") is False:
        raise MismatchError(f"{where}: cross-attention and unscaled attention are not supported", hint)
    activation = values.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise MismatchError(f"{where}: activation {activation!r} is not one of {', '.join(ACTIVATIONS)}", hint)
    try:
        width = int(values.get("n_embd", 768))
        vocab_size = int(values.get("vocab_size", 50257))
        eos = values.get("eos_token_id", vocab_size - 1)
        config = GPT2Config(
            vocab_size=vocab_size, context=int(values.get("n_positions", 1024)), width=width,
            layers=int(values.get("n_layer", 12)), heads=int(values.get("n_head", 12)),
            inner=int(values.get("n_inner") or 4 * width), epsilon=float(values.get("layer_norm_epsilon", 1e-5)),
            gelu=ACTIVATIONS[activation], tied=bool(values.get("tie_word_embeddings", True)),
            scale_by_layer=bool(values.get("scale_attn_by_inverse_layer_idx", False)),
            eos_id=int(eos[0] if isinstance(eos, list) else eos),
        )  # fmt: skip
    except (TypeError, ValueError, OverflowError, IndexError) as error:
        raise MismatchError(f"{where}: a size in it is not a number", hint) from error
    largest = max(vocab_size, config.context, width, config.inner, config.layers * 1024)
    if (
        largest > MAX_SIZE
        or min(vocab_size, config.context, width, config.layers, config.heads) < 1
        or width % config.heads
    ):
        raise MismatchError(f"{where}: {width} wide, {config.heads} heads is not a GPT-2", hint)
    if not 0 <= config.eos_id < vocab_size:
        raise MismatchError(f"{where}: eos_token_id {config.eos_id} is outside the vocabulary of {vocab_size}", hint)
    return config
