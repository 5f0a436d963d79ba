"""Adapters from elsewhere and for elsewhere: PEFT folders, the hub, archives, loralib files.

What comes in is read by a closed schema, checked against its base and published like any training; what carries our
manifest keeps its origin and is refused on any base but its own. What goes out holds every file of the version, so
that bringing it back is exact.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_gpt2.core.errors import ConflictError, CorruptError, NotFoundError, UsageError
from lora_gpt2.core.files import (
    read_regular,
    rename_path,
    sync_tree,
    temporary_dir,
    wrap_os_errors,
    write_atomic,
    write_file,
)
from lora_gpt2.core.hub import download, wrap_hub_errors
from lora_gpt2.core.names import check_name
from lora_gpt2.data.successors import DRAFTER
from lora_gpt2.model.base import Base
from lora_gpt2.model.checkpoint import HUB_ID, HUB_NAMES, locate_for_peft
from lora_gpt2.model.config import HEAD
from lora_gpt2.model.lora import Adapter
from lora_gpt2.model.probe import check_finite_logits
from lora_gpt2.store.archive import pack_archive, read_archive
from lora_gpt2.store.audits import read_audits
from lora_gpt2.store.card import build_card
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.files import Origin, check_base, identify, publish_adapter
from lora_gpt2.store.manifest import CARD, MANIFEST, MAX_FILE_BYTES, PEFT_CONFIG, WEIGHTS, Manifest, parse_manifest
from lora_gpt2.store.peft.config import parse_peft_config
from lora_gpt2.store.peft.convert import convert_variant
from lora_gpt2.store.peft.loralib import read_loralib
from lora_gpt2.store.peft.tensors import from_peft, parse_peft, read_peft_files, to_peft
from lora_gpt2.store.version import verify_hashes

ARCHIVES = (".tar.gz", ".tgz")
LORALIB = (".pt", ".bin", ".pth")
REWRITTEN = (WEIGHTS, PEFT_CONFIG, CARD)
HUB_FILES = (
    WEIGHTS,
    PEFT_CONFIG,
    MANIFEST,
    "metrics.jsonl",
    "report.html",
    "curve.png",
    "training_text.bin",
    DRAFTER,
    CARD,
)


@dataclass(frozen=True, kw_only=True)
class FetchedAdapter:
    """An adapter that has been fetched and not yet looked into."""

    where: str
    files: Mapping[str, bytes] = field(default_factory=dict)
    manifest: Manifest | None = None
    loralib: Path | None = None

    def guess_base(self) -> str:
        """Returns the base that the files name, if it is one that can be found; else ''."""
        if self.manifest is not None:
            return self.manifest.base.name
        if self.loralib is not None:
            return ""
        name = parse_peft_config(self.files[PEFT_CONFIG], self.where).base_name
        by_hub = {identifier: short for short, identifier in HUB_NAMES.items()}
        known = name in HUB_NAMES or name in by_hub or HUB_ID.fullmatch(name) or Path(name, "config.json").is_file()
        return by_hub.get(name, name) if known else ""


@dataclass(frozen=True, kw_only=True)
class ImportedAdapter:
    """A published import; the differences say what a conversion cost, and are zero where there was none."""

    manifest: Manifest
    variant: str = "lora"
    relative_error: float = 0.0
    max_logit_difference: float = 0.0


def is_foreign(text: str) -> bool:
    """True if a text names an adapter by its path, an archive or a hub id, and not by its name in a store."""
    return "/" in text or os.sep in text or text.endswith((*ARCHIVES, *LORALIB))


def fetch_adapter(source: str) -> FetchedAdapter:
    """Reads a PEFT folder, an archive, a loralib file, or fetches a hub repository (`owner/name`).

    Raises:
        NotFoundError: there is no such thing, or it holds no adapter.
        ResourceError: the hub cannot be reached.
        CorruptError: an archive or a manifest in it is damaged.
    """
    path = Path(source)
    if not source.strip():  # Path("") is the current folder
        raise NotFoundError("the source has no name", "give a folder, a .tar.gz, a .pt file, or a hub id: owner/name")
    if path.is_dir():
        return _read_folder(path, source)
    if path.is_file() and path.name.endswith(ARCHIVES):
        files = read_archive(path)
        for name in (WEIGHTS, PEFT_CONFIG):
            if name not in files:
                raise CorruptError(f"{source} holds no {name}", "make one with 'lora-gpt2 adapters export'")
        return FetchedAdapter(where=source, files=files, manifest=_check_manifest(files, source))
    if path.is_file() and path.name.endswith(LORALIB):
        return FetchedAdapter(where=source, loralib=path)
    if path.exists():
        raise UsageError(f"{source} is neither a folder, an archive nor a .pt file", "give a folder that PEFT saved")
    if HUB_ID.fullmatch(source):
        hint = "copy the folder by hand and import that"
        return _read_folder(
            download(source, HUB_FILES, (WEIGHTS, PEFT_CONFIG), "the adapter", hint, refresh=True), source
        )
    raise NotFoundError(f"there is no {source}", "give a folder, a .tar.gz, a .pt file, or a hub id: owner/name")


def _read_folder(path: Path, where: str) -> FetchedAdapter:
    weights, config = read_peft_files(path)
    files = {WEIGHTS: weights, PEFT_CONFIG: config}
    if (path / MANIFEST).is_file():
        with wrap_os_errors(f"read {path}"):
            present = [name for name in HUB_FILES if (path / name).is_file()]
            files |= {name: read_regular((path / name).resolve(), MAX_FILE_BYTES) for name in present}
    return FetchedAdapter(where=where, files=files, manifest=_check_manifest(files, where))


def _check_manifest(files: Mapping[str, bytes], where: str) -> Manifest | None:
    """Returns our manifest among the files, whose hashes they must have; None if there is none.

    The card may have been edited on the way, and a foreign manifest is ignored.
    """
    if b'"tokenizer_fingerprint"' not in files.get(MANIFEST, b""):
        return None
    try:
        manifest = parse_manifest(files[MANIFEST])
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{where}: {MANIFEST} is damaged", "fetch it again") from error
    present = [name for name in manifest.files if name in files and name != CARD]
    verify_hashes(files, manifest, where, dict.fromkeys((WEIGHTS, PEFT_CONFIG, *present)))
    return manifest


def import_adapter(
    source: FetchedAdapter, store: Store, name: str, base: Base, rank: int | None = None, alpha: float | None = None
) -> ImportedAdapter:
    """Checks what was fetched and publishes it as the next version of `name`; `rank` is for conversions.

    Raises:
        CorruptError, MismatchError: it is damaged, unsupported (the key is named), or of another base.
        UsageError: a loralib file without `alpha`.
    """
    check_name(name)
    provenance: dict[str, Any] = {"by": "import", "from": Path(source.where).name}
    if source.manifest is not None:
        check_base(source.manifest, identify(base))
    if source.loralib is not None:
        adapter, variant, error, difference = read_loralib(source.loralib, base.config, alpha), "loralib", 0.0, 0.0
    else:
        adapter, variant, error, difference = _convert(source, base, rank)
    if variant != "lora":
        provenance |= {"variant": variant, "relative_error": error, "max_logit_difference": difference}
    old = source.manifest
    if old is None:
        origin = Origin(data={"sources": []}, provenance=provenance)
    else:
        pages = {name: source.files[name] for name in source.files if name in old.files and name not in REWRITTEN}
        provenance = {**(old.provenance or {"by": "train"}), "imported_from": old.reference}
        origin = Origin(
            data=old.data,
            recipe=old.recipe,
            figures=old.figures,
            parents=old.parents,
            provenance=provenance,
            pages=pages,
        )
    return ImportedAdapter(
        manifest=publish_adapter(store, name, adapter, base, origin),
        variant=variant,
        relative_error=error,
        max_logit_difference=difference,
    )


def parse_adapter(source: FetchedAdapter, base: Base) -> Adapter:
    """Returns what was fetched as an adapter of the base, without publishing it; a conversion keeps its own rank.

    Raises:
        CorruptError, MismatchError: it is damaged, unsupported (the key is named), or of another base.
        UsageError: it is a loralib file, which does not say its alpha.
    """
    if source.loralib is not None:
        raise UsageError(
            f"{source.where} does not say its alpha", "import it: lora-gpt2 adapters import FILE --name N --alpha A"
        )
    if source.manifest is not None:
        check_base(source.manifest, identify(base))
    adapter = _convert(source, base, None)[0]
    check_finite_logits(base, adapter, source.where)
    return adapter


def _convert(source: FetchedAdapter, base: Base, rank: int | None) -> tuple[Adapter, str, float, float]:
    weights = {"head": lambda: base.model.head, "embeddings": lambda: base.model.wte.weight}
    content = parse_peft(
        source.files[WEIGHTS], source.files[PEFT_CONFIG], base.config, source.where, lambda name: weights[name]()
    )
    if not (content.spec.dora or content.spec.pissa):
        return content.adapter, "lora", 0.0, 0.0
    found = convert_variant(content, base, rank)
    return found.adapter, found.variant, found.relative_error, found.max_logit_difference


def export_adapter(store: Store, reference: str, out: Path, without_head: Base | None = None) -> Manifest:
    """Writes a version, checked, to the new folder `out`, or to one file if that ends in `.tar.gz`.

    In a folder the configuration names the base as transformers finds it on this machine, so that
    `AutoPeftModelForCausalLM` loads it as it is. `without_head` is the base of an adapter whose change of the tied head
    is left out, with our manifest, which is not of these weights.

    Raises:
        ConflictError: `out` exists.
        CorruptError: the version is damaged.
        UsageError: nothing but the head is adapted.
    """
    if out.exists():
        raise ConflictError(f"{out} exists", "choose another name, or remove it first")
    manifest, files = read_version_files(store, reference)
    if without_head is not None:
        files = _leave_head_out(manifest, files, without_head)
    if not out.name.endswith(ARCHIVES):
        files |= _name_base(manifest, files)
    with wrap_os_errors(f"write {out}"):
        if out.name.endswith(ARCHIVES):
            out.absolute().parent.mkdir(parents=True, exist_ok=True)
            write_atomic(out.absolute(), pack_archive(files, f"{manifest.name}-{manifest.version}"))
        else:
            with temporary_dir(out.absolute().parent, out.name) as work:
                for name, content in files.items():
                    write_file(work / name, content)
                sync_tree(work)
                rename_path(work, out)
    return manifest


def _name_base(manifest: Manifest, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Returns the files in which the base is named as transformers finds it, where that is another name."""
    config = json.loads(files[PEFT_CONFIG])
    if (name := locate_for_peft(manifest.base.name)) == config.get("base_model_name_or_path"):
        return {}
    changed = {PEFT_CONFIG: (json.dumps(config | {"base_model_name_or_path": name}, indent=2) + "\n").encode()}
    if MANIFEST in files:
        hashes = {**manifest.files, PEFT_CONFIG: hashlib.sha256(changed[PEFT_CONFIG]).hexdigest()}
        changed[MANIFEST] = replace(manifest, files=hashes).to_bytes()
    return changed


def has_head(store: Store, reference: str) -> bool:
    """True if a version changes the head, which PEFT and lm-evaluation-harness cannot tie again over it."""
    with store.open(reference) as version:
        return HEAD in parse_peft_config(version.read_file(PEFT_CONFIG), reference).list_targets()


def drop_head(adapter: Adapter) -> Adapter:
    """Returns an adapter without its change of the head; raises `UsageError` if nothing is left."""
    rest = {site: update for site, update in adapter.updates.items() if site != HEAD}
    if not rest:
        raise UsageError(
            "the adapter changes nothing but the head", "write it into the base: merge NAME --into-base DIR"
        )
    return Adapter(updates=rest)


def _leave_head_out(manifest: Manifest, files: Mapping[str, bytes], base: Base) -> dict[str, bytes]:
    adapter = drop_head(from_peft(files[WEIGHTS], files[PEFT_CONFIG], base.config, manifest.reference))
    said = f"\n\nExported without its change of the head (`lm_head`) from `{manifest.reference}`.\n"
    return {**to_peft(adapter, base.name, base.config), CARD: files[CARD] + said.encode()}


def read_version_files(store: Store, reference: str) -> tuple[Manifest, dict[str, bytes]]:
    """Returns a version's manifest and every file of it, all checked."""
    with store.open(reference) as version:
        return version.manifest, {**version.read_files(), MANIFEST: (version.folder / MANIFEST).read_bytes()}


def push_adapter(store: Store, reference: str, repository: str, private: bool) -> str:
    """Uploads a version with its card to the hub, making the repository if need be; returns its address.

    Raises:
        UsageError: `repository` is not `owner/name`.
        ResourceError: the hub cannot be reached, or wants a login; the store is unchanged.
    """
    if not HUB_ID.fullmatch(repository):
        raise UsageError(f"'{repository}' is not a hub repository", "write owner/name")
    manifest, files = read_version_files(store, reference)
    files[CARD] = build_card(manifest, read_audits(store, manifest)).encode()
    from huggingface_hub import CommitOperationAdd, HfApi

    hint = f"nothing is lost: 'lora-gpt2 adapters export {reference} FILE.tar.gz' makes a file to carry"
    with wrap_hub_errors(repository, f"push {reference}", hint):
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
        commit = api.create_commit(repository, operations, commit_message=f"Add {reference} by lora-gpt2")
    return str(commit.commit_url)
