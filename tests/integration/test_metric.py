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
    monkeypatch.chdir(tmp_path)  # as a notebook elsewhere
    for where in ({"store": str(trained.root)}, {}):
        monkeypatch.setenv("LORA_GPT2_STORE", str(trained.root) if not where else "nowhere")
        for name, cell in zip(("base", "law"), wanted, strict=True):
            found = metric.compute(predictions=TEXTS, base=str(base_folder), adapter=name, **where)
            assert found.pop("documents_trained_on") == cell["documents_trained_on"]
            assert found == pytest.approx({key: cell[key] for key in found}, rel=1e-6)
    assert wanted[0]["perplexity"] != wanted[1]["perplexity"]


def test_the_module_cleans_text_as_the_command_does(base_folder, tmp_path, monkeypatch):
    import evaluate

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    metric = evaluate.load(find_metric(), keep_in_memory=True, cache_dir=str(tmp_path / "cache"))
    figures = {
        (end, profile): metric.compute(
            predictions=[f"The king is dead.{end}Nobody knows."], base=str(base_folder), profile=profile
        )["perplexity"]
        for end in ("\n", "\r\n")
        for profile in ("prose", "raw")
    }
    assert figures["\n", "prose"] == figures["\r\n", "prose"] == figures["\n", "raw"] != figures["\r\n", "raw"]
