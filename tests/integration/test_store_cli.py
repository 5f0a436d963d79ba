"""The store and merging as users and scripts meet them."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lora_gpt2.store.catalog import Store
from lora_gpt2.store.manifest import WEIGHTS
from tests.builders import make_text


def result_of(run, *arguments):
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_a_version_goes_through_its_life(run, trained, base_folder, tmp_path):
    assert run("adapters", "copy", "law", "code")[:2] == (0, "copied law to code@2\n")
    versions = result_of(run, "adapters", "history", "code")["adapter"]["versions"]
    assert [(v["version"], v["in_use"]) for v in versions] == [(1, False), (2, True)]
    assert "2*" in run("adapters", "history", "code")[1]
    assert run("adapters", "rollback", "code")[1] == "'code' uses version 1 now\n"
    code, out, err = run("adapters", "remove", "code@2")
    assert (code, out) == (0, "removed code@2\n")
    assert "adapters restore code@2" in err
    assert run("adapters", "restore", "code@2")[0] == 0
    assert run("adapters", "rename", "code", "python")[1] == "'code' is now 'python'\n"
    assert [row["name"] for row in result_of(run, "adapters", "list")["adapters"]] == ["law", "python"]
    planned = result_of(run, "adapters", "gc", "--keep", 1, "--dry-run")
    assert planned["removed"] == ["code"]
    assert "bytes" not in run("adapters", "gc", "--keep", 1)[2]
    assert result_of(run, "adapters", "gc")["removed"] == []


def test_show_tells_the_lineage_of_a_merge(run, trained):
    assert run("merge", "law:0.6", "code:0.4", "--as", "both")[0] == 0
    lineage = result_of(run, "adapters", "show", "both")["adapter"]["lineage"]
    assert [(p["reference"], p["weight"], p["found"]) for p in lineage["parents"]] == [
        ("law@1", 0.6, "law@1"),
        ("code@1", 0.4, "code@1"),
    ]
    assert run("adapters", "remove", "code", "code")[0] == 0, "once"
    _, out, _ = run("adapters", "show", "both")
    assert "    law@1 at 0.6: by train" in out
    assert "    code@1 at 0.4: no longer in this store" in out


def test_diff_shows_settings_and_distances(run, trained):
    found = result_of(run, "adapters", "diff", "law", "code")
    assert found["adapters"] == ["law@1", "code@1"]
    assert {row["site"] for row in found["updates"]} >= {"h.0.attn.c_attn", "h.1.mlp.c_proj", "all"}
    assert all(abs(row["cosine"]) < 0.6 for row in found["updates"])
    _, out, _ = run("adapters", "diff", "law", "code")
    assert "cosine" in out
    run("adapters", "copy", "law", "twin")
    assert "the weights are the same" in run("adapters", "diff", "law", "twin")[1]


def test_verify_says_which_is_not_sound_and_ends_with_9(run, trained):
    code, out, _ = run("adapters", "verify")
    assert code == 0
    assert out.count("sound") == 2
    (trained.resolve("law") / WEIGHTS).write_bytes(b"x")
    code, out, err = run("adapters", "verify", "law", "code", "--files-only")
    assert code == 9
    assert "law" in err
    assert "is not the file that was published" in out
    assert "code@1" in out
    code, out, _ = run("adapters", "verify", "law", "code", "--files-only", "--json")
    assert code == 9
    assert [row["sound"] for row in json.loads(out)["adapters"]] == [False, True]
    assert run("adapters", "verify", "--store", trained.root / "none")[0] == 2
    assert run("adapters", "verify", "nothing")[0] == 4


def test_an_adapter_travels_as_a_file(run, trained, tmp_path):
    code, out, err = run("adapters", "export", "law", tmp_path / "law.tar.gz")
    assert (code, out) == (0, f"wrote {tmp_path / 'law.tar.gz'}\n")
    assert "adapters import" in err
    other = tmp_path / "other"
    row = result_of(run, "adapters", "import", tmp_path / "law.tar.gz", "--name", "mine", "--store", other)["adapter"]
    assert (row["name"], row["variant"], row["relative_error"]) == ("mine", "lora", 0)
    assert Store(other).read_manifest("mine").digest == trained.read_manifest("law").digest


def test_merge_publishes_with_its_proof_and_says_perplexity_before_and_after(run, trained, text_file):
    found = result_of(run, "merge", "law:0.6", "code:0.4", "--as", "both", "--on", f"text={text_file}")
    assert set(found) >= {"method", "name", "version", "max_logit_difference", "relative_error", "cells"}
    assert (found["method"], found["name"], found["version"]) == ("cat", "both", 1)
    assert found["max_logit_difference"] < 1e-4
    assert {(c["adapter"], c["source"]) for c in found["cells"]} == {
        (adapter, source) for adapter in ("base", "law", "code", "(merge)") for source in ("general", "text")
    }
    code, out, err = run("merge", "law", "code", "--as", "low", "--method", "svd", "--rank", 2)
    assert code == 0
    assert "rank up to 2" in out
    assert "generate 'Once upon a time' --adapter low" in err


def test_merge_into_the_base_writes_a_plain_gpt2(run, trained, base_folder, tmp_path):
    out_folder = tmp_path / "out"
    found = result_of(run, "merge", "law", "--into-base", out_folder, "--set", "merge.dtype=float16")
    assert (found["path"], found["dtype"]) == (str(out_folder), "float16")
    merged, plain = (load_file(folder / "model.safetensors") for folder in (out_folder, base_folder))
    name = "transformer.h.0.mlp.c_fc.weight"
    assert merged[name].dtype == torch.float16
    assert not torch.equal(merged[name].float(), plain[name])
    assert torch.equal(merged["transformer.wte.weight"], plain["transformer.wte.weight"].half())
    assert run("generate", "the cat", "--base", out_folder, "--set", "generate.max_new_tokens=3")[0] == 0


def test_search_prints_the_front_and_publishes_the_best(run, trained, text_file):
    arguments = ["merge", "law", "code", "--search", "--on", f"a={text_file}", "--set", "merge.search_steps=6"]
    found = result_of(run, *arguments, "--as", "both", "--set", "merge.search_tokens=64")
    assert found["search"]["measured"] == 6 + 4
    assert found["search"]["best"] in found["search"]["front"]
    assert found["method"] == found["search"]["best"]["method"]
    code, out, _ = run(*arguments)
    assert code == 0
    assert "mixes measured" in out
    assert trained.list_names() == ["both", "code", "law"]


def list_files(store):
    files = (path for path in store.root.rglob("*") if path.is_file() and ".locks" not in path.parts)
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


ERRORS = [
    (["merge", "law"], 2, "where the merge goes"),
    (["merge", "law", "code", "--as", "a", "--into-base", "b"], 2, "where the merge goes"),
    (["merge", "nothing", "--as", "a"], 4, "no adapter 'nothing'"),
    (["merge", "law", "--as", "../a"], 2, "not a name"),
    (["merge", "law:x", "--as", "a"], 2, "expected name:weight"),
    (["merge", "law:0", "code:0", "--as", "a"], 2, "changes nothing"),
    (["merge", "law:1", "code:-1", "--as", "a", "--method", "linear"], 2, "sum of the weights"),
    (["merge", "law", "code", "--search"], 2, "--search needs"),
    (["merge", "law", "--as", "a", "--method", "tise"], 2, "tise"),
    (["adapters", "copy", "law", "base"], 2, "not a name"),
    (["adapters", "remove", "law@1"], 6, "in use"),
    (["adapters", "remove", "nothing"], 4, "no adapter"),
    (["adapters", "restore", "law"], 4, "not in the trash"),
    (["adapters", "rename", "law", "code"], 6, "there is an adapter 'code'"),
    (["adapters", "rollback", "law"], 4, "no older version"),
    (["adapters", "rollback", "law", "--to", "7"], 4, "no version 7"),
    (["adapters", "history", "nothing"], 4, "no adapter"),
    (["adapters", "push", "law", "nowhere"], 2, "not a hub repository"),
    (["adapters", "push", "law", "me/law"], 7, "cannot be reached"),
    (["adapters", "pull", "me/law"], 7, "cannot be reached"),
    (["adapters", "pull", "law"], 2, "not a hub repository"),
    (["adapters", "diff", "law", "nothing"], 4, "no adapter"),
    (["adapters", "remove", "law", "nothing"], 4, "no adapter"),
    (["adapters", "remove", "law", "code@99"], 4, "no version 99"),
    (["adapters", "remove", "law", "code@01"], 6, "code@1 is the version in use"),
    (["merge", "law", "--as", "a", "--rank", "2", "--set", "merge.max_error=0.1"], 2, "exclude each other"),
    (["merge", "law", "code", "--search", "--method", "ties", "--on", "{text}"], 2, "--search chooses the method"),
    (["merge", "law:1e-9", "--as", "a"], 9, "changes nothing that can be seen"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "message"), ERRORS, ids=lambda v: " ".join(v) if isinstance(v, list) else ""
)
def test_errors_have_their_codes_and_change_nothing(run, trained, text_file, arguments, code, message):
    arguments = [argument.format(text=text_file) for argument in arguments]
    before = list_files(trained)
    found, out, err = run(*arguments)
    assert (found, out) == (code, "")
    assert message in err
    assert err.count("\n") >= 2, "a hint follows"
    after = list_files(trained)
    assert before == after


def test_a_file_of_prompts_and_an_adapter_found_by_itself(run, trained, base_folder, tmp_path):
    (tmp_path / "p.txt").write_text("the cat\nthe dog\n")
    few = ["--set", "generate.max_new_tokens=4"]
    arguments = ["generate", "--prompts", tmp_path / "p.txt", "--out", tmp_path / "o.jsonl", "--adapter", "law", *few]
    assert result_of(run, *arguments, "--seed", 1) == {"path": str(tmp_path / "o.jsonl"), "prompts": 2, "done": 2}
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 2
    found = result_of(run, "generate", "the cat", "--adapter", "auto", "--base", base_folder, *few)
    assert set(found) == {"outputs", "adapter", "probability", "nll_nats_per_token"}
    assert found["outputs"][0]["adapter"] == found["adapter"]
    code, _, err = run("generate", "the cat", "--adapter", "auto", "--base", base_folder, *few)
    assert code == 0
    assert "adapter " in err
    many = ["generate", "--prompts", tmp_path / "p.txt", "--out", tmp_path / "a.jsonl", "--adapter", "auto"]
    assert result_of(run, *many, "--seed", 1, "--base", base_folder, *few)["done"] == 2
    for line in (tmp_path / "a.jsonl").read_text().splitlines():
        written = json.loads(line)
        assert written["provenance"]["auto"][0]["adapter"].startswith(written["adapter"])
    assert run(*many, "--base", base_folder, "--no-verbatim", 9)[0] == 2
    for wrong in (["x", "--prompts", "p"], ["x", "--adapter", "auto", "--adapter", "law"], ["--out", "o"]):
        assert run("generate", *wrong)[0] == 2


def test_adapters_are_mapped_by_their_updates_and_by_each_others_text(run, trained, base_folder, tmp_path):
    where = ["--store", trained.root]
    code, out, _ = run(
        "adapters", "map", "--json", "--plot", tmp_path / "map.svg", "--html", tmp_path / "map.html", *where
    )
    assert code == 0
    found = json.loads(out)
    assert (found["by"], found["names"]) == ("updates", ["base", "code", "law"])
    assert (tmp_path / "map.svg").read_text().count("<svg") == 1
    assert "All distances" in (tmp_path / "map.html").read_text()
    for name in ("law", "code"):
        (tmp_path / f"{name}.jsonl").write_text(make_text(20, seed=len(name)))
    texts = ",".join(f"{name}={tmp_path / name}.jsonl" for name in ("law", "code"))
    code, out, _ = run("adapters", "map", "law", "code", "--by", "perplexity", "--on", texts, "--json", *where)
    assert code == 0
    assert json.loads(out)["names"] == ["base", "law", "code"]
    code, out, _ = run("adapters", "map", *where)
    assert (code, out.split()[:2]) == (0, ["adapter", "from"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["law"], 2, "a map needs two adapters"),
        (["law", "nobody"], 4, "no adapter 'nobody'"),
        (["--on", "law=x"], 2, "--on is for --by perplexity"),
        (["--by", "perplexity", "--on", "verse=x"], 2, "none of the adapters"),
        (["--by", "perplexity"], 4, "does not say which text"),
        (["--plot", "map.gif"], 2, "does not end in .png or .svg"),
    ],
)
def test_what_is_wrong_with_a_map_is_said(run, trained, arguments, code, message):
    found, _, err = run("adapters", "map", *arguments, "--store", trained.root)
    assert (found, message in err) == (code, True), err


def test_a_difference_is_drawn(run, trained, tmp_path):
    code, _, _ = run("adapters", "diff", "law", "code", "--plot", tmp_path / "diff.png", "--store", trained.root)
    assert code == 0
    assert (tmp_path / "diff.png").read_bytes().startswith(b"\x89PNG")
