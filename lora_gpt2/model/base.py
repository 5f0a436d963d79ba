"""Loading and naming a base, wherever `checkpoint.find_base` finds it.

Only safetensors are read, never pickles, and no code from a checkpoint runs. The fingerprint covers the shape and
every stored tensor's bytes, so an adapter is never applied to another base of the same shape; it is computed once per
file (kept beside size, time and inode) at about 1 GB/s.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lora_gpt2.core.dirs import find_cache_dir
from lora_gpt2.core.errors import CorruptError, MismatchError, NotFoundError
from lora_gpt2.core.files import write_atomic
from lora_gpt2.core.fingerprint import FINGERPRINT_DIGITS, canonical_json, fingerprint_json
from lora_gpt2.core.memory import is_out_of_memory
from lora_gpt2.core.strict_json import load_json
from lora_gpt2.data.tokenizer import Tokenizer
from lora_gpt2.model.checkpoint import Checkpoint, list_bundled
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.gpt2 import GPT2, Linear
from lora_gpt2.model.quantize import QuantizedLinear, check_quantization
from lora_gpt2.model.runtime import Runtime

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
FINGERPRINT = re.compile(rb"[0-9a-f]{%d}" % FINGERPRINT_DIGITS)
BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")


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


def list_weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a checkpoint: one, or the shards of its index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickled = (
            " (pytorch_model.bin is a pickle, which may run code)" if (folder / "pytorch_model.bin").exists() else ""
        )
        raise NotFoundError(
            f"{folder} has no model.safetensors{pickled}",
            "save it again with transformers: model.save_pretrained(folder, safe_serialization=True)",
        )
    try:
        names = sorted(set(load_json(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CorruptError(f"{index} is not a list of shards", "copy the checkpoint again") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise CorruptError(f"{index} names the shard {name!r}, which is not in the folder", "copy it again")
    return [folder / name for name in names]


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
    state = dict(_read_state(list_weight_files(folder), config))
    _check_state(state, {key: tensor.shape for key, tensor in model.state_dict().items()}, folder)
    for key in list(state):  # each copied, so that the file need not stay mapped
        tensor = state.pop(key).to(runtime.device, runtime.dtype, copy=True).contiguous()
        _check_finite(tensor, key, folder)
        _assign(model, key, tensor, quantize)
    model.requires_grad_(False).eval()
    if runtime.device.type == "cuda":
        model.pad_head()
    known = name in list_bundled() or not Path(name).is_dir()
    shown = name if known else str(folder.resolve())  # so that an adapter finds its base from any folder
    return Base(
        name=shown,
        folder=folder,
        config=config,
        model=model,
        tokenizer=tokenizer,
        fingerprint=fingerprint_base(checkpoint),
        runtime=runtime,
    )


def _check_state(state: dict[str, Tensor], expected: dict[str, torch.Size], folder: Path) -> None:
    for key, shape in expected.items():
        if key not in state:
            raise CorruptError(f"{folder}: the tensor {key} is missing", "copy the checkpoint again")
        if state[key].shape != shape:
            found = tuple(state[key].shape)
            raise CorruptError(f"{folder}: {key} has shape {found}, expected {tuple(shape)}", "check config.json")
    if extra := sorted(set(state) - set(expected)):
        raise MismatchError(f"{folder}: {extra[0]} is not part of a GPT-2", "use a GPT-2 checkpoint")


def _check_finite(tensor: Tensor, key: str, folder: Path) -> None:
    """Raises `CorruptError` for NaN and infinity; the sum, which is quick, is finite where every value is."""
    if not torch.isfinite(tensor.sum(dtype=torch.float32)) and not torch.isfinite(tensor).all():
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


def _read_state(files: list[Path], config: GPT2Config) -> list[tuple[str, Tensor]]:
    state = []
    for key, tensor in _iter_tensors(files):
        if BUFFERS.fullmatch(key) or (key == "lm_head.weight" and config.tie_word_embeddings):
            continue
        state.append((key, tensor.t() if key.endswith(TRANSPOSED) else tensor))
    return state


def _iter_tensors(files: list[Path]) -> list[tuple[str, Tensor]]:
    found = []
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                found += [(key.removeprefix("transformer."), file.get_tensor(key)) for key in file.keys()]  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            raise CorruptError(f"{path} cannot be read: {error}", "copy the checkpoint again") from error
    return found


def read_stored_dtype(folder: Path) -> torch.dtype:
    """Returns the dtype in which a base's embeddings are stored."""
    return next(tensor.dtype for name, tensor in _iter_tensors(list_weight_files(folder)) if name == "wte.weight")


def fingerprint_base(checkpoint: Checkpoint) -> str:
    """Returns the fingerprint of a base: its shape and its tensors' names, dtypes and bytes."""
    files, config = list_weight_files(checkpoint.folder), checkpoint.config
    stats = [(str(f.resolve()), s.st_size, s.st_mtime_ns, s.st_ino) for f in files for s in [f.stat()]]
    key = fingerprint_json([config.to_fingerprint(), stats])
    cached = find_cache_dir() / "fingerprints" / key
    try:
        remembered = cached.read_bytes()
        if FINGERPRINT.fullmatch(remembered):
            return remembered.decode("ascii")
    except OSError:
        pass
    digest = hashlib.sha256(canonical_json(config.to_fingerprint()))
    for name, tensor in sorted(_iter_tensors(files), key=lambda pair: pair[0]):
        if BUFFERS.fullmatch(name) or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    value = digest.hexdigest()[:FINGERPRINT_DIGITS]
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(cached, value.encode())
    except OSError:
        pass  # a cache that cannot be written only costs time
    return value
