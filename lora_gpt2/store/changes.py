"""Changing what a store holds: copy, rename, roll back, remove, restore, collect. Never imports torch.

Every change is one rename or one replaced file, made under the adapter's lock; before it the old state holds, after
it the new one. (A new name is one rename, the end of the old name a second: a crash between them leaves both.)
Nothing is deleted but by `collect_garbage`: what is removed waits in `.trash`, and comes back with `restore`. A
version's number is never given out twice while its adapter exists.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from lora_gpt2.core.errors import ConflictError, CorruptError, LoraGpt2Error, NotFoundError
from lora_gpt2.core.files import fsync_dir, rename_path, wrap_os_errors, write_atomic
from lora_gpt2.core.locks import build_reading_error, hold_for_removal, move_unread
from lora_gpt2.core.names import check_name, is_name
from lora_gpt2.store.audits import list_audits
from lora_gpt2.store.catalog import NEXT, STAMP, TRASH, Store, write_version
from lora_gpt2.store.manifest import Manifest, Parent
from lora_gpt2.store.references import AdapterRef
from lora_gpt2.store.version import Version, utc_now


@dataclass(frozen=True, kw_only=True)
class HistoryEntry:
    """One version of an adapter, or the error that keeps it from being read."""

    version: int
    found: Manifest | LoraGpt2Error
    in_use: bool


@dataclass(kw_only=True)
class GarbageReport:
    """What `collect_garbage` deleted (or would), what it left because somebody reads it, and the bytes freed."""

    removed: list[str]
    kept_in_use: list[str]
    freed_bytes: int

    def take(self, path: Path, labels: list[str], dry_run: bool) -> None:
        """Deletes a file or folder and counts it; one that is gone was restored or collected by somebody else."""
        with suppress(FileNotFoundError):
            size = measure_bytes(path)
            if not dry_run:
                _delete(path)
            self.freed_bytes += size
            self.removed += labels


def list_history(store: Store, name: str) -> list[HistoryEntry]:
    """Returns an adapter's versions, oldest first; raises `NotFoundError` if it has none."""
    versions = store.list_versions(check_name(name))
    try:
        current = store.read_current(name)
    except NotFoundError:
        if not versions:
            raise
        current = 0
    except CorruptError:
        current = 0
    return [
        HistoryEntry(version=version, found=_try_read(store, f"{name}@{version}"), in_use=version == current)
        for version in versions
    ]


def _try_read(store: Store, reference: str) -> Manifest | LoraGpt2Error:
    try:
        return store.read_manifest(reference)
    except LoraGpt2Error as error:
        return error


def copy_adapter(store: Store, reference: str, name: str) -> Manifest:
    """Publishes a version under another name, with its origin and the original as its parent; returns the manifest.

    Raises:
        NotFoundError, CorruptError: see `Store.open` and `Version.read_file`.
    """
    check_name(name)
    with store.open(reference) as version:
        manifest, files = version.manifest, version.read_files()
    parent = Parent(reference=manifest.reference, digest=manifest.digest)
    provenance = {**manifest.provenance, "by": "copy"}
    twin = replace(manifest, name=name, created=utc_now(), parents=(parent,), provenance=provenance)
    return store.add_version(name, files, lambda number: replace(twin, version=number))


def rename_adapter(store: Store, old: str, new: str) -> None:
    """Gives an adapter, with all its versions, another name; what was under the old one goes to the trash.

    Raises:
        NotFoundError: there is no adapter `old`.
        ConflictError: there is one called `new`.
        CorruptError: a version is damaged; nothing was changed.
    """
    check_name(new)
    store.read_current(old)
    with ExitStack() as stack:
        for name in sorted({old, new}):
            stack.enter_context(store.change(name, f"rename '{old}' in {store.root}"))
        current, versions = store.read_current(old), store.list_versions(old)
        _check_free(store, new)
        _hold_all(stack, [store.folder_of(old) / str(version) for version in versions], old)
        with store.new_folder(store.root, new) as work:
            for version in versions:
                stored = Version.read(store.folder_of(old) / str(version))
                (work / str(version)).mkdir()
                write_version(work / str(version), replace(stored.manifest, name=new), stored.read_files())
            for audit in list_audits(store, old):
                write_atomic(work / audit.name, audit.read_bytes())
            write_atomic(work / NEXT, f"{store.next_version(old)}\n".encode())
            write_atomic(work / "CURRENT", f"{current}\n".encode())
            rename_path(work, store.folder_of(new))
        fsync_dir(store.root)
        try:
            _move_to_trash(store, store.folder_of(old), old)
        except ConflictError:  # Windows tells only now that somebody reads the old one: as if nothing had been done
            _delete(store.folder_of(new))
            raise


def roll_back(store: Store, name: str, to: int | None = None) -> Manifest:
    """Puts an older version in use: `to`, or the newest sound one before the present; returns its manifest.

    Raises:
        NotFoundError: there is no such version, or none before.
        CorruptError: the version asked for is damaged; the present one stays in use.
    """
    with store.change(name, f"roll back '{name}' in {store.root}"):
        versions = store.list_versions(name)
        if to is not None:
            manifest = _check_sound(store, f"{name}@{to}")
        else:
            try:
                present = store.read_current(name)
            except (CorruptError, NotFoundError):
                if not versions:
                    raise
                present = max(versions) + 1
            manifest = _find_sound(store, name, [version for version in versions if version < present])
        store.use_version(name, manifest.version)
    return manifest


def _find_sound(store: Store, name: str, versions: list[int]) -> Manifest:
    for version in reversed(versions):
        with suppress(CorruptError):
            return _check_sound(store, f"{name}@{version}")
    raise NotFoundError(f"'{name}' has no older version, or none that is sound", f"see 'adapters history {name}'")


def _check_sound(store: Store, reference: str) -> Manifest:
    with store.open(reference) as version:
        version.read_files()
        return version.manifest


def remove_adapter(store: Store, reference: str) -> None:
    """Moves an adapter, or one version of it that is not in use, into the trash.

    Raises:
        NotFoundError: there is no such adapter or version.
        ConflictError: the version is in use, or somebody is reading it.
    """
    chosen = check_removable(store, reference)
    folder = store.folder_of(chosen.name)
    with store.change(chosen.name, f"remove {chosen.label} from {store.root}"), ExitStack() as stack:
        check_removable(store, reference)  # again: somebody may have removed it while this one waited
        if chosen.version is None:
            _hold_all(stack, [folder / str(number) for number in store.list_versions(chosen.name)], chosen.label)
        else:
            folder = folder / str(chosen.version)
            _hold_all(stack, [folder], chosen.label)
            following = max(store.next_version(chosen.name), chosen.version + 1)
            write_atomic(folder.parent / NEXT, f"{following}\n".encode())
        _move_to_trash(store, folder, chosen.label)


def check_removable(store: Store, reference: str) -> AdapterRef:
    """Returns the adapter or version that a reference names; raises what `remove_adapter` would, readers aside."""
    chosen = AdapterRef.parse(reference)
    name, version = chosen.name, chosen.version
    if not store.has_adapter(name) or (version is not None and not (store.folder_of(name) / str(version)).is_dir()):
        store.resolve(chosen.label)  # says what is missing
    if chosen.digest:
        store.read_manifest(reference)  # says if it is another one
    if version is not None and version == _read_pointer(store, name):
        hint = f"use another first ('adapters rollback {name}'), or remove '{name}'"
        raise ConflictError(f"{chosen.label} is the version in use", hint)
    return chosen


def _read_pointer(store: Store, name: str) -> int | None:
    try:
        return store.read_current(name)
    except (CorruptError, NotFoundError):
        return None


def restore_adapter(store: Store, reference: str) -> None:
    """Brings back what was removed last under this reference.

    Raises:
        NotFoundError: nothing of that name is in the trash.
        ConflictError: there is one of that name again.
    """
    chosen = AdapterRef.parse(reference)
    name, label = chosen.name, chosen.label
    found = [path for path in iter_trash(store) if path.name.rpartition(STAMP)[0] == label]
    if not found:
        raise NotFoundError(f"{label} is not in the trash of {store.root}", "see 'adapters gc --dry-run'")
    newest = max(found, key=lambda path: int(path.name.rpartition(STAMP)[2]))
    with store.change(name, f"restore {label} in {store.root}") as home:
        target = home
        if chosen.version is None:
            _check_free(store, name)
        else:
            target = home / str(chosen.version)
            if target.exists():
                raise ConflictError(f"there is a {label}", "remove it first")
            if not home.is_dir():
                raise NotFoundError(f"there is no adapter '{name}' to put the version into", f"restore '{name}' first")
        rename_path(newest, target)
        fsync_dir(target.parent)


def collect_garbage(store: Store, keep: int | None = None, dry_run: bool = False) -> GarbageReport:
    """Deletes the trash, what dead processes left, and, with `keep`, all but the newest `keep` versions of each.

    The version in use and versions that somebody reads are kept.
    """
    found = GarbageReport(removed=[], kept_in_use=[], freed_bytes=0)
    for name in store.list_names() if keep else []:
        with store.change(name, f"collect '{name}' in {store.root}"):
            current = _read_pointer(store, name)
            for version in store.list_versions(name)[: -(keep or 1)] if current is not None else []:
                if version != current:
                    _collect_version(store, store.folder_of(name) / str(version), found, dry_run)
    with wrap_os_errors(f"collect garbage in {store.root}"):
        for path in iter_trash(store):
            label = path.name.rpartition(STAMP)[0]
            found.take(path, [] if label in found.removed else [label], dry_run)
        for path in (store.root / TRASH).glob(".*.partial"):  # half deleted
            found.take(path, [], dry_run)
    _collect_leftovers(store, found, dry_run)
    return found


def _collect_version(store: Store, folder: Path, found: GarbageReport, dry_run: bool) -> None:
    reference = f"{folder.parent.name}@{folder.name}"
    with hold_for_removal(folder) as is_ours:
        if not is_ours:
            found.kept_in_use.append(reference)
            return
        try:
            if dry_run:
                found.freed_bytes += measure_bytes(folder)
            else:
                _move_to_trash(store, folder, reference)
        except ConflictError:  # Windows tells only now that somebody reads it
            found.kept_in_use.append(reference)
        else:
            found.removed.append(reference)


def _collect_leftovers(store: Store, found: GarbageReport, dry_run: bool) -> None:
    """Deletes what dead processes left; a process that still uses it holds the lock of its name."""
    owners = {path: path.name[1:].rpartition(STAMP)[0] for path in store.root.glob(f".*{STAMP}*.partial")}
    for name in filter(is_name, os.listdir(store.root) if store.root.is_dir() else ()):
        with suppress(FileNotFoundError):  # it was removed meanwhile
            owners |= dict.fromkeys(store.folder_of(name).glob(".*.partial"), name)
    for path, name in owners.items():
        if is_name(name):
            with suppress(ConflictError), store.change(name, f"collect '{name}' in {store.root}", wait_seconds=0):
                found.take(path, [path.name], dry_run)


def iter_trash(store: Store) -> Iterator[Path]:
    """Yields what was removed and not yet collected."""
    folder = store.root / TRASH
    yield from (
        (path for path in sorted(folder.iterdir()) if STAMP in path.name and path.name[0] != ".")
        if folder.is_dir()
        else ()
    )


def _delete(path: Path) -> None:
    """Deletes a file, or a folder, which is first renamed: what is half deleted can no longer be restored."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    doomed = path.with_name(f".{path.name}{STAMP}{os.getpid()}.partial")
    rename_path(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def measure_bytes(folder: Path) -> int:
    """Returns the size of all files below a folder."""
    return sum(path.stat().st_size for path in [folder, *folder.rglob("*")] if path.is_file() and not path.is_symlink())


def _hold_all(stack: ExitStack, folders: list[Path], label: str) -> None:
    """Lets nobody begin to read these until the stack ends; raises `ConflictError` if somebody does."""
    for folder in folders:
        if not stack.enter_context(hold_for_removal(folder)):
            raise build_reading_error(label)


def _move_to_trash(store: Store, folder: Path, label: str) -> None:
    trash = store.root / TRASH
    trash.mkdir(exist_ok=True)
    fsync_dir(store.root)
    newest = max((int(path.name.rpartition(STAMP)[2]) for path in iter_trash(store)), default=0)
    move_unread(folder, trash / f"{label}{STAMP}{max(time.time_ns(), newest + 1)}", label)  # clocks go backwards
    fsync_dir(folder.parent)
    fsync_dir(trash)


def _check_free(store: Store, name: str) -> None:
    """Raises `ConflictError` if something has this name; what a failed publication left goes, and nothing else."""
    folder = store.folder_of(name)
    if store.has_adapter(name):
        raise ConflictError(f"there is an adapter '{name}' in {store.root}", "choose another name, or remove it first")
    if folder.is_dir():
        for path in [folder / NEXT, *folder.glob(".*.partial")]:
            _delete(path)
        try:
            folder.rmdir()
        except OSError as error:
            raise ConflictError(f"{folder} holds other things", "choose another name") from error
