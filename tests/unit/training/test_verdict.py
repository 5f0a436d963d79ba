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


def test_skipped_steps_do_not_break_the_verdict():
    skipped = [{**record, "loss": None} for record in records([4.0, 3.0, 3.5])]
    assert "best at step 20" in judge_curve(skipped, 30)


def test_forgetting_is_named_from_a_quarter_on():
    assert judge_forgetting(60.0, 66.0) == "general English 60.0 -> 66.0: little is forgotten"
    assert "much is forgotten" in judge_forgetting(60.0, 60 * math.nextafter(1.25, 2))
