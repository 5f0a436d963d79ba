"""Adapters from elsewhere, fetched and not yet looked into: PEFT folders, the hub, archives, loralib files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from lora_gpt2.core.errors import CorruptError, LoraGpt2Error, NotFoundError, UsageError
from lora_gpt2.core.files import read_regular, wrap_os_errors
from lora_gpt2.core.hub import download
from lora_gpt2.data.successors import DRAFTER
from lora_gpt2.model.base import Base
from lora_gpt2.model.checkpoint import HUB_ID, HUB_NAMES, Checkpoint, list_bundled, shorten_base_name
from lora_gpt2.model.stored_weights import fingerprint_base
from lora_gpt2.store.archive import read_archive
from lora_gpt2.store.manifest import CARD, MANIFEST, MAX_FILE_BYTES, PEFT_CONFIG, WEIGHTS, Manifest, parse_manifest
from lora_gpt2.store.peft.config import parse_peft_config
from lora_gpt2.store.peft.tensors import PICKLED, read_peft_files
from lora_gpt2.store.version import verify_hashes

ARCHIVES = (".tar.gz", ".tgz")
LORALIB = (".pt", ".bin", ".pth")
HUB_FILES = (
    WEIGHTS,
    PEFT_CONFIG,
    MANIFEST,
    "metrics.jsonl",
    "report.html",
    "curve.png",
    "training_text.bin",
    DRAFTER,
    "candidates.json",
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
        name = self.named_base
        known = name in (*list_bundled(), *HUB_NAMES) or HUB_ID.fullmatch(name) or Path(name, "config.json").is_file()
        return name if known else ""

    @property
    def named_base(self) -> str:
        """The base that PEFT's configuration names, by its short name if it has one; '' if it names none."""
        if self.loralib is not None:
            return ""
        name = parse_peft_config(self.files[PEFT_CONFIG], self.where).base_name
        return shorten_base_name(name) if name else ""

    def describe_other_base(self, base: Base) -> str:
        """Returns what speaks against `base` being the one that PEFT trained on; '' if nothing does."""
        named, ours = self.named_base, shorten_base_name(base.name)
        if self.manifest is not None or not named or named == ours:
            return ""
        if named in list_bundled() or Path(named, "config.json").is_file():
            with suppress(LoraGpt2Error):  # a folder of that name may hold anything
                if fingerprint_base(Checkpoint.open(named)) == base.fingerprint:
                    return ""
                return f"{self.where} names the base '{named}', whose weights are not those of '{ours}'"
        return f"{self.where} names the base '{named}'; that '{ours}' has its weights cannot be checked here"


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
        hint = f"there is no folder {source} here either; check its path, or copy the folder by hand and import that"
        folder = download(source, HUB_FILES, ("adapter_model.*", PEFT_CONFIG), "the adapter", hint, refresh=True)
        if not any((folder / name).is_file() for name in (WEIGHTS, PICKLED)):  # as PEFT once saved
            folder = download(source, (*HUB_FILES, PICKLED), (PICKLED, PEFT_CONFIG), "the adapter", hint)
        return _read_folder(folder, source)
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
