import errno
import itertools
import json
import os
import random

import pytest

from lora_gpt2.core.errors import DataError, Interrupted, ResourceError
from lora_gpt2.data import pipeline, shards
from lora_gpt2.data.clean.cleaning import CleaningReport
from lora_gpt2.data.clean.report import build_report_page
from lora_gpt2.data.dedup import sign_records
from lora_gpt2.data.inspect import iter_documents, list_documents, preview_documents, write_texts
from lora_gpt2.data.prepared import (
    SPLITS,
    describe_amount,
    describe_preparation,
    find_prepared,
    measure_overlaps,
    prepare_data,
)
from lora_gpt2.data.read.records import Document
from lora_gpt2.data.tokenizer import Tokenizer, load_tokenizer
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


def test_what_training_saw_is_found_without_its_sources(tokenizer, text_file, reporter):
    settings = settings_for(text_file)
    first = prepare_data(settings, tokenizer, reporter)
    other = Tokenizer(tokenizer.backend, 0)
    text_file.unlink()
    found = find_prepared(first.fingerprint, settings, tokenizer)
    assert found.report == first.report
    assert (found.train.stream == first.train.stream).all()
    unusable = (None, 3, "0" * 32, f"../{first.path.parent.name}/{first.fingerprint}", f"{first.fingerprint}/")
    assert all(find_prepared(fingerprint, settings, tokenizer) is None for fingerprint in unusable)
    assert find_prepared(first.fingerprint, settings, other) is None
    (first.path / "manifest.json").write_text(json.dumps(first.report | {"format": 1}))
    assert find_prepared(first.fingerprint, settings, tokenizer) is None


def test_the_cache_is_found_and_anything_that_matters_makes_another(tokenizer, text_file, reporter, monkeypatch):
    first = prepare_data(settings_for(text_file), tokenizer, reporter)
    with monkeypatch.context() as patched:
        patched.setattr("lora_gpt2.data.prepared._build", lambda *a: pytest.fail("prepared again"))
        assert prepare_data(settings_for(text_file), tokenizer, reporter).fingerprint == first.fingerprint
    seen = {first.fingerprint}
    for changes in ({"profile": "raw"}, {"validation_fraction": 0.2}, {"test_fraction": 0.2}, {"layout": "packed"}):
        seen.add(prepare_data(settings_for(text_file, **changes), tokenizer, reporter).fingerprint)
    text_file.write_text(text_file.read_text() + '{"text": "one more"}\n')
    seen.add(prepare_data(settings_for(text_file), tokenizer, reporter).fingerprint)
    assert len(seen) == 6


def test_copies_and_empty_documents_are_rejected_and_counted(tokenizer, tmp_path, reporter):
    path = tmp_path / "a.jsonl"
    path.write_text(make_text(20) * 2 + '{"text": "  "}\n')
    report = prepare_data(settings_for(path), tokenizer, reporter).report
    assert report["rejected"] == {"duplicate": 20, "empty": 1}


def test_given_validation_files_are_used_and_their_copies_leave_the_training_part(tokenizer, tmp_path, reporter):
    (tmp_path / "t.jsonl").write_text(make_text(30, seed=1))
    (tmp_path / "v.jsonl").write_text(make_text(10, seed=2) + make_text(3, seed=1))
    settings = settings_for(tmp_path / "t.jsonl", validation=(str(tmp_path / "v.jsonl"),), test_fraction=0.0)
    prepared = prepare_data(settings, tokenizer, reporter)
    assert prepared.report["documents"] == {"train": 27, "validation": 13, "test": 0}
    said = "3 training documents were copies or parts of held-out ones and were dropped"
    assert said in describe_preparation(prepared)


def write_book(path, words, count=200):
    """One text file without any line that separates documents: it is cut into sections."""
    draw = random.Random(3)
    path.write_text("\n\n".join(" ".join(draw.choice(words) for _ in range(60)) + "." for _ in range(count)))
    return path.read_text()


WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "re", "tu", "na") for b in ("n", "rt", "sh", "ve", "ll", "d", "mo", "x")]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_what_a_held_out_text_contains_is_not_trained_on_however_it_is_cut(tokenizer, tmp_path, reporter, split):
    book, part = tmp_path / "book.txt", tmp_path / "part.txt"
    text = write_book(book, WORDS)
    own = {"validation_fraction": 0.1, "test_fraction": 0.1}
    whole = prepare_data(settings_for(book, **own), tokenizer, reporter)
    part.write_text(text[len(text) // 3 : len(text) // 2])
    prepared = prepare_data(settings_for(book, **own, **{split: (str(part),)}), tokenizer, reporter)
    dropped = prepared.report["num_train_test_overlaps"]
    assert dropped > 3
    assert prepared.report["rejected"]["part of a held-out text"] == dropped
    assert prepared.report["num_held_out_seen"] == {"validation": 0, "test": 0}
    trained = " ".join(decode_documents(tokenizer, prepared.train))
    held_out = decode_documents(tokenizer, getattr(prepared, split))[0].split()
    middle = " ".join(held_out[len(held_out) // 2 :][:12])
    assert middle in text
    assert middle in " ".join(decode_documents(tokenizer, whole.train)), "the control: it would have been"
    assert middle not in trained
    with pytest.raises(DataError, match="0 usable documents") as caught:
        prepare_data(settings_for(book, **{split: (str(book),)}), tokenizer, reporter)
    assert "data.validation or data.test is the text to train on" in caught.value.hint


def test_held_out_documents_that_are_parts_of_training_documents_are_counted(tokenizer, tmp_path, reporter):
    text = write_book(tmp_path / "book.txt", WORDS, count=1000)
    chapters = [text[start : start + 6_000] for start in range(0, len(text), 6_000)]
    path, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    fresh = write_book(tmp_path / "other.txt", [word.upper() + "s" for word in WORDS])
    path.write_text("".join(json.dumps({"text": chapter}) + "\n" for chapter in chapters))
    passages = [chapters[0][1000:2500], chapters[7][2000:3500], fresh[20_000:21_500]]
    test.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in passages))
    settings = settings_for(path, validation=(str(tmp_path / "other.txt"),), test=(str(test),))
    prepared = prepare_data(settings, tokenizer, reporter)
    trained = "".join(decode_documents(tokenizer, prepared.train))
    assert [passage[100:200] in trained for passage in passages] == [True, True, False], "the control"
    assert prepared.report["num_held_out_seen"]["test"] == 2
    line = "2 of the 3 test documents are parts of training documents: their perplexity is too low"
    assert line in describe_preparation(prepared)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "0 usable documents to train on: 1 document read, 0 kept (1 empty)"),
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
    assert "1,000 documents read, 1 kept (999 duplicate)" in caught.value.message


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


def words_of(path):
    return {name: (path / name).read_bytes() for name in sorted(os.listdir(path)) if name != "manifest.json"}


def make_long_text(documents, seed):
    rng, words = random.Random(seed), ["the", "cat", "and", "dog", "run", "in", "rain", "under", "sun"]
    texts = (" ".join(rng.choices([*words, str(rng.random())], k=60)) for _ in range(documents))
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(pipeline, "BATCH_CHARACTERS", 300)
    monkeypatch.setattr(pipeline, "SAMPLE_DOCUMENTS", 30)


def test_several_processes_make_what_one_makes(tokenizer, text_file, reporter, tmp_path, small_batches):
    one = prepare_data(settings_for(text_file, num_proc=1), tokenizer, reporter, tmp_path / "one")
    two = prepare_data(settings_for(text_file, num_proc=2), tokenizer, reporter, tmp_path / "two")
    assert one.fingerprint == two.fingerprint
    assert words_of(one.path) == words_of(two.path)
    drop = {"num_proc"}
    assert {k: v for k, v in one.report["settings"].items() if k not in drop} == {
        k: v for k, v in two.report["settings"].items() if k not in drop
    }


@pytest.mark.parametrize("kind", [KeyboardInterrupt, Interrupted])
def test_interrupted_work_goes_on_where_it_was(
    tokenizer, text_file, reporter, tmp_path, small_batches, monkeypatch, kind
):
    whole = prepare_data(settings_for(text_file), tokenizer, reporter, tmp_path / "whole")
    done = []
    process = pipeline.process_shard

    def stop_at_the_fifth(batch, job):
        if len(done) == 4:
            raise kind("stopped", "") if kind is Interrupted else kind
        process(batch, job)
        done.append(batch.number)

    monkeypatch.setattr(pipeline, "process_shard", stop_at_the_fifth)
    with pytest.raises(kind):
        prepare_data(settings_for(text_file), tokenizer, reporter, tmp_path / "cut")
    assert done == [0, 1, 2, 3]
    (work,) = (tmp_path / "cut").iterdir()
    counted = [len(shards.load_shard(work / "shards", number)[0].origins) for number in done]
    monkeypatch.setattr(pipeline, "process_shard", process)
    made = []
    monkeypatch.setattr(shards, "sign_records", lambda p, texts: made.append(len(texts)) or sign_records(p, texts))
    again = prepare_data(settings_for(text_file), tokenizer, reporter, tmp_path / "cut")
    assert words_of(again.path) == words_of(whole.path)
    assert not work.exists()
    assert 0 < sum(made) == sum(whole.report["documents"].values()) - sum(counted)


def test_no_near_copy_is_in_another_part_and_each_is_named(tokenizer, tmp_path, reporter):
    texts = [json.loads(line)["text"] for line in make_long_text(300, 5).splitlines()]
    copies = [text.upper() if i % 2 else f"{text} end" for i, text in enumerate(texts[:100])]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, *copies]))
    prepared = prepare_data(settings_for(path), tokenizer, reporter)
    rejected = [json.loads(line) for line in prepared.rejected.read_text().splitlines()]
    assert {entry["origin"] for entry in rejected} >= {f"{path}:{i}" for i in range(301, 401)}
    assert all(entry["reason"] in ("duplicate", "near duplicate") and entry["of"] for entry in rejected)
    assert sum(prepared.report["documents"].values()) == prepared.report["documents_kept"] == 400 - len(rejected)
    kept = prepare_data(settings_for(path, near_duplicate_threshold=0.0), tokenizer, reporter)
    assert kept.report["documents_kept"] == 350


def test_prompts_carry_no_loss_and_one_prompt_is_in_one_part(tokenizer, tmp_path, reporter):
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": f"the {i // 3} cat:", "completion": f" dog {i} and {i * i}"} for i in range(150)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for layout in ("concat", "packed"):
        prepared = prepare_data(settings_for(path, layout=layout, validation_fraction=0.2), tokenizer, reporter)
        found = {}
        for part in ("train", "validation", "test"):
            for ids, carries in iter_documents(getattr(prepared, part), tokenizer.eos_id):
                assert (tokenizer.decode(ids[: carries.index(True)]), all(carries[carries.index(True) :])) == (
                    tokenizer.decode(ids).partition(":")[0] + ":",
                    True,
                )
                found.setdefault(part, set()).add(tokenizer.decode(ids).partition(":")[0])
        assert not found["train"] & (found["validation"] | found["test"])
        assert prepared.report["loss_tokens"]["train"] < prepared.report["tokens"]["train"]
        assert prepared.train.num_targets == prepared.report["loss_tokens"]["train"]
    first = preview_documents(prepared.train, tokenizer, 1)[0]
    assert {token["loss"] for token in first} == {True, False}


def test_clean_text_is_written_and_prepares_to_itself(tokenizer, text_file, tmp_path, reporter):
    prepared = prepare_data(settings_for(text_file), tokenizer, reporter)
    write_texts(prepared, tokenizer, tmp_path / "clean")
    paths = {part: (str(tmp_path / "clean" / f"{part}.jsonl"),) for part in ("train", "validation", "test")}
    given = DataSettings(sources=paths["train"], validation=paths["validation"], test=paths["test"], block_size=32)
    again = prepare_data(given, tokenizer, reporter)
    assert list(again.train.stream) == list(prepared.train.stream)
    assert list(again.test.stream) == list(prepared.test.stream)


def test_bad_records_are_set_aside_and_counted(tokenizer, tmp_path, reporter):
    path = tmp_path / "a.jsonl"
    path.write_text(make_text(40) + "{broken\n" + '{"no": 1}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:41"):
        prepare_data(settings_for(path), tokenizer, reporter)
    prepared = prepare_data(settings_for(path, skip_bad=True), tokenizer, reporter)
    assert prepared.report["rejected"] == {"unreadable": 2}
    messages = [json.loads(line)["text"] for line in prepared.rejected.read_text().splitlines()]
    assert ["a.jsonl:41" in messages[0], "a.jsonl:42: no field 'text'" in messages[1]] == [True, True]
    page = build_report_page(prepared.report)
    assert "unreadable" in page
    assert "<script" not in page


def test_a_domain_that_trains_on_anothers_test_is_found(tokenizer, tmp_path, reporter):
    (tmp_path / "a.jsonl").write_text(make_long_text(60, 1))
    (tmp_path / "b.jsonl").write_text(make_long_text(60, 2))
    one, two = (
        prepare_data(settings_for(tmp_path / f"{n}.jsonl", test_fraction=0.2), tokenizer, reporter) for n in "ab"
    )
    assert measure_overlaps({"one": one, "two": two}, 0.8) == []
    texts = [tokenizer.decode(ids) for ids, _ in iter_documents(one.test, tokenizer.eos_id)]
    leak = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "c.jsonl").write_text(make_long_text(60, 2) + leak)
    given = settings_for(tmp_path / "c.jsonl", validation=(str(tmp_path / "b.jsonl"),), test_fraction=0.0)
    leaky = prepare_data(given.model_copy(update={"near_duplicate_threshold": 0.0}), tokenizer, reporter)
    ((of, among, copies, documents),) = measure_overlaps({"one": one, "leaky": leaky}, 0.8)
    assert (of, among, copies) == ("one", "leaky", len(texts))
    assert documents == one.report["documents"]["test"] + one.report["documents"]["validation"]


def test_eos_in_a_text_is_ordinary_characters_in_every_process(tokenizer, tmp_path, reporter, small_batches):
    path = tmp_path / "a.jsonl"
    rows = [{"text": f"the <|endoftext|> cat {i} and {i * i}"} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [prepare_data(settings_for(path, num_proc=n), tokenizer, reporter, tmp_path / str(n)) for n in (1, 2)]
    assert words_of(found[0].path) == words_of(found[1].path)
    assert list(found[0].train.stream).count(tokenizer.eos_id) == found[0].report["documents"]["train"] + 1


def test_the_same_bytes_under_another_name_are_read_anew(tokenizer, tmp_path, reporter):
    text = make_text(30)
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_text(text)
    reports = [prepare_data(settings_for(tmp_path / n), tokenizer, reporter).report for n in ("a.txt", "a.jsonl")]
    assert [report["documents_read"] for report in reports] == [1, 30]


def test_nothing_at_all_is_said_with_counts(tokenizer, tmp_path, reporter):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(DataError, match="0 usable documents to train on: 0 documents read"):
        prepare_data(settings_for(tmp_path / "a.jsonl"), tokenizer, reporter)


def test_a_template_keeps_its_own_lines(tokenizer, tmp_path, reporter):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"q": f"say {i}", "a": f"{i} {i * i}"}) + "\n" for i in range(60)))
    settings = settings_for(path, template="### Instruction:\n{q}\n\n### Response:\n{a}\nEnd")
    prepared = prepare_data(settings, tokenizer, reporter)
    first = tokenizer.decode(next(iter_documents(prepared.train, tokenizer.eos_id))[0])
    assert first.startswith("### Instruction:\nsay ")
    assert first.endswith("\nEnd")


def test_too_little_text_is_said_plainly():
    assert describe_amount(12_000) == (
        "12k tokens to train on: expect memorisation, watch the validation loss; 200k or more is comfortable"
    )
    assert "too little for the content" in describe_amount(100_000)
    assert describe_amount(200_000) == ""


def test_settings_read_from_a_manifest_read_text_as_they_did_in_training(tokenizer, tmp_path, reporter):
    """What is recognised in records depends on values, which are stored, and not on which of them were typed."""
    path = tmp_path / "pairs.jsonl"
    rows = [{"instruction": f"say {n}", "output": f"the cat {n} and the dog {n}"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    typed = settings_for(path)
    stored = DataSettings.model_validate_json(typed.model_dump_json())
    first = prepare_data(typed, tokenizer, reporter, tmp_path / "one")
    again = prepare_data(stored, tokenizer, reporter, tmp_path / "two")
    assert again.fingerprint == first.fingerprint
    assert again.train.stream.tolist() == first.train.stream.tolist()


@pytest.mark.parametrize("content", ["", "  \n"])
def test_a_split_without_documents_leaves_the_others_as_they_are(tokenizer, text_file, tmp_path, reporter, content):
    (tmp_path / "v.jsonl").write_text(make_text(10, seed=2))
    (tmp_path / "empty.txt").write_text(content)
    given = {"validation": (str(tmp_path / "v.jsonl"),), "test": (str(tmp_path / "empty.txt"),)}
    prepared = prepare_data(settings_for(text_file, **given), tokenizer, reporter)
    assert prepared.report["documents"] == {"train": 80, "validation": 10, "test": 0}


def test_long_documents_are_few_only_if_they_are_all(tokenizer, tmp_path, reporter, monkeypatch):
    """Sections of one book would land on both sides of a split; only where there is little else are books cut."""
    monkeypatch.setattr(pipeline, "SAMPLE_CHARACTERS", 3000)
    generator, words = (
        random.Random(1),
        ["the", "cat", "sat", "in", "rain", "sun", "dog", "and", "house", "tree", "said", "of", "was", "it", "with"],
    )
    for number in range(30):
        paragraphs = [" ".join(generator.choices(words, k=40)) for _ in range(12)]
        (tmp_path / f"{number}.txt").write_text(f"book {number}\n\n" + "\n\n".join(paragraphs))
    prepared = prepare_data(settings_for(tmp_path), tokenizer, reporter)
    assert sum(prepared.report["documents"].values()) == 30
    few = tmp_path / "few"
    few.mkdir()
    for number in range(3):
        (tmp_path / f"{number}.txt").rename(few / f"{number}.txt")
    prepared = prepare_data(settings_for(few), tokenizer, reporter)
    assert sum(prepared.report["documents"].values()) > 3, "three books are cut"


def test_a_pair_counts_as_one_document_wherever_a_rule_found_something(tokenizer, tmp_path, reporter):
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"mail\u200b me{n}@a.org ", "completion": f"or\u200b you{n}@a.org, the cat said"} for n in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = prepare_data(settings_for(path), tokenizer, reporter).report
    assert report["pii"] == {"email": 40}
    assert report["rules"]["control"]["documents"] == 40
    assert report["rules"]["control"]["characters_removed"] == 80


def test_what_could_not_be_read_counts_among_the_documents():
    documents = [Document(text, "a.jsonl") for text in ("one", "two")]
    (line,) = pipeline.describe_cleaning(CleaningReport(), documents, {pipeline.UNREADABLE: 5})
    assert line.startswith("5 of 7 documents are set aside")


def write_records(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def make_words(number, first, count=55):
    return " ".join(f"w{number}x{index}" for index in range(first, first + count))


@pytest.mark.parametrize("starts", [(3,), (0, 3)])
def test_a_near_copy_of_any_held_out_document_is_not_trained_on(tokenizer, tmp_path, reporter, starts):
    """Also of one that is a near copy of another in its own split: a given split stays as it is."""
    held_out = [{"text": make_words(number, start)} for number in range(20) for start in starts]
    near = [{"text": make_words(number, 6)} for number in range(20)]
    other = [{"text": make_words(1000 + number, 0)} for number in range(50)]
    settings = DataSettings(
        sources=(write_records(tmp_path / "t.jsonl", near + other),),
        validation=(write_records(tmp_path / "v.jsonl", held_out),),
        test_fraction=0.0,
        block_size=32,
    )
    report = prepare_data(settings, tokenizer, reporter).report
    assert report["documents"] == {"train": 50, "validation": 20 * len(starts), "test": 0}
    assert report["num_train_test_overlaps"] == 20


def test_a_long_prompt_that_records_share_makes_no_copies_of_them(tokenizer, tmp_path, reporter):
    system = make_words(0, 0, 200)
    chats = [
        {"prompt": f"{system} {make_words(1 + n, 0, 8)}", "completion": make_words(5000 + n, 0, 24)} for n in range(60)
    ]
    settings = DataSettings(sources=(write_records(tmp_path / "a.jsonl", chats),), block_size=32)
    assert prepare_data(settings, tokenizer, reporter).report["documents_kept"] == 60
    copies = [{**record, "completion": record["completion"] + " more"} for record in chats[:9]]
    settings = DataSettings(sources=(write_records(tmp_path / "b.jsonl", [*chats, *copies]),), block_size=32)
    assert prepare_data(settings, tokenizer, reporter).report["rejected"]["near duplicate"] == 9


def test_records_with_much_in_common_in_their_prompts_are_no_copies_unless_all_is_alike(tokenizer, tmp_path, reporter):
    """A classification: long instructions, few labels; and one prompt with answers that differ in a quarter."""
    labels = [
        {"prompt": f"{make_words(0, 0, 31)} {make_words(1 + n, 0, 9)}", "completion": f" {n % 2}"} for n in range(60)
    ]
    answers = [
        {"prompt": make_words(0, 0, 31), "completion": f"{make_words(9, 0, 90)} {make_words(n, 0, 30)}"}
        for n in range(60)
    ]
    for number, records in enumerate((labels, answers)):
        path = write_records(tmp_path / f"{number}.jsonl", records)
        assert prepare_data(settings_for(path), tokenizer, reporter).report["documents_kept"] >= 58, "estimates"


def test_prompts_that_are_added_move_no_document_to_another_split(tokenizer, tmp_path, reporter):
    records = [{"prompt": f"p{n // 12}:", "completion": f" {make_words(n, 0, 30)}"} for n in range(80 * 12)]
    splits = []
    for count in (40, 60, 80):
        path = write_records(tmp_path / f"{count}.jsonl", records[: 12 * count])
        prepared = prepare_data(settings_for(path), tokenizer, reporter)
        named = {d.text.strip(): split for split in SPLITS for d in list_documents(prepared, split, tokenizer)}
        splits.append(named)
    for fewer, more in itertools.pairwise(splits):
        assert fewer.items() <= more.items()


@pytest.mark.parametrize(("count", "each"), [(5, 80), (1, 40), (2, 40), (3, 40), (5, 45)])
def test_few_prompts_are_not_held_out_whole(tokenizer, tmp_path, reporter, count, each):
    genres, total = ("war", "love", "fantasy", "crime", "sport")[:count], count * each
    records = [{"prompt": f"Genre: {genres[n % count]}\n", "completion": make_words(n, 0, 20)} for n in range(total)]
    settings = DataSettings(sources=(write_records(tmp_path / "a.jsonl", records),), block_size=32)
    documents = prepare_data(settings, tokenizer, reporter).report["documents"]
    assert 0.8 * total < documents["train"] < total
    assert min(documents.values()) >= (5 if total == 400 else 1)


def test_near_copies_are_found_in_scripts_without_spaces(tokenizer, tmp_path, reporter):
    draw = random.Random(1)
    texts = ["".join(chr(0x4E00 + draw.randrange(2000)) for _ in range(120)) for _ in range(30)]
    copies = [text[:60] + "一" + text[61:] for text in texts[:10]]
    path = write_records(tmp_path / "a.jsonl", [{"text": text} for text in [*texts, *copies]])
    assert prepare_data(settings_for(path), tokenizer, reporter).report["rejected"] == {"near duplicate": 10}


def test_a_text_longer_than_what_is_read_ahead_is_cut_like_a_shorter_one(tokenizer, tmp_path, reporter, monkeypatch):
    monkeypatch.setattr(pipeline, "SAMPLE_CHARACTERS", 4000)
    monkeypatch.setattr(pipeline, "PIECE_CHARACTERS", 2000)
    for number in (1, 3):  # 12 kB are read whole, 36 kB are not
        paragraphs = [make_words(paragraph, 0, 25) for paragraph in range(60 * number)]
        (tmp_path / f"{number}.txt").write_text("\n\n".join(paragraphs))
        tokens = prepare_data(settings_for(tmp_path / f"{number}.txt"), tokenizer, reporter).report["tokens"]
        assert tokens["train"] / sum(tokens.values()) == pytest.approx(0.9, abs=0.07)


def test_overlaps_are_found_in_one_pass_over_all_domains(tokenizer, tmp_path, reporter):
    domains = {}
    for name, first in (("a", 0), ("b", 100), ("c", 200)):
        records = [{"text": make_words(first + number, 0)} for number in range(40)]
        if name == "c":  # trains on what the others hold out
            for other in domains.values():
                for split in ("validation", "test"):
                    texts = decode_documents(tokenizer, getattr(other, split))
                    records += [{"text": f"{text} {word}"} for text in texts for word in ("one", "two", "three")]
        domains[name] = prepare_data(
            settings_for(write_records(tmp_path / f"{name}.jsonl", records)), tokenizer, reporter
        )
    found = measure_overlaps(domains, 0.8)
    assert {(own, other) for own, other, _, _ in found} == {("a", "c"), ("b", "c")}
    assert all(0 < copies <= of for _, _, copies, of in found)
