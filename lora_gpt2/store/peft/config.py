"""PEFT's `adapter_config.json` from strangers: a closed schema, and patterns that cannot run away.

A key that we do not implement must be switched off, or the adapter is refused by that key's name and with the reason.
Expressions (`target_modules`, `rank_pattern`, …) mean what they mean in PEFT, but run in RE2, whose time is linear and
whose memory is bounded; what RE2 cannot express is refused. Nothing is imported or called on the file's behalf.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import re2

from lora_gpt2.core.errors import CorruptError, MismatchError
from lora_gpt2.core.printable import shorten, show_value
from lora_gpt2.core.strict_json import load_json
from lora_gpt2.model.config import HEAD
from lora_gpt2.model.gpt2 import TARGETS
from lora_gpt2.model.lora import layer_of
from lora_gpt2.store.manifest import PEFT_CONFIG

MAX_CONFIG_BYTES = 2**20
MAX_PATTERNS, MAX_PATTERN_LENGTH, PATTERN_MEMORY = 4096, 1000, 2**22
LARGEST = 65536
TRANSFORMER = "transformer."
PLAIN = re2.compile(r"\^?[A-Za-z0-9_.]+")
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
"""Initialisations that leave the base as it is: afterwards the adapter is like any other."""

READ_KEYS = frozenset(
    {
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "use_dora",
        "init_lora_weights",
        "base_model_name_or_path",
    }
)
FREE_KEYS = frozenset(
    {
        "revision",
        "task_type",
        "inference_mode",
        "fan_in_fan_out",
        "lora_dropout",
        "peft_version",
        "auto_mapping",
        "eva_config",
    }
)
OFF_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "megatron_core": ("megatron.core",),
    "qalora_group_size": (16,),
}
OTHER_WEIGHTS = (
    "an adapter here is low-rank updates of the projections and the head alone; make a base of it: PEFT's "
    "merge_and_unload, then save_pretrained, and that folder with --base"
)
REASONS = {
    "peft_type": "only LoRA is; convert it first, with PEFT's convert_to_lora where it can, or merge it into a base",
    "bias": OTHER_WEIGHTS,
    "lora_bias": OTHER_WEIGHTS,
    "modules_to_save": OTHER_WEIGHTS,
    "trainable_token_indices": OTHER_WEIGHTS,
    "layer_replication": "it changes the network's layers",
    "alora_invocation_tokens": "it adapts only the tokens after an invocation",
    "use_bdlora": "PEFT does not support it for GPT-2",
    "kasa_config": "PEFT does not support it for GPT-2",
}
STARTS = {
    "olora": "PEFT itself changes GPT-2's weights wrongly with it",
    "pissa_niter": "its random start is not in the file; save it with path_initial_model_for_weight_conversion",
    "corda": "its start is not in the file; save it with path_initial_model_for_weight_conversion",
    "lora_ga": "its start is not in the file; save it with path_initial_model_for_weight_conversion",
    "loftq": "it belongs to a quantised base of its own",
}


@dataclass(frozen=True, kw_only=True)
class PeftSpec:
    """What a configuration says, checked: how each projection is adapted."""

    rank: int
    alpha: float
    use_rslora: bool
    dora: bool
    pissa: bool
    base_name: str
    ranks: tuple[tuple[Any, float], ...]
    alphas: tuple[tuple[Any, float], ...]
    targets: Any
    excluded: Any
    layers: tuple[int, ...] | None
    is_plain: bool
    """True if no expression is in it, so that PEFT's own matching is safe too."""
    prefix: str = TRANSFORMER
    """What stands before a block's name where PEFT matched it: nothing over `GPT2Model` alone."""

    def rank_of(self, site: str) -> int:
        """Returns the rank at a site: that of the first pattern that fits, else the common one."""
        return int(self._lookup(self.ranks, site, self.rank))

    def alpha_of(self, site: str) -> float:
        """Returns alpha at a site, found like the rank."""
        return self._lookup(self.alphas, site, self.alpha)

    def _lookup(self, patterns: Sequence[tuple[Any, float]], site: str, default: float) -> float:
        name = module_of(site, self.prefix)
        return next((value for pattern, value in patterns if pattern.match(name)), default)

    def list_targets(self) -> tuple[str, ...]:
        """Returns the modules that the configuration lists; none where it has an expression."""
        return self.targets if isinstance(self.targets, tuple) else ()

    def is_target(self, site: str) -> bool:
        """True if the configuration names the site."""
        name = module_of(site, self.prefix)
        if _fits(self.excluded, name):
            return False
        if isinstance(self.targets, tuple) and name in self.targets:  # as PEFT: before it looks at the layers
            return True
        in_layers = self.layers is None or layer_of(site) in self.layers
        return _fits(self.targets, name) and (in_layers or not isinstance(self.targets, tuple))


def parse_peft_config(content: bytes, where: str, weights: bytes = b"") -> PeftSpec:
    """Returns what `adapter_config.json` says; `weights` (safetensors) tell how PEFT called the modules.

    Raises:
        CorruptError: it is not JSON, or a value is not what it should be.
        MismatchError: it asks for something that we do not implement, or an expression that RE2 does not take.
    """
    location = f"{where}: {PEFT_CONFIG}"
    values = _parse_object(content, location)
    for key, value in sorted(values.items(), key=lambda item: item[0] != "peft_type"):  # the method explains the rest
        if key in READ_KEYS or key in FREE_KEYS or (key in OFF_VALUES and value in OFF_VALUES[key]):
            continue
        if key == "ensure_weight_tying" and HEAD not in str(values.get("target_modules")):  # nothing of it is tied
            continue
        if key in OFF_VALUES or value not in (None, False, {}, []):
            reason = REASONS.get(key, "only plain LoRA, rsLoRA, DoRA and PiSSA on GPT-2's projections and head are")
            raise MismatchError(f"{location}: {shorten(key, 60)} = {show_value(value, 60)} is not supported", reason)
    return PeftSpec(
        rank=int(_number(values, "r", 8, location)),
        alpha=_number(values, "lora_alpha", 8, location),
        use_rslora=_switch(values, "use_rslora", location),
        dora=_switch(values, "use_dora", location),
        pissa=_check_start(values.get("init_lora_weights", True), location),
        base_name=str(values.get("base_model_name_or_path") or ""),
        ranks=_patterns(values, "rank_pattern", location),
        alphas=_patterns(values, "alpha_pattern", location),
        targets=_modules(values.get("target_modules"), "target_modules", location),
        excluded=_modules(values.get("exclude_modules") or [], "exclude_modules", location),
        layers=_layers(values.get("layers_to_transform"), location),
        is_plain=_is_plain(values),
        prefix="" if _is_without_head(weights) else TRANSFORMER,
    )


def _is_without_head(weights: bytes) -> bool:
    """True if the header of some safetensors names blocks as `GPT2Model` alone does."""
    return b'"base_model.model.h.' in weights[8 : 8 + int.from_bytes(weights[:8], "little")]


def _parse_object(content: bytes, location: str) -> dict[str, Any]:
    if len(content) > MAX_CONFIG_BYTES:
        raise CorruptError(f"{location} is larger than any configuration", "restore it from a copy")
    try:
        values = load_json(content)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{location} is not JSON", "restore it from a copy") from error
    if not isinstance(values, dict):
        raise CorruptError(f"{location} is not an object", "restore it from a copy")
    return values


def _check_start(start: Any, location: str) -> bool:
    """Returns True for PiSSA, whose start can be computed again; refuses starts that are lost."""
    if any(start is plain or (isinstance(plain, str) and start == plain) for plain in PLAIN_STARTS):
        return False
    if start == "pissa":
        return True
    reason = next((text for name, text in STARTS.items() if str(start).startswith(name)), "it is not known")
    raise MismatchError(f"{location}: init_lora_weights = {show_value(start, 60)} is not supported", reason)


def _switch(values: Mapping[str, Any], key: str, location: str) -> bool:
    value = values.get(key) or False
    if not isinstance(value, bool):
        raise CorruptError(f"{location}: {key} is not true or false", "restore it from a copy")
    return value


def _number(values: Mapping[str, Any], key: str, default: float, location: str) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LARGEST:
        raise CorruptError(
            f"{location}: {key} is {show_value(value, 40)}, expected a positive number", "restore it from a copy"
        )
    return float(value)


def _layers(value: Any, location: str) -> tuple[int, ...] | None:
    layers = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(layer) is int for layer in layers):
        raise CorruptError(f"{location}: layers_to_transform is not a list of layers", "restore it from a copy")
    return tuple(layers) or None


def _patterns(values: Mapping[str, Any], key: str, location: str) -> tuple[tuple[Any, float], ...]:
    patterns = values.get(key) or {}
    if not isinstance(patterns, dict) or len(patterns) > MAX_PATTERNS:
        raise CorruptError(f"{location}: {key} is not an object of patterns", "restore it from a copy")
    return tuple(
        (_compile(rf"(.*\.)?({name})$", f"{location}: {key}"), _number(patterns, name, 0, f"{location}: {key}"))
        for name in patterns
    )


def _modules(value: Any, key: str, location: str) -> Any:
    """Returns a tuple of suffixes, or a compiled expression for a text."""
    if value is None:
        return ("c_attn",)  # PEFT's own default for GPT-2
    if isinstance(value, str) and value.lower() == "all-linear":
        return TARGETS
    if isinstance(value, str):
        return _compile(rf"(?:{value})$", f"{location}: {key}")
    if not isinstance(value, list) or len(value) > MAX_PATTERNS or not all(isinstance(name, str) for name in value):
        raise CorruptError(f"{location}: {key} is not a list of modules", "restore it from a copy")
    return tuple(value)


def _is_plain(values: Mapping[str, Any]) -> bool:
    lists = [values.get(key) or [] for key in ("target_modules", "exclude_modules", "layers_pattern")]
    if not all(isinstance(some, list) for some in lists):
        return False
    names = [
        name for some in (*lists, values.get("rank_pattern") or {}, values.get("alpha_pattern") or {}) for name in some
    ]
    return all(isinstance(name, str) and PLAIN.fullmatch(name) for name in names)


def _compile(pattern: str, location: str) -> Any:
    options = re2.Options()
    options.log_errors, options.max_mem = False, PATTERN_MEMORY
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise MismatchError(f"{location} holds an expression of {len(pattern)} characters", "name modules plainly")
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        raise MismatchError(
            f"{location} holds an expression that cannot run safely: {pattern[:80]!r}",
            "name modules plainly, such as attn.c_attn",
        ) from error


def module_of(site: str, prefix: str = TRANSFORMER) -> str:
    """Returns Hugging Face's name of the module at a site: `h.0.mlp.c_fc` → `transformer.h.0.mlp.c_fc`."""
    return site if site == HEAD else f"{prefix}{site}"


def _fits(modules: Any, name: str) -> bool:
    if isinstance(modules, tuple):
        return any(name == module or name.endswith(f".{module}") for module in modules)
    return modules.match(name) is not None
