"""Choices make the next version: on the command line and in Python."""

import json
import math
import os
import random
import re
import shutil
import statistics
from pathlib import Path

import pytest

import lora_gpt2 as lg
from lora_gpt2.core.errors import DataError
from lora_gpt2.inference.generate import Request, generate
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.open import load_for_inference
from lora_gpt2.inference.session import Session
from lora_gpt2.recipe import GenerateSettings
from lora_gpt2.store.catalog import Store


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
    for more in (("--all", tmp_path), ("--dry-run",), ("--watch",), ("--ray", "local")):
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


def test_labelled_texts_train_by_kto_and_say_what_they_need(run, base_folder, trained, pairs, tmp_path):
    records = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for number, pair in enumerate(pairs)
        for side in (("chosen", "rejected") if number % 2 else ("chosen",))
    ]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    shared = ("--base", base_folder, "--store", trained.root, "--from", "law", "--steps", 6, "--learning-rate", 0.03)
    code, _, err = run("train", *shared, "--preferences", tmp_path / "texts.jsonl")
    assert (code, "--set preferences.loss=kto" in err) == (2, True), err
    kto = (*shared, "--preferences", tmp_path / "texts.jsonl", "--set", "preferences.loss=kto")
    code, out, err = run("train", *kto, "--json")
    assert code == 0, err
    (report,) = json.loads(out)["adapters"]
    assert "30 desirable and 15 undesirable texts" in err
    assert report["held_out_loss_before"] == pytest.approx(0.5)
    assert report["held_out_loss"] < 0.5
    assert report["held_out_accuracy"] == 1.0
    shared = {"base": str(base_folder), "store": trained.root, "progress": False, "steps": 6, "learning_rate": 0.03}
    report = lg.train_preferences(pairs, "law@1", loss="kto", name="both", **shared)
    assert report.held_out_loss < report.held_out_loss_before == pytest.approx(0.5)
    for wrong, message in (("maybe", "the label is 'maybe'"), (None, "label: expected text, found NoneType")):
        with pytest.raises(DataError, match=message):
            lg.train_preferences([{**record, "label": wrong} for record in records], "law", loss="kto", **shared)
    for unknown in ({"prompt": "a", "completion": "b"}, {"text": "a"}):
        with pytest.raises(DataError, match="no field") as caught:
            lg.train_preferences([unknown], "law", loss="kto", **shared)
        assert "labelled texts prompt, completion and label" in caught.value.hint


TEXT = Path(os.environ.get("LORA_GPT2_SHARED", Path(__file__).parents[3] / "shared")) / "data/domains/cooking_recipes"


@pytest.mark.slow
def test_a_rater_of_known_taste_prefers_the_new_version(tmp_path):
    """200 choices for short sentences, one in five wrong; then a fresh blind round of the same rater."""
    if not TEXT.exists():
        pytest.skip("no shared data here; see LORA_GPT2_SHARED")
    store, generator = Store(tmp_path / "adapters"), random.Random(0)
    shutil.copytree(Path(__file__).parents[2] / "adapters", store.root)
    base = load_for_inference("nano", "auto")
    texts = [json.loads(line)["text"] for line in (TEXT / "train.jsonl").read_text().splitlines()[:450]]
    prompts = [base.tokenizer.decode(base.tokenizer.encode(text)[:12]) for text in texts]

    def write(name, some, seed):
        settings = GenerateSettings(temperature=0.8, max_new_tokens=40)
        requests = [Request(prompt, Mix.parse(name), seed * 1000 + n) for n, prompt in enumerate(some)]
        return [output.text for output in generate(Session(base, store), requests, settings)]

    def measure(text):
        sentences = [part for part in re.split(r"[.!?\n]+", text) if part.strip()]
        return statistics.mean(len(part.split()) for part in sentences) if sentences else 99

    def rate(first, second, noise=0.2):
        """Returns whether the first text is chosen, None for a tie."""
        lengths = measure(first), measure(second)
        return None if lengths[0] == lengths[1] else (lengths[0] < lengths[1]) != (generator.random() < noise)

    pairs = []
    for prompt, one, other in zip(prompts, write("cooking", prompts, 1), write("cooking", prompts, 2), strict=True):
        if (is_first := rate(one, other)) is not None and len(pairs) < 200:
            chosen, rejected = (one, other) if is_first else (other, one)
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    report = lg.train_preferences(pairs, "cooking", store=store.root, progress=False)
    fresh = prompts[250:] * 3  # with other random numbers each time
    texts = list(zip(write("cooking@2", fresh, 3), write("cooking@1", fresh, 4), strict=True))
    for noise in (0.0, 0.2):
        decided = [answer for new, old in texts if (answer := rate(new, old, noise)) is not None]
        share = sum(decided) / len(decided)
        spread = 1.96 * math.sqrt(share * (1 - share) / len(decided))
        print(f"noise {noise}: {share:.3f} ± {spread:.3f} of {len(decided)}; {report}")
        assert share - spread > 0.5
