"""Writes adapters into the base: a plain GPT-2 in safetensors that any tool loads, verified before it appears.

The sum is made in float32 from the base's own file, never from a quantised or once-merged copy, and each projection
is rounded once to the dtype that is asked for. What is written is loaded again and compared with the unmerged
computation, logits and perplexity, before the folder takes its name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import CheckFailed, ConflictError, MismatchError, ResourceError
from lora_gpt2.core.files import rename_path, sync_tree, temporary_dir, wrap_os_errors
from lora_gpt2.evaluation.general import add_general
from lora_gpt2.evaluation.held_out import read_sketches
from lora_gpt2.evaluation.matrix import Cell, EvaluationText, measure_matrix
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.session import Session
from lora_gpt2.merging.checks import check_effect, check_exact
from lora_gpt2.merging.combine import MERGED, Parents, build_rule, check_deltas, open_parents, select_unmerged
from lora_gpt2.merging.gguf import check_gguf, write_gguf
from lora_gpt2.merging.state import merge_state
from lora_gpt2.model.base import Base, load_base
from lora_gpt2.model.checkpoint import Checkpoint
from lora_gpt2.model.config import HEAD
from lora_gpt2.model.merge import MergeRule
from lora_gpt2.model.probe import AdapterSelector, compute_logits, measure_difference, select_base
from lora_gpt2.model.quantize import QuantizedLinear
from lora_gpt2.model.runtime import DTYPES
from lora_gpt2.model.stored_weights import StoredWeights
from lora_gpt2.model.weight_files import list_weight_files
from lora_gpt2.recipe import EvaluateSettings, MergeSettings
from lora_gpt2.store.card import is_hub_name, mark_trained
from lora_gpt2.store.references import BASE

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
GGUF = "model.gguf"


@dataclass(frozen=True, kw_only=True)
class MergedBaseReport:
    """A merged base and its verification; `cells` has the base, the mix before and the merged base on each text."""

    method: str
    path: str
    dtype: str
    size_bytes: int
    files: list[str]
    max_logit_difference: float
    effect: float
    cells: list[Cell]

    def to_json(self) -> dict[str, Any]:
        """Returns the report with the keys of `merge --into-base --json`."""
        return vars(self) | {"cells": [cell.to_json() for cell in self.cells]}


def merge_into_base(
    session: Session,
    mix: Mix,
    out: Path,
    settings: MergeSettings,
    texts: Sequence[EvaluationText],
    *,
    evaluate: EvaluateSettings,
    reporter: Reporter,
    searched_on: Sequence[str] = (),
) -> MergedBaseReport:
    """Writes base + mix to the new folder `out` and returns what was measured; for `searched_on` see `merge_adapters`.

    Raises:
        UsageError: see `merge_adapters`.
        ConflictError: `out` exists.
        CheckFailed: what was written does not compute what it should; `out` is not there.
    """
    if out.exists():
        raise ConflictError(f"{out} exists", "choose a new folder, or remove it first")
    base = session.base
    if any(isinstance(module, QuantizedLinear) for module in base.model.modules()):
        raise MismatchError(f"'{base.name}' is quantised", "merge onto the 16- or 32-bit base: no train.quantize here")
    if settings.gguf:
        check_gguf(base.config)
    parents, rule = open_parents(session, mix), build_rule(settings)
    stored = StoredWeights(Checkpoint.read(base.folder))
    dtype = stored.read_dtype("wte.weight") if settings.dtype == "auto" else DTYPES[settings.dtype]
    state = build_state(session, parents, rule, dtype)
    unmerged = select_unmerged(session, parents, rule)
    with wrap_os_errors(f"write {out}"), temporary_dir(out.absolute().parent, out.name) as work:
        _write_folder(work, base.folder, state, dtype, settings.max_shard_bytes)
        if settings.gguf:
            write_gguf(work / GGUF, state, base)
        check_written(work, state)
        del state
        written = load_base(str(work), base.runtime)
        difference, effect = _verify(base, unmerged, written, dtype, f"the base merged with {mix}")
        singles = {name: session.select(Mix.single(name)) for name in mix.references}
        selectors = {BASE: select_base, **singles, str(mix): unmerged}
        texts = add_general(texts)
        exact = [manifest.reference for manifest in parents.manifests]
        own = {name: [reference] for name, reference in zip(mix.references, exact, strict=True)}
        known = read_sketches(session.store, {**own, str(mix): exact, MERGED: exact})
        before = measure_matrix(base, selectors, texts, evaluate, reporter, sketches=known)
        after = measure_matrix(written, {MERGED: select_base}, texts, evaluate, reporter, sketches=known)
        card = _build_card(base, parents, rule, difference, [*before, *after], searched_on)
        (work / "README.md").write_text(card, encoding="utf-8", newline="\n")
        sync_tree(work)
        rename_path(work, out)
    files = sorted(path.name for path in out.iterdir())
    return MergedBaseReport(
        method=rule.method,
        path=str(out),
        dtype=str(dtype).removeprefix("torch."),
        size_bytes=sum((out / name).stat().st_size for name in files if name.endswith(".safetensors")),
        files=files,
        max_logit_difference=difference,
        effect=effect,
        cells=[*before, *after],
    )


def _verify(
    base: Base, unmerged: AdapterSelector, written: Base, dtype: torch.dtype, label: str
) -> tuple[float, float]:
    """Returns how far a merged base's logits are from the unmerged computation and from the base; or `CheckFailed`."""
    reference, plain, found = compute_logits(base, unmerged), compute_logits(base), compute_logits(written)
    difference, effect = measure_difference(reference, found), measure_difference(plain, found)
    check_effect(difference, effect, plain, label)
    if difference >= effect:
        raise CheckFailed(f"{label} loses its effect in {dtype}", "use --set merge.dtype=float32")
    if dtype == torch.float32 and base.runtime.dtype == torch.float32:
        check_exact(difference, reference, label)
    return difference, effect


def check_written(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Raises `CheckFailed` unless the folder's files hold exactly these tensors."""
    found = {key: tensor for file in list_weight_files(folder) for key, tensor in load_file(file).items()}
    if set(found) != set(state) or not all(torch.equal(found[key], tensor) for key, tensor in state.items()):
        raise CheckFailed(f"{folder} does not hold what was written", "check the disk; nothing was kept")


def build_state(session: Session, parents: Parents, rule: MergeRule, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns what `merge_state` does, of a merge that changes something and is finite."""
    check_deltas(parents, rule)
    return merge_state(session.base, parents.adapters, rule.scale_weights(parents.weights), rule, dtype)


def _write_folder(
    folder: Path, source: Path, state: Mapping[str, Tensor], dtype: torch.dtype, max_shard_bytes: int
) -> None:
    """Writes weights, configuration and tokenizer; the latter two are those of the base in `source`."""
    from huggingface_hub import save_torch_state_dict

    try:
        save_torch_state_dict(dict(state), folder, max_shard_size=max_shard_bytes, metadata={"format": "pt"})
    except SafetensorError as error:  # it wraps the system's errors in text
        raise ResourceError(f"cannot write {folder}: {error}", "free some space, or choose another disk") from error
    config: dict[str, Any] = {**Checkpoint.read(source).values} | {"architectures": ["GPT2LMHeadModel"]}
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["tie_word_embeddings"] = f"{HEAD}.weight" not in state
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8", newline="\n")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    stop_ids = Checkpoint.open(str(source)).load_tokenizer().stop_ids
    if len(stop_ids) > 1:  # documents end with the one, turns with the other
        path = folder / "generation_config.json"
        own = json.loads(path.read_bytes()) if path.is_file() else {}
        path.write_text(json.dumps({**own, "eos_token_id": sorted(stop_ids)}, indent=2) + "\n", encoding="utf-8")


def _build_card(
    base: Base,
    parents: Parents,
    rule: MergeRule,
    difference: float,
    cells: Sequence[Cell],
    searched_on: Sequence[str],
) -> str:
    adapters = "\n".join(
        f"- `{manifest.reference}` at {weight:g} (sha256 of its weights `{manifest.digest[:16]}`)"
        for manifest, weight in zip(parents.manifests, parents.weights, strict=True)
    )
    rows = "\n".join(
        f"| {cell.adapter} | {cell.source}{mark_trained(cell.trained_on, cell.num_documents)} "
        f"| {cell.score.perplexity:.3f} |"
        for cell in cells
    )
    searched = f"Weights and method were chosen on these texts: {', '.join(searched_on)}.\n\n" if searched_on else ""
    named = f"base_model: {base.name}\n" if is_hub_name(base.name) else ""  # a path says nothing to others
    return f"""---
{named}library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, lora-gpt2]
---
# A merged GPT-2

`{base.name}` (fingerprint `{base.fingerprint}`) with these adapters written into its weights by lora-gpt2, method
{rule.method}:

{adapters}

Largest difference of its logits from the unmerged computation: {difference:.2e}.

{searched}| computed | text | perplexity |
|---|---|---|
{rows}

It states false things fluently, carries the bias of its text, and may repeat passages of it.
"""
