"""Rating from the command line and through the form's server."""

import io
import json

import pytest

from lora_gpt2.rating.rounds import Round, read_answers, read_round, write_round
from lora_gpt2.serving.rating_form import build_rating_server
from tests.serving import ask, running


@pytest.fixture
def begin(run, trained, base_folder, tmp_path, monkeypatch):
    """Begins a round with what a rater types."""
    (tmp_path / "prompts.txt").write_text("the cat\nthe dog\n")
    monkeypatch.chdir(tmp_path)

    def call(typed, *more, json_too=True):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        begins = ("--base", base_folder, "--set", "generate.max_new_tokens=12") if "--prompts" in more else ()
        return run("rate", *more, *begins, *(["--json"] if json_too else []))

    return call


START = ("--adapter", "law", "--adapter", "code", "--adapter", "base", "--prompts", "prompts.txt")


def test_a_round_in_the_terminal_hides_names_stops_and_goes_on(begin, tmp_path):
    code, out, err = begin("1\n2 1 0 1\ns\nwhat\nq\n", *START)
    assert code == 0, err
    report = json.loads(out)
    assert (report["tasks"], report["answers"], report["raters"]) == (6, 8, ["me"])
    assert set(report) >= {"ranking", "agreement", "missing", "by_criterion"}
    assert "6 tasks for me" in err
    assert "type 4 marks" in err
    shown = err[err.index("=====") :]
    assert not any(name in shown for name in ("law", "code", "base"))
    said = begin("q\n", json_too=False)[1]
    assert "4 tasks are left for me" in said
    assert not any(name in said for name in ("law", "code", "base")), "the ranking would tell who wrote what"
    code, out, err = begin("0\n" * 9)
    assert json.loads(out)["answers"] == 24
    assert "4 tasks for me" in err, "the skipped one and the rest"
    for option, value in (("--mode", "scale"), ("--criterion", "tone"), ("--seed", "3"), ("--base", "nano")):
        code, _, err = begin("", "--report", option, value, json_too=False)
        assert code == 2
        assert f"{option} changes a round that begins, and none does" in err
    code, out, _ = begin("", "--report")
    assert code == 0
    assert sum(row["judgements"] for row in json.loads(out)["ranking"]) == 12


def test_what_a_rater_says_of_sides_reaches_the_right_adapter(begin, tmp_path):
    folder = tmp_path / "ratings"
    write_round(
        folder,
        Round(
            base="x",
            adapters=("good", "poor"),
            prompts=tuple("abcdefgh"),
            texts=(("alpha", "omega"),) * 8,
            criteria=("style",),
        ),
    )
    for _ in range(8):  # the rater looks which side is the good one, then types it
        _, _, err = begin("q\n")
        side = "1" if err.index("alpha") < err.index("omega") else "2"
        begin(f"{side}\nq\n")
    answers = read_answers(folder, read_round(folder))
    assert {answer.value for answer in answers} == {"first"}
    assert len(answers) == 8


def test_mixes_can_be_rated(begin):
    code, out, err = begin("q\n", "--adapter", "law:0.6+code:0.4", "--adapter", "base", "--prompts", "prompts.txt")
    assert code == 0, err
    assert {row["adapter"] for row in json.loads(out)["ranking"]} == {"law:0.6+code:0.4", "base"}


def test_wrong_beginnings_are_usage_errors(begin):
    for wrong in (
        ["--adapter", "law", "--prompts", "prompts.txt"],
        ["--adapter", "law", "--adapter", "law", *START[6:]],
    ):
        code, out, _ = begin("", *wrong)
        assert (code, json.loads(out)["error"]["type"]) == (2, "UsageError")
    code, out, _ = begin("")
    assert (code, json.loads(out)["error"]["type"]) == (4, "NotFoundError")
    assert "--prompts" in json.loads(out)["error"]["hint"]
    assert begin("q\n", *START)[0] == 0
    assert begin("q\n", *START)[0] == 6, "a second round does not overwrite the first"


def test_a_form_goes_out_and_its_answers_come_back(begin, tmp_path):
    begin("q\n", *START)
    code, _, err = begin("", "--export", "form.html")
    page = (tmp_path / "form.html").read_text()
    assert code == 0
    assert "rate --out ratings --import" in err
    assert "<script>" in page
    (tmp_path / "a.json").write_text(
        json.dumps(
            {
                "round": read_round(tmp_path / "ratings").identity,
                "answers": [{"rater": "ben", "task": 0, "criterion": "style", "value": "first"}],
            }
        )
    )
    code, out, err = begin("", "--import", "a.json")
    assert (json.loads(out)["raters"], json.loads(out)["answers"]) == (["ben"], 1)
    assert "1 answer added" in err


def test_what_the_repl_recorded_is_rated_without_writing_it_again(begin, tmp_path):
    log = tmp_path / "state" / "lora-gpt2" / "generations.jsonl"
    log.parent.mkdir(parents=True)
    records = [{"prompt": "the cat", "adapter": name, "text": f" by {name}"} for name in ("law", "base")]
    log.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    code, out, err = begin("1\n", "--adapter", "law", "--adapter", "base", "--recorded", "repl")
    assert code == 0, err
    assert "the cat by law" in err
    assert "the cat by base" in err
    assert json.loads(out)["answers"] == 4
    assert (
        begin(
            "",
            "--adapter",
            "law",
            "--adapter",
            "base",
            "--recorded",
            "repl",
            "--prompts",
            "prompts.txt",
            "--out",
            "other",
        )[0]
        == 2
    )
    assert begin("", "--adapter", "law", "--adapter", "code", "--recorded", "repl", "--out", "other")[0] == 3
    assert begin("", "--recorded", "page")[0] == 4


@pytest.fixture
def served(tmp_path):
    folder = tmp_path / "ratings"
    write_round(folder, Round(base="x", adapters=("good", "poor"), prompts=("a", "b"), texts=(("x", "y"),) * 2))
    with running(build_rating_server(folder)) as port:
        yield folder, port


def test_the_served_form_keeps_answers_and_refuses_what_is_none(served):
    folder, port = served
    status, headers, page = ask(port, "/")
    assert (status, b"good" in page) == (200, False)
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert ask(port, "/form.js")[0] == ask(port, "/form.css")[0] == 200
    answer = {"rater": "anna", "task": 0, "criterion": "style", "value": "second"}
    mark = {"round": read_round(folder).identity}
    assert ask(port, "/answers", {**mark, "answers": [answer]})[0] == 200
    wrong = [b"", b"x", [], {"answers": 3}, {**mark, "answers": [{**answer, "task": 9}]}]
    wrong += [{"round": "another", "answers": [answer]}, {**mark, "answers": 3}]
    half = json.dumps({**mark, "answers": [{**answer, "task": "\ud800"}]}).encode()  # half of a surrogate pair
    wrong += [half, half.replace(b'"task"', b'"rater"'), half.replace(b"anna", b"\\udfff")]
    assert [ask(port, "/answers", body, method="POST")[0] for body in wrong] == [400] * 10
    assert ask(port, "/answers", b"x" * (2**20 + 1))[0] == 413
    assert ask(port, "/answers", b"{}", {"Content-Type": "text/plain"}.items())[0] == 415
    assert ask(port, "/", headers=[("Host", "evil.example")])[0] == 403
    assert [vars(found) for found in read_answers(folder, read_round(folder))] == [answer]
