"""Changing what a store holds: copy, rename, roll back, remove, restore, collect. Never imports torch.

Every change is one rename or one replaced file, made under the adapter's lock; before it the old state holds, after
it the new one. Nothing is deleted but by `collect_garbage`: what is removed waits in `.trash`, and comes back with
`restore`. A version's number is never given out twice while its adapter exists.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from lora_gpt2.core.errors import ConflictError, CorruptError, LoraGpt2Error, NotFoundError
from lora_gpt2.core.paths import check_name, fsync_dir, hold_for_removal, is_name, os_errors_as_ours, write_atomic
from lora_gpt2.store.catalog import NEXT, STAMP, Store, write_version
from lora_gpt2.store.manifest import Manifest, Parent
from lora_gpt2.store.version import read_all_checked, read_manifest, utc_now

TRASH = ".trash"
PROCESS = re.compile(r"[.~](\d+)\.partial$")


@dataclass(frozen=True)
class HistoryEntry:
    """One version of an adapter, or the error that keeps it from being read."""

    version: int
    found: Manifest | LoraGpt2Error
    in_use: bool


@dataclass(frozen=True)
class Collected:
    """What `collect_garbage` deleted (or would), what it left because somebody reads it, and the bytes freed."""

    removed: list[str]
    kept_in_use: list[str]
    freed_bytes: int


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
    return [HistoryEntry(version, _try_read(store, f"{name}@{version}"), version == current) for version in versions]


def _try_read(store: Store, reference: str) -> Manifest | LoraGpt2Error:
    try:
        return store.read_manifest(reference)
    except LoraGpt2Error as error:
        return error


def copy_adapter(store: Store, reference: str, name: str) -> Manifest:
    """Publishes a version under another name, with its origin and the original as its parent; returns the manifest.

    Raises:
        NotFoundError, CorruptError: see `Store.resolve` and `read_checked`.
    """
    check_name(name)
    with store.pin(reference) as folder:
        manifest = read_manifest(folder, expected=f"{folder.parent.name}@{folder.name}")
        files = read_all_checked(folder, manifest)
    parent = Parent(reference=manifest.reference, digest=manifest.digest)
    twin = replace(manifest, name=name, created=utc_now(), parents=(parent,), made={"by": "copy"})
    version = store.add_version(name, files, lambda number: replace(twin, version=number))
    return store.read_manifest(f"{name}@{version}")


def rename_adapter(store: Store, old: str, new: str) -> None:
    """Gives an adapter, with all its versions, another name; what was under the old one goes to the trash.

    Raises:
        NotFoundError: there is no adapter `old`.
        ConflictError: there is one called `new`.
        CorruptError: a version is damaged; nothing was changed.
    """
    current = store.read_current(old)
    check_name(new)
    with ExitStack() as stack:
        for name in sorted({old, new}):
            stack.enter_context(store.change(name, f"rename '{old}' in {store.root}"))
        _check_free(store, new)
        with store.new_folder(store.root, new) as work:
            for version in store.list_versions(old):
                folder = store.folder_of(old) / str(version)
                manifest = read_manifest(folder, expected=f"{old}@{version}")
                files = read_all_checked(folder, manifest)
                (work / folder.name).mkdir()
                write_version(work / folder.name, replace(manifest, name=new), files)
            write_atomic(work / NEXT, f"{max(store.list_versions(old)) + 1}\n".encode())
            write_atomic(work / "CURRENT", f"{current}\n".encode())
            os.rename(work, store.folder_of(new))
        fsync_dir(store.root)
        _discard(store, store.folder_of(old), old)


def roll_back(store: Store, name: str, to: int | None = None) -> Manifest:
    """Puts an older version in use: `to`, or the newest sound one before the present; returns its manifest.

    Raises:
        NotFoundError: there is no such version, or none before.
        CorruptError: the version asked for is damaged; the present one stays in use.
    """
    versions = store.list_versions(check_name(name))
    with store.change(name, f"roll back '{name}' in {store.root}"):
        if to is not None:
            manifest = _check_sound(store, f"{name}@{to}")
        else:
            try:
                present = store.read_current(name)
            except CorruptError:
                present = max(versions, default=0) + 1
            manifest = _find_sound(store, name, [version for version in versions if version < present])
        store.use_version(name, manifest.version)
    return manifest


def _find_sound(store: Store, name: str, versions: list[int]) -> Manifest:
    for version in reversed(versions):
        with suppress(CorruptError):
            return _check_sound(store, f"{name}@{version}")
    raise NotFoundError(f"'{name}' has no older version that is sound", f"see 'adapters history {name}'")


def _check_sound(store: Store, reference: str) -> Manifest:
    with store.pin(reference) as folder:
        manifest = read_manifest(folder, expected=f"{folder.parent.name}@{folder.name}")
        read_all_checked(folder, manifest)
        return manifest


def remove_adapter(store: Store, reference: str) -> None:
    """Moves an adapter, or one version of it that is not in use, into the trash.

    Raises:
        NotFoundError: there is no such adapter or version.
        ConflictError: the version is in use, or somebody is reading it.
    """
    name, separator, _ = reference.partition("@")
    versions = store.list_versions(check_name(name))
    if not separator and (versions or store.folder_of(name).is_dir()):
        folder = store.folder_of(name)
    else:
        folder = store.resolve(reference)
    with store.change(name, f"remove {reference} from {store.root}") as home:
        if separator:
            if folder.name == str(store.read_current(name)):
                raise ConflictError(
                    f"{reference} is the version in use",
                    f"use another first ('adapters rollback {name}'), or remove '{name}'",
                )
            if int(folder.name) == max(versions):
                write_atomic(home / NEXT, f"{int(folder.name) + 1}\n".encode())
        _discard(store, folder, f"{name}@{folder.name}" if separator else name)


def restore_adapter(store: Store, reference: str) -> None:
    """Brings back what was removed last under this reference.

    Raises:
        NotFoundError: nothing of that name is in the trash.
        ConflictError: there is one of that name again.
    """
    name, separator, version = reference.partition("@")
    check_name(name)
    found = [path for path in iter_trash(store) if path.name.rpartition(STAMP)[0] == reference]
    if not found:
        raise NotFoundError(f"{reference} is not in the trash of {store.root}", "see 'adapters gc --dry-run'")
    newest = max(found, key=lambda path: int(path.name.rpartition(STAMP)[2]))
    with store.change(name, f"restore {reference} in {store.root}") as home:
        target = home / version if separator else home
        if separator and target.exists():
            raise ConflictError(f"there is a {reference}", "remove it first")
        if separator and not home.is_dir():
            raise NotFoundError(f"there is no adapter '{name}' to put the version into", f"restore '{name}' first")
        if not separator:
            _check_free(store, name)
        os.rename(newest, target)
        fsync_dir(target.parent)


def collect_garbage(store: Store, keep: int | None = None, dry_run: bool = False) -> Collected:
    """Deletes the trash, what dead processes left, and, with `keep`, all but the newest `keep` versions of each.

    The version in use and versions that somebody reads are kept.
    """
    removed: list[str] = []
    in_use: list[str] = []
    freed = 0
    for name in store.list_names() if keep else []:
        with store.change(name, f"collect '{name}' in {store.root}"):
            current = store.read_current(name)
            for version in store.list_versions(name)[: -(keep or 1)]:
                folder = store.folder_of(name) / str(version)
                if version == current:
                    continue
                with hold_for_removal(folder) as is_ours:
                    (removed if is_ours else in_use).append(f"{name}@{version}")
                    if is_ours and not dry_run:
                        _move_to_trash(store, folder, f"{name}@{version}")
                    elif is_ours:
                        freed += measure_bytes(folder)
    with os_errors_as_ours(f"collect garbage in {store.root}"):
        for path in [*iter_trash(store), *_iter_leftovers(store)]:
            freed += measure_bytes(path)
            if (label := path.name.rpartition(STAMP)[0] or path.name) not in removed:
                removed.append(label)
            if not dry_run:
                _delete(path)
    return Collected(removed, in_use, freed)


def iter_trash(store: Store) -> Iterator[Path]:
    """Yields what was removed and not yet collected."""
    folder = store.root / TRASH
    yield from (
        (path for path in sorted(folder.iterdir()) if STAMP in path.name and path.name[0] != ".")
        if folder.is_dir()
        else ()
    )


def _iter_leftovers(store: Store) -> Iterator[Path]:
    """Yields what dead processes left: their locks are free."""
    for parent in [store.root, store.root / TRASH, *(path for path in store.root.glob("*") if is_name(path.name))]:
        for path in parent.glob(".*.partial"):
            process = PROCESS.search(path.name)
            if process is None or not Path("/proc", process[1]).exists():
                yield path


def _delete(path: Path) -> None:
    """Deletes a file, or a folder, which is first renamed: what is half deleted can no longer be restored."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    doomed = path.with_name(f".{path.name}{STAMP}{os.getpid()}.partial")
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def measure_bytes(folder: Path) -> int:
    """Returns the size of all files below a folder."""
    return sum(path.stat().st_size for path in [folder, *folder.rglob("*")] if path.is_file() and not path.is_symlink())


def _discard(store: Store, folder: Path, label: str) -> None:
    versions = [folder] if "@" in label else [path for path in folder.iterdir() if path.name.isdecimal()]
    with _hold_all(versions, label):
        _move_to_trash(store, folder, label)


@contextmanager
def _hold_all(folders: list[Path], label: str) -> Iterator[None]:
    with ExitStack() as stack:
        for folder in folders:
            if not stack.enter_context(hold_for_removal(folder)):
                raise ConflictError(f"{label} is being read by another process", "try again when it has ended")
        yield


def _move_to_trash(store: Store, folder: Path, label: str) -> None:
    trash = store.root / TRASH
    trash.mkdir(exist_ok=True)
    os.rename(folder, trash / f"{label}{STAMP}{time.time_ns()}")
    fsync_dir(folder.parent)
    fsync_dir(trash)


def _check_free(store: Store, name: str) -> None:
    """Raises `ConflictError` if an adapter has this name; an empty folder of a failed publication goes."""
    folder = store.folder_of(name)
    if (folder / "CURRENT").exists() or store.list_versions(name):
        raise ConflictError(f"there is an adapter '{name}' in {store.root}", "choose another name, or remove it first")
    if folder.is_dir():
        shutil.rmtree(folder)
