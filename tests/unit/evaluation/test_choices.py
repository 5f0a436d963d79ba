"""What was chosen blind, and what was recorded, becomes a ranking or a round."""

import json

import pytest

from lora_gpt2.core.errors import DataError, NotFoundError
from lora_gpt2.core.log import read_log
from lora_gpt2.evaluation.choices import Choice, check_choice, find_texts, read_choices
from lora_gpt2.evaluation.preferences import measure_choices

GOOD = {"prompt": "p", "models": ["a", "b", "c"], "chosen": "b", "seed": 3}


def test_who_is_chosen_is_preferred_to_each_other_of_the_page():
    report = measure_choices([Choice("p", ("a", "b", "c"), "b")] * 3 + [Choice("p", ("a", "b"), "a")])
    rows = {row["adapter"]: row for row in report["ranking"]}
    assert [row["adapter"] for row in report["ranking"]] == ["b", "a", "c"]
    assert (rows["b"]["preferred"], rows["b"]["judgements"]) == (pytest.approx(6 / 7), 7)
    assert rows["b"]["interval"] is None, "four choices say little"
    pairs = {(row["a"], row["b"]): (row["ratings"], row["a_preferred"]) for row in report["missing"]}
    assert pairs == {("a", "b"): (4, 0.25), ("a", "c"): (0, None), ("b", "c"): (3, 1.0)}


def test_many_choices_have_an_interval():
    choices = [Choice("p", ("a", "b"), "a" if number % 4 else "b") for number in range(40)]
    best = measure_choices(choices)["ranking"][0]
    assert best["adapter"] == "a"
    assert best["interval"][0] < best["strength"] < best["interval"][1]


@pytest.mark.parametrize(
    "change",
    [
        {"models": ["a"]}, {"models": ["a", "a"]}, {"models": ["a", 3]}, {"models": "ab"},
        {"models": ["b", "x" * 3000]},
        {"models": [f"{n}" for n in range(9)]}, {"chosen": "d"}, {"chosen": None}, {"prompt": 3}, {"seed": "x"},
        {"seed": True}, {"models": None},
    ],
)  # fmt: skip
def test_what_is_no_choice_is_refused(change):
    assert check_choice(GOOD) == Choice("p", ("a", "b", "c"), "b", 3)
    with pytest.raises(DataError):
        check_choice({**GOOD, **change})


def test_records_are_read_past_damage(tmp_path):
    path = tmp_path / "log.jsonl"
    with pytest.raises(NotFoundError, match="nothing was recorded"):
        read_log(path)
    with pytest.raises(NotFoundError, match="any file"):
        read_log(None)
    path.write_text(
        f'{json.dumps(GOOD)}\n[]\nnot json\n{{"prompt": "only"}}\n{json.dumps(GOOD)[:20]}', encoding="utf-8"
    )
    assert read_choices(read_log(path)) == [Choice("p", ("a", "b", "c"), "b", 3)]
    with pytest.raises(DataError, match="no choice"):
        read_choices([{"prompt": "only"}])


def test_a_round_takes_the_newest_text_of_prompts_that_all_have_continued():
    records = [
        {"prompt": "p", "adapter": "a", "text": "old"}, {"prompt": "p", "adapter": "a", "text": "new"},
        {"prompt": "p", "adapter": "b", "text": "other"}, {"prompt": "q", "adapter": "a", "text": "alone"},
        {"prompt": "p", "adapter": "c", "text": "not asked"}, {"prompt": 3, "adapter": "a", "text": "no prompt"},
    ]  # fmt: skip
    assert find_texts(records, ["b", "a"]) == (("p",), (("other", "new"),))
    with pytest.raises(DataError, match="each of a, d"):
        find_texts(records, ["a", "d"])
