import errno
import json
import os

import pytest

from lora_gpt2.core.errors import DataError, ResourceError
from lora_gpt2.data.prepared import prepare_data
from lora_gpt2.data.tokenizer import load_tokenizer
from lora_gpt2.recipe import DataSettings
from tests.builders import make_text


@pytest.fixture
def tokenizer(base_folder):
    return load_tokenizer(base_folder, 0)


def settings_for(path, **changes):
    return DataSettings(sources=(str(path),), block_size=32, **changes)


def decode_documents(tokenizer, blocks):
    text, ids = [], []
    for token in blocks.stream[1:]:
        if token == tokenizer.eos_id:
            text.append(tokenizer.decode(ids))
            ids = []
        else:
            ids.append(int(token))
    return text


def test_every_document_lands_whole_in_exactly_one_part(tokenizer, text_file, reporter):
    prepared = prepare_data(settings_for(text_file), tokenizer, reporter)
    parts = [decode_documents(tokenizer, getattr(prepared, p)) for p in ("train", "validation", "test")]
    wanted = [json.loads(line)["text"] for line in text_file.read_text().splitlines()]
    assert sorted(text for part in parts for text in part) == sorted(wanted)
    assert all(parts)
    assert not set(parts[0]) & (set(parts[1]) | set(parts[2]))
    assert prepared.report["documents_read"] == prepared.report["documents_kept"] == 80
    assert prepared.report["tokens"]["train"] == prepared.train.num_tokens


def test_the_cache_is_found_and_anything_that_matters_makes_another(tokenizer, text_file, reporter, monkeypatch):
    first = prepare_data(settings_for(text_file), tokenizer, reporter)
    with monkeypatch.context() as patched:
        patched.setattr("lora_gpt2.data.prepared._build", lambda *a: pytest.fail("prepared again"))
        assert prepare_data(settings_for(text_file), tokenizer, reporter).fingerprint == first.fingerprint
    seen = {first.fingerprint}
    for changes in ({"profile": "raw"}, {"validation_share": 0.2}, {"test_share": 0.2}, {"text_field": "x"}):
        if changes != {"text_field": "x"}:
            seen.add(prepare_data(settings_for(text_file, **changes), tokenizer, reporter).fingerprint)
    text_file.write_text(text_file.read_text() + '{"text": "one more"}\n')
    seen.add(prepare_data(settings_for(text_file), tokenizer, reporter).fingerprint)
    assert len(seen) == 5


def test_copies_and_empty_documents_are_rejected_and_counted(tokenizer, tmp_path, reporter):
    path = tmp_path / "a.jsonl"
    path.write_text(make_text(20) * 2 + '{"text": "  "}\n')
    report = prepare_data(settings_for(path), tokenizer, reporter).report
    assert report["rejected"] == {"duplicate": 20, "empty": 1}


def test_given_validation_files_are_used_and_their_copies_leave_the_training_part(tokenizer, tmp_path):
    (tmp_path / "t.jsonl").write_text(make_text(30, seed=1))
    (tmp_path / "v.jsonl").write_text(make_text(10, seed=2) + make_text(3, seed=1))
    said = []

    class Listener:
        def message(self, text):
            said.append(text)

        detail = message
        from lora_gpt2.core.console import SilentReporter

        task = SilentReporter.task

    settings = settings_for(tmp_path / "t.jsonl", validation=(str(tmp_path / "v.jsonl"),), test_share=0.0)
    prepared = prepare_data(settings, tokenizer, Listener())
    assert prepared.report["documents"] == {"train": 27, "validation": 13, "test": 0}
    assert any("3 training documents" in line for line in said)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "0 usable documents to train on: 1 documents read, 0 kept (1 empty)"),
        ("just one document", "no document is left to validate on"),
    ],
)
def test_too_little_text_is_said_with_counts(tokenizer, tmp_path, reporter, content, message):
    path = tmp_path / "a.txt"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        prepare_data(settings_for(path), tokenizer, reporter)
    assert message in caught.value.message
    with pytest.raises(DataError, match="no text to train on"):
        prepare_data(DataSettings(), tokenizer, reporter)


@pytest.mark.parametrize("separator", ["\n\n", "\n"])
def test_one_book_in_one_file_is_cut_so_that_it_can_be_split(tokenizer, tmp_path, reporter, separator):
    path = tmp_path / "book.txt"
    path.write_text(separator.join(f"sentence {i} the cat and the dog" for i in range(800)))
    report = prepare_data(settings_for(path), tokenizer, reporter).report
    assert (report["documents_read"], report["documents_kept"]) == (1, 1)
    assert all(report["tokens"].values())
    assert sum(report["documents"].values()) > 30


@pytest.mark.parametrize("damage", ["cut", "manifest", "gone"])
def test_a_damaged_cache_is_made_again(tokenizer, text_file, reporter, damage):
    first = prepare_data(settings_for(text_file), tokenizer, reporter)
    wanted = list(first.train.stream)
    if damage == "cut":
        (first.path / "train.bin").write_bytes((first.path / "train.bin").read_bytes()[:-100])
    elif damage == "manifest":
        (first.path / "manifest.json").write_text("{")
    else:
        (first.path / "validation.bin").unlink()
    again = prepare_data(settings_for(text_file), tokenizer, reporter)
    assert again.path == first.path
    assert list(again.train.stream) == wanted
    assert again.report == first.report


def test_a_thousand_copies_of_one_document_are_one(tokenizer, tmp_path, reporter):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "the same"}\n' * 1000)
    with pytest.raises(DataError) as caught:
        prepare_data(settings_for(path), tokenizer, reporter)
    assert "1000 documents read, 1 kept (999 duplicate)" in caught.value.message


def test_a_full_disk_leaves_nothing_behind(tokenizer, text_file, reporter, tmp_path, monkeypatch):
    fired = []

    def full(*args):
        fired.append(args)
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="no space"):
        prepare_data(settings_for(text_file), tokenizer, reporter, tmp_path / "out")
    assert fired, "the fault did not fire"
    assert not list((tmp_path / "out").iterdir())
