"""The bootstrap's draws: with replacement, of one size, the same for all rows, and none of them twice."""

from statistics import NormalDist

import numpy as np
import pytest

from lora_gpt2.evaluation import bootstrap
from lora_gpt2.evaluation.bootstrap import ROUNDS, draw_counts, find_interval, find_t_quantile, resample_ratio

DOCUMENTS = 40


@pytest.fixture
def values():
    return np.random.default_rng(0).normal(5, 2, size=DOCUMENTS)


def test_a_draw_has_as_many_documents_with_replacement_and_follows_its_seed():
    counts = draw_counts(DOCUMENTS, 2000, seed=3)
    assert counts.shape == (2000, DOCUMENTS)
    assert (counts.sum(1) == DOCUMENTS).all()
    assert counts.mean(0) == pytest.approx(1, abs=0.12), "each document alike: five deviations of 2,000 draws"
    # 2,000 draws of each document: the share deviates by well under 0.002
    assert (counts == 0).mean() == pytest.approx((1 - 1 / DOCUMENTS) ** DOCUMENTS, abs=0.01)
    assert (draw_counts(DOCUMENTS, 2000, seed=3) == counts).all()
    assert (draw_counts(DOCUMENTS, 2000, seed=4) != counts).any()


@pytest.mark.parametrize("rounds_at_once", [1, 7, 300, 999, ROUNDS, 5000])
def test_no_two_rounds_are_alike_however_many_are_drawn_at_once(values, monkeypatch, rounds_at_once):
    monkeypatch.setattr(bootstrap, "AT_ONCE", rounds_at_once * DOCUMENTS)
    means = resample_ratio(values[None], np.ones(DOCUMENTS))[:, 0]
    assert len(means) == ROUNDS
    assert len(np.unique(means.round(12))) == ROUNDS
    assert means.mean() == pytest.approx(values.mean(), abs=0.05)  # 5 deviations of a mean of 1,000
    # the spread of 1,000 draws deviates by 2.2 %: five of them
    assert means.std() == pytest.approx(values.std() / DOCUMENTS**0.5, rel=0.12)


def test_a_round_is_the_ratio_of_sums_over_its_draw_and_all_rows_have_the_same_draws(values, monkeypatch):
    sizes = np.arange(1.0, DOCUMENTS + 1)
    totals = np.stack([values, 2 * values, sizes])
    found = resample_ratio(totals, sizes)
    counts = draw_counts(DOCUMENTS, ROUNDS)
    assert found[:, 0] == pytest.approx((counts * values).sum(1) / (counts * sizes).sum(1))
    for rounds_at_once in (5000, 300):
        monkeypatch.setattr(bootstrap, "AT_ONCE", rounds_at_once * DOCUMENTS)
        found = resample_ratio(totals, sizes)
        assert found[:, 1] == pytest.approx(2 * found[:, 0])
        assert found[:, 2] == pytest.approx(1)


def test_an_interval_leaves_the_same_share_out_at_both_ends():
    values, many = np.arange(1001.0)[::-1], 10**6
    assert find_interval(values, many) == pytest.approx((25, 975), abs=0.2)
    assert find_interval(values, many, 0.5) == pytest.approx((250, 750), abs=0.2)
    assert find_interval([*values, np.nan, np.nan], many) == pytest.approx((25, 975), abs=0.2), (
        "rounds without any token count nothing"
    )


@pytest.mark.parametrize(
    ("share", "freedom", "wanted"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 4, 2.77645), (0.975, 9, 2.26216), (0.95, 30, 1.69726)],
)
def test_quantiles_of_student_are_those_of_the_tables(share, freedom, wanted):
    assert find_t_quantile(share, freedom) == pytest.approx(wanted, rel=1e-5)
    assert find_t_quantile(share, 10**7) == pytest.approx(NormalDist().inv_cdf(share), rel=2e-3)


@pytest.mark.parametrize(("count", "least"), [(5, 0.88), (8, 0.9), (20, 0.91)])
def test_an_interval_of_few_documents_covers_the_truth_nearly_as_often_as_it_says(count, least):
    """The percentiles alone cover it in 81 % (five documents) and 86 % (eight)."""
    generator, covered, trials = np.random.default_rng(1), 0, 400
    for _ in range(trials):
        low, high = find_interval(resample_ratio(generator.normal(size=(1, count)), np.ones(count))[:, 0], count)
        covered += low <= 0 <= high
    assert least < covered / trials < 0.985


def test_a_round_of_documents_without_tokens_is_no_number():
    sizes = np.zeros(DOCUMENTS)
    assert np.isnan(resample_ratio(np.ones((1, DOCUMENTS)), sizes)).all()
