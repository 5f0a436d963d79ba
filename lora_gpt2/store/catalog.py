"""Names, versions and manifests of a store, without torch: what `adapters list` needs and no more.

<root>/<name>/CURRENT        the version in use, replaced atomically
<root>/<name>/<version>/     immutable; not removed while a reader holds its lock
<root>/.locks/               one lock per name, held by the process that changes it
<root>/.trash/               what was removed, until `gc` (see `store/changes.py`)
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lora_gpt2.core.errors import CorruptError, LoraGpt2Error, NotFoundError
from lora_gpt2.core.files import (
    fsync_dir,
    read_regular,
    rename_path,
    translate_os_error,
    wrap_os_errors,
    write_atomic,
    write_file,
)
from lora_gpt2.core.locks import hold_lock, hold_shared
from lora_gpt2.core.names import check_name, is_name
from lora_gpt2.core.suggest import suggest
from lora_gpt2.store.manifest import MANIFEST, Manifest, parse_manifest
from lora_gpt2.store.references import MAX_VERSION_DIGITS, AdapterRef
from lora_gpt2.store.version import Version, pack_version, read_manifest

PUBLISH_WAIT_SECONDS = 30.0  # a publication takes milliseconds; another one may be in front
MAX_POINTER_BYTES = 64
PIN_ATTEMPTS = 20  # each is lost only to a publication and a collection in between
STAMP = "~"  # not in any name
DEFAULT_STORE = "adapters"
LOCKS, TRASH = ".locks", ".trash"
NEXT = ".next"  # the lowest number that the next version may have, once the highest version was removed


@dataclass(frozen=True)
class Store:
    """A folder of adapters."""

    root: Path

    @classmethod
    def find(cls, folder: str | Path | None = None) -> Store:
        """Returns the store in a folder; without one `$LORA_GPT2_STORE`, else `./adapters`."""
        return cls(Path(folder or os.environ.get("LORA_GPT2_STORE") or DEFAULT_STORE))

    def list_names(self) -> list[str]:
        """Returns the names of all adapters that have a version in use; other folders are ignored.

        Raises `ResourceError` where this user may not look into one.
        """
        try:
            with os.scandir(self.root) as entries:
                names = [entry.name for entry in entries if is_name(entry.name)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(filter(self._is_in_use, names))

    def _is_in_use(self, name: str) -> bool:
        path = f"{self.root}/{name}/CURRENT"
        try:
            return stat.S_ISREG(os.stat(path).st_mode)
        except PermissionError as error:
            raise translate_os_error(error, f"read {path}") from error
        except (OSError, ValueError):
            return False

    def check_writable(self) -> None:
        """Raises `ResourceError` if nothing can be published here; asked before hours of training, not after."""
        with wrap_os_errors(f"write to the store {self.root}"):
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass

    def list_versions(self, name: str) -> list[int]:
        """Returns an adapter's versions, oldest first."""
        try:
            names = os.listdir(self.folder_of(name))
        except (FileNotFoundError, NotADirectoryError):  # it may go at any moment
            return []
        return sorted(int(each) for each in names if each.isdecimal())

    def iter_current(self) -> Iterator[Manifest | LoraGpt2Error]:
        """Yields the manifest of each adapter's version in use, or the error of one that is damaged."""
        for name in self.list_names():
            try:
                folder = self.resolve(name)
                yield read_manifest(folder, expected=f"{name}@{folder.name}")
            except LoraGpt2Error:  # it may have been collected meanwhile: look again, holding it
                yield self._try_pinned(name)

    def list_for_base(self, fingerprint: str) -> list[Manifest]:
        """Returns the versions in use that were trained on a base; damaged ones are left out."""
        found = (item for item in self.iter_current() if isinstance(item, Manifest))
        return [manifest for manifest in found if manifest.base.fingerprint == fingerprint]

    def _try_pinned(self, name: str) -> Manifest | LoraGpt2Error:
        try:
            return self.read_manifest(name)
        except LoraGpt2Error as error:
            return error

    def read_current(self, name: str) -> int:
        """Returns the number of the version in use.

        Raises:
            NotFoundError: there is no such adapter; the hint names the nearest.
            CorruptError: CURRENT does not name a version.
        """
        path = f"{self.root}/{check_name(name)}/CURRENT"
        try:
            content = read_regular(path, MAX_POINTER_BYTES)
        except (FileNotFoundError, NotADirectoryError) as error:
            hint = f"{suggest(name, self.list_names())}; another store is named with --store or $LORA_GPT2_STORE"
            raise NotFoundError(f"there is no adapter '{name}' in {self.root.absolute()}", hint) from error
        except OSError as error:
            raise translate_os_error(error, f"read {path}") from error
        wanted = content.removesuffix(b"\n")
        if not content.endswith(b"\n") or not wanted.isdigit() or len(wanted) > MAX_VERSION_DIGITS:
            hint = f"use 'adapters rollback {name} --to N', N one of {self.list_versions(name)}"
            raise CorruptError(f"{path} names no version", hint)
        return int(wanted)

    def resolve(self, reference: str) -> Path:
        """Returns the folder of `name` (the version in use) or `name@version`.

        Raises:
            UsageError: it is not a name.
            NotFoundError: there is no such adapter or version; the hint names the nearest.
            CorruptError: CURRENT does not name a version, or a link leads out of the store.
        """
        ref = AdapterRef.parse(reference)
        name, is_latest = ref.name, ref.version is None
        home = f"{self.root}/{name}"
        version = Path(f"{home}/{self.read_current(name) if is_latest else ref.version}")
        if not os.path.isfile(f"{version}/{MANIFEST}"):
            if is_latest and version.name not in map(str, self.list_versions(name)):
                raise CorruptError(f"'{name}' uses version {version.name}, which is gone", f"adapters rollback {name}")
            if is_latest:
                raise CorruptError(f"{version / MANIFEST} is missing", f"restore it, or adapters rollback {name}")
            raise NotFoundError(
                f"'{name}' has no version {ref.version}", f"it has {self.list_versions(name) or 'none'}"
            )
        is_linked = os.path.islink(home) or os.path.islink(version)
        if is_linked and not version.resolve().is_relative_to(self.root.resolve()):
            raise CorruptError(f"{version} leads out of the store", "remove the link")
        return version

    @contextmanager
    def pin(self, reference: str) -> Iterator[Path]:
        """Yields the folder of a version, which nobody removes until the block ends; raises as `resolve`."""
        for attempt in range(PIN_ATTEMPTS):
            try:
                folder = self.resolve(reference)
            except CorruptError:
                if "@" in reference or attempt == PIN_ATTEMPTS - 1:
                    raise
                continue  # CURRENT was read before, the folder looked for after a newer version took its place
            with hold_shared(folder) as found:
                if found:
                    yield folder
                    return
        raise NotFoundError(f"'{reference}' was removed while it was opened", "see 'adapters list'")

    @contextmanager
    def open(self, reference: str) -> Iterator[Version]:
        """Yields a version, which nobody removes until the block ends.

        Raises what `resolve` does, `NotFoundError` if another adapter has its name now than the one of the reference's
        digest, or `CorruptError` if its manifest is damaged or not its own.
        """
        ref = AdapterRef.parse(reference)
        with self.pin(ref.label) as folder:
            version = Version.read(folder)
            if not version.manifest.is_pinned_by(ref.digest):
                raise NotFoundError(f"{ref.label} was replaced by another adapter", "name it again")
            yield version

    def read_manifest(self, reference: str) -> Manifest:
        """Returns the manifest of a version; raises as `open`."""
        with self.open(reference) as version:
            return version.manifest

    def add_version(self, name: str, files: Mapping[str, bytes], make_manifest: Callable[[int], Manifest]) -> Manifest:
        """Publishes a new version and makes it the one in use; returns its manifest.

        `make_manifest` gets its number and returns what is to be said of it. The version's folder appears whole or not
        at all; CURRENT follows. Concurrent publications get different numbers, and the last one is in use.
        """
        with self.change(name, f"publish '{name}' in {self.root}") as folder:
            folder.mkdir(exist_ok=True)
            version = self.next_version(name)
            with self.new_folder(folder, str(version)) as work:
                manifest = write_version(work, make_manifest(version), files)
                rename_path(work, folder / str(version))
            self.use_version(name, version)
        return manifest

    def use_version(self, name: str, version: int) -> None:
        """Puts a version in use. Raises `NotFoundError` if there is no such version."""
        folder = self.folder_of(name)
        if version not in self.list_versions(name):
            self.resolve(f"{name}@{version}" if self.has_adapter(name) else name)  # says what is missing
        with wrap_os_errors(f"write to the store {self.root}"):
            fsync_dir(folder)
            write_atomic(folder / "CURRENT", f"{version}\n".encode())
            fsync_dir(self.root)

    @contextmanager
    def change(self, name: str, action: str, wait_seconds: float = PUBLISH_WAIT_SECONDS) -> Iterator[Path]:
        """Yields an adapter's folder while nobody else changes it; `OSError` becomes ours, naming `action`.

        Raises:
            ConflictError: somebody else is still at it after `wait_seconds`.
            CorruptError: a link stands where a folder of the store should; what it leads to is left alone.
        """
        folder, locks, trash = self.folder_of(name), self.root / LOCKS, self.root / TRASH
        with wrap_os_errors(action):
            self.root.mkdir(parents=True, exist_ok=True)
            for path in (folder, locks, trash):
                if path.is_symlink():
                    raise CorruptError(f"{path} is a link, expected a folder", "replace it by the folder itself")
            with hold_lock(locks / name, f"the adapter '{name}'", wait_seconds):
                yield folder

    @contextmanager
    def new_folder(self, parent: Path, label: str) -> Iterator[Path]:
        """Yields an empty folder in `parent`, to be renamed by the block; the adapter's lock must be held.

        What dead processes left there under this label goes.
        """
        for stale in parent.glob(f".{label}{STAMP}*.partial"):
            shutil.rmtree(stale, ignore_errors=True)
        work = parent / f".{label}{STAMP}{os.getpid()}.partial"
        work.mkdir()
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def folder_of(self, name: str) -> Path:
        """Returns where an adapter is, or would be; raises `UsageError` if it is not a name."""
        return self.root / check_name(name)

    def has_adapter(self, name: str) -> bool:
        """True if there is an adapter of this name, even a damaged one; other folders do not count."""
        folder = self.folder_of(name)
        versions = (folder / str(version) for version in self.list_versions(name))
        return (folder / "CURRENT").is_file() or any((version / MANIFEST).is_file() for version in versions)

    def next_version(self, name: str) -> int:
        """Returns the number of the next version: above all there are, and above all that were removed."""
        after = max(self.list_versions(name), default=0) + 1
        try:
            return max(after, int(read_regular(self.folder_of(name) / NEXT, MAX_POINTER_BYTES)))
        except (FileNotFoundError, ValueError):
            return after


def write_version(folder: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Manifest:
    """Writes a version's files, its card and its manifest into an empty folder, durably; returns the manifest."""
    packed = pack_version(manifest, files)
    for name, content in packed.items():
        write_file(folder / name, content)
    fsync_dir(folder)
    return parse_manifest(packed[MANIFEST])
