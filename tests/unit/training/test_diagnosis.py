import math
import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from lora_gpt2.evaluation.perplexity import Score
from lora_gpt2.recipe import build_recipe
from lora_gpt2.training.diagnosis import diagnose_budget, diagnose_curve, diagnose_forgetting, diagnose_test

judge = partial(diagnose_curve, passes=2.0, validation_tokens=9_000)


def records(validations, training=None, every=10):
    made = []
    for index, value in enumerate(validations):
        for step in range(every):
            loss = (training or validations)[index]
            made.append({"step": index * every + step + 1, "loss": loss})
        made[-1]["validation_loss"] = value
    return made


@pytest.mark.parametrize(
    ("validations", "training", "num_steps", "said"),
    [
        ([4.0, 3.5, 3.2, 3.0], None, 40, "still improving at step 40: more steps would help"),
        ([4.0, 3.0, 3.0, 3.001], None, 40, "best at step 20; the curve is flat after it"),
        ([4, 3, 3.1, 3.3], [4, 3, 2.5, 2], 40, "best at step 20; after it validation rose by 35 % while training fell"),
        ([4.0, 3.0, 3.1, 3.3], [4.0, 3.0, 3.5, 9.0], 40, "with training: a smaller learning rate"),
        ([4.0, 3.0, 3.1, 3.3], [4.0, 3.0, 2.5, 2.0], 90, "(stopped early, of 90)"),
        ([4.0, 3.0], None, 20, "fewer than three validations"),
    ],
)
def test_the_verdict_follows_the_curve(validations, training, num_steps, said):
    assert said in judge(records(validations, training), num_steps)


BEST_AT_20 = [4.0, 3.0, 3.1, 3.3]  # validation: rises by 0.3 nats after step 20, by 0.2 in the last interval


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ([4.0, 3.0, 1.0, 3.6], "with training"),  # fell early, rose late, and is low on the whole
        ([4.0, 3.0, 9.0, 3.4], "while training fell"),  # rose early, fell late, and is high on the whole
        ([4.0, 3.0, 3.5, 3.499], "while training fell"),  # 3.5 is the mean up to the best step
        ([4.0, 3.0, 3.5, 3.501], "with training"),
        ([3.0, 4.0, 3.5, 3.6], "with training"),
    ],
)
def test_training_fell_if_its_last_interval_is_below_its_mean_up_to_the_best_step(training, said):
    verdict = judge(records(BEST_AT_20, training), 40)
    assert verdict.startswith("best at step 20; after it validation rose by 35 % ")
    assert said in verdict


def test_the_last_interval_begins_after_the_validation_before_the_last():
    made = records(BEST_AT_20, [4.0, 3.0, 2.0, 3.6])
    made[29]["loss"] = -1000.0  # step 30, the last of the interval before
    assert "with training" in judge(made, 40)
    made[30]["loss"] = -1000.0
    assert "while training fell" in judge(made, 40)
    made[20]["loss"], made[30]["loss"] = -1000.0, 3.6  # step 21 is not up to the best step either
    assert "with training" in judge(made, 40)


@pytest.mark.parametrize(
    ("validations", "said"),
    [
        ([4.0, 3.0, 3.0, 3.02 + 1e-9], "validation rose by 2 %"),
        ([4.0, 3.0, 3.0, 3.02 - 1e-9], "the curve is flat after it"),
        ([4.0, 3.5, 3.1, 3.095 - 1e-9], "still improving at step 40"),
        ([4.0, 3.5, 3.1, 3.095 + 1e-9], "best at step 40, where it ended; the learning rate had decayed"),
        ([4.0, 3.0, 3.5, 3.01], "the curve is flat after it"),  # what counts is where it ends
    ],
)
def test_a_rise_counts_from_0_02_nats_and_a_fall_from_0_005(validations, said):
    assert said in judge(records(validations), 40)


def test_a_run_that_was_stopped_is_not_said_to_be_improving():
    assert "still improving" in judge(records([4.0, 3.5, 3.0]), 30)
    said = judge(records([4.0, 3.5, 3.0]), 60)
    assert said == "best at step 30 (stopped early, of 60), where it ended: more steps may help"


def test_skipped_steps_do_not_break_the_verdict():
    skipped = [{**record, "loss": None} for record in records([4.0, 3.0, 3.5])]
    assert "best at step 20" in judge(skipped, 30)


def test_nothing_is_claimed_of_too_little():
    flat = records([4.0, 3.0, 3.0, 3.001])
    assert diagnose_curve(flat, 40, 1.0, 2_000).startswith("best at step 20")
    for passes, tokens, why in ((0.99, 2_000, "seen 0.99 times"), (3.0, 1_999, "1,999 tokens of validation text")):
        said = diagnose_curve(flat, 40, passes, tokens)
        assert said.startswith("too little to judge: ")
        assert why in said
        assert "right length" not in said


def score(nats, documents=12):
    return Score(
        nll_nats=nats * documents * 100,
        tokens=documents * 100,
        words=1,
        bytes=1,
        per_document=np.array([[nats * 100] * documents, [100] * documents]),
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [(-0.1, "little"), (0.099, "little"), (0.101, "some of it"), (0.299, "some of it"), (0.301, "much")],
)
def test_forgetting_is_graded_in_nats(change, said):
    found = diagnose_forgetting(score(4.0), score(4.0 + change))
    assert f"{said} is forgotten" in found
    assert f"({change:+.3f} nats per token, {change:+.3f} to {change:+.3f})" in found, "equal documents: no spread"


def test_the_interval_of_forgetting_is_of_the_difference_over_passages():
    rng = np.random.default_rng(0)
    before, change = rng.uniform(300, 500, 40), rng.uniform(0, 40, 40)
    sizes = np.full(40, 100.0)
    scores = [
        Score(nll_nats=float(nats.sum()), tokens=4000, words=1, bytes=1, per_document=np.stack([nats, sizes]))
        for nats in (before, before + change)
    ]
    low, high = (
        float(x) for x in re.findall(r"token, ([+-][0-9.]+) to ([+-][0-9.]+)", diagnose_forgetting(*scores))[0]
    )
    mean, spread = change.mean() / 100, change.std() / 100 / 40**0.5
    # a quantile of 1,000 draws deviates by a tenth of the spread, 0.0018; and three digits are shown
    assert low == pytest.approx(mean - 1.96 * spread, abs=0.004), "that of the perplexities would be ten times as wide"
    assert high == pytest.approx(mean + 1.96 * spread, abs=0.004)


@pytest.mark.parametrize(("forgotten", "hinted"), [(0.05, False), (0.2, True), (math.inf, True), (math.nan, True)])
def test_where_much_is_forgotten_a_budget_is_suggested_unless_there_is_one(forgotten, hinted):
    slot = SimpleNamespace(recipe=build_recipe({"name": "x"}, "x"), final_divergence=None)
    assert ("--forget 0.1" in diagnose_budget(slot, forgotten)) == hinted
    bounded = build_recipe({"name": "x", "train": {"forget": 0.1}}, "x")
    for divergence, said in (
        (0.07, "is within it"),
        (0.105, "is within its tolerance of 10%"),
        (0.12, "exceeds the budget"),
    ):
        slot = SimpleNamespace(recipe=bounded, final_divergence=divergence)
        found = diagnose_budget(slot, forgotten)
        assert found.startswith(f"; a divergence of {divergence:.3f} nats from the base, of 0.1, {said}")


@pytest.mark.parametrize(
    ("test_nll", "block_size", "said"),
    [
        (None, 128, ""),
        ((4.0, 3.9), 128, ""),
        ((4.0, 4.1), 512, "; on test text it is no better than the base (54.60 -> 60.34)"),
        (
            (4.0, 4.1),
            128,
            "; on test text it is no better than the base (54.60 -> 60.34), which is read 512 tokens at a time: "
            "train on longer blocks than 128",
        ),
    ],
)
def test_an_adapter_that_is_worse_on_test_text_is_not_called_a_gain(test_nll, block_size, said):
    assert diagnose_test(test_nll, block_size, 512) == said
