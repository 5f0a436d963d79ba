"""The recipes at their work: a few steps of each on `nano`, on real text of its domain; slow, because of the base."""

import json

import pytest

DOMAINS = {
    "dialogue": "dialogue_task",
    "medical": "biomed_abstracts",
    "legal": "legal_statutes",
    "abstracts": "arxiv_abstracts",
    "stories": "children_stories",
    "verse": "poetry",
    "prose": "wikitext2",
    "code": "shell_docs_tldr",
    "smoke": "cooking_recipes",
    "notebook": "cooking_recipes",
    "lora-paper": "cooking_recipes",
    "xl-on-8gb": "cooking_recipes",
}
QUICK = (
    "--set",
    "train.steps=3",
    "--set",
    "train.batch_tokens=512",
    "--set",
    "data.max_documents=60",
    "--set",
    "train.sample_tokens=0",
    "--set",
    "train.validation_tokens=1024",
    "--set",
    "data.validation_fraction=0.2",
)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", DOMAINS)
def test_a_recipe_learns_on_its_domain(run, shared, recipe):
    text = shared / "domains" / DOMAINS[recipe] / "train.jsonl"
    as_it_is = () if recipe != "code" else ("--set", "data.format=jsonl")
    code, out, err = run(
        "train", recipe, "--data", text, "--name", "tried", "--base", "nano", *QUICK, *as_it_is, "--json"
    )
    assert code == 0, err
    (adapter,) = json.loads(out)["adapters"]
    assert adapter["steps"] == 3
    assert adapter["validation_perplexity"] < adapter["base_perplexity"]


@pytest.mark.slow
def test_the_e2e_recipe_trains_and_scores_against_all_references(run, shared, tmp_path):
    e2e = shared / "nlg" / "e2e"
    for name, count in (("train", 400), ("test", 40)):
        lines = (e2e / f"{name}.txt").read_text(encoding="utf-8").splitlines()[:count]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    code, _, err = run(
        "train",
        "e2e",
        "--data",
        tmp_path / "train.txt",
        "--name",
        "e2e",
        "--base",
        "nano",
        *QUICK[:-2],
        "--set",
        "data.max_documents=0",
    )
    assert code == 0, err
    code, out, err = run(
        "evaluate",
        f"e2e={tmp_path / 'test.txt'}",
        "--recipe",
        "e2e",
        "--adapter",
        "e2e",
        "--generate",
        3,
        "--no-general",
        "--set",
        "generate.max_new_tokens=12",
        "--json",
    )
    assert code == 0, err
    found = json.loads(out)
    assert all(0 <= row["bleu"] <= 100 for row in found["generation"])
    assert found["cells"][1]["perplexity"] < found["cells"][0]["perplexity"]
