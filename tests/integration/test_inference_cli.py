"""Writing and tracing text, as users and scripts meet it."""

import json

import pytest


def test_a_watermark_is_written_and_found(run, base_folder, tmp_path):
    options = ["--base", base_folder, "--seed", 1, "-n", 12, "--json", "--set", "generate.top_k=0"]
    options += ["--set", "generate.temperature=1", "--set", "generate.top_p=1"]
    bytes_only = dict.fromkeys(range(128, 256), -100)  # what is no UTF-8 would not be read again as it was
    options += ["--set", f"generate.logit_bias={json.dumps(bytes_only)}"]
    marks = []
    for watermark in ("true", "false"):
        code, out, err = run("generate", "a", *options, "--set", f"generate.watermark={watermark}")
        assert code == 0, err
        outputs = json.loads(out)["outputs"]
        assert all(output["provenance"]["settings"]["watermark"] is (watermark == "true") for output in outputs)
        path = tmp_path / f"{watermark}.txt"
        path.write_text("".join(output["text"] for output in outputs), encoding="utf-8")
        code, out, err = run("audit", "watermark", path, "--base", base_folder, "--json")
        assert code == 0, err
        marks.append(json.loads(out)["marked"])
    assert marks == [True, False]
    path = tmp_path / "true.txt"
    for extra in (["--set", "generate.watermark_key=5"], ["--threshold", 90]):
        code, out, _ = run("audit", "watermark", path, "--base", base_folder, *extra)
        assert (code, out.partition(":")[0]) == (0, "no mark found")


def test_every_output_says_where_it_comes_from(run, trained):
    code, out, _ = run("generate", "the", "--adapter", "law:0.6", "--adapter", "code:0.4", "--seed", 7, "--json")
    assert code == 0
    (output,) = json.loads(out)["outputs"]
    origin = output["provenance"]
    weights = [(part["adapter"], part["weight"]) for part in origin["adapters"]]
    assert weights == [("law@1", 0.6), ("code@1", 0.4)]
    assert [part["sha256"] for part in origin["adapters"]] == [trained.read_manifest(n).digest for n in ("law", "code")]
    assert origin["seed"] == 7
    assert origin["base_fingerprint"] == trained.read_manifest("law").base.fingerprint
    assert origin["settings"]["temperature"] == pytest.approx(0.7)
