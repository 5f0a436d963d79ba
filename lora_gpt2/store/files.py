"""Publishing an adapter as a version, and loading it with every check before a number is used.

A version is read into memory once; the bytes that were hashed are the bytes that are parsed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_gpt2.core.errors import CorruptError, MismatchError
from lora_gpt2.core.paths import translate_os_error
from lora_gpt2.model.base import Base
from lora_gpt2.model.gpt2 import GPT2Config
from lora_gpt2.model.lora import Adapter
from lora_gpt2.store.catalog import Store, read_manifest
from lora_gpt2.store.interop import from_peft, to_peft
from lora_gpt2.store.manifest import CARD, METRICS, PEFT_CONFIG, SCHEMA, WEIGHTS, BaseIdentity, Manifest

LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "lora-gpt2")


@dataclass(frozen=True)
class Origin:
    """Where an adapter comes from and how good it is: what goes into its manifest and card."""

    data: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    parents: tuple[str, ...] = ()
    metrics: Sequence[dict[str, Any]] = ()
    pages: Mapping[str, bytes] = field(default_factory=dict)
    """Files for people that go into the version's folder."""


def identify(base: Base) -> BaseIdentity:
    """Returns what binds an adapter to a base."""
    return BaseIdentity(name=base.name, fingerprint=base.fingerprint, tokenizer_fingerprint=base.tokenizer.fingerprint)


def publish_adapter(store: Store, name: str, adapter: Adapter, base: Base, origin: Origin) -> Manifest:
    """Writes an adapter as the next version of `name` and puts it in use; returns its manifest.

    Raises:
        UsageError: `name` is not a name.
        ConflictError: another process is publishing the same adapter.
        ResourceError: the store cannot be written; what was there is untouched.
    """
    guarded = to_peft(adapter, base.name, base.config)
    from_peft(guarded[WEIGHTS], guarded[PEFT_CONFIG], base.config, name)  # what cannot be loaded is not published
    size = sum(update.a.numel() + update.b.numel() for update in adapter.updates.values())

    def build(version: int) -> Manifest:
        return Manifest(
            schema=SCHEMA, name=name, version=version, created=datetime.now(UTC).replace(microsecond=0),
            base=identify(base), data=origin.data, recipe=origin.recipe, figures=origin.figures,
            parents=origin.parents, libraries=_library_versions(), size_bytes=len(guarded[WEIGHTS]),
            num_parameters=origin.figures.get("trained_parameters", size),
            files={file: hashlib.sha256(content).hexdigest() for file, content in guarded.items()},
        )  # fmt: skip

    def to_bytes(version: int) -> bytes:
        return (build(version).model_dump_json(by_alias=True, indent=1) + "\n").encode()

    lines = "".join(json.dumps(record) + "\n" for record in origin.metrics)
    extra = {**origin.pages, **({METRICS: lines.encode()} if lines else {})}
    card = {CARD: build_card(build(1)).encode()}
    version = store.add_version(name, {**guarded, **extra, **card}, to_bytes)
    return store.read_manifest(f"{name}@{version}")


def load_adapter(store: Store, reference: str, base: Base) -> tuple[Manifest, Adapter]:
    """Returns a version's manifest and adapter after checking hashes, base, schema, shapes and finiteness.

    Raises:
        NotFoundError: see `Store.resolve`.
        CorruptError: a byte, a shape or a value is not what it should be.
        MismatchError: it was made for another base or tokenizer; both fingerprints are named.
    """
    folder = store.resolve(reference)
    manifest = read_manifest(folder, expected=f"{folder.parent.name}@{folder.name}")
    check_base(manifest, base)
    return manifest, read_version(folder, manifest, base.config)


def check_base(manifest: Manifest, base: Base) -> None:
    """Raises `MismatchError` unless the version was made for this base and tokenizer."""
    ours, hint = identify(base), f"use --base {manifest.base.name}"
    for field_name, what in (("fingerprint", "base"), ("tokenizer_fingerprint", "tokenizer")):
        theirs, mine = getattr(manifest.base, field_name), getattr(ours, field_name)
        if theirs != mine:
            raise MismatchError(
                f"{manifest.reference} was made for another {what}: '{manifest.base.name}' {theirs[:12]}, "
                f"this is '{base.name}' {mine[:12]}", hint
            )  # fmt: skip


def read_version(folder: Path, manifest: Manifest, config: GPT2Config) -> Adapter:
    """Returns the adapter in a version's folder; the bytes must have the manifest's hashes."""
    content = {}
    for name in (WEIGHTS, PEFT_CONFIG):
        try:
            content[name] = (folder / name).read_bytes()
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise CorruptError(f"{folder / name} is missing", "restore it, or use an older version") from error
            raise translate_os_error(error, f"read {folder / name}") from error
        if hashlib.sha256(content[name]).hexdigest() != manifest.files.get(name):
            raise CorruptError(
                f"{folder / name} is not the file that was published", "restore it, or use an older version: name@N"
            )
    return from_peft(content[WEIGHTS], content[PEFT_CONFIG], config, manifest.reference)


def build_card(manifest: Manifest) -> str:
    """Returns the model card (`README.md`) of a version: what it is, where from, how good, and its limits."""
    figures = "\n".join(
        f"| {key} | {value} |" for key, value in manifest.figures.items() if not isinstance(value, dict)
    )
    sources = ", ".join(manifest.data.get("sources", [])) or "unknown"
    description = manifest.recipe.get("description") or "A LoRA adapter for a frozen GPT-2."
    return f"""---
base_model: {manifest.base.name}
library_name: peft
tags: [lora, gpt2, lora-gpt2]
---
# {manifest.name}

{description}

Base: `{manifest.base.name}` (fingerprint `{manifest.base.fingerprint}`); it works on no other.
Text: {sources}; {manifest.data.get("train_tokens", "an unknown number of")} training tokens.

| figure | value |
|---|---|
{figures}

Use: `lora-gpt2 generate "..." --adapter {manifest.name}`, or `PeftModel.from_pretrained(base, this_folder)`.

Limits: it continues text in the manner of its domain. It states false things fluently, carries the bias of its
text, and may repeat passages of it. Perplexity is measured on held-out text of the same source.
"""


def _library_versions() -> dict[str, str]:
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
