"""Writing and tracing text, as users and scripts meet it."""

import io
import json
import os
import pty
import select
import subprocess
import sys
import time

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


def test_the_repl_reads_lines_and_goes_on_after_a_wrong_one(run, trained, base_folder, monkeypatch, tmp_path):
    lines = "the cat\n/usee law\n/use code\n/retry\n/stats\n/quit\nnever\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    code, out, err = run("repl", "--adapter", "law", "--seed", 3, "--set", "generate.max_new_tokens=5")
    assert code == 0
    assert out.startswith("the cat")
    assert "code continues" in out
    assert "perplexity of the text under code" in out
    assert "never" not in out
    assert "did you mean 'use'?" in err
    log = tmp_path / "state" / "lora-gpt2" / "generations.jsonl"
    assert str(log) in err
    assert [json.loads(line)["seed"] for line in log.read_text(encoding="utf-8").splitlines()] == [3, 4]
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n"))
    run("repl", "--base", base_folder, "--no-log")
    assert len(log.read_text(encoding="utf-8").splitlines()) == 2


def test_a_terminal_gets_a_prompt_history_and_ctrl_c_keeps_the_text(trained, tmp_path):
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "dumb", "PROMPT_TOOLKIT_NO_CPR": "1"}
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_gpt2", "repl", "--adapter", "law", "--seed", "1", "--store", trained.root],
        stdin=child,
        stdout=child,
        stderr=child,
        env=environment,
        start_new_session=True,
    )
    os.close(child)
    shown = b""

    def wait_for(text):
        nonlocal shown
        deadline = time.monotonic() + 60
        while text not in shown and time.monotonic() < deadline:
            if select.select([parent], [], [], 0.2)[0]:
                shown += os.read(parent, 65536)
        assert text in shown, shown
        shown = shown[shown.index(text) + len(text) :]

    wait_for(b"law> ")
    os.write(parent, b"the cat\r")
    wait_for(b"the cat")
    os.write(parent, b"/stats\r")
    wait_for(b"last seed 1")
    wait_for(b"law> ")
    time.sleep(0.5)  # until it reads keys again
    os.write(parent, b"half a line\x03/help\r")  # Ctrl-C empties the line
    wait_for(b"this list")
    wait_for(b"law> ")
    time.sleep(0.5)
    os.write(parent, b"\x04")
    assert process.wait(timeout=20) == 0
    os.close(parent)
    history = (tmp_path / "lora-gpt2" / "history").read_text(encoding="utf-8")
    assert "+the cat" in history
    assert "half" not in history


@pytest.mark.parametrize("options", [["--temperature", 0], ["--num-beams", 2], []])
def test_copies_of_one_text_are_not_given_for_several(run, base_folder, options):
    options = ["--base", base_folder, "--seed", 1, "-n", 2, "--max-tokens", 3, "--json", *options]
    code, out, err = run("generate", "the cat", *options)
    assert code == 0, err
    first, second = (output["text"] for output in json.loads(out)["outputs"])
    assert ("all 2 continuations are the same text" in err) == ("--temperature" in options)
    assert (first == second) == ("--temperature" in options), "of beams, the two best"
    assert first == second or "the same text" not in err
