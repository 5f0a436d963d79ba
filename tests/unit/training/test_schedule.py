"""Learning rates by hand."""

import math

import pytest

from lora_gpt2.recipe import TrainSettings
from lora_gpt2.training.schedule import lr_factor


def shares(num_steps, **settings):
    return [lr_factor(step, num_steps, TrainSettings(**settings)) for step in range(num_steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_every_schedule_warms_up_linearly_to_its_peak(schedule):
    found = shares(100, schedule=schedule, warmup_fraction=0.1)
    assert found[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert found[10] == max(found) == 1
    assert shares(100, schedule=schedule, warmup_fraction=0.0)[0] == 1


def test_cosine_falls_along_half_a_cosine_to_a_tenth():
    found = shares(100, warmup_fraction=0.1)
    assert found[10:] == pytest.approx([0.1 + 0.45 * (1 + math.cos(math.pi * i / 90)) for i in range(90)])
    assert found[55] == pytest.approx(0.55)
    # the last step is one of 90 before the end, where the cosine is flat
    assert found[99] == pytest.approx(0.1, abs=1e-3)
    assert shares(100, schedule="cosine", warmup_fraction=0.1) == found, "the default"


def test_linear_falls_to_zero_and_constant_stays():
    assert shares(4, schedule="linear", warmup_fraction=0.0) == [1, 0.75, 0.5, 0.25]
    assert shares(5, schedule="linear", warmup_fraction=0.2) == [0.5, 1, 0.75, 0.5, 0.25]
    assert shares(3, schedule="constant", warmup_fraction=0.0) == [1, 1, 1]


@pytest.mark.parametrize(
    ("num_steps", "decay_fraction", "warmup_fraction", "wanted"),
    [
        (20, 0.25, 0.0, [1.0] * 15 + [1, 0.8, 0.6, 0.4, 0.2]),
        (20, 0.25, 0.1, [1 / 3, 2 / 3] + [1.0] * 13 + [1, 0.8, 0.6, 0.4, 0.2]),
        (10, 0.2, 0.0, [1.0] * 9 + [0.5]),
        (4, 1.0, 0.0, [1, 0.75, 0.5, 0.25]),
        (4, 0.01, 0.0, [1, 1, 1, 1]),
    ],
)
def test_wsd_stays_until_the_last_share_of_the_steps_and_falls_linearly_to_zero(
    num_steps, decay_fraction, warmup_fraction, wanted
):
    """Hu et al. 2024: the decay is a share of all steps, whatever the warm-up."""
    found = shares(num_steps, schedule="wsd", decay_fraction=decay_fraction, warmup_fraction=warmup_fraction)
    assert found == pytest.approx(wanted)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_no_run_is_so_short_that_a_step_has_no_rate(schedule):
    assert all(0 < share <= 1 for steps in (1, 2, 3, 37) for share in shares(steps, schedule=schedule))
