"""Names, versions and manifests of a store, without torch: what `adapters list` needs and no more.

<root>/<name>/CURRENT        the version in use, replaced atomically
<root>/<name>/<version>/     immutable
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from lora_gpt2.core.errors import CorruptError, LoraGpt2Error, NotFoundError, UsageError
from lora_gpt2.core.paths import check_name, fsync_dir, hold_lock, is_name, os_errors_as_ours, sync_tree, write_atomic
from lora_gpt2.recipe import suggest
from lora_gpt2.store.manifest import MANIFEST, Manifest

PUBLISH_WAIT_SECONDS = 30.0  # a publication takes milliseconds; another one may be in front


@dataclass(frozen=True)
class Store:
    """A folder of adapters."""

    root: Path

    def list_names(self) -> list[str]:
        """Returns the names of all adapters that have a version in use; other folders are none of ours."""
        if not self.root.is_dir():
            return []
        names = (entry.name for entry in os.scandir(self.root) if (self.root / entry.name / "CURRENT").is_file())
        return sorted(name for name in names if is_name(name))

    def check_writable(self) -> None:
        """Raises `ResourceError` if nothing can be published here; asked before hours of training, not after."""
        with os_errors_as_ours(f"write to the store {self.root}"):
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass

    def list_versions(self, name: str) -> list[int]:
        """Returns an adapter's versions, oldest first."""
        folder = self._adapter_dir(name)
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []

    def iter_current(self) -> Iterator[Manifest | LoraGpt2Error]:
        """Yields the manifest of each adapter's version in use, or the error of one that is damaged."""
        for name in self.list_names():
            try:
                yield self.read_manifest(name)
            except LoraGpt2Error as error:
                yield error

    def resolve(self, reference: str) -> Path:
        """Returns the folder of `name` (the version in use) or `name@version`.

        Raises:
            UsageError: it is not a name.
            NotFoundError: there is no such adapter or version; the hint names the nearest.
            CorruptError: CURRENT does not name a version, or a link leads out of the store.
        """
        name, _, wanted = reference.partition("@")
        folder = self._adapter_dir(check_name(name))
        if wanted and not wanted.isdecimal():
            raise UsageError(f"'{reference}' is not an adapter", "write name or name@version, for example legal@2")
        if not wanted:
            try:
                wanted = (folder / "CURRENT").read_text(encoding="ascii").strip()
            except (FileNotFoundError, NotADirectoryError) as error:
                hint = suggest(name, self.list_names())
                raise NotFoundError(f"there is no adapter '{name}' in {self.root}", hint) from error
            except (OSError, UnicodeDecodeError) as error:
                raise CorruptError(f"{folder / 'CURRENT'} cannot be read", "see 'ls -l' of it") from error
            if not wanted.isdecimal():
                raise CorruptError(f"{folder / 'CURRENT'} names no version", f"write one of {self.list_versions(name)}")
        version = folder / str(int(wanted))
        if not (version / MANIFEST).is_file():
            raise NotFoundError(f"'{name}' has no version {wanted}", f"it has {self.list_versions(name) or 'none'}")
        if not version.resolve().is_relative_to(self.root.resolve()):
            raise CorruptError(f"{version} leads out of the store", "remove the link")
        return version

    def read_manifest(self, reference: str) -> Manifest:
        """Returns the manifest of a version; raises `CorruptError` if it is not one, or not this version's."""
        folder = self.resolve(reference)
        return read_manifest(folder, expected=f"{folder.parent.name}@{folder.name}")

    def add_version(self, name: str, files: dict[str, bytes], make_manifest: Callable[[int], bytes]) -> int:
        """Publishes a new version and makes it the one in use; returns its number.

        `make_manifest` gets that number and returns `manifest.json`. The version's folder appears whole or not at all;
        CURRENT follows. Concurrent publications get different numbers, and the last one is in use.
        """
        folder = self._adapter_dir(check_name(name))
        with os_errors_as_ours(f"publish '{name}' in {self.root}"):
            folder.mkdir(parents=True, exist_ok=True)
            with hold_lock(folder / ".lock", f"the adapter '{name}'", PUBLISH_WAIT_SECONDS):
                version = max(self.list_versions(name), default=0) + 1
                work = folder / f".{version}.{os.getpid()}.partial"
                try:
                    for stale in folder.glob(".*.partial"):  # of processes that died: the lock is ours
                        shutil.rmtree(stale, ignore_errors=True)
                    work.mkdir()
                    for file_name, content in files.items():
                        (work / file_name).write_bytes(content)
                    (work / MANIFEST).write_bytes(make_manifest(version))
                    sync_tree(work)
                    os.rename(work, folder / str(version))
                finally:
                    shutil.rmtree(work, ignore_errors=True)
                self.use_version(name, version)
        return version

    def use_version(self, name: str, version: int) -> None:
        """Puts a version in use."""
        folder = self._adapter_dir(check_name(name))
        with os_errors_as_ours(f"write to the store {self.root}"):
            fsync_dir(folder)
            write_atomic(folder / "CURRENT", f"{version}\n".encode())
            fsync_dir(self.root)

    def _adapter_dir(self, name: str) -> Path:
        return self.root / name


def read_manifest(folder: Path, expected: str) -> Manifest:
    """Returns the manifest in a folder; raises `CorruptError` if it is damaged or not that of `expected`."""
    path = folder / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except (OSError, ValidationError, ValueError) as error:
        raise CorruptError(f"{path} cannot be read", "restore the folder from a copy, or train again") from error
    if manifest.reference != expected:
        raise CorruptError(f"{path} is the manifest of {manifest.reference}", f"restore the one of {expected}")
    return manifest
