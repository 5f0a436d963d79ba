"""What is said of generated texts: prompts, references, and whose fault repetition is."""

import pytest

from lora_gpt2.core.errors import DataError, ResourceError
from lora_gpt2.data.read.records import Document
from lora_gpt2.evaluation.matrix import EvaluationText
from lora_gpt2.evaluation.quality import (
    GenerationTask,
    build_task,
    compare_references,
    find_causes,
    measure_quality,
    measure_self_bleu,
)
from lora_gpt2.recipe import GenerateSettings

SETTINGS = GenerateSettings(temperature=0.1)


def test_prompts_are_beginnings_or_come_with_their_references(base):
    text = "the cat and the dog run in the rain under another sun " * 3
    task = build_task(EvaluationText(label="a", documents=[text, "short", text.upper()]), base.tokenizer, 10)
    assert len(task.prompts) == 2
    assert text.startswith(task.prompts[0])
    assert task.references == [[], []]
    pairs = [Document("one", "", "p: "), Document(" two", "", "p: "), Document("three", "", "q: ")]
    task = build_task(EvaluationText(label="b", documents=pairs), base.tokenizer, 10)
    assert (task.prompts, task.references) == (["p: ", "q: "], [["one", "two"], ["three"]])
    assert build_task(EvaluationText(label="b", documents=pairs), base.tokenizer, 1).prompts == ["p: "]


def test_bleu_chrf_and_rouge_of_an_exact_answer_and_of_a_stranger():
    refs = [["the cat sat on the mat today", "a cat sat"], ["the dog ran in the rain again"]]
    right = compare_references([" the cat sat on the mat today", "the dog ran in the rain again"], refs)
    assert right == {"bleu": pytest.approx(100), "chrf": pytest.approx(100), "rouge_l": pytest.approx(100)}
    wrong = compare_references(["zzz", "yyy"], refs)
    assert wrong["rouge_l"] == 0
    assert wrong["bleu"] < 1
    assert compare_references(["a"], [[]]) == {"bleu": None, "chrf": None, "rouge_l": None}


def test_self_bleu_tells_copies_from_different_texts():
    assert measure_self_bleu(["the cat sat on the mat"] * 4) == pytest.approx(100)
    assert measure_self_bleu(["the cat sat on a mat", "five dogs run under sun"]) < 10
    assert measure_self_bleu(["one"]) is None


@pytest.mark.parametrize(
    ("plain", "says"),
    [
        ("all words here differ from the next one", "the sampling"),
        ("again and again and again and again and", "the model"),
    ],
)
def test_the_cause_of_repetition_is_found_by_sampling_plainly(plain, says):
    def write(adapter, prompts, settings):
        return [plain if settings.temperature == 1 else "x y z w " * 10 for _ in prompts]

    task = GenerationTask(
        source="a", prompts=["p"] * 3, references=[[]] * 3, domain="the text of the domain is not repetitive at all"
    )
    warnings = find_causes(task, "law", SETTINGS, write, 0.9, 0.0)
    assert len(warnings) == 1
    assert says in warnings[0]
    assert find_causes(task, "law", SETTINGS, write, 0.05, 0.0) == []
    assert find_causes(task, "law", SETTINGS, write, 0.5, 0.4) == [], "a domain that repeats itself"


def test_quality_has_every_figure_and_asks_the_judge_about_the_continuations(base):
    task = GenerationTask(
        source="a",
        prompts=["once ", "twice "],
        references=[["the cat sat on the mat"]] * 2,
        domain="the cat and the dog. " * 300,
    )
    judged = []

    def judge(name, documents):
        judged.append((name, [(d.prompt, d.text) for d in documents]))
        return 7.0 if name == "law" else 9.0

    found = measure_quality(task, "law", SETTINGS, lambda *_: ["the cat sat on the mat again today", ""], judge)
    assert (found.texts, found.words) == (2, 4.0)
    assert (found.perplexity_under_adapter, found.perplexity_under_base) == (7.0, 9.0)
    assert judged[0] == ("law", [("once ", "the cat sat on the mat again today")])
    assert all(value is not None for key, value in found.to_json().items() if key not in ("self_bleu", "delta"))
    with pytest.raises(DataError, match="no document of more than"):
        build_task(EvaluationText(label="a", documents=["short"]), base.tokenizer, 3)


def test_judging_without_its_packages_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ResourceError, match="judging texts needs rouge_score") as caught:
        compare_references(["a"], [["b"]])
    assert "lora-gpt2[quality]" in caught.value.hint
