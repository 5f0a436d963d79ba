"""Publishing an adapter as a version, and loading it with every check before a number is used.

A version is read into memory once; the bytes that were hashed are the bytes that are parsed.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_gpt2.core.errors import MismatchError
from lora_gpt2.data.successors import DRAFTER, SuccessorTable
from lora_gpt2.model.base import Base
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.lora import Adapter
from lora_gpt2.model.probe import check_finite_logits
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.manifest import METRICS, PEFT_CONFIG, WEIGHTS, BaseIdentity, Manifest, Parent
from lora_gpt2.store.peft.tensors import from_peft, to_peft
from lora_gpt2.store.version import Version, utc_now

LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "lora-gpt2")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where an adapter comes from and how good it is: what goes into its manifest and card."""

    data: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    parents: tuple[Parent, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
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
        CorruptError: its logits are not finite.
        ConflictError: another process is publishing the same adapter.
        ResourceError: the store cannot be written; what was there is untouched.
    """
    files = to_peft(adapter, base.name, base.config)
    from_peft(files[WEIGHTS], files[PEFT_CONFIG], base.config, name)  # what cannot be loaded is not published
    check_finite_logits(base, adapter, name)
    files |= origin.pages
    if origin.metrics:
        files[METRICS] = "".join(json.dumps(record) + "\n" for record in origin.metrics).encode()
    size = sum(update.a.numel() + update.b.numel() for update in adapter.updates.values())

    def build(version: int) -> Manifest:
        return Manifest(
            name=name,
            version=version,
            created=utc_now(),
            base=identify(base),
            data=origin.data,
            recipe=origin.recipe,
            figures=origin.figures,
            parents=origin.parents,
            provenance=dict(origin.provenance),
            libraries=_library_versions(),
            size_bytes=len(files[WEIGHTS]),
            num_parameters=int(origin.figures.get("trained_parameters") or size),
            files={},
        )

    return store.add_version(name, files, build)


def load_adapter(store: Store, reference: str, base: Base) -> tuple[Manifest, Adapter]:
    """Returns a version's manifest and adapter after checking hashes, base, schema, shapes, values and logits.

    Raises:
        NotFoundError: see `Store.resolve`.
        CorruptError: a byte, a shape or a value is not what it should be, or its logits are not finite.
        MismatchError: it was made for another base or tokenizer; both fingerprints are named.
    """
    with store.open(reference) as version:
        check_base(version.manifest, identify(base), base.tokenizer.fingerprints)
        adapter = read_adapter(version, base.config)
    check_finite_logits(base, adapter, version.manifest.reference)
    return version.manifest, adapter


def check_base(manifest: Manifest, ours: BaseIdentity, tokenizers: Collection[str] = ()) -> None:
    """Raises `MismatchError` unless the version was made for this base and tokenizer, or one of these `tokenizers`."""
    hint = f"use --base {manifest.base.name}"
    for field_name, what in (("fingerprint", "base"), ("tokenizer_fingerprint", "tokenizer")):
        theirs, mine = getattr(manifest.base, field_name), getattr(ours, field_name)
        if theirs != mine and not (what == "tokenizer" and theirs in tokenizers):
            raise MismatchError(
                f"{manifest.reference} was made for another {what}: '{manifest.base.name}' {theirs[:12]}, "
                f"this is '{ours.name}' {mine[:12]}",
                hint,
            )


def read_adapter(version: Version, config: GPT2Config) -> Adapter:
    """Returns the adapter of a version; raises `CorruptError` if its files are not those that were published."""
    weights, peft_config = version.read_file(WEIGHTS), version.read_file(PEFT_CONFIG)
    return from_peft(weights, peft_config, config, version.manifest.reference)


def read_drafter(version: Version, vocab_size: int) -> SuccessorTable | None:
    """Returns what drafts an adapter's text, or None where a version has none; see `SuccessorTable.from_bytes`."""
    has_drafter = DRAFTER in version.manifest.files
    return SuccessorTable.from_bytes(version.read_file(DRAFTER), vocab_size) if has_drafter else None


def _library_versions() -> dict[str, str]:
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
