"""Adapters from elsewhere and for elsewhere: what was fetched (`fetch.py`) comes in, versions go out.

What comes in is read by a closed schema, checked against its base and published like any training; what carries our
manifest keeps its origin and is refused on any base but its own. What goes out holds every file of the version, so
that bringing it back is exact.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import ConflictError, UsageError
from lora_gpt2.core.files import (
    rename_path,
    sync_tree,
    temporary_dir,
    wrap_os_errors,
    write_atomic,
    write_file,
)
from lora_gpt2.core.hub import wrap_hub_errors
from lora_gpt2.core.names import check_name
from lora_gpt2.model.base import Base
from lora_gpt2.model.checkpoint import (
    HUB_ID,
    locate_for_peft,
)
from lora_gpt2.model.config import HEAD
from lora_gpt2.model.lora import Adapter
from lora_gpt2.model.probe import check_finite_logits
from lora_gpt2.store.archive import pack_archive
from lora_gpt2.store.audits import read_audits
from lora_gpt2.store.card import build_card
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.fetch import ARCHIVES, HUB_FILES, FetchedAdapter
from lora_gpt2.store.files import Origin, check_base, identify, publish_adapter
from lora_gpt2.store.manifest import CARD, MANIFEST, PEFT_CONFIG, WEIGHTS, Manifest
from lora_gpt2.store.peft.config import parse_peft_config
from lora_gpt2.store.peft.convert import Converted, convert_variant
from lora_gpt2.store.peft.loralib import read_loralib
from lora_gpt2.store.peft.tensors import from_peft, parse_peft, to_peft

EXACT = 1e-4
"""Relative error up to which a conversion is one of rounding."""
REWRITTEN = (WEIGHTS, PEFT_CONFIG, CARD)


@dataclass(frozen=True, kw_only=True)
class ImportedAdapter:
    """A published import; the differences say what a conversion cost, and are zero where there was none."""

    manifest: Manifest
    variant: str = "lora"
    relative_error: float = 0.0
    max_logit_difference: float = 0.0


def import_adapter(
    source: FetchedAdapter,
    store: Store,
    name: str,
    base: Base,
    reporter: Reporter,
    *,
    rank: int | None = None,
    alpha: float | None = None,
) -> ImportedAdapter:
    """Checks what was fetched and publishes it as the next version of `name`.

    Args:
        source: what was fetched.
        store: where to publish.
        name: of the adapter.
        base: its base.
        reporter: says what a conversion costs, and what speaks against the base.
        rank: what DoRA is converted to.
        alpha: of a loralib file.

    Raises:
        CorruptError, MismatchError: it is damaged, unsupported (the key is named), or of another base.
        UsageError: a loralib file without `alpha`, or `rank` or `alpha` of what has its own.
    """
    check_name(name)
    provenance: dict[str, Any] = {"by": "import", "from": Path(source.where).name}
    _check_own_shape(source, rank, alpha)
    if source.loralib is not None:
        adapter, variant, error, difference = read_loralib(source.loralib, base.config, alpha), "loralib", 0.0, 0.0
    else:
        found = _convert(source, base, reporter, rank)
        adapter, variant, error, difference = (
            found.adapter,
            found.variant,
            found.relative_error,
            found.max_logit_difference,
        )
    if variant != "lora":
        provenance |= {"variant": variant, "relative_error": error, "max_logit_difference": difference}
    if source.manifest is None and source.loralib is None:
        provenance |= {"base_named": source.named_base, "lora": _describe_lora(source)}
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


def parse_adapter(source: FetchedAdapter, base: Base, reporter: Reporter) -> Adapter:
    """Returns what was fetched as an adapter of the base, without publishing it; `reporter` as for `import_adapter`.

    Raises:
        CorruptError, MismatchError: it is damaged, unsupported (the key is named), or of another base.
        UsageError: it is a loralib file, which does not say its alpha.
    """
    if source.loralib is not None:
        raise UsageError(
            f"{source.where} does not say its alpha", "import it: lora-gpt2 adapters import FILE --name N --alpha A"
        )
    adapter = _convert(source, base, reporter, None).adapter
    check_finite_logits(base, adapter, source.where)
    return adapter


def _check_own_shape(source: FetchedAdapter, rank: int | None, alpha: float | None) -> None:
    """Raises `UsageError` for a rank or an alpha of an adapter that has its own."""
    is_dora = source.loralib is None and parse_peft_config(source.files[PEFT_CONFIG], source.where).dora
    if rank is not None and not is_dora:
        raise UsageError(f"{source.where} has its own rank; --rank is what DoRA is converted to", "leave it out")
    if alpha is not None and source.loralib is None:
        raise UsageError(f"{source.where} has its own alpha; --alpha is that of a loralib file", "leave it out")


def _describe_lora(source: FetchedAdapter) -> dict[str, Any]:
    """Returns what PEFT's configuration says of the adapter's shape, for people."""
    values = json.loads(source.files[PEFT_CONFIG])
    keys = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "target_modules")
    return {key: values[key] for key in keys if values.get(key)}


def _convert(source: FetchedAdapter, base: Base, reporter: Reporter, rank: int | None) -> Converted:
    if source.manifest is not None:
        check_base(source.manifest, identify(base), base.tokenizer.fingerprints)
    if doubt := source.describe_other_base(base):
        reporter.message(f"{doubt}; on other weights an adapter means nothing")
    weights = {"head": lambda: base.model.head, "embeddings": lambda: base.model.wte.weight}
    content = parse_peft(
        source.files[WEIGHTS], source.files[PEFT_CONFIG], base.config, source.where, lambda name: weights[name]()
    )
    if not (content.spec.dora or content.spec.pissa):
        return Converted(adapter=content.adapter, variant="lora", relative_error=0.0, max_logit_difference=0.0)
    found = convert_variant(content, base, rank)
    if found.relative_error > EXACT:
        ranks = [update.rank for update in found.adapter.updates.values()]
        reporter.message(
            f"{source.where} is DoRA, here plain LoRA of rank {max(ranks)}: {found.relative_error:.2%} of its update "
            f"is lost, logits are within {found.max_logit_difference:.1e}; "
            f"'adapters import {source.where} --name N --rank {base.config.n_embd}' makes it exact"
        )
    return found


def export_adapter(store: Store, reference: str, out: Path, without_head: Base | None = None) -> Manifest:
    """Writes a version, checked, to the new folder `out`, or to one file if that ends in `.tar.gz`.

    In a folder the configuration names the base as transformers finds it on this machine, so that
    `AutoPeftModelForCausalLM` loads it as it is. `without_head` is the base of an adapter whose change of the tied head
    is left out, with our manifest and its figures, which are not of these weights. Returns what is known of what was
    written.

    Raises:
        ConflictError: `out` exists.
        CorruptError: the version is damaged.
        UsageError: nothing but the head is adapted.
    """
    if out.exists():
        raise ConflictError(f"{out} exists", "choose another name, or remove it first")
    manifest, files = read_version_files(store, reference)
    if without_head is not None:
        manifest, files = _leave_head_out(manifest, files, without_head)
    is_archive = out.name.lower().endswith(ARCHIVES)
    if not is_archive:
        files |= _name_base(manifest, files)
    with wrap_os_errors(f"write {out}"):
        if is_archive:
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


def _leave_head_out(manifest: Manifest, files: Mapping[str, bytes], base: Base) -> tuple[Manifest, dict[str, bytes]]:
    adapter = drop_head(from_peft(files[WEIGHTS], files[PEFT_CONFIG], base.config, manifest.reference))
    written = to_peft(adapter, base.name, base.config)
    size = sum(update.a.numel() + update.b.numel() for update in adapter.updates.values())
    lean = replace(manifest, figures={}, num_parameters=size, size_bytes=len(written[WEIGHTS]))
    said = f"\nExported without its change of the head (`lm_head`) from `{manifest.reference}`, whose figures are "
    said += "those of another adapter.\n"
    return lean, {**written, CARD: (build_card(lean) + said).encode()}


def read_version_files(store: Store, reference: str) -> tuple[Manifest, dict[str, bytes]]:
    """Returns a version's manifest and every file of it, all checked."""
    with store.open(reference) as version:
        return version.manifest, {**version.read_files(), MANIFEST: (version.folder / MANIFEST).read_bytes()}


def push_adapter(store: Store, reference: str, repository: str, private: bool) -> str:
    """Uploads a version with its card to the hub, making the repository if need be; returns its address.

    Files of an earlier version that this one lacks, such as a drafter that holds some of its text, leave the
    repository; its history has them.

    Raises:
        UsageError: `repository` is not `owner/name`.
        ResourceError: the hub cannot be reached, or wants a login; the store is unchanged.
    """
    if not HUB_ID.fullmatch(repository):
        raise UsageError(f"'{repository}' is not a hub repository", "write owner/name")
    manifest, files = read_version_files(store, reference)
    files[CARD] = build_card(manifest, read_audits(store, manifest)).encode()
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    hint = f"nothing is lost: 'lora-gpt2 adapters export {reference} FILE.tar.gz' makes a file to carry"
    with wrap_hub_errors(repository, f"push {reference}", hint):
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        old = sorted({*HUB_FILES} & {*api.list_repo_files(repository)} - {*files})
        operations: list[Any] = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
        operations += [CommitOperationDelete(name) for name in old]
        commit = api.create_commit(repository, operations, commit_message=f"Add {reference} by lora-gpt2")
    return str(commit.commit_url)
