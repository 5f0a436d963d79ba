"""Nothing is lost, nothing leaks: outputs written by two at once, pages of strangers, paths in answers."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from lora_gpt2.core.console import LoggingReporter, SilentReporter
from lora_gpt2.core.errors import CorruptError
from lora_gpt2.core.locks import hold_lock
from lora_gpt2.inference.batch import hold_output
from lora_gpt2.inference.session import Session
from lora_gpt2.recipe import GenerateSettings, ServeSettings
from lora_gpt2.serving.answers import translate_error
from lora_gpt2.serving.api import Server
from lora_gpt2.store.exchange import export_adapter, import_adapter
from lora_gpt2.store.fetch import fetch_adapter
from lora_gpt2.store.files import Origin, publish_adapter
from lora_gpt2.training.checkpoint import RunFolder
from tests.builders import make_adapter
from tests.serving import ask, serving


def hold_until(path, event, held):
    with hold_output(path):
        held.set()
        event.wait(60)


def test_the_second_who_writes_to_one_output_is_refused_and_nothing_is_written_twice(run, trained, tmp_path):
    prompts, out = tmp_path / "p.txt", tmp_path / "o.jsonl"
    prompts.write_text("the\ncat\nand\n", encoding="utf-8")
    command = ["generate", "--prompts", prompts, "--out", out, "--adapter", "law", "--seed", 1]
    context = multiprocessing.get_context("fork")
    event, held = context.Event(), context.Event()
    other = context.Process(target=hold_until, args=(out, event, held))
    other.start()
    try:
        assert held.wait(60)
        code, _, err = run(*command)
        assert code == 6
        assert f"{out} is in use by process {other.pid}" in err
        assert "wait until it ends, or choose another --out" in err
        assert not out.exists()
        assert (
            run("generate", "--prompts", prompts, "--out", tmp_path / "other.jsonl", "--seed", 1, "--adapter", "law")[0]
            == 0
        )
    finally:
        event.set()
        other.join()
    assert run(*command)[0] == 0
    assert len(out.read_text().splitlines()) == 3
    assert sorted(path.name for path in tmp_path.glob("*o.jsonl*")) == ["o.jsonl"], "no lock file beside it"


@pytest.mark.parametrize("name", ["report.html", "metrics.jsonl"])
def test_an_imported_folder_whose_pages_were_changed_is_refused(base, store, tmp_path, name):
    pages = {"report.html": b"<p>ours</p>", "metrics.jsonl": b'{"step": 1}\n'}
    publish_adapter(store, "law", make_adapter(base.config), base, Origin(pages=pages))
    export_adapter(store, "law", tmp_path / "out")
    assert (
        import_adapter(fetch_adapter(str(tmp_path / "out")), store, "same", base, LoggingReporter()).manifest.reference
        == "same@1"
    )
    (tmp_path / "out" / name).write_bytes(b"<script>theirs</script>")
    with pytest.raises(CorruptError, match=f"{name} is not the file that was published") as caught:
        fetch_adapter(str(tmp_path / "out"))
    assert caught.value.exit_code == 5
    (tmp_path / "out" / name).unlink()
    imported = import_adapter(fetch_adapter(str(tmp_path / "out")), store, "less", base, LoggingReporter()).manifest
    assert name not in imported.files


def test_a_page_of_a_stranger_is_not_taken_over(base, store, tmp_path):
    publish_adapter(store, "law", make_adapter(base.config), base, Origin())
    export_adapter(store, "law", tmp_path / "out")
    (tmp_path / "out" / "report.html").write_bytes(b"<script>theirs</script>")
    manifest = import_adapter(fetch_adapter(str(tmp_path / "out")), store, "law", base, LoggingReporter()).manifest
    assert "report.html" not in manifest.files
    assert not (store.resolve("law") / "report.html").exists()


def test_answers_over_http_hold_no_path_of_this_machine(base, trained, tmp_path, caplog):
    server = Server(session=Session(base, trained), defaults=GenerateSettings(max_new_tokens=2), limits=ServeSettings())
    weights = trained.resolve("code") / "adapter_model.safetensors"
    weights.write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING), serving(server) as port:
        answers = {
            model: ask(port, "/v1/completions", {"model": model, "prompt": "a"})
            for model in ("nobody", "law@99", "code", "a/../b", "law")
        }
        answers["show"] = ask(port, "/v1/models/nobody")
    assert [status for status, _, _ in answers.values()] == [404, 404, 503, 404, 200, 404]
    for status, _, answer in answers.values():
        shown = json.dumps(answer["error"]) if status != 200 else ""
        assert str(tmp_path) not in shown
        assert "/adapter_model" not in shown
    assert "nobody" in answers["nobody"][2]["error"]["message"]
    assert "adapter_model.safetensors is not the file that was published" in answers["code"][2]["error"]["message"]
    assert str(weights) in caplog.text, "the log has it"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/srv/store/law/1/a.bin is damaged", "a.bin is damaged"),
        (r"C:\Users\me\law is a link", "law is a link"),
        ("see 'lora-gpt2 adapters list'", "see 'lora-gpt2 adapters list'"),
        ("'a/b' is no name", "'a/b' is no name"),
        ("1/2 of '/x/y z'", "1/2 of 'y z'"),
        ("http://host/v1/models", "http://host/v1/models"),
    ],
)
def test_paths_are_taken_out_of_messages_and_nothing_else(text, shown):
    assert translate_error(CorruptError(text, "restore it")).message == f"{shown}; restore it"


def test_two_who_write_one_merged_base_get_one_and_a_conflict(run, trained, tmp_path, monkeypatch):
    from lora_gpt2.merging import into_base as bake

    out, check = tmp_path / "merged", bake.check_written

    def finish_first(folder, state):
        check(folder, state)
        shutil.copytree(folder, out)  # somebody else was faster

    monkeypatch.setattr(bake, "check_written", finish_first)
    code, _, err = run("merge", "law", "--into-base", out)
    assert code == 6
    assert "it exists" in err
    assert "choose another name" in err
    assert not list(tmp_path.glob("*.partial"))


def test_a_lock_is_free_again_when_its_owner_is_gone(tmp_path):
    context = multiprocessing.get_context("fork")
    event, held = context.Event(), context.Event()
    other = context.Process(target=hold_until, args=(tmp_path / "o", event, held))
    other.start()
    assert held.wait(60)
    other.kill()
    other.join()
    with hold_output(tmp_path / "o"), hold_lock(tmp_path / "another", "another"):
        pass


def test_what_killed_attempts_left_goes_with_the_next_and_nothing_else(run, trained, tmp_path):
    """A base-sized folder stayed beside the target each time that `merge --into-base` was killed."""
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        pass
    left = tmp_path / f".merged.{dead.pid}.abc.partial"
    kept = [
        tmp_path / f".merged.{os.getpid()}.abc.partial",  # somebody still writes it
        tmp_path / f".other.{dead.pid}.abc.partial",
        tmp_path / ".merged.mine.partial",
        tmp_path / f".merged.{dead.pid}.txt",
    ]
    for folder in (left, *kept):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x" * 100)
    assert run("merge", "law", "--into-base", tmp_path / "merged")[0] == 0
    assert not left.exists()
    assert all((folder / "model.safetensors").exists() for folder in kept)
    file = tmp_path / f".law.tar.gz.{dead.pid}.partial"
    file.write_bytes(b"half")
    assert run("adapters", "export", "law", tmp_path / "law.tar.gz")[0] == 0
    assert not file.exists()


def kill_while_it_writes(path, ready):
    def stop(*arguments):
        ready.set()
        os.kill(os.getpid(), signal.SIGKILL)

    os.replace = stop
    RunFolder(path=path).save(3, {"x": torch.zeros(1000)}, {})


@pytest.mark.parametrize("end", ["finish", "begin"])
def test_half_written_checkpoints_go_when_the_run_ends_or_begins_anew(tmp_path, end):
    folder, context = RunFolder(path=tmp_path / "run"), multiprocessing.get_context("fork")
    folder.begin({"a": 1})
    ready = context.Event()
    writer = context.Process(target=kill_while_it_writes, args=(folder.path, ready))
    writer.start()
    writer.join()
    assert ready.is_set()
    assert len(list(folder.path.glob(".*.partial"))) == 1
    assert folder.load(SilentReporter()) is None
    folder.finish(["law@1"]) if end == "finish" else folder.begin({"a": 2})
    assert not list(folder.path.glob(".*.partial"))
