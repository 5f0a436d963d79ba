"""Choices make the next version: on the command line and in Python."""

import json

import pytest

import lora_gpt2 as lg
from lora_gpt2.core.errors import DataError


@pytest.fixture
def pairs():
    words = ["sun", "rain", "cat", "dog", "hill"]
    return [
        {"prompt": f"the {words[n % 5]} {n}", "chosen": f" and the cat {n}", "rejected": f" in rain in {n}"}
        for n in range(30)
    ]


def test_the_command_line_trains_the_next_version_and_says_what_became_better(
    run, base_folder, trained, pairs, tmp_path
):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    shared = ("--base", base_folder, "--store", trained.root, "--from", "law", "--preferences", file, "--steps", 6)
    code, out, err = run("train", *shared, "--learning-rate", 0.03)
    assert code == 0, err
    assert "law@2" in out
    assert "held-out pairs: loss" in out
    assert "26 pairs to train on" in err or "27 pairs to train on" in err
    assert "the longer text was preferred in" in err
    assert "prefers the chosen text more than its parent" in err
    assert "next: lora-gpt2 rate --adapter law@2 --adapter law@1 --prompts FILE" in err
    code, out, err = run("train", *shared, "--name", "kind", "--json")
    assert code == 0, err
    (report,) = json.loads(out)["adapters"]
    assert (report["name"], report["version"], report["parents"]) == ("kind", 1, ["law@2"])
    assert report["pairs"] + report["held_out_pairs"] == 30
    code, out, err = run("adapters", "show", "kind", "--store", trained.root)
    assert (code, "law@2" in out) == (0, True), err
    assert run("generate", "the cat", "--adapter", "kind", "--base", base_folder, "--store", trained.root)[0] == 0
    for more in (("--all", tmp_path), ("--dry-run",), ("--resume",), ("--ray", "local")):
        code, _, err = run("train", *shared, *more)
        assert code == 2, err


def test_python_takes_records_and_returns_the_figures(base_folder, trained, pairs):
    shared = {"base": str(base_folder), "store": trained.root, "progress": False, "steps": 6}
    report = lg.train_preferences(pairs, "law", beta=0.2, learning_rate=0.03, **shared)
    assert isinstance(report, lg.PreferenceReport)
    assert str(report) == "law@2"
    assert report.held_out_loss < report.held_out_loss_before
    manifest = trained.read_manifest("law")
    assert (manifest.recipe["preferences"]["beta"], manifest.figures["pairs"]) == (0.2, report.pairs)
    with pytest.raises(DataError, match="5 pairs are decided"):
        lg.train_preferences(pairs[:5], "law", **shared)
