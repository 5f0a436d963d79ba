"""Laws of an evaluation that is divided: every cell once, and the same figures."""

from dataclasses import replace

import pytest

from lora_gpt2.core.errors import CorruptError, MismatchError, UsageError
from lora_gpt2.evaluation.matrix import EvaluationText
from lora_gpt2.evaluation.on_ray import ScoringTask, _read_weights, divide, score_task
from lora_gpt2.evaluation.run import evaluate_texts
from lora_gpt2.inference.mix import Mix
from lora_gpt2.recipe import EvaluateSettings, Recipe
from lora_gpt2.store.files import Origin, identify, publish_adapter
from tests.builders import make_adapter

TEXTS = [["the cat and the dog", "another dog in the rain"], ["the king of the country " * 9]]


@pytest.fixture
def trained(base, store):
    for seed, name in enumerate(("law", "code"), start=1):
        publish_adapter(store, name, make_adapter(base.config, seed), base, Origin())
    return store


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
@pytest.mark.parametrize("sizes", [[5], [9, 1, 1, 3]])
@pytest.mark.parametrize("devices", [1, 2, 4, 16])
def test_each_cell_is_in_one_task_and_no_device_is_left_idle(rows, sizes, devices):
    tasks = list(divide(rows, sizes, devices))
    cells = [(row, column) for some, columns in tasks for row in some for column in columns]
    assert sorted(cells) == [(row, column) for row in range(rows) for column in range(len(sizes))]
    assert len(tasks) >= min(devices, rows) or len(tasks) == len(cells)
    assert all(some and columns for some, columns in tasks)


def test_columns_are_divided_by_their_size():
    assert [columns for _, columns in divide(1, [9, 1, 1, 3], 2)] == [[0], [1, 2, 3]]


def test_a_task_gives_the_figures_of_this_machine(base, trained, reporter):
    documents = [EvaluationText(label=str(index), documents=texts) for index, texts in enumerate(TEXTS)]
    recipe = Recipe.model_validate({"base": str(base.folder)})
    here = evaluate_texts(documents, ["law", "law:0.5+code:0.5"], trained, recipe, reporter, general=False)
    mixes = [Mix.parse("law:0.5+code:0.5"), Mix()]
    task = ScoringTask(base=identify(base), mixes=mixes, settings=EvaluateSettings())
    adapters = {name: _read_weights(trained, name, identify(base)) for name in ("law", "code")}
    scores, dtype = score_task(task, TEXTS, adapters)
    expected = {(cell.adapter, cell.source): cell.score for cell in here.cells}
    rows = [(str(mix), str(column)) for mix in mixes for column in range(2)]
    for key, score in zip(rows, scores, strict=True):
        assert score.nll_nats == pytest.approx(expected[key].nll_nats, rel=1e-6)
        assert score.tokens == expected[key].tokens
    assert dtype == here.dtype
    for key in ("fingerprint", "tokenizer_fingerprint"):
        other = replace(task.base, **{key: "0" * 64})
        with pytest.raises(MismatchError, match="another base"):
            score_task(replace(task, base=other), TEXTS, adapters)
        with pytest.raises(MismatchError, match="made for another"):
            _read_weights(trained, "law", other)
    weights, config = adapters["law"]
    with pytest.raises(CorruptError):
        score_task(task, TEXTS, {**adapters, "law": (weights[:-4], config)})


def test_what_is_generated_is_generated_here(trained, base, reporter):
    text = EvaluationText(label="a", documents=TEXTS[0])
    with pytest.raises(UsageError, match="this machine alone"):
        evaluate_texts([text], ["law"], trained, Recipe(base=str(base.folder)), reporter, num_texts=1, ray="auto")
