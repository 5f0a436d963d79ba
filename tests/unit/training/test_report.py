"""The charts of a report, from records of every kind."""

import json

import pytest

from lora_gpt2.recipe import Recipe
from lora_gpt2.training.report import CURVE, REPORT, _smooth, render_report

FIGURES = {
    "verdict": "about <right>",
    "forgetting": "little",
    "base_perplexity": 100.0,
    "validation_perplexity": 50.0,
    "base_test_perplexity": 71.5,
    "test_perplexity": 52.25,
    "base_general_perplexity": 60.0,
    "general_perplexity": 66.0,
    "best_step": 2,
    "steps": 3,
    "train_tokens": 1234,
    "tokens_per_second": 99.5,
    "peak_memory_bytes": 10**9,
    "trained_parameters": 10,
    "seconds": 90.0,
}


def records(count, validations=True):
    made = []
    for step in range(1, count + 1):
        made.append(
            {"step": step, "tokens": 64 * step, "loss": 5 - step / count, "learning_rate": 1e-3, "seconds": step / 10}
        )
        if validations:
            made[-1] |= {"validation_loss": 5 - step / count, "memory_bytes": 10**9, "sample": f"text </script> {step}"}
    return made


@pytest.mark.parametrize("count", [1, 2, 300])
@pytest.mark.parametrize("validations", [False, True])
def test_any_run_can_be_drawn(count, validations):
    pages = render_report("mine", Recipe(), records(count, validations), FIGURES)
    page = pages[REPORT].decode()
    assert pages[CURVE].startswith(b"\x89PNG")
    data = json.loads(page.partition('id="run">')[2].partition("</script>")[0])
    curves = data["curves"]["mine"]
    assert [row[0] for row in curves["points"]] == list(range(1, count + 1))
    assert [row[0] for row in curves["validations"]] == (list(range(1, count + 1)) if validations else [])
    assert ("</script>" in json.dumps(data)) == validations, "a sample cannot end the script"
    assert "about &lt;right&gt;" in page
    assert "100.00 → 50.00" in page


def test_skipped_steps_are_left_out_of_the_curve():
    made = records(4)
    made[1] = {**made[1], "loss": None}
    assert render_report("mine", Recipe(), made, FIGURES)[CURVE]


def test_the_same_records_give_the_same_bytes():
    assert render_report("mine", Recipe(), records(9), FIGURES) == render_report("mine", Recipe(), records(9), FIGURES)


def test_smoothing_is_the_mean_of_the_neighbours():
    assert _smooth([1.0, 2.0, 6.0]) == [1.5, 3.0, 4.0]
    assert _smooth([]) == []
