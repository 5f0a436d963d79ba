"""Our perplexity as a module of Hugging Face's `evaluate`."""

import json

import pytest

from lora_gpt2.evaluation.metric import find_metric

TEXTS = ["The king is dead, and nobody knows who will follow.", "Take two eggs and beat them well. " * 4]


def test_the_evaluate_module_gives_the_commands_figures(trained, base, base_folder, run, tmp_path, monkeypatch):
    import evaluate

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    metric = evaluate.load(find_metric(), keep_in_memory=True, cache_dir=str(tmp_path / "cache"))
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    _, out, _ = run("evaluate", path, "--adapter", "law", "--no-general", "--base", base_folder, "--json")
    wanted = json.loads(out)["cells"]
    for name, cell in zip(("base", "law"), wanted, strict=True):
        found = metric.compute(predictions=TEXTS, base=str(base_folder), adapter=name, store=str(trained.root))
        assert found == pytest.approx({key: cell[key] for key in found}, rel=1e-6)
    assert wanted[0]["perplexity"] != wanted[1]["perplexity"]
