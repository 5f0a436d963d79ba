import math

import pytest

from lora_gpt2.training.verdict import judge_curve, judge_forgetting


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
        ([4.0, 3.0], None, 20, "too few validations"),
    ],
)  # fmt: skip
def test_the_verdict_follows_the_curve(validations, training, num_steps, said):
    assert said in judge_curve(records(validations, training), num_steps)


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
    verdict = judge_curve(records(BEST_AT_20, training), 40)
    assert verdict.startswith("best at step 20; after it validation rose by 35 % ")
    assert said in verdict


def test_the_last_interval_begins_after_the_validation_before_the_last():
    made = records(BEST_AT_20, [4.0, 3.0, 2.0, 3.6])
    made[29]["loss"] = -1000.0  # step 30, the last of the interval before
    assert "with training" in judge_curve(made, 40)
    made[30]["loss"] = -1000.0
    assert "while training fell" in judge_curve(made, 40)
    made[20]["loss"], made[30]["loss"] = -1000.0, 3.6  # step 21 is not up to the best step either
    assert "with training" in judge_curve(made, 40)


@pytest.mark.parametrize(
    ("validations", "said"),
    [
        ([4.0, 3.0, 3.0, 3.02 + 1e-9], "validation rose by 2 %"),
        ([4.0, 3.0, 3.0, 3.02 - 1e-9], "the curve is flat after it"),
        ([4.0, 3.5, 3.1, 3.095 - 1e-9], "still improving at step 40"),
        ([4.0, 3.5, 3.1, 3.095 + 1e-9], "the curve is flat after it"),
        ([4.0, 3.0, 3.5, 3.01], "the curve is flat after it"),  # what counts is where it ends
    ],
)
def test_a_rise_counts_from_0_02_nats_and_a_fall_from_0_005(validations, said):
    assert said in judge_curve(records(validations), 40)


def test_a_run_that_was_stopped_is_not_said_to_be_improving():
    assert "still improving" in judge_curve(records([4.0, 3.5, 3.0]), 30)
    assert "best at step 30 (stopped early, of 60)" in judge_curve(records([4.0, 3.5, 3.0]), 60)


def test_skipped_steps_do_not_break_the_verdict():
    skipped = [{**record, "loss": None} for record in records([4.0, 3.0, 3.5])]
    assert "best at step 20" in judge_curve(skipped, 30)


def test_forgetting_is_named_from_a_quarter_on():
    assert judge_forgetting(60.0, 66.0) == "general English 60.0 -> 66.0: little is forgotten"
    assert "much is forgotten" in judge_forgetting(60.0, 60 * math.nextafter(1.25, 2))
