"""Loading a base, wherever `checkpoint.find_base` finds it: each tensor is read, hashed, converted and let go in turn.

So the peak is the weights in their dtype and the largest tensor; see `stored_weights.py`. No code from a checkpoint
runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_gpt2.core.errors import CorruptError, MismatchError
from lora_gpt2.data.tokenizer import Tokenizer
from lora_gpt2.model.checkpoint import Checkpoint, name_everywhere
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.gpt2 import GPT2, Linear
from lora_gpt2.model.quantize import QuantizedLinear, check_quantization
from lora_gpt2.model.runtime import Runtime
from lora_gpt2.model.stored_weights import Fingerprint, StoredWeights

SUMMED_VALUES = 2**22
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


@dataclass(frozen=True, kw_only=True)
class Base:
    """A loaded base; its weights are never written."""

    name: str
    folder: Path
    config: GPT2Config
    model: GPT2
    tokenizer: Tokenizer
    fingerprint: str
    runtime: Runtime


def load_base(name: str, runtime: Runtime, quantize: str = "none") -> Base:
    """Loads a base onto a device, frozen, in evaluation mode; `quantize` keeps its projections in int8 or nf4.

    Raises:
        NotFoundError, ResourceError: see `find_base`.
        CorruptError: a tensor is missing, has the wrong shape or cannot be read.
        MismatchError: the configuration is not a GPT-2 that we run, or the tokenizer does not fit it.
    """
    if quantize != "none":
        check_quantization(quantize, runtime.device)
    checkpoint = Checkpoint.open(name)
    folder, config, tokenizer = checkpoint.folder, checkpoint.config, checkpoint.load_tokenizer()
    if tokenizer.vocab_size > config.vocab_size:
        raise MismatchError(
            f"the tokenizer in {folder} has ids up to {tokenizer.vocab_size - 1}, the model has {config.vocab_size}",
            "copy tokenizer and weights from the same checkpoint",
        )
    with torch.device("meta"):
        model = GPT2(config)
    weights = StoredWeights(checkpoint)
    fingerprint = Fingerprint(checkpoint, weights.files)
    _check_shapes(weights.shapes, {key: tensor.shape for key, tensor in model.state_dict().items()}, folder)
    for key, stored in weights:
        fingerprint.add(key, stored)
        tensor = (stored.t() if key.endswith(TRANSPOSED) else stored).to(runtime.device, runtime.dtype, copy=True)
        del stored
        tensor = tensor.contiguous()
        _check_finite(tensor, key, folder)
        _assign(model, key, tensor, quantize)
    model.requires_grad_(False).eval()
    if runtime.device.type == "cuda":
        model.pad_head()
    return Base(
        name=name_everywhere(name),
        folder=folder,
        config=config,
        model=model,
        tokenizer=tokenizer,
        fingerprint=fingerprint.finish(),
        runtime=runtime,
    )


def _check_shapes(found: dict[str, tuple[int, ...]], expected: dict[str, torch.Size], folder: Path) -> None:
    for key, shape in expected.items():
        if key not in found:
            raise CorruptError(f"{folder}: the tensor {key} is missing", "copy the checkpoint again")
        stored = found[key][::-1] if key.endswith(TRANSPOSED) else found[key]
        if stored != tuple(shape):
            raise CorruptError(f"{folder}: {key} has shape {stored}, expected {tuple(shape)}", "check config.json")
    if extra := sorted(set(found) - set(expected)):
        raise MismatchError(f"{folder}: {extra[0]} is not part of a GPT-2", "use a GPT-2 checkpoint")


def _check_finite(tensor: Tensor, key: str, folder: Path) -> None:
    """Raises `CorruptError` for NaN and infinity; a sum, which is quick, is finite where every value is."""
    for part in torch.split(tensor.flatten(), SUMMED_VALUES):  # which become float32
        if not torch.isfinite(part.sum(dtype=torch.float32)) and not torch.isfinite(part).all():
            what = f"{folder}: {key} holds NaN or infinity as {str(tensor.dtype).removeprefix('torch.')}"
            raise CorruptError(what, "copy the checkpoint again")


def _assign(model: GPT2, key: str, tensor: Tensor, quantize: str) -> None:
    """Puts a tensor in its place; a projection's weight is quantised, if it is to be."""
    path, _, name = key.rpartition(".")
    module = model.get_submodule(path)
    if quantize != "none" and key.endswith(TRANSPOSED):
        parent, _, child = path.rpartition(".")
        assert isinstance(module, Linear)
        setattr(model.get_submodule(parent), child, QuantizedLinear(tensor, module.bias, quantize))
    else:
        setattr(module, name, nn.Parameter(tensor, requires_grad=False))
