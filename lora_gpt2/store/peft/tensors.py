"""PEFT's adapter format: writing it, and reading it from strangers (the configuration: `peft/config.py`).

Sizes come from the tensors, after their number and shapes have been checked against the base.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from lora_gpt2.core.errors import CorruptError, MismatchError, NotFoundError
from lora_gpt2.core.files import read_regular, wrap_os_errors
from lora_gpt2.core.memory import check_room
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.gpt2 import ADAPTABLE
from lora_gpt2.model.lora import Adapter, LoraUpdate, list_sites, target_of
from lora_gpt2.store.manifest import MAX_FILE_BYTES, PEFT_CONFIG, WEIGHTS
from lora_gpt2.store.peft.config import MAX_CONFIG_BYTES, PeftSpec, module_of, parse_peft_config
from lora_gpt2.store.peft.loralib import load_tensors
from lora_gpt2.store.safetensors import pack_safetensors

PREFIX = "base_model.model."
COPIES, ROOM_BYTES = 2, 2**25  # safetensors' reader takes a copy, and must not run out of memory on the way
MAGNITUDE = "magnitude_vector"
TENSOR_NAME = re.compile(
    r"base_model\.model\.(?:(?:transformer\.)?(h\.\d{1,4}\.[a-z_.]+)|(lm_head))"
    r"\.lora_(?:([AB])\.weight|(magnitude_vector)(?:\.weight)?)"
)
"""PEFT's names; over `GPT2Model` alone, as for feature extraction, they are without `transformer.`."""
PICKLED = "adapter_model.bin"
FROZEN = {
    f"{PREFIX}lm_head.base_layer.weight": "head",
    f"{PREFIX}lm_head.weight": "head",
    f"{PREFIX}transformer.wte.weight": "embeddings",
    f"{PREFIX}wte.weight": "embeddings",
}
"""Weights of the base that PEFT saves beside the factors where the head or the vocabulary was touched."""
FrozenWeights = Callable[[str], Tensor]
"""From `head` or `embeddings` to the base's own weight, which a saved one must equal."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True, kw_only=True)
class PeftContent:
    """An adapter as it was saved; `magnitudes` `[out]` by site are DoRA's, of which nothing is in the updates."""

    spec: PeftSpec
    adapter: Adapter
    magnitudes: Mapping[str, Tensor]


def to_peft(adapter: Adapter, base_name: str, config: GPT2Config) -> dict[str, bytes]:
    """Returns the two files that PEFT needs, by name."""
    tensors: dict[str, Tensor] = {}
    for site, update in adapter.updates.items():
        tensors[f"{PREFIX}{module_of(site)}.lora_A.weight"] = update.a.float().contiguous()
        tensors[f"{PREFIX}{module_of(site)}.lora_B.weight"] = update.b.float().contiguous()
    values = json.dumps(build_peft_config(adapter, base_name, config), indent=2) + "\n"
    return {WEIGHTS: pack_safetensors(tensors, {"format": "pt"}), PEFT_CONFIG: values.encode()}


def build_peft_config(adapter: Adapter, base_name: str, config: GPT2Config) -> dict[str, Any]:
    """Returns PEFT's `LoraConfig` for an adapter; the commonest rank and alpha lead, the rest become patterns.

    Where not every layer has every target, the modules are named one by one.
    """
    updates = adapter.updates
    (rank, alpha), _ = Counter((u.rank, u.alpha) for u in updates.values()).most_common(1)[0]
    targets = [target for target in ADAPTABLE if any(target_of(site) == target for site in updates)]
    if set(updates) != set(list_sites(config, tuple(targets))):
        targets = list(updates)
    whole = {
        target
        for target in ADAPTABLE
        if len({(u.rank, u.alpha) for s, u in updates.items() if target_of(s) == target}) == 1
    }
    rank_pattern, alpha_pattern = {}, {}
    for site, update in updates.items():
        key = target_of(site) if target_of(site) in whole else site
        if update.rank != rank:
            rank_pattern[key] = update.rank
        if update.alpha != alpha:
            alpha_pattern[key] = update.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": True,
        "use_rslora": next(iter(updates.values())).use_rslora,
        "target_modules": targets,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "inference_mode": True,
    }


def from_peft(
    weights: bytes, config_bytes: bytes, config: GPT2Config, where: str, frozen: FrozenWeights | None = None
) -> Adapter:
    """Returns the adapter in PEFT's two files, checked against the base's shape; `frozen` as in `parse_peft`.

    Raises:
        CorruptError: not JSON, not safetensors, a missing, unpaired or non-finite tensor, a rank that disagrees.
        MismatchError: a feature that we do not implement, one that has to be converted, or a shape of another base.
    """
    content = parse_peft(weights, config_bytes, config, where, frozen)
    if content.spec.dora or content.spec.pissa:
        key = "use_dora" if content.spec.dora else "init_lora_weights = 'pissa'"
        raise MismatchError(f"{where}: {key} is not a plain LoRA", "'adapters import' converts it, with its base")
    return content.adapter


def parse_peft(
    weights: bytes, config_bytes: bytes, config: GPT2Config, where: str, frozen: FrozenWeights | None = None
) -> PeftContent:
    """Returns what PEFT's two files hold, variants included; raises as `from_peft`.

    Weights of the base among them must be those of `frozen`; without it they are refused.
    """
    spec = parse_peft_config(config_bytes, where, weights)
    check_room(COPIES * len(weights) + ROOM_BYTES)
    try:
        tensors = load(weights)
    except (SafetensorError, ValueError, KeyError, OverflowError) as error:
        raise CorruptError(f"{where}: {WEIGHTS} is damaged: {error}", "restore it, or train again") from error
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = TENSOR_NAME.fullmatch(name)
        if name in FROZEN and frozen is not None:
            _check_frozen(name, tensor, frozen(FROZEN[name]), where)
            continue
        if match is None or (match[4] == MAGNITUDE and not spec.dora):
            raise MismatchError(
                f"{where}: the tensor {name[:120]} is not part of a GPT-2 LoRA",
                "adapters change c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj and lm_head",
            )
        site, part = match[1] or match[2], match[3] or match[4]
        if part in halves.setdefault(site, {}):
            raise CorruptError(f"{where}: {WEIGHTS} has {name[:120]} twice, by two names", "save it again")
        halves[site][part] = tensor
    _check_sites(set(halves), spec, config, where)
    ordered = [site for site in list_sites(config) if site in halves]
    magnitudes = {site: _take_magnitude(site, halves[site], config, where) for site in ordered if spec.dora}
    return PeftContent(
        spec=spec,
        adapter=Adapter(updates={site: _build_update(site, halves[site], spec, config, where) for site in ordered}),
        magnitudes=magnitudes,
    )


def _check_frozen(name: str, saved: Tensor, own: Tensor, where: str) -> None:
    """Raises `MismatchError` unless a saved weight of the base is the base's, in the dtype in which it was saved."""
    if saved.shape != own.shape or not torch.equal(saved, own.to("cpu", saved.dtype)):
        raise MismatchError(
            f"{where}: {name} is not that of this base: it was trained over other weights, or trained itself",
            "use the base it was trained on: --base FOLDER",
        )


def read_peft_files(folder: Path) -> tuple[bytes, bytes]:
    """Returns the weights and the configuration in a folder that PEFT saved.

    Older ones have the weights as a pickle, of which PyTorch's restricted reader takes tensors and runs nothing.

    Raises:
        NotFoundError: one of the two is missing.
        CorruptError: the pickle holds anything but tensors.
    """
    is_pickled = not (folder / WEIGHTS).is_file() and (folder / PICKLED).is_file()
    for name in (PICKLED if is_pickled else WEIGHTS, PEFT_CONFIG):
        if not (folder / name).is_file():
            inside = sorted(str(path.parent) for path in folder.glob(f"*/{PEFT_CONFIG}"))
            hint = f"adapters are in {', '.join(inside[:4])}" if inside else "save it with PEFT's save_pretrained"
            raise NotFoundError(f"{folder} has no {name}", hint)
    with wrap_os_errors(f"read {folder}"):
        config = read_regular((folder / PEFT_CONFIG).resolve(), MAX_CONFIG_BYTES)
        if not is_pickled:
            return read_regular((folder / WEIGHTS).resolve(), MAX_FILE_BYTES), config
    tensors = load_tensors(folder / PICKLED)
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()):
        raise CorruptError(f"{folder / PICKLED} holds more than tensors", "save it again with PEFT's save_pretrained")
    return pack_safetensors({name: tensor.contiguous() for name, tensor in tensors.items()}), config


def _check_sites(found: set[str], spec: PeftSpec, config: GPT2Config, where: str) -> None:
    known = list_sites(config)
    if extra := sorted(found - set(known)):
        raise MismatchError(f"{where}: {extra[0]} is not in this base of {config.n_layer} layers", "use its own base")
    if not found:
        raise CorruptError(f"{where}: {WEIGHTS} holds no adapter", "restore it, or train again")
    for site in known:
        if site not in found and spec.is_target(site):
            raise CorruptError(f"{where}: the tensors of {site} are missing", "restore it, or use its own base")
        if site in found and not spec.is_target(site):
            raise MismatchError(
                f"{where}: the tensors of {site} are there, but its configuration does not name it",
                "PEFT ignores them: correct target_modules, or save it again",
            )


def _take_magnitude(site: str, halves: dict[str, Tensor], config: GPT2Config, where: str) -> Tensor:
    magnitude = halves.pop(MAGNITUDE, None)
    if magnitude is None or magnitude.numel() != config.shape_of(target_of(site))[1]:
        raise CorruptError(f"{where}: the magnitudes of {site} are missing or of another size", "restore it")
    _check_finite(magnitude, f"{where}: the magnitudes of {site}")
    return magnitude.float().flatten()


def _check_finite(tensor: Tensor, what: str) -> None:
    if tensor.dtype not in DTYPES or not torch.isfinite(tensor).all():
        raise CorruptError(
            f"{what} hold NaN or infinity, or are no numbers of 16 to 64 bits", "train again: it diverged"
        )


def _build_update(
    site: str, halves: Mapping[str, Tensor], spec: PeftSpec, config: GPT2Config, where: str
) -> LoraUpdate:
    if set(halves) != {"A", "B"}:
        missing = "B" if "A" in halves else "A"
        raise CorruptError(f"{where}: lora_{missing} of {site} is missing", "restore it, or train again")
    a, b = halves["A"], halves["B"]
    inputs, outputs = config.shape_of(target_of(site))
    rank = spec.rank_of(site)
    if a.ndim != 2 or b.ndim != 2 or (a.shape[1], b.shape[0]) != (inputs, outputs):
        shapes = f"A {tuple(a.shape)}, B {tuple(b.shape)}"
        raise MismatchError(
            f"{where}: {site} has {shapes}; this base needs A [rank, {inputs}], B [{outputs}, rank]", "use its own base"
        )
    if (a.shape[0], b.shape[1]) != (rank, rank):
        raise CorruptError(f"{where}: {site} has rank {a.shape[0]}, its configuration says {rank}", "restore it")
    for name, tensor in (("A", a), ("B", b)):
        _check_finite(tensor, f"{where}: the values of lora_{name} of {site}")
    return LoraUpdate(a.float(), b.float(), spec.alpha_of(site), spec.use_rslora)
