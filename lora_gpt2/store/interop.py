"""PEFT's adapter format: writing it, and reading it from strangers.

Reading is closed: a key of `adapter_config.json` that we do not implement must be switched off, or the adapter is
refused by that key's name. Patterns in it are compared as plain module suffixes and never run as expressions; sizes
come from the tensors, after their number and shapes have been checked against the base.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lora_gpt2.core.errors import CorruptError, MismatchError, NotFoundError
from lora_gpt2.model.gpt2 import TARGETS, GPT2Config
from lora_gpt2.model.lora import Adapter, LoraUpdate, list_sites, target_of
from lora_gpt2.store.manifest import PEFT_CONFIG, WEIGHTS

PREFIX = "base_model.model.transformer."
TENSOR_NAME = re.compile(r"base_model\.model\.transformer\.(h\.\d{1,4}\.[a-z_.]+)\.lora_([AB])\.weight")
SUFFIX = re.compile(r"\^?[A-Za-z0-9_.]{1,100}")
MAX_CONFIG_BYTES = 2**20
READ_KEYS = frozenset(
    {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "layers_to_transform"}
)
FREE_KEYS = frozenset(
    {"base_model_name_or_path", "revision", "task_type", "inference_mode", "fan_in_fan_out", "lora_dropout",
     "peft_version", "layers_pattern", "auto_mapping"}
)  # fmt: skip
OFF_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),
    "megatron_core": ("megatron.core",),
    "qalora_group_size": (16,),
}


def to_peft(adapter: Adapter, base_name: str, config: GPT2Config) -> dict[str, bytes]:
    """Returns the two files that PEFT needs, by name."""
    tensors: dict[str, Tensor] = {}
    for site, update in adapter.updates.items():
        tensors[f"{PREFIX}{site}.lora_A.weight"] = update.a.float().contiguous()
        tensors[f"{PREFIX}{site}.lora_B.weight"] = update.b.float().contiguous()
    values = json.dumps(build_peft_config(adapter, base_name, config), indent=2) + "\n"
    return {WEIGHTS: save(tensors, metadata={"format": "pt"}), PEFT_CONFIG: values.encode()}


def build_peft_config(adapter: Adapter, base_name: str, config: GPT2Config) -> dict[str, Any]:
    """Returns PEFT's `LoraConfig` for an adapter; the commonest rank and alpha lead, the rest become patterns.

    Where not every layer has every target, the modules are named one by one.
    """
    updates = adapter.updates
    (rank, alpha), _ = Counter((u.rank, u.alpha) for u in updates.values()).most_common(1)[0]
    targets = [target for target in TARGETS if any(target_of(site) == target for site in updates)]
    if set(updates) != set(list_sites(config, tuple(targets))):
        targets = list(updates)
    whole = {
        target
        for target in TARGETS
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
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": True, "use_rslora": next(iter(updates.values())).rslora, "target_modules": targets,
        "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern, "inference_mode": True,
    }  # fmt: skip


def from_peft(weights: bytes, config_bytes: bytes, config: GPT2Config, where: str) -> Adapter:
    """Returns the adapter in PEFT's two files, checked against the base's shape.

    Raises:
        CorruptError: not JSON, not safetensors, a missing, unpaired or non-finite tensor, a rank that disagrees.
        MismatchError: a feature that we do not implement, or a shape of another base.
    """
    values = _parse_config(config_bytes, where)
    try:
        tensors = load(weights)
    except (SafetensorError, ValueError, OverflowError, MemoryError) as error:
        raise CorruptError(f"{where}: {WEIGHTS} is damaged: {error}", "restore it, or train again") from error
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = TENSOR_NAME.fullmatch(name)
        if match is None:
            raise MismatchError(
                f"{where}: the tensor {name[:120]} is not part of a GPT-2 LoRA",
                "adapters change c_attn, attn.c_proj, mlp.c_fc and mlp.c_proj (README, Formats)",
            )
        halves.setdefault(match[1], {})[match[2]] = tensor
    _check_sites(set(halves), values, config, where)
    ordered = [site for site in list_sites(config) if site in halves]
    return Adapter({site: _build_update(site, halves[site], values, config, where) for site in ordered})


def read_peft_folder(folder: Path, config: GPT2Config) -> Adapter:
    """Returns the adapter in a folder that PEFT saved."""
    for name in (WEIGHTS, PEFT_CONFIG):
        if not (folder / name).is_file():
            old = (
                " (adapter_model.bin is a pickle, which may run code)"
                if (folder / "adapter_model.bin").exists()
                else ""
            )
            raise NotFoundError(f"{folder} has no {name}{old}", "save it with PEFT's save_pretrained")
    if (folder / PEFT_CONFIG).stat().st_size > MAX_CONFIG_BYTES:
        raise CorruptError(f"{folder / PEFT_CONFIG} is larger than any configuration", "restore it from a copy")
    return from_peft((folder / WEIGHTS).read_bytes(), (folder / PEFT_CONFIG).read_bytes(), config, str(folder))


def _parse_config(content: bytes, where: str) -> dict[str, Any]:
    place = f"{where}: {PEFT_CONFIG}"
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{place} is not JSON", "restore it from a copy") from error
    if not isinstance(values, dict):
        raise CorruptError(f"{place} is not an object", "restore it from a copy")
    for key, value in values.items():
        if key in READ_KEYS or key in FREE_KEYS:
            continue
        if key in OFF_VALUES and any(value is off or value == off for off in OFF_VALUES[key]):
            continue
        if key in OFF_VALUES or value not in (None, False, {}, []):
            text = f"{place}: {key[:60]} = {str(value)[:60]!r} is not supported"
            raise MismatchError(text, "only plain LoRA and rsLoRA on GPT-2's four projections are")
    _check_types(values, place)
    return values


def _check_types(values: Mapping[str, Any], place: str) -> None:
    _check_number(values, "r", 8, place)
    _check_number(values, "lora_alpha", 8, place)
    layers = values.get("layers_to_transform")
    if layers is not None and not all(
        type(layer) is int for layer in (layers if isinstance(layers, list) else [layers])
    ):
        raise CorruptError(f"{place}: layers_to_transform is not a list of layers", "restore it from a copy")
    if not isinstance(values.get("use_rslora", False), bool):
        raise CorruptError(f"{place}: use_rslora is not true or false", "restore it from a copy")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = values.get(key) or {}
        if not isinstance(pattern, dict) or not all(SUFFIX.fullmatch(str(k)) for k in pattern):
            raise MismatchError(f"{place}: {key} holds an expression", "name modules plainly, such as attn.c_attn")
        for name in pattern:
            _check_number(pattern, name, 0, f"{place}: {key}")


def _check_number(values: Mapping[str, Any], key: str, default: int, place: str) -> None:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 65536:
        raise CorruptError(f"{place}: {key} is {str(value)[:40]}, expected a positive number", "restore it from a copy")


def _lookup(pattern: Mapping[str, Any] | None, site: str, default: Any) -> Any:
    for key, value in (pattern or {}).items():
        plain = key.removeprefix("^")
        if f"transformer.{site}" == plain or f"transformer.{site}".endswith(f".{plain}"):
            return value
    return default


def _check_sites(found: set[str], values: Mapping[str, Any], config: GPT2Config, where: str) -> None:
    known = set(list_sites(config))
    if extra := sorted(found - known):
        raise MismatchError(f"{where}: {extra[0]} is not in this base of {config.layers} layers", "use its own base")
    if not found:
        raise CorruptError(f"{where}: {WEIGHTS} holds no adapter", "restore it, or train again")
    targets, layers = values.get("target_modules"), values.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    if targets == "all-linear":
        targets = list(TARGETS)
    if not isinstance(targets, list):  # an expression, which we do not run: the tensors say what it meant
        return
    for site in known:
        wanted = any(f"transformer.{site}".endswith(f".{t}") for t in targets)
        if wanted and site not in found and (layers is None or int(site.split(".")[1]) in layers):
            raise CorruptError(f"{where}: the tensors of {site} are missing", "restore it, or use its own base")


def _build_update(
    site: str, halves: Mapping[str, Tensor], values: Mapping[str, Any], config: GPT2Config, where: str
) -> LoraUpdate:
    if set(halves) != {"A", "B"}:
        missing = "B" if "A" in halves else "A"
        raise CorruptError(f"{where}: lora_{missing} of {site} is missing", "restore it, or train again")
    a, b = halves["A"], halves["B"]
    inputs, outputs = config.shape_of(target_of(site))
    rank = int(_lookup(values.get("rank_pattern"), site, values.get("r", 8)))
    if a.ndim != 2 or b.ndim != 2 or (a.shape[1], b.shape[0]) != (inputs, outputs):
        shapes = f"A {tuple(a.shape)}, B {tuple(b.shape)}"
        raise MismatchError(
            f"{where}: {site} has {shapes}; this base needs A [rank, {inputs}], B [{outputs}, rank]", "use its own base"
        )
    if (a.shape[0], b.shape[1]) != (rank, rank):
        raise CorruptError(f"{where}: {site} has rank {a.shape[0]}, its configuration says {rank}", "restore it")
    for name, tensor in (("A", a), ("B", b)):
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise CorruptError(f"{where}: lora_{name} of {site} holds NaN or infinity", "train again: it diverged")
    alpha = float(_lookup(values.get("alpha_pattern"), site, values.get("lora_alpha", 8)))
    return LoraUpdate(a.float(), b.float(), alpha, bool(values.get("use_rslora")))
