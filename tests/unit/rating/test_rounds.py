"""A round: what raters see, what is kept, and what comes out."""

import json
from dataclasses import replace

import pytest

from lora_gpt2.core.errors import ConflictError, DataError, NotFoundError, UsageError
from lora_gpt2.rating.form import build_form
from lora_gpt2.rating.ranking import summarize_round
from lora_gpt2.rating.rounds import (
    ANSWERS,
    Answer,
    Round,
    add_answers,
    check_answer,
    find_open,
    import_answers,
    order_tasks,
    read_answers,
    read_round,
    write_round,
)

TEXTS = tuple((f"good {n}", f"fair {n}", f"poor {n}") for n in range(12))
ROUND = Round(
    base="nano",
    adapters=("secretgood", "secretfair", "secretpoor"),
    prompts=tuple(f"p{n}" for n in range(12)),
    texts=TEXTS,
    mode="pairwise",
    criteria=("style",),
)
SCALE = Round(
    base="nano",
    adapters=ROUND.adapters,
    prompts=ROUND.prompts,
    texts=TEXTS,
    mode="scale",
    criteria=("style", "fluency"),
)
WORTH = {"good": 5, "fair": 3, "poor": 1}


@pytest.fixture
def folder(tmp_path):
    write_round(tmp_path / "r", ROUND)
    return tmp_path / "r"


def judge(round_, rater, right=lambda task: True):
    """Answers as one who prefers good to fair to poor, where `right`; the other way where not."""
    found = []
    for task in round_.tasks:
        worth = [WORTH[text.split()[0]] for text in task.texts]
        for criterion in round_.criteria:
            value = worth[0] if round_.mode == "scale" else ("second", "first")[(worth[0] > worth[1]) == right(task)]
            found.append(Answer(rater=rater, task=task.number, criterion=criterion, value=value))
    return found


def test_a_round_is_read_as_it_was_written_and_not_overwritten(folder):
    assert read_round(folder) == ROUND
    with pytest.raises(ConflictError):
        write_round(folder, ROUND)
    with pytest.raises(NotFoundError, match="has no round"):
        read_round(folder.parent / "none")
    short = json.loads((folder / "round.json").read_text()) | {"texts": [["a"]]}
    (folder / "round.json").write_text(json.dumps(short))
    with pytest.raises(DataError, match="damaged"):
        read_round(folder)
    (folder / "round.json").write_text("{}")
    with pytest.raises(DataError, match="damaged"):
        read_round(folder)


def test_every_pair_of_every_prompt_is_a_task_but_equal_texts():
    assert len(ROUND.tasks) == 12 * 3
    same = Round(base="nano", adapters=("a", "b"), prompts=("p",), texts=(("x", "x"),))
    assert same.tasks == []
    assert [task.number for task in ROUND.tasks] == list(range(36))


def test_orders_are_a_raters_own_and_sides_are_mixed():
    anna, ben = order_tasks(ROUND, "anna"), order_tasks(ROUND, "ben")
    assert anna == order_tasks(ROUND, "anna")
    assert [t.number for t, _ in anna] != [t.number for t, _ in ben]
    assert sorted(t.number for t, _ in anna) == list(range(36))
    assert 8 < sum(swapped for _, swapped in anna) < 28


def test_a_round_goes_on_where_it_was_left_and_the_newest_answer_counts(folder):
    answers = judge(ROUND, "anna")
    add_answers(folder, answers[:5])
    add_answers(folder, [Answer(rater="anna", task=answers[0].task, criterion="style", value="tie")])
    with (folder / ANSWERS).open("a") as file:
        file.write('{"rater": "anna", "ta')
    assert len(read_answers(folder, ROUND)) == 5
    add_answers(folder, [Answer(rater="zoe", task=3, criterion="style", value="first")])
    assert read_answers(folder, ROUND)[-1] == Answer(rater="zoe", task=3, criterion="style", value="first"), (
        "a half line takes no other with it"
    )
    found = [answer for answer in read_answers(folder, ROUND) if answer.rater == "anna"]
    assert len(found) == 5
    assert found[0].value == "tie"
    assert len(find_open(ROUND, found, "anna")) == 31
    assert len(find_open(ROUND, found, "ben")) == 36


def test_the_ranking_is_that_of_the_judgements():
    answers = judge(ROUND, "anna", lambda t: t.number % 7 != 5) + judge(ROUND, "ben")
    report = summarize_round(ROUND, answers)
    assert [row.adapter for row in report.ranking] == list(ROUND.adapters)
    best = report.ranking[0]
    assert best.interval[0] < best.score < best.interval[1]
    assert 0.9 < best.preferred < 1
    assert best.judgements == 48
    assert 0 < report.agreement["style"] < 1
    assert {(row.a, row.b): row.more for row in report.missing}["secretgood", "secretfair"] == 0
    assert report.by_criterion["style"] == report.ranking


def test_a_scale_has_means_and_pairs_of_the_same_prompt():
    report = summarize_round(SCALE, judge(SCALE, "anna") + judge(SCALE, "ben"))
    assert [(row.adapter, row.score) for row in report.ranking] == [
        ("secretgood", 5.0),
        ("secretfair", 3.0),
        ("secretpoor", 1.0),
    ]
    assert report.agreement["overall"] == 1
    assert [row.a_preferred for row in report.missing] == [1.0, 1.0, 1.0]


def test_a_prompt_that_is_repeated_is_a_draw_each_time():
    """As forty continuations of one prompt are, each with texts of its own."""
    same = replace(ROUND, prompts=("once",) * len(ROUND.prompts))
    found = [summarize_round(each, judge(each, "anna", lambda t: t.number % 7 != 5)) for each in (ROUND, same)]
    assert found[0].ranking[0].interval is not None
    assert found[1].ranking == found[0].ranking
    scales = [replace(SCALE, prompts=each.prompts) for each in (ROUND, same)]
    assert len({summarize_round(each, judge(each, "anna")).missing[0].ratings for each in scales}) == 1


def test_few_or_equal_judgements_have_no_interval():
    sure = summarize_round(ROUND, judge(ROUND, "anna"))
    assert [row.interval for row in sure.ranking] == [None] * 3, "nothing bounds who always wins"
    same = Round(base="x", adapters=("a", "b"), prompts=tuple("pqrstu"), texts=(("x", "y"),) * 6, criteria=("style",))
    report = summarize_round(same, [Answer(rater="anna", task=n, criterion="style", value="first") for n in range(6)])
    assert report.ranking[0].interval is None, "six that are equal do not say how far chance goes"
    one = Round(base="x", adapters=("a", "b"), prompts=("p",), texts=(("x", "y"),), criteria=("style",))
    crowd = summarize_round(
        one, [Answer(rater=f"rater {n}", task=0, criterion="style", value="first") for n in range(9)]
    )
    assert crowd.missing[0].more > 0, "nine raters of one text settle nothing about others"


def test_tasks_of_one_prompt_are_one_draw_and_only_what_is_bounded_has_an_interval():
    """Whole prompts disagree here: drawn task by task they would seem three times as many."""
    answers = judge(ROUND, "anna", lambda t: ROUND.prompts.index(t.prompt) % 3 != 2)
    by_prompt = summarize_round(ROUND, answers).ranking[0].interval
    alone = Round(
        base="nano",
        adapters=ROUND.adapters,
        prompts=tuple(f"q{n}" for n in range(36)),
        texts=tuple(row for row in ROUND.texts for _ in range(3)),
        mode="pairwise",
        criteria=("style",),
    )
    kept = [[t for t in alone.tasks if t.prompt == f"q{n}"][n % 3].number for n in range(36)]
    right = {task.number: ROUND.prompts.index(task.prompt) % 3 != 2 for task in ROUND.tasks}
    spread = [a for a in judge(alone, "anna", lambda t: (int(t.prompt[1:]) // 3) % 3 != 2) if a.task in kept]
    by_task = summarize_round(alone, spread).ranking[0].interval
    assert len(spread) == len(answers) == len(right)
    assert by_prompt[1] - by_prompt[0] > 1.3 * (by_task[1] - by_task[0])
    first = [a for a in answers if "secretpoor" not in ROUND.tasks[a.task].adapters]
    rows = {row.adapter: row.interval for row in summarize_round(ROUND, first + judge(ROUND, "ben")).ranking}
    assert rows["secretpoor"] is None, "who only lost"
    assert rows["secretgood"] is not None


def test_without_answers_nothing_is_claimed():
    report = summarize_round(ROUND, [])
    assert {row.preferred for row in report.ranking} == {None}
    assert all(row.more is None for row in report.missing)
    assert set(report.agreement.values()) == {None}


@pytest.mark.parametrize(
    "values",
    [
        {},
        [],
        {"rater": "a", "task": 99, "criterion": "style", "value": "tie"},
        {"rater": "a", "task": True, "criterion": "style", "value": "tie"},
        {"rater": "a", "task": 0, "criterion": "taste", "value": "tie"},
        {"rater": "a", "task": 0, "criterion": "style", "value": 3},
        {"rater": "a", "task": 0, "criterion": "style", "value": ["tie"]},
    ],
)
def test_answers_of_another_round_are_refused(values):
    with pytest.raises(DataError):
        check_answer(ROUND, values)


def test_a_rater_needs_a_name():
    with pytest.raises(UsageError):
        check_answer(ROUND, {"rater": " ", "task": 0, "criterion": "style", "value": "tie"})
    with pytest.raises(DataError):
        check_answer(SCALE, {"rater": "a", "task": 0, "criterion": "style", "value": True})


def test_saved_answers_are_imported_once(folder, tmp_path):
    answers = judge(ROUND, "anna")[:4]
    path = tmp_path / "answers.json"
    path.write_text(json.dumps({"round": ROUND.identity, "answers": [vars(a) for a in answers]}))
    assert import_answers(folder, ROUND, [path]) == 4
    assert import_answers(folder, ROUND, [path]) == 0
    assert read_answers(folder, ROUND) == answers
    for content in ("[]", "null", '{"answers": 3}', "\xff\xfe", '{"round": 1, "answers": []}'):
        path.write_text(content)
        with pytest.raises(DataError, match=r"holds no answers|another round"):
            import_answers(folder, ROUND, [path])
    path.write_text(json.dumps({"round": SCALE.identity, "answers": []}))
    with pytest.raises(DataError, match="another round"):
        import_answers(folder, ROUND, [path])


def test_the_form_names_no_adapter_and_lets_no_text_out_of_its_place():
    evil = Round(
        base="nano", adapters=("secretgood", "b"), prompts=("</script><b>",), texts=(("<!--script--> x", "y"),)
    )
    for linked in (False, True):
        page = build_form(evil, linked)
        assert "secretgood" not in page
        assert page.count("</script>") == 2
        assert "\\u003c/script>" in page
        assert ("<style>" in page) != linked
