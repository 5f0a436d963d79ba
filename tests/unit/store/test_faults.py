"""Every change of a store, failed at every operation in four ways: the old state or the new one, nothing lost."""

import os
import shutil
import warnings
from pathlib import Path

import pytest

from lora_gpt2.core.console import LoggingReporter, SilentReporter
from lora_gpt2.core.errors import LoraGpt2Error
from lora_gpt2.core.files import wrap_os_errors, write_file
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.session import Session
from lora_gpt2.merging.combine import merge_adapters
from lora_gpt2.recipe import EvaluateSettings, MergeSettings
from lora_gpt2.store import catalog
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.changes import (
    collect_garbage,
    copy_adapter,
    iter_trash,
    remove_adapter,
    rename_adapter,
    restore_adapter,
    roll_back,
)
from lora_gpt2.store.exchange import import_adapter
from lora_gpt2.store.fetch import fetch_adapter
from lora_gpt2.store.files import Origin, load_adapter, publish_adapter
from lora_gpt2.store.manifest import WEIGHTS
from tests.builders import make_adapter
from tests.faults import KINDS, count_operations, inject

warnings.filterwarnings("ignore", message=".*fork.*")
WORKS = {
    "publish": lambda store, base: publish_adapter(store, "law", make_adapter(base.config, 9), base, Origin()),
    "roll back": lambda store, base: roll_back(store, "law"),
    "remove": lambda store, base: remove_adapter(store, "law"),
    "remove a version": lambda store, base: remove_adapter(store, "law@1"),
    "restore": lambda store, base: restore_adapter(store, "gone"),
    "copy": lambda store, base: copy_adapter(store, "law", "twin"),
    "rename": lambda store, base: rename_adapter(store, "law", "right"),
    "import": lambda store, base: import_adapter(
        fetch_adapter(str(store.folder_of("code") / "1")), store, "law", base, LoggingReporter()
    ),
    "merge": lambda store, base: merge_adapters(
        Session(base, store),
        Mix([("law", 0.5), ("code", 0.5)]),
        "both",
        MergeSettings(),
        [],
        evaluate=EvaluateSettings(),
        reporter=SilentReporter(),
    ),
    "collect": lambda store, base: collect_garbage(store, keep=1),
}
LEAST_FAULTS = 300


@pytest.fixture
def pristine(base, tmp_path):
    """A store with two versions of one adapter, another adapter, and one in the trash."""
    store = Store(tmp_path / "pristine")
    for seed in (1, 2):
        publish_adapter(store, "law", make_adapter(base.config, seed), base, Origin())
    for name in ("code", "gone"):
        publish_adapter(store, name, make_adapter(base.config, 3 + len(name)), base, Origin())
    remove_adapter(store, "gone")
    return store


def list_weights(store, base):
    """Returns the digests of everything sound in a store: versions in use or not, and the trash; checks each."""
    found = set()
    for name in store.list_names():
        load_adapter(store, name, base)
        found |= {load_adapter(store, f"{name}@{version}", base)[0].digest for version in store.list_versions(name)}
    for path in iter_trash(store):
        versions = [path] if "@" in path.name else [p for p in path.iterdir() if p.name.isdecimal()]
        found |= {digest_of(folder) for folder in versions}
    return found


def digest_of(folder):
    import hashlib

    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def fresh_copy(pristine, tmp_path, number, copy=os.link):
    """Returns a copy; by links, which is quicker, because a store never writes into a file that is there."""
    target = tmp_path / f"s{number}"
    shutil.copytree(pristine.root, target, copy_function=copy)
    return Store(target)


def sweep(work, pristine, base, tmp_path, copy=os.link, every=1):
    """Injects every fault into a piece of work on a fresh copy each; returns what was lost, by fault.

    With `every` above 1, each kind of fault at every so manieth place only, the kinds at different ones.
    """
    before = list_weights(pristine, base)
    counted = fresh_copy(pristine, tmp_path, "count", copy)
    total = count_operations(lambda: work(counted, base))
    assert total > 2
    lost = {}
    for first, kind in enumerate(KINDS):
        for at in range(1 + first % every, total + 1, every):
            store = fresh_copy(pristine, tmp_path, f"{kind}{at}", copy)
            fired = inject(lambda store=store: work(store, base), kind, at)
            assert fired, f"{kind} at {at} of {total} did not fire"
            try:
                gone = before - list_weights(store, base)
            except LoraGpt2Error as error:
                gone = {error.message}
            if gone:
                lost[kind, at] = gone
            shutil.rmtree(store.root)
    return lost


EVERY = {"merge": 4, "rename": 4, "import": 4, "publish": 3, "copy": 3}
ALL_PLACES = [(name, EVERY.get(name, 1)) for name in WORKS if name != "collect"]


@pytest.mark.parametrize(
    ("name", "every"),
    [*ALL_PLACES, *(pytest.param(name, 1, marks=pytest.mark.slow) for name, every in ALL_PLACES if every > 1)],
)
def test_no_fault_loses_anything(pristine, base, tmp_path, name, every):
    assert sweep(WORKS[name], pristine, base, tmp_path, every=every) == {}


def test_collecting_loses_only_what_it_was_told_to(pristine, base, tmp_path):
    wanted = {load_adapter(pristine, name, base)[0].digest for name in ("law", "code")}
    lost = sweep(WORKS["collect"], pristine, base, tmp_path, every=2)
    assert not [fault for fault, gone in lost.items() if gone & wanted]
    done = fresh_copy(pristine, tmp_path, "done")
    collect_garbage(done, keep=1)
    assert list_weights(done, base) == wanted


@pytest.mark.parametrize("name", ["publish", "copy", "rename"])
def test_after_any_kill_the_same_work_succeeds(pristine, base, tmp_path, name):
    counted = fresh_copy(pristine, tmp_path, "count")
    total = count_operations(lambda: WORKS[name](counted, base))
    for at in range(1, total + 1):
        store = fresh_copy(pristine, tmp_path, at)
        assert inject(lambda store=store: WORKS[name](store, base), "kill", at)
        if name != "rename" or "right" not in store.list_names():
            WORKS[name](store, base)
        list_weights(store, base)
        assert not [path for path in store.root.rglob("*.partial") if "CURRENT" not in path.name]
        collect_garbage(store)
        assert not list(store.root.rglob("*.partial"))
        shutil.rmtree(store.root)


def test_there_are_enough_faults_to_inject(pristine, base, tmp_path):
    """The sweeps above inject each of these, and assert that it fired."""
    copies = {name: fresh_copy(pristine, tmp_path, name) for name in WORKS}
    counts = {name: count_operations(lambda name=name: WORKS[name](copies[name], base)) for name in WORKS}
    assert len(KINDS) * sum(counts.values()) >= LEAST_FAULTS


def publish_in_place(store, base):
    """A store as it must not be: files are written over each other, and CURRENT first."""
    folder = store.folder_of("law") / "2"
    with wrap_os_errors("publish"):
        write_file(folder.parent / "CURRENT", b"2\n")
        for path in sorted(folder.iterdir()):
            write_file(path, Path(store.folder_of("law") / "1" / path.name).read_bytes())


def test_the_sweep_finds_a_broken_store(pristine, base, tmp_path):
    assert sweep(publish_in_place, pristine, base, tmp_path, shutil.copy2)


def test_the_sweep_finds_a_store_that_points_before_it_writes(pristine, base, tmp_path, monkeypatch):
    def add_badly(self, name, files, make_manifest):
        folder, version = self.folder_of(name), max(self.list_versions(name)) + 1
        (folder / "CURRENT").write_text(f"{version}\n")
        with wrap_os_errors("publish"):
            (folder / str(version)).mkdir()
            catalog.write_version(folder / str(version), make_manifest(version), files)
        return version

    monkeypatch.setattr(Store, "add_version", add_badly)
    assert sweep(WORKS["publish"], pristine, base, tmp_path, every=3)
