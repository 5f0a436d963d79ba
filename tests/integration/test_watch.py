"""Runs that are watched and stopped from outside, and training that is begun over HTTP."""

import http.client
import json
import os
import re
import subprocess
import sys
import time

import pytest

from lora_gpt2.core.dirs import find_cache_dir, find_runs_dir
from lora_gpt2.inference.session import Session
from lora_gpt2.recipe import GenerateSettings, ServeSettings
from lora_gpt2.serving import training_job
from lora_gpt2.serving.api import Server
from lora_gpt2.serving.middleware import Access
from lora_gpt2.serving.training_job import BYTES_TYPE, TrainingJob, clean_file_name
from lora_gpt2.serving.watch import RunPages, build_watch_server
from lora_gpt2.training.run_reader import RunReader, list_runs
from lora_gpt2.training.run_status import RunStatus
from tests.builders import make_text
from tests.serving import ask, running, serving

DEADLINE = 180.0
PLAN = {"name": "plays", "steps": 400}


def read_events(port, path, until):
    """Returns the messages of a stream until one of them fulfils a condition."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    connection.request("GET", path)
    answer = connection.getresponse()
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    found, deadline = [], time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        line = answer.readline()
        if line.startswith(b"data: "):
            found.append(json.loads(line[6:]))
            if until(found[-1]):
                break
    connection.close()
    return found


def count_points(message):
    return sum(len(curves["points"]) for curves in message["curves"].values())


def wait_until(condition):
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not happen")


def start_training(base_folder, tmp_path, *more, steps=4000):
    (tmp_path / "plays.jsonl").write_text(make_text(60))
    settings = ["--set", "data.block_size=48", "--set", "train.sample_tokens=0", "--steps", steps]
    where = ["--base", base_folder, "--store", tmp_path / "store"]
    line = [sys.executable, "-m", "lora_gpt2", "train", tmp_path / "plays.jsonl", *where, *settings, *more]
    return subprocess.Popen(list(map(str, line)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_run_is_watched_while_it_trains_and_stopped_by_its_page(base_folder, tmp_path):
    process = start_training(base_folder, tmp_path, "--watch", "--json")
    try:
        said = process.stderr.readline()
        found = re.fullmatch(r"watch at http://127\.0\.0\.1:(\d+)/\n", said)
        assert found, said
        port = int(found[1])

        def find_run():
            status, headers, _ = ask(port, "/")
            return headers["Location"] if status == 302 else None

        key = wait_until(find_run)
        whole, *news = read_events(
            port, f"/{key}events", lambda message: count_points(message) and "run" not in message
        )
        assert whole["run"]["adapters"][0]["name"] == "plays"
        assert not {"store", "process", "owner"} & whole["run"].keys(), "nobody needs to know"
        assert news, "what is new comes by itself, without the whole again"
        assert ask(port, f"/{key}stop", {"adapter": "plays"})[0] == 200
        out, _ = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
    assert process.returncode == 0
    (adapter,) = json.loads(out)["adapters"]
    assert adapter["version"] == 1
    assert 1 <= adapter["steps"] < 4000


def test_the_command_shows_the_newest_run_as_one_file_and_says_where_there_is_none(run, tmp_path):
    code, _, err = run("watch", tmp_path)
    assert (code, "there is no run in" in err, "train FILE --watch" in err) == (4, True, True)
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    adapter = {"name": "law", "num_steps": 2, "tokens_per_step": 8, "description": "</script><script>alert(1)"}
    with RunStatus(folder).report({"base": "nano", "device": "cpu", "dtype": "float32", "adapters": [adapter]}):
        pass
    code, _, _ = run("watch", tmp_path / "runs", "--html", tmp_path / "run.html")
    assert code == 0
    page = (tmp_path / "run.html").read_text()
    assert page.count("</script>") == page.count("<script"), "a description cannot end a script"
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", ""), "it loads nothing"
    code, _, err = run("watch", tmp_path / "runs", "--host", "0.0.0.0")
    assert (code, "LORA_GPT2_API_KEY" in err) == (2, True)


def test_pages_of_runs_give_out_nothing_else(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "run-1").mkdir()
    with RunStatus(tmp_path / "run-1").report({"adapters": [{"name": "law", "num_steps": 2, "tokens_per_step": 8}]}):
        pages = RunPages(folder=tmp_path, access=Access(is_local=True))
        with running(build_watch_server(pages)) as port:
            for path in ("/secret.txt/", "/run-1/run.json", "/run-1/../secret.txt", "/..%2Fsecret.txt/", "/run-2/"):
                status, _, answer = ask(port, path)
                assert status in (307, 404), path
                assert "secret" not in str(answer).replace("secret.txt", ""), path
            assert ask(port, "/run-1/")[0] == 200
            assert ask(port, "/run-1/training.js")[1]["Content-Type"].startswith("text/javascript")
            assert ask(port, "/run-1/stop", {"adapter": "code"})[0] == 404
            assert ask(port, "/run-1/stop", b"[1]")[0] == 400
            assert ask(port, "/run-1/stop", b"{}" + b" " * 5000)[0] == 413
            assert ask(port, "/run-1/stop", {}, {"Content-Type": "text/plain"})[0] == 415
            assert ask(port, "/run-1/stop", {}, {"X-Forwarded-For": "10.0.0.1"})[0] == 403
            assert not list(tmp_path.glob("run-1/*.stop")), "nothing of that was heard"
    with running(build_watch_server(pages)) as port:
        assert ask(port, "/run-1/stop", {"adapter": "law"})[0] == 409, "it has ended"


@pytest.fixture
def server(base, trained):
    limits = ServeSettings(max_upload_bytes=100_000)
    found = Server(
        session=Session(base, trained), defaults=GenerateSettings(), limits=limits, access=Access(is_local=True)
    )
    yield found
    found.job.close()


def upload(port, content, name="plays.jsonl", kind=BYTES_TYPE, **headers):
    return ask(port, f"/training/job/upload?file={name}", content, {"Content-Type": kind, **headers})


def test_a_text_is_planned_trained_and_served(server, trained):
    with serving(server) as port:
        assert ask(port, "/training/job/train", {"begin": None})[2]["error"]["message"] == "send a file first"
        assert upload(port, make_text(60).encode())[0] == 200
        assert ask(port, "/training/job/train", {"begin": None})[2]["error"]["message"] == "plan it first"
        assert ask(port, "/training/job/plan", PLAN)[0] == 202
        assert ask(port, "/training/job/plan", {**PLAN, "name": "other"})[0] == 409, "one at a time"
        assert ask(port, "/training/job/")[2]["name"] == "plays", "what is refused changes nothing"
        assert upload(port, b"other")[0] == 409
        job = wait_until(lambda: (found := ask(port, "/training/job/")[2])["state"] == "planned" and found)
        for path, meant in (("plan", {**PLAN, "upload": "another"}), ("train", {"begin": None, "plan": "another"})):
            code, _, answer = ask(port, f"/training/job/{path}", meant)
            assert (code, answer["error"]["param"]) == (409, "upload" if path == "plan" else "plan")
        assert job["plan"]["fits"]
        assert job["plan"]["tokens"] == 400 * 46 * 48, "the text has 46 blocks, of which a step sees each once"
        assert ask(port, "/training/job/train", {"begin": None, "plan": job["plan_id"]})[0] == 202
        run = wait_until(lambda: ask(port, "/training/job/")[2]["run"])
        assert ask(port, "/training/list")[2]["runs"][0]["key"] == run
        assert ask(port, f"/training/{run}/stop", {"adapter": None})[0] == 200
        job = wait_until(lambda: (found := ask(port, "/training/job/")[2])["state"] == "done" and found)
        assert job["adapter"]["name"] == "plays"
        assert job["adapter"]["steps"] < 400
        assert "plays" in [model["id"] for model in ask(port, "/v1/models")[2]["data"]], "at once"
        body = {"model": "plays", "prompt": "a", "max_tokens": 4}
        assert ask(port, "/v1/completions", body)[0] == 200
    assert not list((find_cache_dir() / "uploads").iterdir()), "the text is not kept"
    assert trained.read_manifest("plays").data["sources"] == ["plays.jsonl"]


def test_a_training_that_the_server_leaves_behind_is_resumed(server, trained, monkeypatch):
    with serving(server) as port:
        upload(port, make_text(60).encode())
        ask(port, "/training/job/plan", {**PLAN, "steps": 60})
        wait_until(lambda: ask(port, "/training/job/")[2]["state"] == "planned")
        ask(port, "/training/job/train", {"begin": None})
        wait_until(lambda: ask(port, "/training/job/")[2]["run"])
        server.job.close()
        job = wait_until(lambda: (found := ask(port, "/training/job/")[2])["state"] == "failed" and found)
        assert job["error"]["type"] == "Interrupted"
        own = {key: getattr(server.job, key) for key in ("base", "block_size", "store", "runs", "access")}
        later = TrainingJob(**own, max_upload_bytes=1)
        later.offer_interrupted()
        assert later.state == "idle", "its server is still there"
        monkeypatch.setattr(training_job, "has_ended", lambda kept: kept["process"] == os.getpid())
        later.offer_interrupted()
        assert (later.state, later.name, later.error["type"]) == ("failed", "plays", "InterruptedRunError")
        assert (later.upload, later.plan_id) == (server.job.upload, server.job.plan_id)
        other = TrainingJob(**{**own, "base": "other"}, max_upload_bytes=1)
        other.offer_interrupted()
        assert other.state == "idle"
        ask(port, "/training/job/train", {"begin": None})
        job = wait_until(lambda: (found := ask(port, "/training/job/")[2])["state"] == "failed" and found)
        assert job["error"]["type"] == "InterruptedRunError", "the page asks what becomes of it"
        assert ask(port, "/training/job/train", {"begin": "resume"})[0] == 202
        job = wait_until(lambda: (found := ask(port, "/training/job/")[2])["state"] != "training" and found)
    assert (job["state"], job["error"]) == ("done", None)
    assert job["adapter"]["steps"] == 60


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("upload?file=a.txt", b"x", {"Content-Type": "text/plain"}, 415),
        ("upload?file=a.txt", b"x" * 100_001, {"Content-Type": BYTES_TYPE}, 413),
        ("upload?file=a.txt", b"x", {"Content-Type": BYTES_TYPE, "X-Forwarded-For": "10.0.0.1"}, 403),
        ("plan", {"name": "../x"}, {}, 400),
        ("plan", {"name": "base"}, {}, 400),
        ("plan", {}, {}, 400),
        ("plan", {"name": "law", "steps": 0}, {}, 400),
        ("plan", {"name": "law", "steps": True}, {}, 400),
        ("plan", {"name": "law", "forget": "--x"}, {}, 400),
        ("plan", {"name": "law"}, {}, 409),
        ("train", {"begin": "--resume"}, {}, 400),
        ("", None, {"Via": "1.1 proxy"}, 403),
        ("", None, {"Origin": "https://app.example"}, 403),
    ],
)
def test_what_is_wrong_with_a_request_is_said_and_begins_nothing(server, path, body, headers, status):
    with serving(server) as port:
        found, _, answer = ask(port, f"/training/job/{path}", body, headers)
        assert found == status
        assert answer["error"]["message"]
        assert ask(port, "/training/job/")[2]["state"] == "idle"


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("law.jsonl", "law.jsonl"),
        ("../../etc/passwd", "passwd"),
        ("C:\\texts\\my plays.txt", "my plays.txt"),
        ("-rf", "rf"),
        (".hidden", "hidden"),
        ("a=b*[c].txt", "a_b__c_.txt"),
        ("", "text.txt"),
        ("..", "text.txt"),
        ("Gesetz über.pdf", "Gesetz über.pdf"),
        ("x" * 300 + ".txt", "x" * 100 + ".txt"),
        ("法" * 100 + ".txt", "法" * 33 + ".txt"),
        ("con.txt", "_con.txt"),
        ("LPT1", "_LPT1"),
    ],
)
def test_names_of_files_become_harmless(sent, kept):
    assert clean_file_name(sent) == kept


def test_a_recipe_that_was_sent_is_text_like_any_other(server, tmp_path):
    """A recipe could name any file of the server's as its text."""
    secret = tmp_path / "secret.txt"
    secret.write_text("secret " * 3000)
    recipe = f"name: spy\ndata:\n  sources: [{secret}]\n"
    with serving(server) as port:
        assert upload(port, recipe.encode(), "spy.yaml")[0] == 200
        assert ask(port, "/training/job/plan", {"name": "spy", "steps": 2})[0] == 202
        job = wait_until(lambda: (found := ask(port, "/training/job/")[2])["state"] != "planning" and found)
    assert job["state"] == "failed", "it is too little text, and not the secret"
    assert str(tmp_path) not in str(job), "no path of this machine is told"


def test_runs_of_this_user_are_not_shown_to_those_who_have_the_key_of_the_api(base, trained):
    access = Access(key="api", is_local=True)
    found = Server(session=Session(base, trained), defaults=GenerateSettings(), limits=ServeSettings(), access=access)
    folder = find_runs_dir() / "one"
    folder.mkdir(parents=True)
    with RunStatus(folder).report({"adapters": [{"name": "law", "num_steps": 2, "tokens_per_step": 8}]}):
        pass
    with serving(found) as port:
        for path in ("", "list", "one/", "one/events", "job/"):
            assert ask(port, f"/training/{path}", headers={"Authorization": "Bearer api"})[0] == 403, path
    found.access = Access(key="api", admin_key="adm")
    assert found.build_app()


def test_a_run_whose_process_was_killed_says_so_and_cannot_be_stopped(tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    code = (
        "import pathlib, sys, time; from lora_gpt2.training.run_status import RunStatus\n"
        "with RunStatus(pathlib.Path(sys.argv[1])).report({'adapters': [{'name': 'law'}]}):\n"
        "    print(flush=True); time.sleep(99)"
    )
    with subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert RunReader(folder).state == "training"
        process.kill()
    reader = RunReader(folder)
    assert reader.state == "killed"
    assert "--resume" in reader.describe_status()["message"]
    (folder / "run.json").write_text(json.dumps({**reader.description, "machine": "elsewhere"}))
    assert RunReader(folder).state == "training", "which nobody here can know"
    (folder / "run.json").write_text(json.dumps(reader.description))
    with running(build_watch_server(RunPages(folder=tmp_path, access=Access(is_local=True)))) as port:
        assert ask(port, "/list")[2]["runs"][0]["state"] == "killed"
        assert ask(port, "/one/stop", {"adapter": None})[0] == 409


def test_a_list_of_runs_survives_what_comes_and_goes(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with RunStatus(tmp_path / name).report({"adapters": []}):
            pass
    (tmp_path / "one" / ".status.json.1.partial").symlink_to(tmp_path / "nowhere")
    (tmp_path / "one" / "law.metrics.jsonl").symlink_to(tmp_path / "nowhere")
    assert {path.name for path in list_runs(tmp_path)} == {"one", "two"}


def test_a_training_goes_on_when_nobody_reads_what_it_says(base_folder, tmp_path):
    """Such as `train 2>&1 | tee log` over a connection that is lost."""
    process = start_training(base_folder, tmp_path, steps=20)
    with process:
        process.stderr.readline()
        process.stderr.close()
        process.stdout.read()
        process.wait(timeout=DEADLINE)
    assert (tmp_path / "store" / "plays" / "1" / "manifest.json").exists()
