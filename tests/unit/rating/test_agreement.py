"""Statistics of ratings, against published worked examples."""

import numpy as np
import pytest

from lora_gpt2.rating.agreement import compare_signs, count_missing, count_wins, fit_bradley_terry, measure_alpha

# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C: four observers, twelve units
OBSERVERS = (
    (1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None),
    (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3),
    (None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None),
    (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None),
)
UNITS = [[float(v) for v in unit if v is not None] for unit in zip(*OBSERVERS, strict=True)]


@pytest.mark.parametrize(("metric", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_of_krippendorffs_example(metric, alpha):
    assert measure_alpha(UNITS, metric) == pytest.approx(alpha, abs=5e-4)


def test_alpha_of_agreement_chance_and_nothing():
    assert measure_alpha([[1.0, 1.0], [2.0, 2.0]], "nominal") == 1
    generator = np.random.default_rng(0)
    # 4,000 pairs by chance: alpha deviates by 0.016; three of them
    assert abs(measure_alpha(generator.integers(0, 2, size=(4000, 2)).astype(float).tolist(), "nominal")) < 0.05
    assert measure_alpha([[1.0, 2.0], [2.0, 1.0]], "nominal") < 0
    assert measure_alpha([[1.0], [2.0]], "nominal") is None
    assert measure_alpha([[1.0, 1.0]], "nominal") is None


# Agresti, Categorical Data Analysis, table 10.10: American League East 1987, home and away together
TEAMS = ("Milwaukee", "Detroit", "Toronto", "New York", "Boston", "Cleveland", "Baltimore")
BASEBALL = np.array(
    [
        [0, 7, 9, 7, 7, 9, 11],
        [6, 0, 7, 5, 11, 9, 9],
        [4, 6, 0, 7, 7, 8, 12],
        [6, 8, 6, 0, 6, 7, 10],
        [6, 2, 6, 7, 0, 7, 12],
        [4, 4, 5, 6, 6, 0, 6],
        [2, 4, 1, 3, 1, 7, 0],
    ],
    dtype=float,
)


def test_bradley_terry_of_agrestis_baseball():
    assert (BASEBALL + BASEBALL.T)[np.triu_indices(7, 1)].tolist() == [13.0] * 21
    strengths = fit_bradley_terry(BASEBALL)
    published = [1.5814, 1.4364, 1.2945, 1.2476, 1.1077, 0.6839, 0.0]
    # the book prints four digits
    assert strengths - strengths[-1] == pytest.approx(published, abs=1e-3)
    assert strengths.sum() == pytest.approx(0)


def test_two_who_met_have_the_odds_of_their_wins():
    strengths = fit_bradley_terry(np.array([[0, 3.0], [1.0, 0]]))
    assert strengths[0] - strengths[1] == pytest.approx(np.log(3))


def test_one_who_won_everything_has_a_finite_strength():
    strengths = fit_bradley_terry(np.array([[0, 5.0, 5.0], [0, 0, 3.0], [0, 2.0, 0]]))
    assert np.isfinite(strengths).all()
    assert strengths[0] > strengths[1] > strengths[2]
    assert fit_bradley_terry(np.zeros((2, 2))).tolist() == [0, 0]


def test_on_a_chain_of_pairs_each_step_has_the_log_odds_of_its_own_wins():
    """0 met 1 and 1 met 2 alone: then each pair's strengths are fitted exactly, whatever the other pair did."""
    wins = np.zeros((3, 3))
    wins[0, 1], wins[1, 0], wins[1, 2], wins[2, 1] = 5, 2, 3, 4
    strengths = fit_bradley_terry(wins)
    assert strengths[0] - strengths[1] == pytest.approx(np.log(5 / 2))
    assert strengths[1] - strengths[2] == pytest.approx(np.log(3 / 4))
    assert strengths.sum() == pytest.approx(0)


def test_half_a_tie_is_added_to_the_pairs_that_met_and_to_no_others():
    wins = np.zeros((3, 3))
    wins[0, 1], wins[1, 2], wins[2, 1] = 5, 3, 1  # 1 lost every comparison with 0; 0 and 2 did not meet
    strengths = fit_bradley_terry(wins)
    assert strengths[0] - strengths[1] == pytest.approx(np.log(5.25 / 0.25))
    assert strengths[1] - strengths[2] == pytest.approx(np.log(3.25 / 1.25))
    assert strengths.sum() == pytest.approx(0)


def test_the_strengths_explain_the_wins_with_half_a_tie_added_where_one_lost_all():
    """At the maximum of the likelihood each has as many wins as its strengths let expect (Hunter 2004, section 2)."""
    generator = np.random.default_rng(0)
    wins = generator.integers(0, 5, (5, 5)).astype(float)
    np.fill_diagonal(wins, 0)
    wins[0, 3] = wins[3, 0] = 0  # did not meet
    for lost_all in (False, True):
        if lost_all:
            wins[4] = 0
        strengths = fit_bradley_terry(wins)
        added = 0.25 * (wins + wins.T > 0) if lost_all else 0
        met = wins + wins.T + 2 * added
        expected = (met / (1 + np.exp(strengths[None] - strengths[:, None]))).sum(1)
        assert (wins + added).sum(1) == pytest.approx(expected, abs=1e-6)
        assert strengths.sum() == pytest.approx(0)


def test_who_did_not_meet_over_others_either_is_not_compared():
    wins = np.zeros((5, 5))
    wins[0, 1], wins[1, 0], wins[2, 3], wins[3, 2] = 3, 1, 1, 2
    strengths = fit_bradley_terry(wins)
    assert strengths == pytest.approx([np.log(3) / 2, -np.log(3) / 2, -np.log(2) / 2, np.log(2) / 2, 0])
    wins[1, 0] = 0  # what is infinite in one group changes nothing in the other
    assert fit_bradley_terry(wins)[2:] == pytest.approx(strengths[2:])
    assert fit_bradley_terry(wins)[0] == pytest.approx(np.log(3.25 / 0.25) / 2)


def test_wins_are_counted_with_ties_as_halves():
    assert count_wins({(0, 1): [1.0, 1.0, 0.0, 0.5]}, 2).tolist() == [[0, 2.5], [1.5, 0]]


def test_what_is_missing():
    assert count_missing([]) is None
    assert count_missing([1.0, 0.0]) is None
    assert count_missing([1.0] * 3) > 0, "three who agree settle nothing"
    assert count_missing([1.0] * 6) == 0, "p = 2 / 64"
    outcomes = [1.0] * 12 + [0.0] * 8  # (1.96 / 0.091)^2 * 0.59 * 0.41 = 112 in all
    assert count_missing(outcomes) == pytest.approx(112 - 20, abs=3)
    assert count_missing(outcomes * 10) == 0
    assert count_missing([0.5] * 9 + [1.0] * 6) == 0, "ties are left out"


def test_the_sign_test_by_hand():
    assert compare_signs(5, 0) == pytest.approx(2 / 32)
    assert compare_signs(1, 8) == pytest.approx(2 * (9 + 1) / 512)
    assert compare_signs(3, 3) == 1
