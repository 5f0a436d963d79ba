"""The harness scores adapters through our model as through its own `hf` model over the merged checkpoint."""

import json
import os
import subprocess
import sys

import pytest

import lora_gpt2 as lg
from lora_gpt2.recipe import LoraSettings
from lora_gpt2.store.files import Origin, publish_adapter
from tests.builders import make_adapter, make_text

TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "writing": """
output_type: generate_until
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
ADAPTERS = ("law", "code")


@pytest.fixture
def tasks(tmp_path):
    """A folder with three tasks in the harness's format and their documents."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    texts = [json.loads(line)["text"] for line in make_text(40).splitlines()]
    words = " ".join(texts).split()
    rows = {
        "choice": [
            {"question": " ".join(words[i : i + 6]), "choices": [f" {w}" for w in words[i + 6 : i + 9]], "answer": 0}
            for i in range(0, 120, 10)
        ],
        "rolling": [{"text": text * 8} for text in texts[:4]] + [{"text": " ".join(words * 3)}],
        "writing": [{"question": " ".join(words[i : i + 8]), "answer": "x"} for i in range(0, 60, 12)],
    }
    for name, description in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: '{data}'}}}}\ntest_split: test"
        (folder / f"{name}.yaml").write_text(head + description)
    return folder


def run_harness(harness, module, out, tasks, *options):
    command = [sys.executable, "-m", module, *options, "--include_path", tasks, "--output_path", out, "--log_samples"]
    done = subprocess.run(
        [*map(str, command), "--tasks", ",".join(TASKS), "--batch_size", "1"],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(harness), os.getcwd()]),
            "HF_DATASETS_CACHE": f"{out}-cache",
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def read_results(folder):
    """Returns the figures by task and metric, and what was scored and written for each document."""
    (results,) = folder.rglob("results_*.json")
    values = json.loads(results.read_text())["results"]
    samples = {}
    for name in TASKS:
        (file,) = folder.rglob(f"samples_{name}_*.jsonl")
        rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
        samples[name] = [row["resps"] for row in rows]
    figures = {
        (task, key): value
        for task, row in values.items()
        for key, value in row.items()
        if isinstance(value, float) and "stderr" not in key
    }
    return figures, samples


def flatten(value):
    if isinstance(value, list):
        return [item for each in value for item in flatten(each)]
    return [float(value)] if str(value) not in ("True", "False") else [float(str(value) == "True")]


@pytest.mark.slow
def test_the_harness_scores_adapters_as_its_own_model_does_the_merged_checkpoint(harness, store, tasks, tmp_path):
    base = lg.load("nano", dtype="float32", progress=False).session.base
    for seed, name in enumerate(ADAPTERS, start=1):
        publish_adapter(store, name, make_adapter(base.config, seed, LoraSettings(rank=4)), base, Origin())
    out = tmp_path / "ours"
    said = run_harness(
        harness,
        "lora_gpt2.harness",
        out,
        tasks,
        "--model_args",
        f"base=nano,adapters={'+'.join(ADAPTERS)},store={store.root}",
    )
    assert said.count("|rolling") == len(ADAPTERS), "a table for each"
    model = lg.load("nano", adapters=list(ADAPTERS), dtype="float32", progress=False)
    found = {}
    for name in ADAPTERS:
        from transformers import AutoTokenizer

        merged = tmp_path / f"merged-{name}"
        model.to_transformers(name).save_pretrained(merged)
        AutoTokenizer.from_pretrained(model.folder).save_pretrained(merged)
        theirs = tmp_path / f"theirs-{name}"
        arguments = f"pretrained={merged},dtype=float32"
        run_harness(harness, "lm_eval", theirs, tasks, "--model", "hf", "--model_args", arguments, "--device", "cpu")
        (figures, samples), (wanted, expected) = read_results(out / name), read_results(theirs)
        assert figures == pytest.approx(wanted, rel=1e-4)
        for task in ("choice", "rolling"):
            assert flatten(samples[task]) == pytest.approx(flatten(expected[task]), abs=1e-3, rel=1e-4)
        assert samples["writing"] == expected["writing"]
        found[name] = samples["choice"]
    assert found["law"] != found["code"]
