"""The shape of a GPT-2, from a Hugging Face `config.json`; never imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_gpt2.core.errors import MismatchError
from lora_gpt2.core.printable import show_value

ACTIVATIONS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh", "gelu": "none"}
HEAD = "lm_head"
FINGERPRINT_KEYS = {
    "n_positions": "context",
    "n_embd": "width",
    "n_layer": "layers",
    "n_head": "heads",
    "n_inner": "inner",
    "layer_norm_epsilon": "epsilon",
    "gelu_approximate": "gelu",
    "tie_word_embeddings": "tied",
    "scale_attn_by_inverse_layer_idx": "scale_by_layer",
}
MAX_LAYERS = 1024
NO_EOS = -1
MAX_SIZE = 1_048_576  # beyond any GPT-2: a damaged or hostile configuration


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """The shape of a GPT-2, named as in Hugging Face's `config.json`; `gelu_approximate` is that of `nn.GELU`.

    `eos_id` is `NO_EOS` where the configuration names none of the vocabulary; the tokenizer mostly does.
    """

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    layer_norm_epsilon: float
    gelu_approximate: str
    tie_word_embeddings: bool
    scale_attn_by_inverse_layer_idx: bool
    eos_id: int

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    def shape_of(self, target: str) -> tuple[int, int]:
        """Returns (inputs, outputs) of one of `TARGETS`, or of the head."""
        d, i = self.n_embd, self.n_inner
        blocks = {"attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d), "mlp.c_fc": (d, i), "mlp.c_proj": (i, d)}
        return (d, self.vocab_size) if target == HEAD else blocks[target]

    def to_fingerprint(self) -> dict[str, Any]:
        """Returns the shape under the keys that the fingerprints in stored adapters were computed with."""
        return {FINGERPRINT_KEYS.get(key, key): value for key, value in vars(self).items()}


def parse_config(values: Mapping[str, Any], where: str) -> GPT2Config:
    """Returns the shape described by a Hugging Face `config.json`; raises `MismatchError` for what we cannot run."""
    hint = "use a GPT-2 checkpoint: 'lora-gpt2 bases list'"
    if values.get("model_type") != "gpt2":
        raise MismatchError(f"{where}: model_type is {show_value(values.get('model_type'))}, expected 'gpt2'", hint)
    if values.get("quantization_config"):
        raise MismatchError(f"{where}: the checkpoint is quantised", "use the 16- or 32-bit one it was made from")
    if values.get("add_cross_attention") or values.get("scale_attn_weights") is False:
        raise MismatchError(f"{where}: cross-attention and unscaled attention are not supported", hint)
    activation = values.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise MismatchError(
            f"{where}: activation {show_value(activation)} is not one of {', '.join(ACTIVATIONS)}", hint
        )
    read = _Reader(values, where, hint)
    width, vocab_size = read.size("n_embd", 768), read.size("vocab_size", 50257)
    heads, eos = read.size("n_head", 12), values.get("eos_token_id", vocab_size - 1)
    eos_id = NO_EOS if eos is None else eos[0] if isinstance(eos, list) and eos else eos
    if width % heads:
        raise MismatchError(f"{where}: {width} wide, {heads} heads is not a GPT-2", hint)
    if not isinstance(eos_id, int) or isinstance(eos_id, bool):
        raise MismatchError(f"{where}: eos_token_id {show_value(eos_id)} is no token", hint)
    return GPT2Config(
        vocab_size=vocab_size,
        n_positions=read.size("n_positions", 1024),
        n_embd=width,
        n_layer=read.size("n_layer", 12, MAX_LAYERS),
        n_head=heads,
        n_inner=4 * width if values.get("n_inner") is None else read.size("n_inner", 0),
        layer_norm_epsilon=read.epsilon(),
        gelu_approximate=ACTIVATIONS[activation],
        tie_word_embeddings=read.switch("tie_word_embeddings", True),
        scale_attn_by_inverse_layer_idx=read.switch("scale_attn_by_inverse_layer_idx", False),
        eos_id=eos_id if 0 <= eos_id < vocab_size else NO_EOS,  # left at 50,256 in a smaller vocabulary
    )


@dataclass(frozen=True)
class _Reader:
    """Takes values out of a configuration, each of its own type and within its bounds."""

    values: Mapping[str, Any]
    where: str
    hint: str

    def size(self, key: str, default: int, largest: int = MAX_SIZE) -> int:
        value = self.values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
            raise self._refuse(key, f"a whole number from 1 to {largest:,}")
        return value

    def epsilon(self) -> float:
        value = self.values.get("layer_norm_epsilon", 1e-5)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 1e-12 <= value < 1:
            raise self._refuse("layer_norm_epsilon", "a number from 1e-12 to 1")
        return float(value)

    def switch(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self._refuse(key, "true or false")
        return value

    def _refuse(self, key: str, expected: str) -> MismatchError:
        return MismatchError(f"{self.where}: {key} is {show_value(self.values[key])}, expected {expected}", self.hint)
