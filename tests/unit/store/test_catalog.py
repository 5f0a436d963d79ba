import errno
import hashlib
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch

from lora_gpt2.core.errors import ConflictError, CorruptError, MismatchError, NotFoundError, ResourceError, UsageError
from lora_gpt2.core.locks import hold_for_removal
from lora_gpt2.model.base import load_base
from lora_gpt2.model.runtime import choose_runtime
from lora_gpt2.store.catalog import MAX_POINTER_BYTES, Store
from lora_gpt2.store.changes import collect_garbage, remove_adapter, rename_adapter
from lora_gpt2.store.files import Origin, load_adapter, publish_adapter
from lora_gpt2.store.manifest import MANIFEST, MAX_BYTES, MAX_FILE_BYTES, PEFT_CONFIG, WEIGHTS
from tests.builders import make_adapter, make_base_folder

ORIGIN = Origin(figures={"validation_perplexity": 12.5}, metrics=[{"step": 1}])


def equal(one, other):
    return all(
        torch.equal(u.a, other.updates[s].a) and torch.equal(u.b, other.updates[s].b) for s, u in one.updates.items()
    )


def test_what_is_saved_loads_exactly_and_versions_accumulate(base, store):
    adapters = [make_adapter(base.config, seed) for seed in (1, 2)]
    for version, adapter in enumerate(adapters, start=1):
        assert publish_adapter(store, "law", adapter, base, ORIGIN).reference == f"law@{version}"
    for reference, adapter in {"law": adapters[1], "law@1": adapters[0], "law@2": adapters[1]}.items():
        assert equal(load_adapter(store, reference, base)[1], adapter)
    assert not equal(adapters[0], adapters[1])
    assert (store.list_names(), store.list_versions("law")) == (["law"], [1, 2])


def test_a_version_holds_the_agreed_files_with_their_hashes(base, store):
    manifest = publish_adapter(store, "law", make_adapter(base.config), base, ORIGIN)
    folder = store.resolve("law")
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        PEFT_CONFIG,
        WEIGHTS,
        MANIFEST,
        "metrics.jsonl",
    ]
    assert (folder.parent / "CURRENT").read_text() == "1\n"
    for name, digest in manifest.files.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    written = json.loads((folder / MANIFEST).read_text())
    assert written["schema"] == 2
    assert written["base"]["fingerprint"] == base.fingerprint
    assert not [p for p in folder.parent.iterdir() if "partial" in p.name]


@pytest.mark.parametrize(
    ("reference", "error", "hint"),
    [
        ("lew", NotFoundError, "did you mean 'law'"),
        ("law@7", NotFoundError, "[1]"),
        ("law@x", UsageError, "legal@2"),
        ("../law", UsageError, "adapters import FOLDER"),
        (".hidden", UsageError, "1 to 64"),
        ("base", UsageError, "not 'base'"),
    ],
)
def test_references_that_name_nothing(base, store, reference, error, hint):
    publish_adapter(store, "law", make_adapter(base.config), base, ORIGIN)
    with pytest.raises(error) as caught:
        store.resolve(reference)
    assert hint in caught.value.hint


def test_every_flipped_byte_is_found_before_use(base, store):
    publish_adapter(store, "law", make_adapter(base.config), base, ORIGIN)
    load_adapter(store, "law", base)
    for name in (WEIGHTS, PEFT_CONFIG):
        path = store.resolve("law") / name
        content = path.read_bytes()
        for position in range(0, len(content), max(1, len(content) // 60)):
            damaged = bytearray(content)
            damaged[position] ^= 0x10
            path.write_bytes(damaged)
            with pytest.raises(CorruptError) as caught:
                load_adapter(store, "law", base)
            assert "not the file that was published" in caught.value.message
        for cut in (0, 1, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:cut])
            with pytest.raises(CorruptError):
                load_adapter(store, "law", base)
        path.unlink()
        with pytest.raises(CorruptError, match="is missing"):
            load_adapter(store, "law", base)
        path.write_bytes(content)
    load_adapter(store, "law", base)


def test_files_swapped_between_adapters_are_found(base, store):
    for seed, name in enumerate(("law", "code")):
        publish_adapter(store, name, make_adapter(base.config, seed), base, ORIGIN)
    shutil.copy(store.resolve("code") / WEIGHTS, store.resolve("law") / WEIGHTS)
    with pytest.raises(CorruptError):
        load_adapter(store, "law", base)
    shutil.copy(store.resolve("law") / MANIFEST, store.resolve("code") / MANIFEST)
    with pytest.raises(CorruptError, match="is the manifest of law@1"):
        store.read_manifest("code")


def test_another_base_or_tokenizer_of_the_same_shape_is_refused_with_both_fingerprints(base, store, tmp_path):
    publish_adapter(store, "law", make_adapter(base.config), base, ORIGIN)
    twin = make_base_folder(tmp_path / "twin", seed=3)
    words = make_base_folder(tmp_path / "words")
    merges = (words / "merges.txt").read_text(encoding="utf-8").splitlines()
    (words / "merges.txt").write_text("\n".join([merges[0], *merges[2:]]) + "\n", encoding="utf-8")
    for folder, what in ((twin, "another base"), (words, "another tokenizer")):
        other = load_base(str(folder), choose_runtime("float32", torch.device("cpu")))
        with pytest.raises(MismatchError) as caught:
            load_adapter(store, "law", other)
        assert what in caught.value.message
        theirs, ours = (base, other) if what == "another base" else (base.tokenizer, other.tokenizer)
        assert theirs.fingerprint[:12] in caught.value.message
        assert ours.fingerprint[:12] in caught.value.message


def test_broken_manifests_and_pointers_are_corrupt_not_crashes(base, store):
    publish_adapter(store, "law", make_adapter(base.config), base, ORIGIN)
    path = store.resolve("law") / MANIFEST
    content = path.read_bytes()
    for broken in (b"", b"{", b"{}", content.replace(b'"schema": 2', b'"schema": 3')):
        assert broken != content
        path.write_bytes(broken)
        with pytest.raises(CorruptError):
            store.read_manifest("law")
        assert [type(entry) for entry in store.iter_current()] == [CorruptError]
    path.write_bytes(content)
    (store.root / "law" / "CURRENT").write_text("x")
    with pytest.raises(CorruptError, match="names no version"):
        store.resolve("law")


BIG = 10**400


@pytest.mark.parametrize(
    "change",
    [
        {"parents": [{"reference": "a@1", "digest": "0" * 64, "weight": BIG}]},
        {"parents": [{"reference": "a@1", "digest": "0" * 64, "weight": float("nan")}]},
        {"parents": [{"reference": "a@1", "digest": "0" * 64, "weight": float("inf")}]},
        {"size_bytes": BIG},
        {"num_parameters": -BIG},
        {"figures": {"train_tokens": BIG}},
        {"figures": {"general_perplexity": BIG}},
        {"data": {"tokens": {"train": [BIG]}}},
        {"recipe": {"description": "\ud800"}},
        {"made": {"\udfff": 1}},
        {"libraries": {"torch": "\ud800"}},
        {"data": {"sources": ["a\udcff.txt"]}},
        {"recipe": json.loads("[" * 100 + "]" * 100)},
        {"recipe": {"x": json.loads('{"a":' * 100 + "1" + "}" * 100)}},
    ],
    ids=lambda change: str(change)[:40],
)
def test_values_that_cannot_be_used_make_a_manifest_corrupt(base, store, run, change):
    publish_adapter(store, "law", make_adapter(base.config), base, ORIGIN)
    path = store.resolve("law") / MANIFEST
    values = json.loads(path.read_text())
    del values["checksum"]
    path.write_text(json.dumps({**values, "schema": 1, **change}))
    with pytest.raises(CorruptError, match="is damaged") as caught:
        store.read_manifest("law")
    assert (caught.value.exit_code, "restore the folder" in caught.value.hint) == (5, True)
    for command in (["show", "law"], ["card", "law"], ["history", "law"], ["list"]):
        code, _, err = run("adapters", *command)
        assert "bug" not in err
        assert code in (0, 5)


def test_a_time_without_zone_is_taken_as_utc(base, store, run):
    publish_adapter(store, "law", make_adapter(base.config), base, ORIGIN)
    path = store.resolve("law") / MANIFEST
    values = json.loads(path.read_text())
    del values["checksum"]
    path.write_text(json.dumps({**values, "schema": 1, "created": "2026-01-01"}))
    assert store.read_manifest("law").created.tzinfo is not None
    assert run("adapters", "list")[0] == 0


def test_a_link_out_of_the_store_is_refused(base, store, tmp_path):
    publish_adapter(store, "law", make_adapter(base.config), base, ORIGIN)
    outside = shutil.copytree(store.root / "law", tmp_path / "outside")
    shutil.rmtree(store.root / "law" / "1")
    (store.root / "law" / "1").symlink_to(outside / "1")
    with pytest.raises(CorruptError, match="leads out"):
        store.resolve("law")


@pytest.mark.parametrize("step", range(1, 12))
def test_a_failure_at_any_operation_leaves_the_old_version_in_use(base, store, monkeypatch, step):
    """Fails the n-th of the calls that make a publication durable or visible."""
    old, new = make_adapter(base.config, 1), make_adapter(base.config, 2)
    publish_adapter(store, "law", old, base, ORIGIN)
    calls = []

    def failing(original):
        def call(*args, **kwargs):
            calls.append(original.__name__)
            if len(calls) == step:
                raise OSError(errno.EIO, "injected")
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patched, pytest.raises(ResourceError):
        for name in ("fsync", "rename", "replace"):
            patched.setattr(os, name, failing(getattr(os, name)))
        publish_adapter(store, "law", new, base, ORIGIN)
    assert len(calls) >= step, "the fault did not fire"
    loaded = load_adapter(store, "law", base)[1]
    assert equal(loaded, old) or (calls.count("replace") and equal(loaded, new))
    assert not [p for p in (store.root / "law").iterdir() if "partial" in p.name]
    publish_adapter(store, "law", new, base, ORIGIN)
    assert equal(load_adapter(store, "law", base)[1], new)


def publish_many(root, base_folder, seed, count):
    base = load_base(base_folder, choose_runtime("float32", torch.device("cpu")))
    for _ in range(count):
        publish_adapter(Store(Path(root)), "law", make_adapter(base.config, seed), base, ORIGIN)


def test_two_writers_and_a_reader_never_meet_half_a_version(base, base_folder, store):
    publish_adapter(store, "law", make_adapter(base.config), base, ORIGIN)
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=publish_many, args=(str(store.root), str(base_folder), s, 8)) for s in (1, 2)]
    for writer in writers:
        writer.start()
    reads = 0
    while any(writer.is_alive() for writer in writers):
        load_adapter(store, "law", base)
        reads += 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert reads > 5
    assert store.list_versions("law") == list(range(1, 18))
    for version in store.list_versions("law"):
        load_adapter(store, f"law@{version}", base)


def test_an_adapter_with_nan_is_never_published(base, store):
    adapter = make_adapter(base.config)
    next(iter(adapter.updates.values())).b[0, 0] = torch.nan
    with pytest.raises(CorruptError, match="NaN"):
        publish_adapter(store, "law", adapter, base, ORIGIN)
    assert not store.root.exists()


def test_a_store_that_cannot_be_written_is_a_resource_error(base, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(ResourceError) as caught:
        publish_adapter(Store(blocked), "law", make_adapter(base.config), base, ORIGIN)
    assert "publish 'law'" in caught.value.message


def test_a_publication_is_durable_in_order(base, store, monkeypatch):
    """What a name leads to is on the disk before the name is: a power loss shows the old state or the new one."""
    durable, places, moves = set(), {}, []
    real_open, real_fsync, real_rename, real_replace = os.open, os.fsync, os.rename, os.replace

    def track_open(path, flags, *rest, **more):
        handle = real_open(path, flags, *rest, **more)
        places[handle] = (str(path), flags)
        return handle

    def track_fsync(handle):
        durable.add(places[handle][0])
        moves.append(("fsync", places[handle][0]))
        return real_fsync(handle)

    def track_move(real):
        def move(source, target, **more):
            folder = Path(source)
            inside = [str(path) for path in folder.iterdir()] if folder.is_dir() else []
            assert {str(folder), *inside} <= durable, f"{source} is named before it is on the disk"
            moves.append(("move", str(target)))
            return real(source, target, **more)

        return move

    monkeypatch.setattr(os, "open", track_open)
    monkeypatch.setattr(os, "fsync", track_fsync)
    monkeypatch.setattr(os, "rename", track_move(real_rename))
    monkeypatch.setattr(os, "replace", track_move(real_replace))
    publish_adapter(store, "law", make_adapter(base.config), base, ORIGIN)
    home = str(store.root / "law")
    version, current = moves.index(("move", f"{home}/1")), moves.index(("move", f"{home}/CURRENT"))
    assert version < moves.index(("fsync", home)) < current, "the version's name is durable before CURRENT says it"
    assert ("fsync", home) in moves[current:], "and CURRENT's afterwards"
    assert ("fsync", str(store.root)) in moves[current:]


@pytest.mark.parametrize(
    ("name", "limit"), [("CURRENT", MAX_POINTER_BYTES), (f"1/{MANIFEST}", MAX_BYTES), (f"1/{WEIGHTS}", MAX_FILE_BYTES)]
)
def test_a_file_that_is_larger_than_it_can_be_is_refused_unread(base, store, monkeypatch, name, limit):
    publish_adapter(store, "law", make_adapter(base.config), base, ORIGIN)
    path, real = store.root / "law" / name, os.read
    os.truncate(path, limit + 1)  # a hole: it takes no room on the disk

    def read(handle, count):
        assert count <= 2**20, "so much is read at once"
        return real(handle, count)

    monkeypatch.setattr(os, "read", read)
    with pytest.raises(CorruptError) as caught:
        load_adapter(store, "law", base)
    assert f"expected at most {limit:,}" in caught.value.message
    monkeypatch.undo()
    assert MAX_POINTER_BYTES < 1000 < MAX_BYTES < 2**30, "a pointer and a manifest are small"


def is_held(folder):
    with hold_for_removal(folder) as is_ours:
        return not is_ours


@pytest.mark.parametrize("reference", ["law", "law@1", "law@2"])
def test_a_pinned_version_is_held_until_the_block_ends(base, store, reference):
    for seed in (1, 2):
        publish_adapter(store, "law", make_adapter(base.config, seed), base, ORIGIN)
    pinned, other = ("1", "2") if reference == "law@1" else ("2", "1")
    with store.pin(reference) as folder:
        assert folder == store.root / "law" / pinned
        assert is_held(folder)
        assert not is_held(folder.parent / other), "and no more than that"
        publish_adapter(store, "law", make_adapter(base.config, 3), base, ORIGIN)
        assert f"law@{pinned}" in collect_garbage(store, keep=1).kept_in_use
        for work in (
            lambda: remove_adapter(store, "law"),
            lambda: remove_adapter(store, f"law@{pinned}"),
            lambda: rename_adapter(store, "law", "right"),
        ):
            with pytest.raises(ConflictError, match="being read"):
                work()
        assert (folder / WEIGHTS).is_file()
    assert not is_held(folder)
    with pytest.raises(ValueError, match="x"), store.pin(reference) as folder:
        raise ValueError("x")
    assert not is_held(folder)
    if folder.name != "3":
        remove_adapter(store, f"law@{folder.name}")


def test_a_version_that_goes_while_it_is_opened_is_looked_for_again(base, store, monkeypatch):
    """What is yielded is held and there; who was too late gets the version that took its place, or is told."""
    for seed in (1, 2):
        publish_adapter(store, "law", make_adapter(base.config, seed), base, ORIGIN)
    resolve, asked = Store.resolve, []

    def resolve_then_lose(self, reference):
        folder = resolve(self, reference)
        asked.append(folder.name)
        if len(asked) == 1:
            publish_adapter(store, "law", make_adapter(base.config, 3), base, ORIGIN)
            collect_garbage(store, keep=1)
        return folder

    with monkeypatch.context() as patched:
        patched.setattr(Store, "resolve", resolve_then_lose)
        with store.pin("law") as folder:
            assert (folder.name, (folder / WEIGHTS).is_file(), is_held(folder)) == ("3", True, True)
        assert asked == ["2", "3"]
        asked.clear()
        with pytest.raises(NotFoundError), store.pin("law@3"):
            pytest.fail("it was collected")
    publish_adapter(store, "code", make_adapter(base.config, 4), base, ORIGIN)

    def resolve_then_remove(self, reference):
        folder = resolve(self, reference)
        remove_adapter(self, "code")
        return folder

    monkeypatch.setattr(Store, "resolve", resolve_then_remove)
    with pytest.raises(NotFoundError), store.pin("code"):
        pytest.fail("it was removed")
