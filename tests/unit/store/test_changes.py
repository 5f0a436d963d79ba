"""Copy, rename, roll back, remove, restore, collect; who reads is not disturbed, and who changes waits in line."""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lora_gpt2.core.errors import ConflictError, CorruptError, NotFoundError, ResourceError, UsageError
from lora_gpt2.core.locks import hold_shared
from lora_gpt2.model.base import load_base
from lora_gpt2.model.runtime import choose_runtime
from lora_gpt2.recipe import LoraSettings
from lora_gpt2.store.audits import read_audits, write_audit
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.changes import (
    collect_garbage,
    copy_adapter,
    list_history,
    remove_adapter,
    rename_adapter,
    restore_adapter,
    roll_back,
)
from lora_gpt2.store.files import Origin, load_adapter, publish_adapter
from lora_gpt2.store.lineage import compare_manifests, describe_lineage
from lora_gpt2.store.manifest import CARD, MANIFEST, METRICS, PEFT_CONFIG, WEIGHTS, Manifest, Parent
from tests.builders import make_adapter
from tests.faults import Disk


def publish(store, base, name="law", seed=1, **origin):
    return publish_adapter(store, name, make_adapter(base.config, seed), base, Origin(**origin))


@pytest.fixture
def three(base, store):
    """An adapter with three versions."""
    return [publish(store, base, seed=seed, figures={"validation_perplexity": 10.0 + seed}) for seed in (1, 2, 3)]


def test_a_copy_has_the_weights_the_figures_and_its_parent(base, store, three):
    copied = copy_adapter(store, "law@2", "twin")
    assert (copied.reference, copied.digest, copied.figures) == ("twin@1", three[1].digest, three[1].figures)
    assert [parent.reference for parent in copied.parents] == ["law@2"]
    assert load_adapter(store, "twin", base)[0].digest == three[1].digest
    assert "# twin" in (store.resolve("twin") / CARD).read_text()
    assert copy_adapter(store, "law", "twin").version == 2
    with pytest.raises(NotFoundError):
        copy_adapter(store, "law@9", "other")
    with pytest.raises(UsageError):
        copy_adapter(store, "law", "base")


def test_a_copy_and_a_card_say_how_a_version_came_about(base, store):
    publish(store, base, provenance={"by": "import", "variant": "dora", "relative_error": 0.134})
    card = (store.resolve("law") / CARD).read_text()
    assert "variant dora, relative_error 0.134" in card
    copied = copy_adapter(store, "law", "twin")
    assert copied.provenance == {"by": "copy", "variant": "dora", "relative_error": 0.134}


def test_only_a_version_that_is_there_is_put_in_use(store, three):
    for name, version, said in (("law", 9, "no version 9"), ("nope", 1, "no adapter 'nope'")):
        with pytest.raises(NotFoundError, match=said):
            store.use_version(name, version)
    assert store.read_current("law") == 3


def test_the_last_that_was_removed_comes_back_although_the_clock_was_set_back(base, store, monkeypatch):
    for seed, now in ((1, 2000), (2, 1000), (3, 1000)):
        publish(store, base, seed=seed)
        monkeypatch.setattr(time, "time_ns", lambda now=now: now)
        remove_adapter(store, "law")
    restore_adapter(store, "law")
    assert store.read_manifest("law").digest == publish(store, base, "other", seed=3).digest


def test_an_adapter_that_may_not_be_read_is_not_left_out_of_a_list(store, three, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("lora_gpt2.store.catalog.os.stat", refuse)
    with pytest.raises(ResourceError, match="CURRENT"):
        store.list_names()


def test_a_long_or_tangled_lineage_is_told_once(base, store):
    first = publish(store, base, "a0", seed=0)
    last = [first, first]
    for number in range(1, 120):
        parents = [Parent(reference=each.reference, digest=each.digest) for each in last]
        made = publish(store, base, f"a{number}", seed=number, parents=tuple(parents))
        last = [made, last[0]]
    text = json.dumps(describe_lineage(store, last[0]))
    assert text.count('"reference": "a60@1"') == 2, "as either one's parent"


def test_a_rename_keeps_versions_numbers_and_the_one_in_use(base, store, three):
    roll_back(store, "law", 2)
    rename_adapter(store, "law", "right")
    assert (store.list_names(), store.list_versions("right"), store.read_current("right")) == (["right"], [1, 2, 3], 2)
    for version, manifest in enumerate(three, start=1):
        assert load_adapter(store, f"right@{version}", base)[0].digest == manifest.digest
    assert publish(store, base, "right", seed=4).version == 4
    with pytest.raises(NotFoundError):
        rename_adapter(store, "law", "left")
    publish(store, base, "left")
    with pytest.raises(ConflictError, match="there is an adapter 'left'"):
        rename_adapter(store, "right", "left")


def test_a_rename_keeps_what_audits_found(base, store, three):
    write_audit(store, store.read_manifest("law@2"), "evaluation", {"cells": []})
    rename_adapter(store, "law", "right")
    assert read_audits(store, store.read_manifest("right@2")) == {"evaluation": {"cells": []}}


def test_a_version_with_leading_zeros_is_removed_and_restored_like_any(base, store, three):
    remove_adapter(store, "law@01")
    assert store.list_versions("law") == [2, 3]
    restore_adapter(store, "law@001")
    assert store.list_versions("law") == [1, 2, 3]
    assert store.read_manifest("law@1").version == 1


def test_of_two_who_remove_an_adapter_one_does_and_the_other_finds_none(base, store, three):
    def remove(_):
        try:
            remove_adapter(store, "law")
        except NotFoundError:
            return "none"
        return "removed"

    for _ in range(5):
        with ThreadPoolExecutor(2) as pool:
            assert sorted(pool.map(remove, range(2))) == ["none", "removed"]
        restore_adapter(store, "law")


def test_a_rename_of_a_damaged_adapter_changes_nothing(base, store, three):
    (store.folder_of("law") / "1" / WEIGHTS).write_bytes(b"x")
    with pytest.raises(CorruptError):
        rename_adapter(store, "law", "right")
    assert store.list_names() == ["law"]
    load_adapter(store, "law", base)


def test_rolling_back_goes_to_the_newest_sound_version_before(base, store, three):
    assert roll_back(store, "law").version == 2
    (store.folder_of("law") / "1" / METRICS).write_bytes(b"")
    assert roll_back(store, "law", 3).version == 3
    (store.folder_of("law") / "2" / WEIGHTS).write_bytes(b"x")
    assert roll_back(store, "law").version == 1
    with pytest.raises(NotFoundError, match="no older version"):
        roll_back(store, "law")
    with pytest.raises(CorruptError):
        roll_back(store, "law", 2)
    assert store.read_current("law") == 1


@pytest.mark.parametrize("content", [b"", b"x\n", b"3", b"-1\n", b"\xff\n", b"1234567890\n"])
def test_a_broken_pointer_is_found_and_rolled_back_from(base, store, three, content):
    (store.folder_of("law") / "CURRENT").write_bytes(content)
    with pytest.raises(CorruptError) as caught:
        load_adapter(store, "law", base)
    assert "rollback" in caught.value.hint
    assert [entry.in_use for entry in list_history(store, "law")] == [False, False, False]
    assert roll_back(store, "law").version == 3


def test_the_history_shows_the_version_in_use_and_damage(base, store, three):
    (store.folder_of("law") / "2" / MANIFEST).write_bytes(b"{}")
    entries = list_history(store, "law")
    assert [(entry.version, entry.in_use) for entry in entries] == [(1, False), (2, False), (3, True)]
    assert [isinstance(entry.found, Manifest) for entry in entries] == [True, False, True]
    with pytest.raises(NotFoundError):
        list_history(store, "nothing")


def test_what_is_removed_comes_back_and_numbers_are_not_given_twice(base, store, three):
    with pytest.raises(ConflictError, match="in use"):
        remove_adapter(store, "law@3")
    roll_back(store, "law", 1)
    remove_adapter(store, "law@3")
    with pytest.raises(NotFoundError, match="no version 3"):
        store.resolve("law@3")
    assert publish(store, base, seed=5).version == 4
    restore_adapter(store, "law@3")
    assert load_adapter(store, "law@3", base)[0].digest == three[2].digest
    with pytest.raises(NotFoundError, match="not in the trash"):
        restore_adapter(store, "law@3")
    remove_adapter(store, "law")
    assert store.list_names() == []
    restore_adapter(store, "law")
    assert store.list_versions("law") == [1, 2, 3, 4]


def test_restoring_does_not_take_a_new_adapters_place(base, store, three):
    remove_adapter(store, "law")
    publish(store, base, seed=7)
    with pytest.raises(ConflictError):
        restore_adapter(store, "law")
    rename_adapter(store, "law", "new")
    restore_adapter(store, "law")  # the newest of that name: the one that was renamed away
    assert {store.read_manifest(name).digest for name in ("law", "new")} == {store.read_manifest("new").digest}


def test_collecting_deletes_the_trash_and_old_versions_but_not_those_in_use(base, store, three):
    publish(store, base, "gone")
    remove_adapter(store, "gone")
    roll_back(store, "law", 1)
    planned = collect_garbage(store, keep=1, dry_run=True)
    assert store.list_versions("law") == [1, 2, 3]
    with hold_shared(store.folder_of("law") / "2"):
        first = collect_garbage(store, keep=1)
    assert (planned.removed, first.removed, first.kept_in_use) == (["law@2", "gone"], ["gone"], ["law@2"])
    assert store.list_versions("law") == [1, 2, 3]
    assert collect_garbage(store, keep=1).removed == ["law@2"]
    assert planned.freed_bytes > first.freed_bytes > 0
    assert store.list_versions("law") == [1, 3]
    with pytest.raises(NotFoundError):
        restore_adapter(store, "gone")


def test_nobody_removes_what_somebody_reads(base, store, three):
    with store.pin("law@1"), pytest.raises(ConflictError, match="being read"):
        remove_adapter(store, "law@1")
    with store.pin("law"), pytest.raises(ConflictError, match="being read"):
        remove_adapter(store, "law")
    remove_adapter(store, "law@1")


def test_a_read_only_store_is_read_and_not_changed(base, store, three, monkeypatch):
    real = os.open

    def refuse(path, flags, *rest, **more):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(30, "Read-only file system", str(path))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "mkdir", lambda *rest, **more: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    load_adapter(store, "law", base)
    assert len(list(store.iter_current())) == 1
    for work in (lambda: publish(store, base), lambda: roll_back(store, "law")):
        with pytest.raises(ResourceError, match="read-only"):
            work()


def test_lineage_goes_back_through_parents_wherever_they_are_now(base, store, three):
    copy_adapter(store, "law@2", "twin")
    copy_adapter(store, "twin", "third")
    rename_adapter(store, "twin", "other")
    tree = describe_lineage(store, store.read_manifest("third"))
    assert tree["parents"][0]["found"] == "law@2", "the name is gone, the weights are there"
    remove_adapter(store, "law")
    (parent,) = describe_lineage(store, store.read_manifest("third"))["parents"]
    assert (parent["found"], parent["reference"]) == ("other@1", "other@1")
    assert [(p["reference"], p["found"]) for p in parent["parents"]] == [("law@2", None)]
    remove_adapter(store, "other")
    (parent,) = describe_lineage(store, store.read_manifest("third"))["parents"]
    assert (parent["found"], parent["reference"]) == (None, "twin@1")


def test_manifests_are_compared_by_section_and_key(base, store):
    one = publish(store, base, figures={"seconds": 1}, recipe={"lora": {"rank": 4}, "name": "law"})
    other = publish(store, base, figures={"seconds": 2}, recipe={"lora": {"rank": 8}, "name": "law"})
    assert compare_manifests(one, other) == {"recipe": {"lora.rank": (4, 8)}, "figures": {"seconds": (1, 2)}}
    assert compare_manifests(one, one) == {}


def test_a_thousand_random_damages_are_all_found(base, store, tmp_path):
    """Flips, cuts, swaps between adapters: of every file of a version, found before a number is used."""
    for seed, name in enumerate(("law", "code"), start=1):
        adapter = make_adapter(base.config, seed, LoraSettings(rank=2 + seed))
        publish_adapter(store, name, adapter, base, Origin(metrics=[{"step": seed}]))
    draw = random.Random(0)
    files = (WEIGHTS, PEFT_CONFIG, MANIFEST)
    for number in range(1000):
        name, other = draw.sample(("law", "code"), 2)
        file = draw.choice(files)
        path = store.resolve(name) / file
        content = path.read_bytes()
        kind = draw.choice(("flip", "cut", "swap"))
        damaged = bytearray(content)
        if kind == "flip":
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del damaged[draw.randrange(len(damaged)) :]
        else:
            damaged[:] = (store.resolve(other) / file).read_bytes()
        assert bytes(damaged) != content
        path.write_bytes(damaged)
        with pytest.raises(CorruptError):
            load_adapter(store, name, base)
            pytest.fail(f"damage {number} ({kind} of {file}) was not found")
        path.write_bytes(content)
        if number % 100 == 0:
            load_adapter(store, name, base)


def write_forever(root, base_folder, seed, stop):
    base = load_base(base_folder, choose_runtime("float32"))
    store, count = Store(Path(root)), 0
    while not stop.is_set():
        publish(store, base, seed=seed)
        count += 1
        if count % 5 == 0:
            roll_back(store, "law")
            collect_garbage(store, keep=3)


def read_under_writers(store, base, base_folder, count):
    """Reads while two processes publish, roll back and collect; returns how many versions were seen."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    writers = [context.Process(target=write_forever, args=(str(store.root), str(base_folder), s, stop)) for s in (1, 2)]
    for writer in writers:
        writer.start()
    digests = {make_digest(base, seed) for seed in (1, 2)}
    seen = set()
    deadline = time.monotonic() + 60
    while store.list_versions("law")[-1] < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    for _ in range(count):
        manifest, _ = load_adapter(store, "law", base)
        assert manifest.digest in digests
        seen.add(manifest.version)
    stop.set()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    return len(seen)


def make_digest(base, seed):

    from lora_gpt2.store.peft.tensors import to_peft

    return hashlib.sha256(to_peft(make_adapter(base.config, seed), base.name, base.config)[WEIGHTS]).hexdigest()


def test_reads_under_two_writers_who_also_collect_are_never_bad(base, base_folder, store):
    publish(store, base)
    assert read_under_writers(store, base, base_folder, 200) > 3


@pytest.mark.slow
def test_twenty_thousand_reads_under_two_writers_are_never_bad(base, base_folder, store):
    publish(store, base)
    assert read_under_writers(store, base, base_folder, 20_000) > 50


def test_links_pipes_and_devices_in_a_version_are_not_followed(base, store, tmp_path):
    publish(store, base)
    path = store.resolve("law") / WEIGHTS
    shutil.move(path, tmp_path / "elsewhere")
    for make in (lambda: path.symlink_to(tmp_path / "elsewhere"), lambda: os.mkfifo(path), lambda: path.mkdir()):
        make()
        with pytest.raises(CorruptError):
            load_adapter(store, "law", base)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def test_folders_of_something_else_are_never_touched(base, store, three):
    for name in ("docs", "2024"):
        (store.root / name / "5").mkdir(parents=True)
        (store.root / name / "5" / "notes.txt").write_text("precious")
    with pytest.raises(ConflictError, match="other things"):
        rename_adapter(store, "law", "docs")
    for work in (lambda: remove_adapter(store, "docs"), lambda: remove_adapter(store, "docs@5")):
        with pytest.raises(NotFoundError):
            work()
    publish(store, base, "gone")
    remove_adapter(store, "gone")
    (store.root / "gone").mkdir()
    (store.root / "gone" / "mine.txt").write_text("precious")
    with pytest.raises(ConflictError):
        restore_adapter(store, "gone")
    collect_garbage(store, keep=1)
    assert (store.root / "docs" / "5" / "notes.txt").read_text() == "precious"
    assert (store.root / "gone" / "mine.txt").exists()


def test_no_number_is_given_twice_whatever_is_removed(base, store, three):
    publish(store, base, seed=4)
    roll_back(store, "law", 1)
    for version in (4, 3, 2):
        remove_adapter(store, f"law@{version}")
    assert publish(store, base, seed=5).version == 5
    for version in (2, 3, 4):
        restore_adapter(store, f"law@{version}")
    assert store.list_versions("law") == [1, 2, 3, 4, 5]


def test_a_rename_under_a_reader_changes_nothing(base, store, three):
    with store.pin("law@2"), pytest.raises(ConflictError, match="being read"):
        rename_adapter(store, "law", "right")
    assert store.list_names() == ["law"]
    rename_adapter(store, "law", "right")


def test_links_in_place_of_the_stores_folders_are_not_written_through(base, store, three, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (store.root / ".locks" / "law").unlink()
    (store.root / ".locks" / "law").symlink_to(victim)
    with pytest.raises(ResourceError):
        publish(store, base)
    assert victim.read_text() == "precious"
    (store.root / ".locks" / "law").unlink()
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("new", ".trash"):
        (store.root / name).symlink_to(outside)
        with pytest.raises(CorruptError, match="is a link"):
            publish(store, base, "new")
    assert list(outside.iterdir()) == []


def test_half_damaged_adapters_can_be_dealt_with(base, store, three):
    publish(store, base, "code")
    publish(store, base, "code", seed=2)
    (store.folder_of("code") / "CURRENT").write_bytes(b"x")
    assert collect_garbage(store, keep=1).removed == ["law@1", "law@2"]
    assert store.list_versions("code") == [1, 2]
    (store.folder_of("code") / "1" / MANIFEST).unlink()
    remove_adapter(store, "code@1")
    (store.folder_of("code") / "CURRENT").unlink()
    assert roll_back(store, "code").version == 2
    remove_adapter(store, "code")


def damage_manifest(store, reference, changes):
    """Replaces keys of a manifest and seals it again, as somebody hostile would."""
    path = store.resolve(reference) / MANIFEST
    values = json.loads(path.read_bytes()) | changes | {"checksum": "0" * 64}
    content = (json.dumps(values, indent=1) + "\n").encode()
    path.write_bytes(content.replace(b"0" * 64, hashlib.sha256(content).hexdigest().encode()))


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {"../.bashrc": "0" * 63 + "1"}},
        {"files": {"/etc/x": "0" * 63 + "1"}},
        {"files": {"a": 7}},
        {"figures": {"train_tokens": "many"}},
        {"figures": {"trained_parameters": "x"}},
        {"data": {"sources": [1]}},
        {"data": {"sources": "x"}},
        {"parents": [{"reference": "../../root@1", "digest": "a" * 64}]},
        {"parents": [{"reference": "law@1"}]},
        {"parents": [7]},
        {"version": -1},
        {"created": "yesterday"},
        {"base": {"name": "x"}},
        {"size_bytes": True},
        {"name": "other"},
    ],
)
def test_sealed_but_hostile_manifests_are_refused(base, store, three, changes):
    load_adapter(store, "law", base)
    damage_manifest(store, "law", changes)
    with pytest.raises(CorruptError):
        load_adapter(store, "law", base)
    assert [type(entry) for entry in store.iter_current()] == [CorruptError]


def lose_the_newest(store, base):
    """Leaves two versions of law, with number 3 given out and gone."""
    roll_back(store, "law", 2)
    remove_adapter(store, "law@3")
    return "law"


def then_rename(store, name):
    rename_adapter(store, name, "right")
    return "right"


def then_rename_twice(store, name):
    rename_adapter(store, then_rename(store, name), "left")
    return "left"


def then_remove_and_restore(store, name):
    remove_adapter(store, name)
    restore_adapter(store, name)
    return name


def then_collect(store, name):
    collect_garbage(store, keep=1)
    return name


def then_collect_and_rename(store, name):
    return then_rename(store, then_collect(store, name))


def then_roll_back(store, name):
    roll_back(store, name, 1)
    return name


@pytest.mark.parametrize(
    "then",
    [then_rename, then_rename_twice, then_remove_and_restore, then_collect, then_collect_and_rename, then_roll_back],
)
def test_a_number_that_was_given_out_stays_so_through_every_change(base, store, three, then):
    name = then(store, lose_the_newest(store, base))
    assert store.next_version(name) == 4
    assert publish(store, base, name, seed=4).reference == f"{name}@4"
    remove_adapter(store, f"{name}@{max(store.list_versions(name)[:-1])}")
    assert publish(store, base, name, seed=5).version == 5, "an older one that goes frees no number either"


def test_a_rename_of_an_adapter_that_lost_nothing_begins_nothing_anew(base, store, three):
    rename_adapter(store, "law", "right")
    assert publish(store, base, "right", seed=4).version == 4
    assert publish(store, base, "law", seed=5).version == 1, "the old name is free, and its numbers begin again"
    assert store.list_versions("right") == [1, 2, 3, 4]


CHANGES = {
    "publish": lambda store, base: publish(store, base, seed=9),
    "publish the first": lambda store, base: publish(store, base, "new"),
    "copy": lambda store, base: copy_adapter(store, "law", "twin"),
    "roll back": lambda store, base: roll_back(store, "law", 1),
    "remove": lambda store, base: remove_adapter(store, "law"),
    "remove a version": lambda store, base: remove_adapter(store, "law@1"),
    "rename": lambda store, base: rename_adapter(store, "law", "right"),
    "restore": lambda store, base: restore_adapter(store, "gone"),
    "restore a version": lambda store, base: restore_adapter(store, "law@2"),
}


@pytest.mark.parametrize("has_trash", [True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_on_the_disk_when_it_is_done_and_in_an_order_that_loses_nothing(
    base, store, three, name, has_trash
):
    if has_trash or name.startswith("restore"):
        publish(store, base, "gone")
        remove_adapter(store, "gone")
        remove_adapter(store, "law@2")
    with Disk(store.root) as disk:
        CHANGES[name](store, base)
    trash = str(store.root / ".trash")
    assert disk.moves, "something was renamed"
    for source, target, unsafe in disk.moves:
        below = {path for path in unsafe if path == source or path.startswith(f"{source}/")}
        assert not below, f"{source} got its name before it was on the disk"
        if target.startswith(trash):
            assert not unsafe - {os.path.dirname(source)}, "what takes its place is on the disk before it goes"
    # What was restored may still be in the trash after a power loss: it is then restored twice, and nothing is lost.
    allowed = [".trash"] if name.startswith("restore") else []
    assert [path for path in disk.list_unsafe() if path not in allowed] == []


def test_the_disk_notices_what_was_not_synced(tmp_path):
    """The control of the law above."""
    with Disk(tmp_path) as disk:
        (tmp_path / "a").mkdir()
        handle = os.open(tmp_path / "a" / "f", os.O_WRONLY | os.O_CREAT)
        assert disk.list_unsafe() == [".", "a", "a/f"]
        os.fsync(handle)
        os.close(handle)
        assert disk.list_unsafe() == [".", "a"]
        for folder in (tmp_path, tmp_path / "a"):
            handle = os.open(folder, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        assert disk.list_unsafe() == []
        os.rename(tmp_path / "a", tmp_path / "b")
        assert disk.list_unsafe() == ["."]
