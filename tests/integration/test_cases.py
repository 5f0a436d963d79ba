"""Ordinary files in the layouts that people have, and what must come of each: read, split, trained and measured.

The inputs are members of kinds that were found to fail; files of the same kinds are in the shared data, where it is.
"""

import gzip
import json
import math
import random

import pytest

from lora_gpt2.core.console import SilentReporter
from lora_gpt2.data.inspect import list_documents
from lora_gpt2.data.prepared import describe_preparation, prepare_data
from lora_gpt2.data.tokenizer import load_tokenizer
from lora_gpt2.recipe import DataSettings

SENTENCE = "the cat and a dog run in rain under another sun while every third lighthouse keeper counts ships"
WORDS = SENTENCE.split()


def write_sentence(draw, words=20):
    return " ".join(draw.choices(WORDS, k=words)).capitalize() + "."


def make_documents(count, words=20, seed=0):
    draw = random.Random(seed)
    return [write_sentence(draw, words) for _ in range(count)]


@pytest.fixture
def tokenizer(base_folder):
    return load_tokenizer(base_folder, 0)


@pytest.fixture
def prepare(tokenizer):
    def call(*paths, **changes):
        settings = DataSettings(sources=tuple(map(str, paths)), block_size=32, **changes)
        return prepare_data(settings, tokenizer, SilentReporter())

    return call


def read_all(prepared, tokenizer):
    """Returns all documents of a preparation, in no order, as prompt and text."""
    documents = [d for part in ("train", "validation", "test") for d in list_documents(prepared, part, tokenizer)]
    return sorted((document.prompt, document.text) for document in documents)


def evaluate(run, base_folder, *arguments):
    code, out, err = run("evaluate", *arguments, "--base", base_folder, "--json")
    assert code == 0, out
    return {(cell["adapter"], cell["source"]): cell for cell in json.loads(out)["cells"]}, err


# A2, A3, A8, A11: the same text gives the same number, and what was trained on is marked


@pytest.mark.parametrize("end", ["\r\n", "\r", "\u2028"])
def test_line_ends_do_not_change_a_figure(run, base_folder, tmp_path, end):
    text = "\n".join(make_documents(40))
    (tmp_path / "unix.txt").write_bytes(text.encode())
    (tmp_path / "other.txt").write_bytes(text.replace("\n", end).encode())
    names = [f"one={tmp_path / 'unix.txt'}", f"two={tmp_path / 'other.txt'}"]
    cells, _ = evaluate(run, base_folder, *names)
    assert cells["base", "one"]["perplexity"] == cells["base", "two"]["perplexity"]
    assert cells["base", "one"]["profile"] == "prose"
    raw, _ = evaluate(run, base_folder, *names, "--set", "data.profile=raw")
    assert raw["base", "one"]["perplexity"] != raw["base", "two"]["perplexity"], "the bytes as they are"


def test_what_cleaning_takes_away_is_said_from_a_hundredth_on(run, base_folder, tmp_path):
    path = tmp_path / "spaced.txt"
    path.write_text("   ".join(make_documents(20)), encoding="utf-8")
    _, err = evaluate(run, base_folder, path)
    assert "of the characters away, as in training; --set data.profile=raw measures the text as it is" in err
    path.write_text(" ".join(make_documents(20)) + "  .", encoding="utf-8")
    _, err = evaluate(run, base_folder, path)
    assert "characters away" not in err


def train(run, base_folder, name, *options):
    settings = ["train.steps=3", "data.block_size=16", "train.batch_tokens=64", "train.sample_tokens=0"]
    return run(
        "train", "--name", name, "--base", base_folder, *[part for s in settings for part in ("--set", s)], *options
    )


def write_records(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.mark.parametrize("layout", ["concat", "packed"])
def test_the_test_figure_of_training_is_that_of_evaluate(run, base_folder, store, tmp_path, layout):
    texts = make_documents(30, words=40)
    data = write_records(tmp_path / "d.jsonl", texts[:22])
    held_out = write_records(tmp_path / "held_out.jsonl", [*texts[22:], texts[22], texts[23] + "  "])
    options = ["--data", data, "--set", f"data.test=['{held_out}']", "--set", f"data.layout={layout}"]
    code, _, err = train(run, base_folder, "law", *options)
    assert code == 0, err
    figures = store.read_manifest("law").figures
    cells, err = evaluate(run, base_folder, f"t={held_out}", "law", "--adapter", "law")
    assert cells["law", "t"]["documents"] == 10, "copies within a given test text stay: it is the text that was given"
    for source in ("t", "law"):
        for adapter, key in (("law", "test_perplexity"), ("base", "base_test_perplexity")):
            # what CASES allows between the two figures, in nats
            assert math.log(cells[adapter, source]["perplexity"] / figures[key]) == pytest.approx(0, abs=1e-3)
    assert "when it was trained" not in err
    changed = ["--set", "evaluate.window=8", "--set", "evaluate.stride=8"]
    _, err = evaluate(run, base_folder, f"t={held_out}", "--adapter", "law", *changed)
    assert "law@1 on t: perplexity" in err
    assert "window 48 then, 8 now; stride 24 then, 8 now" in err


def test_text_that_was_trained_on_is_marked_wherever_it_is_measured(run, base_folder, tmp_path):
    texts = make_documents(60, words=60)
    data, new = (
        write_records(tmp_path / "d.jsonl", texts),
        write_records(tmp_path / "new.jsonl", make_documents(12, words=60, seed=9)),
    )
    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(texts), encoding="utf-8")
    for name, source in (("records", data), ("sections", book)):
        assert train(run, base_folder, name, "--data", source)[0] == 0
        cells, _ = evaluate(run, base_folder, f"d={data}", f"b={book}", f"n={new}", name, "--adapter", name)
        seen = {source: cells[name, source]["documents_trained_on"] for source in ("d", "b", "n", name)}
        assert 45 <= seen["d"] <= 58, "all but those held out"
        assert (seen["b"], seen["n"], seen[name]) == (1, 0, 0)
        assert cells["base", "d"]["documents_trained_on"] is None
        code, out, _ = run("evaluate", f"d={data}", f"n={new}", "--adapter", name, "--base", base_folder)
        assert code == 0
        assert f"! {name} was trained on {seen['d']} of 60 documents of d" in out
        assert out.count("! ") == 2, "the cell and its line"


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "valid.jsonl", "test.jsonl"),
        ("train.txt", "dev.txt", "eval.txt"),
        ("my-training-set.csv", "my-val-set.csv", "my-test-set.csv"),
        ("train/a.txt", "validation/a.txt", "test/a.txt"),
        ("train.jsonl.gz", "test.jsonl.gz"),
    ],
)
def test_splits_that_files_are_named_for_are_used(prepare, tokenizer, tmp_path, names):
    documents = {name: make_documents(30, seed=index) for index, name in enumerate(names)}
    for name, texts in documents.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if ".jsonl" in name:
            content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        else:
            content = "text\n" + "\n".join(f'"{t}"' for t in texts) if ".csv" in name else "\n".join(texts)
        path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    (tmp_path / "data" / "README.md").write_text("about the data", encoding="utf-8")
    prepared = prepare(tmp_path / "data", unit="line")
    parts = dict(zip(names, ("train", "validation", "test") if len(names) == 3 else ("train", "test"), strict=True))
    for name, part in parts.items():
        found = {document.text for document in list_documents(prepared, part, tokenizer)}
        assert found <= set(documents[name])
        assert len(found) > 25
    said = describe_preparation(prepared)[0]
    assert said.startswith("split by names: train: ")
    assert names[-1].rpartition("/")[2] in said


@pytest.mark.parametrize(
    "names", [("a.txt", "test.txt"), ("train.txt", "b.txt", "test.txt"), ("train.txt", "contest.txt")]
)
def test_names_that_do_not_say_a_split_for_every_file_are_no_splits(prepare, tmp_path, names):
    for index, name in enumerate(names):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_text("\n".join(make_documents(30, seed=index)), encoding="utf-8")
    prepared = prepare(tmp_path / "data", unit="line")
    assert prepared.report["documents_read"] == 30 * len(names)
    assert not any("split by names" in line for line in describe_preparation(prepared))


def test_evaluate_measures_the_test_split_of_a_folder(run, base_folder, tmp_path):
    for index, name in enumerate(("train", "valid", "test")):
        write_records(tmp_path / "data" / f"{name}.jsonl", make_documents(8 + index, seed=index))
    cells, err = evaluate(run, base_folder, f"d={tmp_path / 'data'}")
    assert cells["base", "d"]["documents"] == 10
    assert "the test split is measured" in err


# A6, A7, A8, A9, A10: marks, instructions, tables, archives, separators

EOS, START = "<|endoftext|>", "<|startoftext|>"


@pytest.mark.parametrize(
    "layout",
    [
        "{}" + EOS + "\n",
        START + "{}" + EOS + "\n",
        "{}\n" + EOS + "\n",
        START + "\n{}\n" + EOS + "\n",
        "{}" + EOS,
        EOS + "{}\n",
        "{} " + EOS + "\r\n",
    ],
)
def test_marks_between_documents_separate_them_and_are_not_trained_on(prepare, tokenizer, tmp_path, layout):
    texts = make_documents(50)
    path = tmp_path / "marked.txt"
    path.write_bytes("".join(layout.format(text) for text in texts).encode())
    prepared = prepare(path)
    assert read_all(prepared, tokenizer) == sorted(("", text) for text in texts)
    records = write_records(tmp_path / "marked.jsonl", [layout.format(text).strip() for text in texts])
    prepared = prepare(records)
    assert read_all(prepared, tokenizer) == sorted(("", text) for text in texts)
    assert any(EOS in line for line in prepared.report["reading"])


def test_a_sentence_about_a_mark_keeps_it(prepare, tokenizer, tmp_path):
    texts = [f"{text} The mark {EOS} ends a text, and '{START}' begins one." for text in make_documents(30)]
    prepared = prepare(write_records(tmp_path / "about.jsonl", texts))
    assert read_all(prepared, tokenizer) == sorted(("", text) for text in texts)


@pytest.mark.parametrize(
    "form",
    [
        "Below is a task. Answer it in full.\n\n### Instruction:\nNote {n}\n\n### Response:\n{text}",
        "User: note {n}\nBot: {text}\n[END]",
    ],
)
def test_what_all_records_have_in_common_is_trained_on(prepare, tokenizer, tmp_path, form):
    texts = [form.format(n=number, text=text) for number, text in enumerate(make_documents(40))]
    prepared = prepare(write_records(tmp_path / "instructions.jsonl", texts))
    assert read_all(prepared, tokenizer) == sorted(("", text) for text in texts)
    with_rule = prepare(tmp_path / "instructions.jsonl", rules={"boilerplate": True})
    assert any("cleaning rule boilerplate: 40 documents" in line for line in describe_preparation(with_rule))


def test_what_each_rule_and_reading_did_is_said_and_kept(run, drawn, base_folder, store, tmp_path):
    texts = [f"{text}{EOS}" for text in make_documents(40)] + ["spaced   out " + write_sentence(random.Random(5))]
    code, _, err = train(run, base_folder, "law", "--data", write_records(tmp_path / "d.jsonl", texts))
    assert code == 0
    assert "law: cleaning rule whitespace: 1 document, 2 characters removed" in err
    assert err.count("cleaning rule whitespace") == 1
    assert EOS in err
    manifest = store.read_manifest("law")
    assert manifest.data["rules"]["whitespace"] == {"documents": 1, "characters_removed": 2}
    assert any(EOS in line for line in manifest.data["reading"])
    folder = store.resolve("law")
    for page in ("README.md", "report.html"):
        content = (folder / page).read_text(encoding="utf-8")
        assert "whitespace" in content
        assert "endoftext" in content


def test_a_table_without_a_header_is_an_error_that_names_the_setting(prepare, tokenizer, tmp_path, run, base_folder):
    texts = make_documents(30)
    path = tmp_path / "headerless.csv"
    path.write_text("".join(f'"{text}"\n' for text in texts), encoding="utf-8")
    code, _, err = run("prepare", path, "--base", base_folder)
    assert code == 3
    assert "the first row looks like text, not like names of columns" in err
    assert "--set data.header=false" in err
    assert read_all(prepare(path, header=False), tokenizer) == sorted(("", text) for text in texts)
    path.write_text("".join(f'{number},"{text}"\n' for number, text in enumerate(texts)), encoding="utf-8")
    assert run("prepare", path, "--base", base_folder)[0] == 3
    found = read_all(prepare(path, header=False, text_field="2"), tokenizer)
    assert found == sorted(("", text) for text in texts)


def test_the_column_that_is_read_is_named(prepare, tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_text("review\n" + "".join(f'"{text}"\n' for text in make_documents(30)), encoding="utf-8")
    assert any("the only column, 'review', is read" in line for line in prepare(path).report["reading"])


@pytest.mark.parametrize("damage", ["checksum", "cut", "flipped"])
def test_nothing_of_a_damaged_archive_is_trained_on(run, base_folder, tmp_path, damage):
    good = write_records(tmp_path / "good.jsonl", make_documents(30, seed=1))
    content = bytearray(
        gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in make_documents(400)).encode(), mtime=0)
    )
    if damage == "checksum":
        content[-6] ^= 1
    elif damage == "cut":
        content = content[:-20]
    else:
        content[len(content) // 2] ^= 4
    (tmp_path / "bad.jsonl.gz").write_bytes(bytes(content))
    code, _, err = run("prepare", tmp_path / "bad.jsonl.gz", "--base", base_folder)
    assert code == 3
    assert "bad.jsonl.gz is damaged" in err
    options = ["--skip-bad", "--base", base_folder, "--json", "--set", "data.block_size=16"]
    code, out, _ = run("prepare", good, tmp_path / "bad.jsonl.gz", *options)
    assert code == 0
    result = json.loads(out)
    assert result["documents_read"] == 30
    assert result["rejected"]["unreadable"] == 1


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt", "parquet"])
def test_a_separator_applies_to_every_format(prepare, tokenizer, tmp_path, kind):
    texts = make_documents(30)
    whole = [f"Q {number} ### {text}" for number, text in enumerate(texts)]
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": whole}), path)
    else:
        forms = {
            "jsonl": "".join(json.dumps({"text": text}) + "\n" for text in whole),
            "json": json.dumps(whole),
            "csv": "text\n" + "".join(f'"{text}"\n' for text in whole),
            "txt": "\n".join(whole),
        }
        path.write_text(forms[kind], encoding="utf-8")
    unit = "line" if kind == "txt" else "file"
    found = read_all(prepare(path, separator="###", unit=unit), tokenizer)
    assert found == sorted((f"Q {number} ###", f" {text}") for number, text in enumerate(texts))


def test_a_separator_beside_a_prompt_is_refused(run, base_folder, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b ### c"}) + "\n", encoding="utf-8")
    code, _, err = run("prepare", path, "--base", base_folder, "--set", "data.separator=###")
    assert code == 3
    assert "it has a prompt already, so data.separator does not apply" in err


# A12: nothing is overwritten


def test_an_interrupted_run_is_gone_on_with_or_set_aside_but_not_overwritten(
    run, base_folder, store, tmp_path, monkeypatch
):
    from lora_gpt2.training.trainer import Trainer

    data = write_records(tmp_path / "d.jsonl", make_documents(60))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_conclude", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train(run, base_folder, "law", "--data", data)[0] == 130
    code, _, err = train(run, base_folder, "law", "--data", data)
    assert code == 6
    assert "an interrupted run of law is kept, at step 3" in err
    assert "--resume continues it, --fresh starts over" in err
    assert store.list_names() == []
    code, _, err = train(run, base_folder, "law", "--data", data, "--resume")
    assert code == 0
    assert "resuming at step 3" in err
    assert train(run, base_folder, "law", "--data", data)[0] == 0, "a finished run is no obstacle"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_conclude", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        train(run, base_folder, "law", "--data", data)
    assert train(run, base_folder, "law", "--data", data, "--fresh")[0] == 0
    assert train(run, base_folder, "law", "--data", data, "--fresh", "--resume")[0] == 2


# B1 to B4: text that trains


@pytest.mark.parametrize("kind", ["txt", "stdin", "jsonl"])
@pytest.mark.parametrize("text", ["sentences", "words", "chinese", "dna"])
def test_a_text_without_a_line_break_is_split_and_trained(prepare, tokenizer, tmp_path, monkeypatch, kind, text):
    draw = random.Random(0)
    whole = {
        "sentences": " ".join(write_sentence(draw) for _ in range(150)),
        "words": " ".join(draw.choices(WORDS, k=3000)),
        "chinese": "".join(draw.choices("天地玄黄宇宙洪荒日月盈昃。", k=6000)),
        "dna": "".join(draw.choices("ACGT", k=12_000)),
    }[text]
    path = tmp_path / ("a.jsonl" if kind == "jsonl" else "a.txt")
    path.write_text(json.dumps({"text": whole}) if kind == "jsonl" else whole, encoding="utf-8")
    if kind == "stdin":
        from lora_gpt2.data.read import sources

        sources._spool_stdin.cache_clear()
        with path.open(encoding="utf-8") as file, monkeypatch.context() as patch:
            patch.setattr("sys.stdin", file)
            prepared = prepare("-")
    else:
        prepared = prepare(path)
    assert min(prepared.report["documents"].values()) >= 1
    assert sum(prepared.report["documents"].values()) > 20
    kept = "".join(text for _, text in read_all(prepared, tokenizer))
    assert sum(map(len, kept.split())) == sum(map(len, whole.split())), "nothing of it goes"


UNSPACED = {
    "chinese": "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏",
    "japanese": "いろはにほへとちりぬるをわかよたれそつねならむ",
    "thai": "กขคงจฉชซญฎฐณดตถทธนบปผฝพฟภมยรลวศษสหฬอฮ",
    "dna": "ACGTN",
    "protein": "ACDEFGHIKLMNPQRSTVWY",
    "moves": "abcdefgh12345678RNBQKx+#O-",
    "lines": "-=_*",
}


@pytest.mark.parametrize("script", UNSPACED)
def test_unspaced_scripts_and_sequences_lose_nothing(prepare, tokenizer, tmp_path, script):
    draw = random.Random(1)
    texts = ["".join(draw.choices(UNSPACED[script], k=1500)) for _ in range(30)]
    prepared = prepare(write_records(tmp_path / "a.jsonl", texts), max_repetition=1.0)
    assert read_all(prepared, tokenizer) == sorted(("", text) for text in texts)


def test_encoded_data_goes_and_that_is_said(prepare, tokenizer, tmp_path):
    import base64

    draw = random.Random(2)
    noise = [
        base64.b64encode(draw.randbytes(1200)).decode(),
        draw.randbytes(700).hex(),
        draw.randbytes(700).hex().upper(),
    ]
    texts = [f"{write_sentence(draw)} {draw.choice(noise)} {write_sentence(draw)}" for _ in range(30)]
    prepared = prepare(write_records(tmp_path / "a.jsonl", texts))
    assert all(len(text) < 400 for _, text in read_all(prepared, tokenizer))
    assert any(line.startswith("cleaning rule long_words: 30 documents") for line in describe_preparation(prepared))


ANSWER = "Answer {n} is {text}"
RECORDS = {
    "openai": lambda q, a: {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": q},
            {"role": "assistant", "content": a},
        ]
    },
    "sharegpt": lambda q, a: {"id": "x", "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    "alpaca": lambda q, a: {"instruction": q, "input": "", "output": a},
    "question": lambda q, a: {"question": q, "answer": a, "id": 3},
    "response": lambda q, a: {"prompt": q, "response": a},
}
PROMPTS = {
    "openai": "system: Be brief.\nuser: {}\nassistant:",
    "sharegpt": "user: {}\nassistant:",
    "alpaca": "### Instruction:\n{}\n\n### Response:\n",
    "question": "{}\n",
    "response": "{}\n",
}


@pytest.mark.parametrize("layout", RECORDS)
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_the_usual_layouts_are_recognised_and_prompts_carry_no_loss(prepare, tokenizer, tmp_path, layout, kind):
    pairs = [(f"Question {number}?", text) for number, text in enumerate(make_documents(30))]
    records = [RECORDS[layout](question, answer) for question, answer in pairs]
    path = tmp_path / f"a.{kind}"
    content = json.dumps(records) if kind == "json" else "".join(json.dumps(record) + "\n" for record in records)
    path.write_text(content, encoding="utf-8")
    prepared = prepare(path)
    space = " " if layout in ("openai", "sharegpt") else ""
    wanted = sorted((PROMPTS[layout].format(question), space + answer) for question, answer in pairs)
    assert read_all(prepared, tokenizer) == wanted
    (said,) = prepared.report["reading"]
    assert "(30 times)" in said
    assert "data." in said, "the settings that would say the same"


def test_an_alpaca_input_stands_between_instruction_and_response(prepare, tokenizer, tmp_path):
    records = [
        {"instruction": f"Do {n}", "input": f"with {n}", "output": text} for n, text in enumerate(make_documents(30))
    ]
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    prompts = {prompt for prompt, _ in read_all(prepare(path), tokenizer)}
    assert "### Instruction:\nDo 3\n\n### Input:\nwith 3\n\n### Response:\n" in prompts


@pytest.mark.parametrize("orient", ["columns", "index", "split", "records"])
def test_tables_as_pandas_writes_them_are_read(prepare, tokenizer, tmp_path, orient):
    texts = make_documents(30)
    columns = {"instruction": [f"do {n}" for n in range(30)], "output": texts, "score": [1.0] * 29 + [math.nan]}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    value = {
        "columns": {name: {str(n): item for n, item in enumerate(items)} for name, items in columns.items()},
        "index": {str(n): row for n, row in enumerate(rows)},
        "split": {"columns": list(columns), "index": list(range(30)), "data": [list(row.values()) for row in rows]},
        "records": rows,
    }[orient]
    path = tmp_path / "pandas.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    assert [text for _, text in read_all(prepare(path), tokenizer)] == sorted(
        texts, key=lambda t: f"do {texts.index(t)}"
    )


@pytest.mark.parametrize("name", ["content", "body", "article"])
def test_a_text_under_another_usual_name_is_read_and_the_name_said(prepare, tokenizer, tmp_path, name):
    texts = make_documents(30)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"id": 1, name: text}) + "\n" for text in texts), encoding="utf-8")
    prepared = prepare(path)
    assert read_all(prepared, tokenizer) == sorted(("", text) for text in texts)
    assert f"data.text_field={name}" in prepared.report["reading"][0]


def test_carriage_returns_alone_end_lines(prepare, tokenizer, tmp_path):
    texts = make_documents(30)
    path = tmp_path / "old.csv"
    path.write_bytes(("text,label\r" + "".join(f'"{text}",1\r' for text in texts)).encode())
    assert read_all(prepare(path), tokenizer) == sorted(("", text) for text in texts)
    path = tmp_path / "old.jsonl"
    path.write_bytes("".join(json.dumps({"text": text}) + "\r" for text in texts).encode())
    assert read_all(prepare(path), tokenizer) == sorted(("", text) for text in texts)


def test_not_a_number_in_a_field_that_is_not_read_is_no_obstacle(prepare, tokenizer, tmp_path):
    texts = make_documents(30)
    path = tmp_path / "nan.jsonl"
    path.write_text("".join(f'{{"text": {json.dumps(text)}, "score": NaN}}\n' for text in texts), encoding="utf-8")
    assert read_all(prepare(path), tokenizer) == sorted(("", text) for text in texts)


SHARED_CASES = {  # file: documents read, and whether there are prompts
    "alpaca_text.jsonl": (30, False),
    "chat_end.jsonl": (30, False),
    "cr_only.csv": (30, False),
    "eos_inline.txt": (30, False),
    "instr_text.jsonl": (30, False),
    "markers.txt": (30, False),
    "nan_one.jsonl": (30, False),
    "openai.jsonl": (30, True),
    "pandas.json": (30, True),
    "sharegpt.json": (30, True),
    "oneline.txt": (1, False),
    "zh_long.txt": (1, False),
    "zh_mixed.txt": (1, False),
}


@pytest.mark.parametrize("name", SHARED_CASES)
def test_the_files_that_strangers_brought_are_read_whole(shared, prepare, name):
    number, has_prompts = SHARED_CASES[name]
    prepared = prepare(shared / "cases" / "text" / name)
    assert prepared.report["documents_read"] >= number
    assert (prepared.report["tokens"] != prepared.report["loss_tokens"]) is has_prompts
    assert min(prepared.report["documents"].values()) >= 1
    assert prepared.report["rejected"].get("unreadable", 0) == 0
    assert "long_words" not in prepared.report["rules"]
    assert "boilerplate" not in prepared.report["rules"]
