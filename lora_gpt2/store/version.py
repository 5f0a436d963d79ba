"""One version's folder: what is written into it, and how it is read back with every byte accounted for.

Never imports torch. A file is read once; the bytes that were hashed are the bytes that are used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from lora_gpt2.core.errors import CorruptError
from lora_gpt2.core.files import read_regular, translate_os_error
from lora_gpt2.store.card import build_card
from lora_gpt2.store.manifest import CARD, MANIFEST, MAX_BYTES, MAX_FILE_BYTES, Manifest, parse_manifest


@dataclass(frozen=True)
class Version:
    """A version that is open, so that nobody removes it: its folder, and its manifest, read once."""

    folder: Path
    manifest: Manifest

    @classmethod
    def read(cls, folder: Path) -> Version:
        """Returns the version in a folder of a store; raises as `read_manifest`."""
        return cls(folder, read_manifest(folder, expected=f"{folder.parent.name}@{folder.name}"))

    def read_file(self, name: str) -> bytes:
        """Returns a file; raises `CorruptError` unless its bytes have the manifest's hash."""
        return read_checked(self.folder, self.manifest, name)

    def read_files(self) -> dict[str, bytes]:
        """Returns every file that the manifest guards; raises as `read_file`."""
        return {name: self.read_file(name) for name in self.manifest.files}


def pack_version(manifest: Manifest, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Returns every file of a version: these, the card, and the manifest with the hashes of all others."""
    packed = {**files, CARD: build_card(manifest).encode()}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in packed.items()}
    content = replace(manifest, files=hashes).to_bytes()
    try:
        parse_manifest(content)  # what could not be read again is not written
    except ValueError as error:
        raise CorruptError(f"{manifest.reference} cannot be stored: {error}", "fix what it was made from") from error
    return {**packed, MANIFEST: content}


def read_manifest(folder: Path, expected: str) -> Manifest:
    """Returns the manifest in a folder; raises `CorruptError` if it is damaged or not that of `expected`."""
    path = folder / MANIFEST
    try:
        manifest = parse_manifest(_read(path, MAX_BYTES))
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path} is damaged", "restore the folder from a copy, or train again") from error
    if manifest.reference != expected:
        raise CorruptError(f"{path} is the manifest of {manifest.reference}", f"restore the one of {expected}")
    return manifest


def read_checked(folder: Path, manifest: Manifest, name: str) -> bytes:
    """Returns a file of a version; raises `CorruptError` unless its bytes have the manifest's hash."""
    content = _read(folder / name)
    verify_hashes({name: content}, manifest, str(folder), [name])
    return content


def verify_hashes(
    files: Mapping[str, bytes], manifest: Manifest, where: str, names: Iterable[str] | None = None
) -> None:
    """Raises `CorruptError` unless the files, or those of `names`, are all there and have the manifest's hashes."""
    for name in manifest.files if names is None else names:
        if name not in files or hashlib.sha256(files[name]).hexdigest() != manifest.files.get(name):
            raise CorruptError(
                f"{where}/{name} is not the file that was published", "restore it, or use an older version: name@N"
            )


def _read(path: Path, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    try:
        return read_regular(path, max_bytes)
    except FileNotFoundError as error:
        raise CorruptError(f"{path} is missing", "restore it, or use an older version") from error
    except OSError as error:
        raise translate_os_error(error, f"read {path}") from error


def utc_now() -> datetime:
    """Returns the time to the second, as manifests give it."""
    return datetime.now(UTC).replace(microsecond=0)
