"""Settings and cleaning rules of earlier versions: refused in recipes, read in stored manifests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED = {
    "data.near_duplicates": "data.near_duplicate_threshold",
    "data.processes": "data.num_proc",
    "data.test_share": "data.test_fraction",
    "data.validation_share": "data.validation_fraction",
    "evaluate.precision": "evaluate.dtype",
    "generate.beams": "generate.num_beams",
    "generate.merged": "generate.merge_into_base",
    "generate.no_repeat_ngram": "generate.no_repeat_ngram_size",
    "generate.precision": "generate.dtype",
    "lora.ranks": "lora.rank_pattern",
    "lora.rslora": "lora.use_rslora",
    "serve.body_seconds": "serve.body_timeout_seconds",
    "serve.drain_seconds": "serve.shutdown_grace_seconds",
    "serve.header_seconds": "serve.header_timeout_seconds",
    "serve.max_rows": "serve.max_num_seqs",
    "serve.send_seconds": "serve.send_timeout_seconds",
    "train.clip": "train.max_grad_norm",
    "train.decay_share": "train.decay_fraction",
    "train.lora_plus_ratio": "train.loraplus_lr_ratio",
    "train.neftune_alpha": "train.neftune_noise_alpha",
    "train.precision": "train.dtype",
    "train.warmup_share": "train.warmup_fraction",
}
"""From the old dotted key of a setting to its present one."""
REMOVED = {"data.special_tokens": "tokens that were added to a base are tokens in every text"}
"""From the dotted key of a setting that is none any more to the reason."""
RENAMED_RULES = {"line_ends": "newlines", "personal": "pii", "spaces": "whitespace"}
"""From the old name of a cleaning rule (`data.rules`) to its present one."""


def upgrade_section(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a section, as a manifest has stored them, under their present names."""
    names = {old: new for old, new in RENAMED.items() if old.startswith(f"{section}.")}
    kept = {key: value for key, value in values.items() if f"{section}.{key}" not in REMOVED}
    upgraded = {names.get(f"{section}.{key}", key).rpartition(".")[2]: value for key, value in kept.items()}
    if isinstance(rules := upgraded.get("rules"), Mapping):
        upgraded["rules"] = {RENAMED_RULES.get(name, name): mode for name, mode in rules.items()}
    return upgraded
