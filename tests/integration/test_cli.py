"""The program as users and scripts meet it: results, errors with their exit codes, JSON, signals."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from lora_gpt2 import __version__
from lora_gpt2.cli import main
from lora_gpt2.core.dirs import find_cache_dir
from lora_gpt2.recipe_files import load_recipe
from lora_gpt2.store.catalog import Store
from tests.builders import make_text

TINY = [
    "--set",
    "data.block_size=16",
    "--set",
    "train.batch_tokens=64",
    "--set",
    "train.steps=8",
    "--set",
    "lora.rank=2",
    "--set",
    "train.sample_tokens=2",
]
HOT = ["--set", "train.learning_rate=1e38", "--set", "train.max_grad_norm=0"]


@pytest.mark.parametrize(
    ("given", "expected"), [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_two_processes_do_not_take_each_others_cores_while_they_wait(monkeypatch, given, expected):
    monkeypatch.setattr(os, "environ", {**os.environ, **given})
    if "GOMP_SPINCOUNT" not in given:
        os.environ.pop("GOMP_SPINCOUNT", None)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert os.environ.get("GOMP_SPINCOUNT") == expected
    assert os.environ["LRU_CACHE_CAPACITY"] == "64"


def test_from_text_to_adapter_to_text_to_figures(run, base_folder, text_file):
    code, out, err = run("train", "--data", text_file, "--name", "mine", "--base", base_folder, *TINY, "--json")
    assert code == 0
    (item,) = json.loads(out)["adapters"]
    assert set(item) >= {
        "name",
        "version",
        "steps",
        "train_tokens",
        "base_perplexity",
        "validation_perplexity",
        "tokens_per_second",
        "peak_memory_bytes",
        "seconds",
    }
    assert (item["name"], item["version"], item["steps"], item["train_tokens"]) == ("mine", 1, 8, 512)
    assert "tokens/s" in err
    assert "next: lora-gpt2 generate 'Once upon a time' --adapter mine\n" in err
    code, out, err = run(
        "generate", "the cat", "--adapter", "mine", "--seed", 1, "--json", "--set", "generate.max_new_tokens=5"
    )
    assert code == 0
    (output,) = json.loads(out)["outputs"]
    assert set(output) == {"prompt", "text", "adapter", "tokens", "finish_reason", "seed", "provenance"}
    assert (output["prompt"], output["adapter"], output["seed"]) == ("the cat", "mine", 1)
    code, out, _ = run("evaluate", f"mine={text_file}", "--adapter", "mine", "--base", base_folder, "--json")
    assert code == 0
    cells = json.loads(out)["cells"]
    assert [(c["adapter"], c["source"]) for c in cells] == [("base", "mine"), ("mine", "mine")]
    assert cells[1]["perplexity"] < cells[0]["perplexity"]
    assert cells[0]["tokens"] == cells[1]["tokens"] > 0


def test_an_adapter_is_continued_as_its_next_version(run, base_folder, text_file):
    own = ["--base", base_folder, *TINY]
    assert run("train", f"law={text_file}", *own)[0] == 0
    tiny = own[:-6] + own[-2:]  # without steps and rank
    code, out, err = run("train", text_file, "--from", "law", "--steps", "3", *tiny, "--json")
    assert code == 0, err
    (item,) = json.loads(out)["adapters"]
    assert (item["name"], item["version"], item["parents"]) == ("law", 2, ["law@1"])
    assert item["parent_perplexity"] > 0
    code, out, err = run("train", text_file, "--from", "law@1", "--name", "on", "--steps", "3", *tiny)
    assert "parent ppl" in out
    assert "on: continues from law@1" in err
    code, out, _ = run("plan", text_file, "--from", "law", "--steps", "3", "--no-probe", *tiny, "--json")
    whole = run("plan", text_file, "--rank", "2", "--steps", "3", "--no-probe", *tiny, "--json")
    assert json.loads(out)["parts"] == json.loads(whole[1])["parts"]
    code, _, err = run("train", text_file, "--from", "laww", *own)
    assert code == 4
    assert "did you mean 'law'" in err


def test_a_folder_of_domains_trains_a_few_at_a_time(run, base_folder, tmp_path):
    folder = tmp_path / "domains"
    folder.mkdir()
    for index in range(4):
        (folder / f"d{index}.jsonl").write_text(make_text(60, seed=index))
    (folder / "own.yaml").write_text("data: {sources: [d0.jsonl], block_size: 16}\nlora: {rank: 3}\n")
    own = ["--base", base_folder, *TINY[:6], *TINY[8:]]
    code, out, err = run("train", "--all", folder, "--slots", "2", *own, "--json")
    assert code == 0, err
    assert [item["name"] for item in json.loads(out)["adapters"]] == ["d0", "d1", "d2", "d3", "own"]
    assert "d3@1: perplexity" in err
    code, out, err = run("train", "--all", folder, *own, "--resume")
    assert code == 0, err
    assert "already complete" in err
    (folder / "broken.jsonl").write_bytes(b"\x00" * 50)
    code, out, err = run("train", "--all", folder, *own, "--resume", "--json")
    assert code == 3, err
    assert len(json.loads(out)["adapters"]) == 5
    assert "has no usable text" in json.loads(out)["failures"]["broken"]
    (folder / "fresh.jsonl").write_text(make_text(60, seed=9))
    code, out, err = run("train", "--all", folder, *own, "--resume")
    assert code == 3
    assert "fresh@1" in out, "what was trained is shown, whatever failed"
    assert "error: 'broken' has no usable text" in err
    (status,) = (found for found in find_cache_dir().glob("runs/*/status.json") if "fresh" in found.read_text())
    states = json.loads(status.read_text())["adapters"]
    assert {name: state for name, (state, _) in states.items()} == {
        **dict.fromkeys(("d0", "d1", "d2", "d3", "own"), "unchanged"),
        "fresh": "published",
        "broken": "failed",
    }
    assert len(json.loads(status.with_name("run.json").read_text())["adapters"]) == 7
    assert run("train", "--all", folder, folder / "d0.jsonl", *own)[0] == 2
    assert run("train", "--all", tmp_path / "none", *own)[0] == 4


def test_a_search_publishes_one_adapter_and_shows_all_candidates(run, base_folder, text_file):
    own = ["--base", base_folder, *TINY, "--set", "tune.ranks=[1,2]", "--candidates", "4"]
    code, out, err = run("tune", f"law={text_file}", *own, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["adapter"]["name"], found["adapter"]["version"], len(found["candidates"])) == ("law", 1, 4)
    assert [candidate["is_best"] for candidate in found["candidates"]] == [True, False, False, False]
    code, out, err = run("tune", f"law={text_file}", *own, "--resume")
    assert "the recipe's own" in out
    assert "best" in out
    assert run("tune", f"a={text_file}", f"b={text_file}", *own)[0] == 2
    assert run("tune", text_file, *own, "--budget", "soon")[0] == 2


def test_bench_domains_trains_one_adapter_per_folder_and_names_the_winners(run, base_folder, tmp_path):
    words = {"cat": "the cat and the dog run", "chat": "le chat et le chien sous"}
    for name, vocabulary in words.items():
        (tmp_path / name).mkdir()
        for seed, part in enumerate(("train", "valid", "test")):
            (tmp_path / name / f"{part}.jsonl").write_text(make_text(40, seed, vocabulary))
    settings = [*TINY, "--set", f"base={base_folder}", "--set", "train.steps=60", "--set", "train.learning_rate=0.01"]
    code, out, _ = run("bench", "domains", tmp_path / "cat", tmp_path / "chat", *settings, "--json")
    assert code == 0
    assert json.loads(out)["winners"] == {"cat": "cat", "chat": "chat"}
    assert run("bench", "domains", tmp_path, "--set", f"base={base_folder}")[0] == 4


def test_the_demo_trains_swaps_and_measures(run, monkeypatch):
    from lora_gpt2.demo import tour as demo

    monkeypatch.setattr(demo, "STEPS", 3)
    monkeypatch.setattr(demo, "BATCH_TOKENS", 256)
    monkeypatch.setattr(demo, "TEST_DOCUMENTS", 3)
    monkeypatch.setattr(demo, "TEST_CHARACTERS", 500)
    monkeypatch.setattr(demo, "MAX_CHARACTERS", 120_000)  # held-out text is measured whole
    monkeypatch.setattr(demo, "MAX_DOCUMENT_BYTES", 8_000)
    code, out, err = run("demo", "--json")
    assert code == 0
    result = json.loads(out)
    assert set(result) == {"adapters", "matrix", "samples", "seconds"}
    assert [sample["adapter"] for sample in result["samples"]] == ["base", *demo.DOMAINS]
    assert len({sample["prompt"] for sample in result["samples"]}) == 1
    assert len(result["matrix"]) == 4 * 3
    assert "s left" in err


def test_several_recipes_train_together(run, base_folder, tmp_path):
    for name, words in (("one", "the cat"), ("two", "le chat")):
        (tmp_path / f"{name}.jsonl").write_text(make_text(40, words=f"{words} and dog rain sun under"))
        (tmp_path / f"{name}.yaml").write_text(
            f"name: {name}\nbase: {base_folder}\ndata: {{sources: [{name}.jsonl]}}\n"
        )
    code, out, _ = run("train", tmp_path / "one.yaml", tmp_path / "two.yaml", *TINY)
    assert code == 0
    assert "one@1" in out
    assert "two@1" in out
    code, out, _ = run("adapters", "list", "--json")
    assert [row["name"] for row in json.loads(out)["adapters"]] == ["one", "two"]


def test_prepare_says_what_it_did(run, base_folder, tmp_path):
    (tmp_path / "a.jsonl").write_text(make_text(40) + '{"text": "x\\u0000y  "}\n{"text": ""}\n')
    code, out, _ = run("prepare", tmp_path / "a.jsonl", "--base", base_folder, "--json", "--out", tmp_path / "out")
    assert code == 0
    result = json.loads(out)
    assert (result["documents_read"], result["documents_kept"], result["rejected"]) == (42, 41, {"empty": 1})
    assert set(result["tokens"]) == {"train", "validation", "test"}
    assert result["rules"]["control"]["documents"] == 1
    assert result["path"] == str(tmp_path / "out" / result["fingerprint"])
    code, out, _ = run("prepare", tmp_path / "a.jsonl", "--base", base_folder)
    assert "rule control: 1 document, 1 character removed" in out


def test_comparing_shows_every_adapter_and_the_base(run, trained, base_folder):
    shared = ["--set", "generate.max_new_tokens=4", "--seed", "1"]
    code, out, _ = run("generate", "the", "--compare", "all", "--base", base_folder, *shared)
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith("===")] == [
        "=== code (seed 1)",
        "=== law (seed 1)",
        "=== base (seed 1)",
    ]
    code, out, _ = run("generate", "the", "--compare", "law,base", "--json", *shared)
    assert [o["adapter"] for o in json.loads(out)["outputs"]] == ["law", "base"]
    code, out, _ = run("generate", "the", "--adapter", "law:0.6", "--adapter", "code:0.4", "--json", "-n", "2", *shared)
    assert [(o["adapter"], o["seed"]) for o in json.loads(out)["outputs"]] == [
        ("law:0.6+code:0.4", 1),
        ("law:0.6+code:0.4", 2),
    ]


def test_streamed_text_is_the_prompt_and_its_continuation(run, trained):
    arguments = ["generate", "the cat", "--adapter", "law", "--seed", "3", "--set", "generate.max_new_tokens=6"]
    _, streamed, _ = run(*arguments)
    _, whole, _ = run(*arguments, "--json")
    (output,) = json.loads(whole)["outputs"]
    assert streamed == f"the cat{output['text']}\n"
    _, _, err = run("generate", "x", "--adapter", "law", "--set", "generate.max_new_tokens=1")
    assert "seed " in err


def test_a_prompt_that_is_truncated_is_said_aloud(run, trained):
    short = ["--set", "generate.max_new_tokens=4", "--seed", "1"]
    code, _, err = run("generate", "x" * 60, "--adapter", "law", "--truncate", "left", *short)
    assert code == 0
    assert "the first 16 tokens of the prompt were left out" in err


def test_figures_that_are_not_finite_are_null_in_json(run, base_folder, tmp_path):
    (tmp_path / "a.txt").write_text("\u3042" * 4000)
    code, out, _ = run("evaluate", tmp_path / "a.txt", "--base", base_folder, "--json")
    assert (code, json.loads(out)["error"]["type"]) == (3, "DataError")
    assert "all documents are set aside, as training does: 1 repetitive" in out
    keep = ("--set", "data.max_repetition=1")
    code, out, _ = run("evaluate", tmp_path / "a.txt", "--base", base_folder, "--json", *keep)
    assert code == 0
    assert json.loads(out, parse_constant=pytest.fail)["cells"][0]["word_perplexity"] is None


def test_show_and_import(run, trained, base, base_folder):
    code, out, _ = run("adapters", "show", "law@1", "--json")
    assert code == 0
    shown = json.loads(out)["adapter"]
    assert shown["base"]["fingerprint"] == base.fingerprint
    assert shown["versions"] == [1]
    code, out, _ = run("adapters", "show", "law")
    assert "fingerprint" in out
    code, out, _ = run("adapters", "import", trained.resolve("law"), "--name", "copy", "--base", base_folder)
    assert (code, out) == (0, f"imported copy@1 for {base_folder}\n")
    copied, original = (trained.resolve(n) / "adapter_model.safetensors" for n in ("copy", "law"))
    assert copied.read_bytes() == original.read_bytes()


def test_recipes_and_bases(run, tmp_path):
    _, out, _ = run("recipes", "list", "--json")
    names = [row["name"] for row in json.loads(out)["recipes"]]
    assert {"smoke", "prose", "code", "lora-paper", "notebook"} <= set(names)
    assert run("recipes", "copy", "smoke", tmp_path / "s.yaml")[0] == 0
    assert run("recipes", "copy", "smoke", tmp_path / "s.yaml")[0] == 6
    assert run("recipes", "check", tmp_path / "s.yaml")[1] == f"{tmp_path / 's.yaml'}: valid\n"
    assert "steps: 20" in run("recipes", "show", "smoke")[1]
    assert "train.learning_rate" in run("recipes", "show")[1]
    assert run("recipes", "show", "smok")[2].endswith("did you mean 'smoke'?\n")
    assert "bundled" in run("bases", "list")[1]
    shown = json.loads(run("bases", "show", "nano", "--json")[1])["base"]
    assert shown["vocab_size"] == 8192


ERRORS = [
    (["trian"], 2, "UsageError", "no command 'trian'", "train"),
    (["train", "--nonsense"], 2, "UsageError", "there is no option --nonsense", "--help"),
    (["train", "-q"], 2, "UsageError", "there is no option -q", "before the command: lora-gpt2 -q"),
    (["train"], 2, "UsageError", "nothing to train on", "name a file or a folder"),
    (["train", "--data", "{text}", "--name", "A/B"], 2, "UsageError", "'A/B' is not a name", "1 to 64"),
    (["train", "--data", "{text}", "--set", "train.stps=1"], 2, "RecipeError", "train.stps", "train.steps"),
    (["train", "--name", "a", "--base", "{base}"], 3, "DataError", "no text to train on", "name a file or a folder"),
    (["train", "--data", "none.txt", "--base", "{base}"], 4, "NotFoundError", "none.txt", "check the path"),
    (["train", "--data", "{text}", "--base", "nothing"], 4, "NotFoundError", "no base 'nothing'", "nano"),
    (["train", "--data", "{text}", "--base", "gpt2-xl"], 7, "ResourceError", "hub cannot be reached", "nano"),
    (["train", "--data", "{text}", "--base", "{base}", *TINY, *HOT], 8, "TrainingDiverged", "step 1", "rate"),
    (["generate", "x", "--adapter", "lew"], 4, "NotFoundError", "no adapter 'lew'", "'law'"),
    (["generate", "x", "--adapter", "law@9"], 4, "NotFoundError", "no version 9", "[1]"),
    (["generate", "x", "--adapter", "law:much"], 2, "UsageError", "expected name:weight", "law:0.6"),
    (["generate", "x", "--adapter", "law", "--compare", "all"], 2, "UsageError", "exclude", "--compare"),
    (["generate", "x", "--adapter", "law", "--base", "nano"], 5, "MismatchError", "made for another base", "--base"),
    (["generate", "x" * 60, "--adapter", "law"], 2, "UsageError", "60 tokens", "--truncate left"),
    (["generate", "x", "--adapter", "law", "--seed", "-1"], 2, "UsageError", "-1", "--help"),
    (["generate", "x", "--adapter", "../law"], 2, "UsageError", "is a path", "adapters import FOLDER"),
    (["generate", "\ud800", "--adapter", "law"], 3, "DataError", "surrogate", "remove"),
    (["generate", "x", "--compare", ","], 2, "UsageError", "names no adapter", "all"),
    (["generate", "x", "--set", "base=/nowhere"], 4, "NotFoundError", "no base '/nowhere'", "nano"),
    (["evaluate", "a={text}", "a={text}", "--base", "{base}"], 2, "UsageError", "two sources", "label=path"),
    (["prepare", "a**/x.txt", "--base", "{base}"], 3, "DataError", "not a pattern", "**"),
    (["evaluate"], 2, "UsageError", "Missing argument", "evaluate --help"),
    (["evaluate", "{text}", "--adapter", "zzz", "--base", "{base}"], 4, "NotFoundError", "zzz", "known are"),
    (["evaluate", "{text}", "--base", "{base}", "--set", "evaluate.window=99"], 2, "UsageError", "<= 48", "window=N"),
    (["train", "{text}", "--set", "tune.ranks=[2]"], 2, "UsageError", "changes nothing in 'train'", "for tune"),
    (["train", "{text}", "--steps", "3", "--set", "train.steps=2"], 2, "UsageError", "given twice, as 2", "once"),
    (["generate", "x", "--set", "train.steps=2"], 2, "UsageError", "changes nothing in 'generate'", "for train"),
    (["audit", "memorization", "--set", "merge.rank=2"], 2, "UsageError", "nothing in 'audit'", "for merge"),
    (["evaluate", "{empty}", "--base", "{base}"], 3, "DataError", "no text to score", "at least one token"),
    (["evaluate", "{png}", "--base", "{base}"], 3, "DataError", "binary", "text first"),
    (["adapters", "show", "nothing"], 4, "NotFoundError", "nothing", "known are"),
    (["adapters", "import", "nowhere", "--name", "a"], 4, "NotFoundError", "no nowhere", "hub id"),
    (["recipes", "check", "{broken}"], 2, "RecipeError", "colour", "did you mean"),
    (["bases", "show", "{empty}"], 4, "NotFoundError", "no base", "nano"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "kind", "message", "hint"), ERRORS, ids=lambda v: v if isinstance(v, str) else None
)
def test_every_error_has_its_code_message_and_hint_in_text_and_json(
    run, trained, tmp_path, base_folder, text_file, arguments, code, kind, message, hint
):
    files = {"empty": tmp_path / "e.txt", "png": tmp_path / "p.txt", "broken": tmp_path / "b.yaml"}
    files["empty"].write_text("")
    files["png"].write_bytes(b"\x89PNG....")
    files["broken"].write_text("train: {colour: 1, step: 2}")
    places = {**files, "text": text_file, "base": base_folder}
    arguments = [a.format(**places) if "{" in a else a for a in arguments]
    listed = trained.list_names()
    found, out, err = run(*arguments)
    assert found == code
    assert out == ""
    assert message in err
    assert hint in err
    assert "Traceback" not in err
    found, out, err = run(*arguments, "--json")
    if arguments[0] != "trian":
        assert found == code
        error = json.loads(out)["error"]
        assert error["type"] == kind
        assert message in error["message"]
        assert hint in error["hint"]
    assert trained.list_names() == listed, "an error publishes nothing"


def test_a_bug_has_an_identifier_and_no_traceback_without_debug(run, monkeypatch):
    monkeypatch.setattr("lora_gpt2.model.checkpoint.list_bundled", lambda: 1 / 0)
    code, _, err = run("bases", "list")
    assert code == 1
    assert "a bug (" in err
    assert "please report" in err
    assert "Traceback" not in err
    assert "Traceback" in run("--debug", "bases", "list")[2]


def test_the_suggested_command_names_a_store_that_is_not_the_default(run, trained, base_folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    arguments = ["adapters", "import", trained.resolve("law"), "--name", "copy", "--base", base_folder]
    _, _, err = run(*arguments, "--store", elsewhere)
    assert f"--adapter copy --store {elsewhere}\n" in err
    assert Store(elsewhere).list_names() == ["copy"]


def test_text_trains_without_options_and_labels_name_adapters(run, base_folder, text_file, tmp_path, monkeypatch):
    """E1 of CASES.md: what everybody types first."""
    monkeypatch.chdir(tmp_path)
    code_folder = tmp_path / "src"
    code_folder.mkdir()
    for number in range(12):
        lines = "".join(f"def f{number}_{i}(x):\n    return x + {i * number}\n\n\n" for i in range(12))
        (code_folder / f"m{number}.py").write_text(lines)
    fast = ["--base", base_folder, "--steps", 2, "--rank", 2, "--block-size", 16, "--batch-size", 2, "--lr", "1e-2"]
    code, out, err = run("train", text_file.name, *fast, "--json")
    assert code == 0, err
    assert json.loads(out)["adapters"][0]["name"] == "text"
    manifest = Store.find().read_manifest("text")
    assert manifest.recipe["train"]["learning_rate"] == 0.01
    assert (manifest.recipe["lora"]["rank"], manifest.recipe["train"]["batch_size"]) == (2, 2)
    assert manifest.figures["train_tokens"] <= 2 * 2 * 16
    code, out, err = run("train", f"law={text_file.name}", "code=src/", *fast, "--json")
    assert code == 0, err
    assert [item["name"] for item in json.loads(out)["adapters"]] == ["law", "code"]
    assert "code: source code: its whitespace is left alone, as with data.profile=code (12 times)" in err
    assert Store.find().read_manifest("law").digest == manifest.digest, "alone or together, by words or by flags"
    same = ["--set", "train.steps=2", "--set", "lora.rank=2", "--set", "data.block_size=16"]
    same += ["--set", "train.batch_size=2", "--set", "train.learning_rate=0.01", "--base", base_folder]
    assert run("train", "--data", text_file.name, "--name", "set", *same)[0] == 0
    assert Store.find().read_manifest("set").digest == manifest.digest
    for words, message in (
        (["law=text.jsonl", "text.jsonl"], "label=SOURCE names adapters"),
        (["law=text.jsonl", "--name", "x"], "label=SOURCE names adapters"),
        (["prose", "code", "text.jsonl"], "several recipes, and text"),
        (["nowhere.txt"], "no file, folder or match for 'nowhere.txt'"),
        (["nowhere.yaml"], "there is no recipe nowhere.yaml"),
        (["text.jsonl", "--rank", "0"], "lora.rank"),
    ):
        code, _, err = run("train", *words)
        assert code in (2, 3, 4, 5), err
        assert message in err
        assert "base nano" not in err, "nothing was loaded"


def test_source_code_keeps_its_indentation_and_prose_beside_it_is_cleaned(run, tmp_path):
    (tmp_path / "mixed").mkdir()
    source = "".join(f"def f{i}(x):\n\tif x:\n\t\treturn   x + {i}\n\n\n\n" for i in range(60))
    (tmp_path / "mixed" / "a.py").write_text(source)
    (tmp_path / "mixed" / "b.md").write_text("\n".join(f"Some   words   of the text number {i}." for i in range(200)))
    code, _, err = run("prepare", tmp_path / "mixed", "--text", tmp_path / "clean", "--set", "data.test_fraction=0")
    assert code == 0, err
    lines = "".join(path.read_text() for path in sorted((tmp_path / "clean").iterdir())).splitlines()
    written = "".join(json.loads(line)["text"] for line in lines)
    assert "\tif x:\n\t\treturn   x + 7\n" in written
    assert "Some words of the text number 7." in written
    code, _, err = run("prepare", tmp_path / "mixed", "--set", "data.profile=raw")
    assert code == 0
    assert "source code" not in err


def test_the_suggested_command_can_be_pasted(run, base_folder, text_file, tmp_path, monkeypatch):
    import shlex

    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "it's.jsonl").write_text(text_file.read_text())
    small = [
        "--set",
        "train.steps=1",
        "--set",
        "data.block_size=16",
        "--set",
        "lora.rank=2",
        "--base",
        str(base_folder),
    ]
    for command in (["prepare", str(folder), *small], ["plan", "--no-probe", f"own={folder}", "--lr", "0.01", *small]):
        code, _, err = run(*command)
        assert code == 0, err
        line = next(line for line in err.splitlines() if line.startswith("next: "))
        words = shlex.split(line.removeprefix("next: "))
        assert words[:2] == ["lora-gpt2", "train"]
        code, _, err = run(*words[1:])
        assert code == 0, err
        line = next(line for line in err.splitlines() if line.startswith("next: "))
        assert run(*shlex.split(line.removeprefix("next: "))[1:], "--max-new-tokens", "2")[0] == 0
    assert Store.find().list_names() == ["a-folder", "own"]


def test_generate_says_what_it_waits_for(run, monkeypatch, base_folder):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("the cat"))
    code, _, err = run("generate", "--base", base_folder, "--max-new-tokens", "2")
    assert code == 0
    assert "type the prompt, then Ctrl-D" in err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_what_there_is(run, shell):
    code, script, _ = run("completion", shell)
    assert code == 0
    assert "_LORA_GPT2_COMPLETE" in script


def test_completion_knows_adapters_recipes_bases_and_settings(trained, tmp_path):
    def complete(*words):
        environment = os.environ | {
            "_LORA_GPT2_COMPLETE": "bash_complete",
            "COMP_WORDS": "lora-gpt2 " + " ".join(words),
            "COMP_CWORD": str(len(words)),
        }
        done = subprocess.run(
            [sys.executable, "-m", "lora_gpt2"], env=environment, capture_output=True, text=True, check=False
        )
        return [line.partition(",")[2] for line in done.stdout.splitlines()]

    assert complete("generate", "--adapter", "l") == ["law"]
    assert complete("generate", "--adapter", "law:0.5+c") == ["law:0.5+code"]
    assert complete("adapters", "show", "c") == ["code"]
    assert "train.steps=" in complete("train", "--set", "train.st")
    assert "gpt2-xl" in complete("train", "--base", "gpt2")
    assert "prose" in complete("train", "pro")
    assert complete("tra") == ["train"]
    assert "--learning-rate" in complete("train", "--le")


def test_the_doctor_tries_what_there_is_and_says_so(run, trained, monkeypatch):
    code, out, err = run("doctor", "--json")
    assert code == 0, err
    findings = {(item["topic"], item["name"]): item for item in json.loads(out)["findings"]}
    assert findings["works", "train a step on nano"]["status"] == "ok"
    assert findings["works", "generate with nano"]["status"] == "ok"
    assert findings["places", "store"]["detail"].startswith(f"{trained.root}: 2 versions of 2 adapters")
    assert findings["versions", "torch"]["detail"]
    assert findings["hub", "huggingface.co"]["detail"] == "not asked; --hub does"
    monkeypatch.setattr("lora_gpt2.doctor._train", lambda quantize: quantize)  # it was tried above
    current = trained.folder_of("code") / "CURRENT"
    kept = current.read_bytes()
    current.write_text("garbage")
    code, out, err = run("doctor")
    assert (code, "NO store" in out) == (9, True)
    current.write_bytes(kept)
    code, out, err = run("doctor", "--store", current)
    assert (code, "it is no folder" in out) == (9, True)
    with (trained.resolve("law") / "adapter_model.safetensors").open("ab") as file:
        file.write(b"x")
    code, out, err = run("doctor", "--hub")
    assert code == 9
    assert "NO store" in out
    assert "NO huggingface.co" in out
    assert "error: does not work: store" in err


def test_a_group_alone_says_what_is_missing(run):
    code, out, err = run("adapters")
    assert (code, out) == (2, "")
    assert err == "error: a command is missing\n  see 'lora-gpt2 adapters --help'\n"


def test_what_people_try_to_find_out_what_there_is(run):
    code, listing, err = run()
    assert (code, err) == (0, "")
    assert "train" in listing
    for arguments in (["help"], ["-h"], ["--help"]):
        assert run(*arguments) == (0, listing, "")
    for arguments in (["help", "train"], ["train", "my.txt", "--help"], ["train", "-h"]):
        code, out, _ = run(*arguments)
        assert code == 0
        assert out.startswith("Usage: lora-gpt2 train ")
    for arguments in (["version"], ["-V"], ["--version"]):
        assert run(*arguments) == (0, f"lora-gpt2, version {__version__}\n", "")


def test_running_out_of_memory_or_disk_is_a_resource_error(run, monkeypatch):
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), OSError(28, "No space")):

        def fail(error=error):
            raise error

        monkeypatch.setattr("lora_gpt2.model.checkpoint.list_bundled", fail)
        assert run("bases", "list")[0] == 7


def test_damaged_adapters_are_listed_as_such(run, trained):
    (trained.resolve("law") / "manifest.json").write_text("{")
    for name in ("ghost", "My_Old"):
        (trained.root / name).mkdir()
        (trained.root / name / "CURRENT").write_text("7")
    code, out, err = run("adapters", "list")
    assert code == 0
    assert "code" in out
    assert "damaged" in err


def spawn(*arguments, **options):
    command = [sys.executable, "-m", "lora_gpt2", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_training_after_the_step_and_keeps_a_checkpoint(base_folder, text_file, number, tmp_path):
    arguments = ["train", "--data", text_file, "--name", "long", "--base", base_folder, *TINY]
    process = spawn(*arguments, "--set", "train.steps=3000")
    time.sleep(1)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("cache/runs/*/identity.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert out == ""
    assert "is kept" in err
    assert "error:" not in err, "who asks for the end made no mistake"
    assert not (tmp_path / "store" / "long").exists()
    assert list(tmp_path.glob("cache/runs/*/step-*.checkpoint"))


def test_a_plan_says_what_fits_and_train_applies_it(run, base_folder, text_file, tmp_path):
    shape = ["--base", base_folder, "--data", text_file, *TINY, "--set", "train.batch_tokens=4096"]
    code, out, err = run("plan", *shape, "--json")
    assert code == 0
    plan = json.loads(out)
    assert set(plan) >= {"fits", "peak_bytes", "parts", "settings"}
    assert plan["fits"]
    assert plan["settings"] == {}
    assert plan["peak_bytes"] == sum(plan["parts"].values())
    assert plan["tokens"] == 8 * 189 * 16, "the text has 189 blocks, of which a step sees each once"
    assert plan["seconds"] == pytest.approx(plan["tokens"] / plan["tokens_per_second"])
    assert "next: lora-gpt2 train" in err
    little = f"{(plan['parts']['reserve'] + plan['parts']['weights'] + 4_000_000) / 1e6}MB"
    code, out, _ = run("train", *shape, "--name", "mine", "--gpu-memory", little, "--dry-run", "--json")
    assert code == 0
    smaller = json.loads(out)
    assert smaller["fits"]
    assert smaller["peak_bytes"] < plan["peak_bytes"]
    assert "train.micro_batch_tokens" in smaller["settings"]
    assert not (tmp_path / "store" / "mine").exists()
    code, out, err = run("train", *shape, "--name", "mine", "--gpu-memory", little, "--json")
    assert code == 0
    assert "to fit into" in err
    manifest = Store(tmp_path / "store").read_manifest("mine")
    assert manifest.recipe["train"]["micro_batch_tokens"] == smaller["settings"]["train.micro_batch_tokens"]
    code, out, _ = run("train", *shape, "--name", "mine", "--gpu-memory", "1MB", "--json")
    assert (code, json.loads(out)["error"]["type"]) == (7, "ResourceError")
    code, out, _ = run("plan", *shape, "--gpu-memory", "1MB", "--no-probe")
    assert code == 9
    assert "does NOT fit" in out
    assert run("plan", *shape, "--gpu-memory", "lots")[0] == 2


def test_running_out_of_memory_names_what_to_change(base_folder, text_file, tmp_path):
    """A limit on the address space, set when the base is loaded, so that the first step cannot allocate."""
    probe = (
        "import resource, sys\nimport numpy.random\nfrom lora_gpt2 import cli\n"
        "from lora_gpt2.training.trainer import Trainer\n"
        "original = Trainer._advance\n"
        "def limited(self, active):\n"
        "    used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (used + 2**25, used + 2**25))\n"
        "    original(self, active)\n"
        "Trainer._advance = limited\nsys.exit(cli.run(sys.argv[1:]))"
    )
    arguments = ["train", "--data", text_file, "--name", "mine", "--base", base_folder, "--json"]
    sizes = ["--set", "data.block_size=32", "--set", "train.batch_tokens=65536", "--set", "train.steps=2"]
    sizes += ["--set", "train.micro_batch_tokens=65536", "--store", tmp_path / "store"]
    done = subprocess.run(
        [sys.executable, "-c", probe, *map(str, [*arguments, *sizes])], capture_output=True, text=True, check=False
    )
    assert done.returncode == 7, done.stdout + done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["type"] == "ResourceError"
    assert "out of memory" in error["message"]
    assert "train.micro_batch_tokens=" in error["hint"]
    assert not (tmp_path / "store" / "mine").exists()


def test_a_trained_adapter_has_pages_that_stand_alone(run, drawn, base_folder, text_file, tmp_path):
    extra = ["--set", "train.validate_every=2", "--set", "train.sample_prompt=the <b>cat</b>"]
    assert run("train", "--data", text_file, "--name", "mine", "--base", base_folder, *TINY, *extra)[0] == 0
    folder = Store(tmp_path / "store").resolve("mine")
    page = (folder / "report.html").read_text()
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads(page.partition('id="run">')[2].partition("</script>")[0])
    samples = [row[data["measured"].index("sample")] for row in data["curves"]["mine"]["validations"]]
    assert len(samples) == 4
    assert all(sample.startswith("the <b>cat</b>") for sample in samples)
    assert "<b>cat" not in page
    for outside in ("src=", "@import", "<link", "fetch(", "import("):
        assert outside not in page.replace("fetch(main.dataset.stop", ""), "only a live page asks a server"
    manifest = Store(tmp_path / "store").read_manifest("mine")
    assert manifest.figures["verdict"] in page
    assert f"{manifest.figures['general_perplexity']:.1f}" in page


def test_a_closed_pipe_ends_quietly(trained):
    process = spawn("recipes", "show")
    process.stdout.close()
    assert process.wait(timeout=30) == 0
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()


@pytest.mark.parametrize("arguments", [["--help"], ["adapters", "list"], ["recipes", "list"], ["train", "--help"]])
def test_what_must_be_instant_imports_neither_torch_nor_transformers(arguments):
    probe = (
        "import sys\nfrom lora_gpt2 import cli\ncode = cli.run(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)\nsys.exit(code or len(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", probe, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "[]")
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "lora_gpt2", *arguments], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    limit = 0.5 if arguments == ["--help"] else 1.0
    assert min(seconds) < limit, "processor time beside other tests; 'bench startup' measures the real thing"


@pytest.mark.parametrize("arguments", [("audit", "watermark", "{text}", "--threshold", "nan")])
def test_nan_is_in_no_range(run, tmp_path, arguments):
    (tmp_path / "a.txt").write_text("text")
    code, _, err = run(*(each.replace("{text}", str(tmp_path / "a.txt")) for each in arguments))
    assert (code, "no finite number" in err) == (2, True), err


@pytest.mark.skipif(os.name == "nt", reason="shells of Unix close streams")
@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("adapters list 2>&-", 0),
        ("adapters list >&-", 0),
        ("adapters list --json >&-", 0),
        ("nosuch 2>&-", 2),
        ("adapters show nosuch 2>&-", 4),
        ("adapters list --json >/dev/full", 7),
        ("adapters show nosuch --json >/dev/full", 4),
    ],
)
def test_streams_may_be_closed_or_full(command, code, tmp_path):
    environment = {**os.environ, "LORA_GPT2_STORE": str(tmp_path)}
    line = f"{sys.executable} -m lora_gpt2 {command}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_sources_of_a_recipe_that_are_no_paths_stay_what_they_are(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "a.yaml").write_text("data: {sources: ['hf:me/texts', '-', a.txt], validation: ['hf:me/more']}\n")
    data = load_recipe(tmp_path / "r" / "a.yaml").data
    assert data.sources == ("hf:me/texts", "-", str(tmp_path / "r" / "a.txt"))
    assert data.validation == ("hf:me/more",)


def test_an_audit_of_text_knows_its_adapter_whatever_the_text(run, text_file):
    assert run("audit", "data", text_file, "--adapter", "nosuch")[0] == 4
