"""evaluate, audit, cards: as a user types them."""

import json
import re
import shutil

import pytest

from lora_gpt2.core.dirs import find_cache_dir
from lora_gpt2.evaluation import run as evaluation_run
from lora_gpt2.model.base import load_base
from lora_gpt2.model.runtime import choose_runtime
from lora_gpt2.store.audits import read_audits
from lora_gpt2.store.card import build_card
from lora_gpt2.store.files import Origin, load_adapter, publish_adapter
from lora_gpt2.store.manifest import CARD


@pytest.fixture
def own(run, text_file, base_folder, store):
    """An adapter trained for a few steps, so that its text is known."""
    code, _, err = run(
        "train",
        "--data",
        text_file,
        "--name",
        "mine",
        "--base",
        base_folder,
        "--set",
        "train.steps=4",
        "--set",
        "train.batch_tokens=96",
        "--set",
        "data.block_size=48",
        "--set",
        "license=CC-BY-4.0",
    )
    assert code == 0, err
    return store


def evaluate(run, base_folder, *more):
    code, out, err = run("evaluate", *more, "--base", base_folder, "--json")
    return code, json.loads(out) if out else {}, err


def test_the_matrix_has_forgetting_intervals_and_pages(run, own, text_file, base_folder, tmp_path):
    png, page = tmp_path / "m.png", tmp_path / "m.html"
    code, result, _ = evaluate(run, base_folder, f"mine={text_file}", "--adapter", "all", "--plot", png, "--html", page)
    assert code == 0
    assert [(c["adapter"], c["source"]) for c in result["cells"]] == [("base", "mine"), ("mine", "mine")]
    assert [(c["adapter"], c["source"]) for c in result["forgetting"]] == [("base", "general"), ("mine", "general")]
    cell = result["cells"][1]
    assert cell["perplexity_interval"][0] < cell["perplexity"] < cell["perplexity_interval"][1]
    assert cell["ratio_interval"][0] < cell["ratio_to_base"] < cell["ratio_interval"][1]
    assert png.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert "<svg" in text
    assert not re.search(r'<script|(?:src|href)="(?!#|data:)', text), "it loads nothing"
    assert f"{cell['perplexity']:,.2f}" in text
    assert result["versions"] == {"mine": ["mine@1"]}
    assert "Versions: mine@1." in text
    _, alone, _ = evaluate(run, base_folder, f"mine={text_file}", "--adapter", "mine", "--no-general")
    assert alone["forgetting"] == []


def test_a_publication_during_a_measurement_keeps_its_own_figures(run, own, text_file, base_folder, monkeypatch):
    measure = evaluation_run.measure_matrix

    def publish_meanwhile(*args, **more):
        cells = measure(*args, **more)
        base = load_base(str(base_folder), choose_runtime("float32"))
        publish_adapter(own, "mine", load_adapter(own, "mine", base)[1], base, Origin())
        return cells

    monkeypatch.setattr(evaluation_run, "measure_matrix", publish_meanwhile)
    _, result, _ = evaluate(run, base_folder, f"mine={text_file}", "--adapter", "mine", "--keep")
    assert result["versions"]["mine"] == ["mine@1"]
    assert own.read_manifest("mine").version == 2
    assert [path.name for path in own.folder_of("mine").glob("audit-*.json")] == ["audit-1.json"]


def test_each_token_is_written_as_data_or_as_a_page(run, own, text_file, base_folder, tmp_path):
    page, lines = tmp_path / "t.html", tmp_path / "t.jsonl"
    _, result, _ = evaluate(run, base_folder, f"mine={text_file}", "--adapter", "mine", "--tokens", lines)
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert list(dict.fromkeys(each["source"] for each in found)) == ["mine", "general"]
    for cell in [*result["cells"], *result["forgetting"]]:
        values = [v for each in found if each["source"] == cell["source"] for v in each["logprobs"][cell["adapter"]]]
        assert len(values) == cell["tokens"]
        assert -sum(values) / len(values) == pytest.approx(cell["nll_nats_per_token"], abs=1e-4)
    assert evaluate(run, base_folder, f"mine={text_file}", "--adapter", "mine", "--tokens", page)[0] == 0
    text = page.read_text()
    assert "<script>" in text
    assert not re.search(r'(?:src|href)="(?!#|data:)', text), "it loads nothing"
    for more, said in (
        (["--tokens", tmp_path / "t.csv"], "does not end in .html or .jsonl"),
        (["--tokens", lines, "--protocol", "stream"], "document by document"),
    ):
        code, result, _ = evaluate(run, base_folder, text_file, *more)
        assert code == 2
        assert said in result["error"]["message"]


def test_text_that_was_trained_on_is_marked_on_the_page_and_the_card(run, own, text_file, base_folder, tmp_path):
    page = tmp_path / "m.html"
    for protocol in ("stream", "document"):
        more = ["--set", f"evaluate.protocol={protocol}", "--no-general", "--html", page, "--keep"]
        _, result, _ = evaluate(run, base_folder, f"mine={text_file}", "--adapter", "mine", *more)
        cell = result["cells"][1]
        assert 0 < cell["documents_trained_on"] <= cell["documents"]
        assert f"{cell['perplexity']:,.2f} !" in page.read_text()
        _, out, _ = run("adapters", "card", "mine")
        assert f"mine (trained on {cell['documents_trained_on']:,} of {cell['documents']:,} documents)" in out


def test_a_limit_on_general_english_that_is_not_measured_is_refused(run, own, text_file, base_folder):
    for more in ([], ["--adapter", "mine", "--no-general"]):
        code, result, _ = evaluate(run, base_folder, f"mine={text_file}", "--fail-above", "general=1.5", *more)
        assert code == 2
        assert "general, which is not measured" in result["error"]["message"]


def test_mixes_that_are_written_alike_are_one_row(run, own, text_file, base_folder):
    mixes = ["--adapter", "mine:0.33333333", "--adapter", "mine:0.33333332", "--adapter", "mine"]
    _, both, _ = evaluate(run, base_folder, f"t={text_file}", "--no-general", *mixes)
    _, alone, _ = evaluate(run, base_folder, f"t={text_file}", "--no-general", "--adapter", "mine")
    found = {cell["adapter"]: cell["perplexity"] for cell in both["cells"]}
    assert list(found) == ["base", "mine:0.333333", "mine"]
    assert found["mine"] == pytest.approx(alone["cells"][1]["perplexity"], rel=1e-5)


def test_an_adapters_name_is_its_held_out_text(run, own, base_folder):
    code, result, _ = evaluate(run, base_folder, "mine", "--adapter", "mine", "--no-general")
    manifest = own.read_manifest("mine")
    assert code == 0
    assert {c["source"] for c in result["cells"]} == {"mine"}
    assert result["cells"][0]["documents"] == manifest.data["documents"]["test"]
    code, out, _ = run("evaluate", "nothing-of-that-name", "--base", base_folder, "--json")
    assert (code, json.loads(out)["error"]["type"]) == (4, "NotFoundError")


def test_limits_and_baselines_end_with_nine_and_name_the_cells(run, own, text_file, base_folder, tmp_path):
    spec = (f"mine={text_file}", "--adapter", "mine")
    _, result, _ = evaluate(run, base_folder, *spec)
    before = tmp_path / "before.json"
    before.write_text(json.dumps(result))
    assert evaluate(run, base_folder, *spec, "--baseline", before, "--fail-above", "1e9")[0] == 0
    code, out, err = run("evaluate", *spec, "--base", base_folder, "--fail-above", "mine=2")
    assert code == 9
    assert "mine on mine: perplexity" in err
    assert "perplexity" in out, "the table is printed first"
    code, out, _ = run("evaluate", *spec, "--base", base_folder, "--fail-above", "mine=2", "--json")
    assert (code, len(json.loads(out)["failures"])) == (9, 1), "one document, which says it"
    code, out, _ = run("evaluate", *spec, "--base", base_folder, "--plot", "x.docx", "--json")
    assert (code, json.loads(out)["error"]["type"]) == (2, "UsageError")
    result["cells"][1]["perplexity"] *= 0.9
    before.write_text(json.dumps(result))
    code, _, err = run("evaluate", *spec, "--base", base_folder, "--baseline", before)
    assert code == 9
    assert "(+11.1%)" in err
    assert run("evaluate", *spec, "--base", base_folder, "--baseline", before, "--tolerance", "0.2")[0] == 0


def test_generated_texts_are_measured(run, own, text_file, base_folder):
    quick = ("--set", "generate.max_new_tokens=8", "--no-general")
    code, result, _ = evaluate(run, base_folder, text_file, "--adapter", "mine", "--generate", 3, *quick)
    assert code == 0
    assert [(row["adapter"], row["texts"]) for row in result["generation"]] == [("base", 3), ("mine", 3)]
    assert all(row["bleu"] is None for row in result["generation"]), "there are no references"


def test_prompts_and_references_come_from_a_recipe(run, own, base_folder, tmp_path):
    (tmp_path / "r.yaml").write_text(
        "data: {unit: line, separator: '||', format: text}\ngenerate: {max_new_tokens: 6}\n"
    )
    (tmp_path / "pairs.txt").write_text("the cat||and the dog\nthe cat||in the rain\nthe sun||under it\n")
    code, result, _ = evaluate(
        run, base_folder, tmp_path / "pairs.txt", "--recipe", tmp_path / "r.yaml", "--generate", 5, "--no-general"
    )
    assert code == 0
    (row,) = result["generation"]
    assert row["texts"] == 2, "one for each prompt"
    assert None not in (row["bleu"], row["chrf"], row["rouge_l"])


def test_an_audit_is_kept_for_the_card(run, own, text_file, base_folder, tmp_path):
    manifest = own.read_manifest("mine")
    before = (own.resolve("mine") / CARD).read_text()
    assert before == build_card(manifest)
    assert "license: cc-by-4.0" in before
    quick = ("--texts", "4", "--windows", "20", "--set", "generate.max_new_tokens=8")
    code, out, err = run("audit", "memorization", "mine", "--base", base_folder, *quick, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["adapter"] == "mine@1"
    assert set(found["extraction"]) == {"train", "held_out", "base_on_train", "drafter"}
    assert read_audits(own, manifest)["memorization"] == found
    assert evaluate(run, base_folder, f"mine={text_file}", "--adapter", "mine", "--keep")[0] == 0
    _, out, _ = run("adapters", "card", "mine")
    assert found["verdict"] in out
    assert "95 % interval" in out
    assert run("adapters", "card", "mine", "--out", tmp_path / "CARD.md")[0] == 0
    assert (tmp_path / "CARD.md").read_text() == out.removesuffix("\n")
    assert (own.resolve("mine") / CARD).read_text() == before, "a version is immutable"
    assert run("adapters", "verify", "mine", "--files-only")[0] == 0


def test_an_audit_of_other_weights_or_a_damaged_one_is_none(run, own, base_folder):
    manifest = own.read_manifest("mine")
    path = own.folder_of("mine") / "audit-1.json"
    for content in ("", "[]", '{"digest": "x", "audits": {"memorization": {}}}'):
        path.write_text(content)
        assert read_audits(own, manifest) == {}
        assert run("adapters", "card", "mine")[0] == 0


def test_an_adapter_without_text_cannot_be_audited(run, trained, base_folder):
    code, out, _ = run("audit", "memorization", "law", "--base", base_folder, "--json")
    assert (code, json.loads(out)["error"]["type"]) == (4, "NotFoundError")
    assert "does not say" in json.loads(out)["error"]["message"]


def test_a_share_above_the_limit_ends_with_nine(run, own, base_folder, monkeypatch):
    from lora_gpt2.audit import memorization

    real = memorization.measure_extraction
    monkeypatch.setattr(
        memorization,
        "measure_extraction",
        lambda *args: (
            memorization.Extraction(windows=20, extracted=20, mean_tokens=24.0, positions=(0,))
            if args[1]([0])
            else real(*args)
        ),
    )
    quick = ("--texts", "2", "--windows", "20", "--set", "generate.max_new_tokens=4", "--fail-above", "0.5")
    code, _, err = run("audit", "memorization", "mine", "--base", base_folder, *quick)
    assert code == 9
    assert "--no-verbatim" in err


def test_data_is_reported_on_and_not_changed(run, base_folder, tmp_path):
    rows = [
        "He said to his wife that the man was an idiot, and wrote to anna@example.org, ben@example.org about it.",
        "The cat sat on the mat and looked at the rain for a long time, until the sun came out again over town.",
        "The cat sat on the mat and looked at the rain for a long time, until the sun came out again over Town.",
        "This text is licensed under CC BY-SA 4.0. All rights reserved? The young man did not know it.",
    ]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    before = path.read_bytes()
    code, out, err = run("audit", "data", path, "--base", base_folder, "--json")
    found = json.loads(out)
    assert code == 0, err
    assert path.read_bytes() == before
    assert (found["documents"], found["exact_copies"]) == (4, 1)
    assert found["pii"] == {"email": 2}
    assert found["harsh"] == {"insult": 1}
    assert set(found["licences"]) == {"creative commons", "all rights reserved"}
    assert "@example.org" not in out, "what is personal is not repeated"
    assert {row["group"] for row in found["swaps"]} == {"gender", "age"}
    code, out, _ = run("audit", "data", path, "--base", base_folder)
    assert "personal data: email 2" in out


def test_long_lines_without_an_end_take_no_time(run, base_folder, tmp_path):
    (tmp_path / "d.txt").write_text("he saw the man " * 20_000 + "." * 50_000)
    keep = ("--set", "data.max_repetition=1", "--json")
    code, out, err = run("audit", "data", tmp_path / "d.txt", "--base", base_folder, *keep)
    assert code == 0, err
    assert json.loads(out)["documents"] == 1


def test_a_changed_text_is_said_in_the_verdict(run, own, text_file, base_folder):
    text_file.write_text(text_file.read_text().replace("cat", "cow"))
    shutil.rmtree(find_cache_dir() / "prepared")  # where the text that was trained on is kept
    quick = ("--texts", "2", "--windows", "20", "--set", "generate.max_new_tokens=4", "--json")
    code, out, _ = run("audit", "memorization", "mine", "--base", base_folder, *quick)
    found = json.loads(out)
    assert (code, found["same_text"]) == (0, False)
    assert "may not be that of training" in found["verdict"]
    assert "may not be that of training" in run("adapters", "card", "mine")[1]


def test_no_verbatim_and_disclosure_from_the_command_line(run, own, base_folder, tmp_path):
    common = ("--adapter", "mine", "--base", base_folder, "--seed", "1", "--set", "generate.max_new_tokens=8")
    code, out, err = run("generate", "the", *common, "--no-verbatim", "8", "--disclose")
    assert code == 0, err
    assert "Written by the language model" in out
    code, out, _ = run("generate", "the", *common, "--disclose", "--json")
    assert "with adapter mine" in json.loads(out)["disclosure"]
    (tmp_path / "p.txt").write_text("the\n")
    done = tmp_path / "done.jsonl"
    assert run("generate", "--prompts", tmp_path / "p.txt", "--out", done, *common, "--disclose")[0] == 0
    assert "with adapter mine" in (tmp_path / "done.jsonl.disclosure.txt").read_text()
    code, out, _ = run("generate", "the", *common, "--no-verbatim", "8", "--set", "generate.num_beams=2", "--json")
    assert (code, json.loads(out)["error"]["type"]) == (2, "UsageError")
