"""What was chosen blind, and what was recorded, becomes a ranking or a round."""

import json

import pytest

from lora_gpt2.core.console import SilentReporter
from lora_gpt2.core.errors import DataError, NotFoundError
from lora_gpt2.inference.history import LocalLog, find_votes, read_log
from lora_gpt2.rating.preferences import read_preferences
from lora_gpt2.rating.ranking import rank_marks, rank_votes
from lora_gpt2.rating.votes import Marks, Vote, check_marks, check_vote, find_texts, read_marks, read_votes

GOOD = {"prompt": "p", "models": ["a", "b", "c"], "chosen": "b", "seed": 3}


def test_who_is_chosen_is_preferred_to_each_other_of_the_page():
    report = rank_votes(
        [Vote(prompt="p", models=("a", "b", "c"), chosen="b")] * 3 + [Vote(prompt="p", models=("a", "b"), chosen="a")]
    )
    rows = {row.adapter: row for row in report.ranking}
    assert [row.adapter for row in report.ranking] == ["b", "a", "c"]
    assert (rows["b"].preferred, rows["b"].judgements) == (pytest.approx(6 / 7), 7)
    assert rows["b"].interval is None, "four choices say little"
    pairs = {(row.a, row.b): (row.ratings, row.a_preferred) for row in report.missing}
    assert pairs == {("a", "b"): (4, 0.25), ("a", "c"): (0, None), ("b", "c"): (3, 1.0)}


def test_models_that_never_met_are_compared_only_with_those_they_met():
    apart = rank_votes(
        [Vote(prompt="p", models=("a@1", "b@1"), chosen="a@1"), Vote(prompt="q", models=("a@2", "b@2"), chosen="b@2")]
    )
    strengths = {row.adapter: row.score for row in apart.ranking}
    assert strengths["a@1"] == pytest.approx(-strengths["b@1"])
    assert strengths["b@2"] == pytest.approx(-strengths["a@2"])
    assert strengths["a@1"] > 0 < strengths["b@2"]
    linked = [Vote(prompt="p", models=("a", "b"), chosen="ab"[n % 2]) for n in range(20)] + [
        Vote(prompt="p", models=("a", "c"), chosen="c")
    ]
    report = rank_votes([*linked, Vote(prompt="p", models=("d", "c"), chosen="d")])
    assert len(report.ranking) == 4, "also where a draw of the bootstrap leaves the link out"


def test_choices_under_two_bases_are_of_different_models():
    report = rank_votes(
        [Vote(prompt="p", models=("base", "law"), chosen="law", base=base) for base in ("gpt2", "nano")]
    )
    assert {row.adapter for row in report.ranking} == {f"{m} on {b}" for m in ("base", "law") for b in ("gpt2", "nano")}


def test_many_choices_have_an_interval():
    choices = [Vote(prompt="p", models=("a", "b"), chosen="a" if number % 4 else "b") for number in range(40)]
    best = rank_votes(choices).ranking[0]
    assert best.adapter == "a"
    assert best.interval[0] < best.score < best.interval[1]


@pytest.mark.parametrize(
    "change",
    [
        {"models": ["a"]},
        {"models": ["a", "a"]},
        {"models": ["a", 3]},
        {"models": "ab"},
        {"models": ["b", "x" * 3000]},
        {"models": [f"{n}" for n in range(9)]},
        {"chosen": "d"},
        {"chosen": None},
        {"prompt": 3},
        {"seed": "x"},
        {"seed": True},
        {"models": None},
    ],
)
def test_what_is_no_choice_is_refused(change):
    assert check_vote(GOOD) == Vote(prompt="p", models=("a", "b", "c"), chosen="b", seed=3)
    with pytest.raises(DataError):
        check_vote({**GOOD, **change})


def test_choices_lie_beside_the_record_where_that_is_a_file(tmp_path, monkeypatch):
    for value, path in (
        (tmp_path / "log", tmp_path / "choices.jsonl"),
        ("off", None),
        (tmp_path, None),
        ("/dev/null", None),
    ):
        monkeypatch.setenv("LORA_GPT2_LOG", str(value))
        assert find_votes() == path


def test_records_are_read_past_damage(tmp_path):
    path = tmp_path / "log.jsonl"
    with pytest.raises(NotFoundError, match="nothing was recorded"):
        read_log(path)
    with pytest.raises(NotFoundError, match="any file"):
        read_log(None)
    path.write_text(
        f'{json.dumps(GOOD)}\n[]\nnot json\n{{"prompt": "only"}}\n{json.dumps(GOOD)[:20]}', encoding="utf-8"
    )
    assert read_votes(read_log(path)) == [Vote(prompt="p", models=("a", "b", "c"), chosen="b", seed=3)]
    with pytest.raises(DataError, match="no choice"):
        read_votes([{"prompt": "only"}])


def test_a_record_with_any_line_separator_comes_back(tmp_path):
    log = LocalLog(tmp_path / "x" / "log.jsonl", SilentReporter())
    prompts = ["a\u2028b", "a\u2029b", "a\x85b", "a\x0bb", "a\nb", "a\rb"]
    assert all(log.add({"prompt": prompt}) for prompt in prompts)
    assert [record["prompt"] for record in read_log(log.path)] == prompts
    assert not LocalLog(None, SilentReporter()).add({})


def test_only_the_newest_weights_of_one_base_are_rated_and_nothing_cut_short():
    def record(prompt, adapter, text, sha, base="nano", reason="length"):
        origin = {"base_fingerprint": base, "adapters": [{"adapter": adapter, "sha256": sha}] if sha else []}
        return {"prompt": prompt, "adapter": adapter, "text": text, "provenance": origin, "finish_reason": reason}

    records = [
        record("p", "law", "old", "1"),
        record("p", "base", "plain", ""),
        record("q", "law", "old", "1"),
        record("q", "base", "plain", ""),
        record("p", "law", "new", "2"),
        record("p", "law", "half", "2", "nano", "interrupted"),
        record("r", "law", "x", "2", "gpt2x"),
        record("p", "base", "plain", ""),
    ]
    with pytest.raises(DataError):
        find_texts([*records, record("z", "law", "x", "9", "gpt2")], ["law", "base"])
    del records[6]
    assert find_texts(records, ["law", "base"]) == (("p",), (("new", "plain"),))


def test_a_round_takes_the_newest_text_of_prompts_that_all_have_continued():
    records = [
        {"prompt": "p", "adapter": "a", "text": "old"},
        {"prompt": "p", "adapter": "a", "text": "new"},
        {"prompt": "p", "adapter": "b", "text": "other"},
        {"prompt": "q", "adapter": "a", "text": "alone"},
        {"prompt": "p", "adapter": "c", "text": "not asked"},
        {"prompt": 3, "adapter": "a", "text": "no prompt"},
    ]
    assert find_texts(records, ["b", "a"]) == (("p",), (("other", "new"),))
    with pytest.raises(DataError, match="each of a, d"):
        find_texts(records, ["a", "d"])


MARKED = {
    "prompt": "p",
    "models": ["a", "b"],
    "seed": 3,
    "marks": {"coherence": [4, 2], "style": [None, 5]},
    "texts": [" one", " two"],
}


def test_marks_are_read_as_they_were_given():
    found = check_marks(MARKED)
    assert found == Marks(
        prompt="p",
        models=("a", "b"),
        seed=3,
        marks={"coherence": (4, 2), "style": (None, 5)},
        texts=(" one", " two"),
    )
    assert check_marks({**MARKED, "models": ["a"], "marks": {"style": [1]}, "texts": [" x"]}).models == ("a",)
    assert read_marks([GOOD, MARKED, {}]) == [found], "choices are in the same file"
    assert read_votes([GOOD, MARKED])[0].chosen == "b"
    with pytest.raises(DataError) as caught:
        read_marks([GOOD])
    assert "from 1 to 5" in caught.value.hint


@pytest.mark.parametrize(
    "change",
    [
        {"marks": {}},
        {"marks": None},
        {"marks": [1, 2]},
        {"marks": {"coherence": [None, None]}},
        {"marks": {"coherence": [4]}},
        {"marks": {"coherence": [0, 1]}},
        {"marks": {"coherence": [6, 1]}},
        {"marks": {"coherence": [1.5, 1]}},
        {"marks": {"coherence": [True, 1]}},
        {"marks": {"coherence": "45"}},
        {"marks": {"taste": [4, 2]}},
        {"models": ["a", "a"]},
        {"models": []},
        {"texts": [" one"]},
        {"seed": "3"},
        {"prompt": None},
    ],
)
def test_what_are_no_marks_is_refused(change):
    with pytest.raises(DataError) as caught:
        check_marks({**MARKED, **change})
    assert caught.value.hint


def test_marks_are_averaged_over_criteria_and_prompts():
    given = [
        Marks(prompt="p", models=("a", "b"), marks={"coherence": (4, 2), "style": (2, None)}),
        Marks(prompt="q", models=("b", "a"), marks={"coherence": (5, 5)}),
        Marks(prompt="r", models=("c",), marks={"style": (1,)}),
    ]
    report = rank_marks(given)
    assert (report.mode, report.score_name, report.criteria) == ("scale", "mean", ("coherence", "style"))
    rows = {row.adapter: (row.score, row.judgements, row.interval) for row in report.ranking}
    assert rows == {"a": (4.0, 2, None), "b": (3.5, 2, None), "c": (1.0, 1, None)}
    assert [row.adapter for row in report.ranking] == ["a", "b", "c"]
    by_style = {row.adapter: row.score for row in report.by_criterion["style"]}
    assert by_style == {"a": 2.0, "b": None, "c": 1.0}
    pairs = {(row.a, row.b): (row.ratings, row.a_preferred) for row in report.missing}
    assert pairs == {("a", "b"): (2, 0.75), ("a", "c"): (0, None), ("b", "c"): (0, None)}, "one won, one tie"
    assert report.answers == 6
    assert [row["mean"] for row in report.to_json()["ranking"]] == [4.0, 3.5, 1.0]


def test_a_model_that_is_better_everywhere_has_an_interval_apart():
    given = [Marks(prompt=str(n), models=("a", "b"), marks={"style": (4 + n % 2, 1 + n % 3)}) for n in range(40)]
    best, worst = rank_marks(given).ranking
    assert best.adapter == "a"
    assert best.interval[0] > worst.interval[1]
    assert best.interval[0] < best.score < best.interval[1]


def test_marks_become_preferences_by_their_mean(tmp_path):
    tied = {**MARKED, "marks": {"coherence": [3, 3]}}
    path = tmp_path / "choices.jsonl"
    lines = [MARKED, tied, {**GOOD, "texts": [" x", " y", " z"]}, {**MARKED, "texts": []}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_preferences([str(path)])
    assert [(pair.chosen, pair.rejected) for pair in found.pairs] == [(" y", " x"), (" y", " z"), (" one", " two")]
    assert found.num_ties == 1
