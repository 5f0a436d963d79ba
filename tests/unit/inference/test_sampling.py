import math

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lora_gpt2.inference.sampling import (
    SamplingParams,
    adjust_logits,
    adjust_row,
    draw_uniform,
    find_nucleus,
    find_top_k,
    forbid_ngrams,
    penalise_repetition,
    sample_tokens,
    weigh_candidates,
)


def weigh(logits, **params):
    """Returns the probabilities `[vocab]` with which a row is sampled."""
    own = SamplingParams(**params)
    found = find_top_k(logits[None], [own.top_k]) if 0 < own.top_k < len(logits) else find_nucleus(logits, own)
    weights = weigh_candidates(found, [own])[0]
    return torch.zeros(len(logits), dtype=torch.float64).scatter(0, found.tokens[0], weights / weights.sum())


def choose(logits, ids, params, uniform=0.5, **options):
    adjusted = adjust_row(logits, ids, params, **options)
    return sample_tokens(adjusted[None], [params], [uniform])[0]


@pytest.mark.parametrize("vocab", [200, 5000])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.9), (0, 0.3), (50, 0.95), (1, 0.5), (500, 0.01), (150, 0.999)]
)
def test_shaping_equals_transformers(vocab, temperature, top_k, top_p):
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(1)) * 3
    wanted = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        wanted = TopKLogitsWarper(top_k)(None, wanted)
    if top_p < 1:
        wanted = TopPLogitsWarper(top_p)(None, wanted)
    found = weigh(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    torch.testing.assert_close(found, wanted[0].double().softmax(0), atol=1e-6, rtol=1e-5)
    assert torch.equal(found > 0, wanted[0].softmax(0) > 0)


@pytest.mark.parametrize("vocab", [7, 300, 4097])
@pytest.mark.parametrize("levels", [1, 2, 40, 10**6])
def test_the_largest_are_those_of_a_sort_also_where_many_are_equal(vocab, levels):
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randint(0, levels, (3, vocab), generator=generator).float()
    sizes = [1, 5, min(60, vocab)]
    found = find_top_k(logits, sizes)
    for row, size in enumerate(sizes):
        order = logits[row].argsort(descending=True, stable=True)
        wanted = order[logits[row][order] >= logits[row][order[size - 1]]]
        is_kept = found.logits[row] > -torch.inf
        assert found.tokens[row][is_kept].tolist() == wanted.tolist()


def test_a_row_is_sampled_alike_alone_and_beside_any_others():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(40, 3000, generator=generator) * 4
    logits[::3] = logits[::3].round()  # many are equal
    kinds = [
        {},
        {"top_k": 7},
        {"top_k": 50, "top_p": 0.95, "temperature": 0.7},
        {"top_p": 0.9},
        {"temperature": 0.0},
        {"top_k": 300, "min_p": 0.02, "temperature": 1.5},
    ]
    params = [SamplingParams(**kinds[row % len(kinds)]) for row in range(40)]
    uniforms = [draw_uniform(row, 3) for row in range(40)]
    alone = [sample_tokens(logits[r : r + 1], [params[r]], [uniforms[r]])[0] for r in range(40)]
    assert sample_tokens(logits, params, uniforms) == alone
    order = torch.randperm(40, generator=generator).tolist()
    mixed = sample_tokens(logits[order], [params[r] for r in order], [uniforms[r] for r in order])
    assert mixed == [alone[r] for r in order]


def test_random_numbers_are_those_of_seed_and_step_and_evenly_spread():
    drawn = torch.tensor(
        [[draw_uniform(seed, step) for step in range(100)] for seed in range(200)], dtype=torch.float64
    )
    assert draw_uniform(5, 7) == drawn[5, 7]
    assert len(drawn.unique()) == 20_000
    assert 0 <= drawn.min() < 1e-3
    assert 0.999 < drawn.max() < 1
    counts = torch.bincount((20 * drawn).long().flatten())
    assert (counts - 1000).abs().max() < 5 * 31, "20,000 draws: each of 20 bins deviates by 31"
    for one, other in ((drawn[:, :-1], drawn[:, 1:]), (drawn[:-1], drawn[1:])):
        correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 0.036, "20,000 pairs: independent ones deviate by 0.007"


def test_the_repetition_penalty_equals_transformers():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    seen = torch.tensor([3, 7, 7, 49])
    wanted = RepetitionPenaltyLogitsProcessor(1.7)(seen[None], logits[None])[0]
    assert torch.equal(penalise_repetition(logits, seen, 1.7), wanted)
    assert not torch.equal(wanted, logits)


def test_draws_follow_the_distribution_and_the_seed():
    logits = torch.tensor([0.0, math.log(3), -torch.inf])
    settings = SamplingParams(temperature=1.0, top_k=0, top_p=1.0)
    drawn = [choose(logits, [], settings, draw_uniform(1, step)) for step in range(4000)]
    counts = torch.bincount(torch.tensor(drawn), minlength=3)
    assert counts[2] == 0
    # 4,000 draws: the share deviates by 0.0068; four of them
    assert counts[1] / 4000 == pytest.approx(0.75, abs=0.03)
    assert choose(logits, [], SamplingParams(temperature=0.0)) == 1
    assert choose(logits, [], settings, 0.0) == 0
    assert choose(logits, [], settings, 1 - 2**-53) == 1, "rounding does not reach what is excluded"


def logits_and_history(vocab=60, seen=30):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(vocab, generator=generator) * 3, torch.randint(0, 3, (seen,), generator=generator)


@pytest.mark.parametrize("min_p", [0.01, 0.2, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_min_p_equals_transformers(min_p, temperature):
    logits, _ = logits_and_history()
    shape = {"temperature": temperature, "top_k": 20, "top_p": 0.9, "min_p": min_p}
    wanted = TopKLogitsWarper(20)(None, TemperatureLogitsWarper(temperature)(None, logits[None]))
    wanted = MinPLogitsWarper(min_p)(None, TopPLogitsWarper(0.9)(None, wanted))
    torch.testing.assert_close(weigh(logits, **shape), wanted[0].double().softmax(0), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_forbidden_ngrams_are_those_of_transformers(size):
    logits, seen = logits_and_history()
    wanted = NoRepeatNGramLogitsProcessor(size)(seen[None], logits[None].clone())[0]
    found = forbid_ngrams(logits, seen, size)
    assert torch.equal(found, wanted)
    assert torch.isinf(found).any() == (size < 5)
    assert torch.equal(forbid_ngrams(logits, seen[: size - 1], size), logits)


def test_presence_and_frequency_count_the_continuation_only():
    logits, _ = logits_and_history()
    seen = torch.tensor([1, 2, 2, 3, 3, 3])
    settings = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    change = adjust_logits(logits, seen, 1, settings) - logits
    expected = torch.zeros(60)
    expected[2], expected[3] = -0.5 - 2 * 0.25, -0.5 - 3 * 0.25
    torch.testing.assert_close(change, expected)


def test_a_bias_moves_single_tokens_and_unknown_ones_are_ignored():
    logits = torch.zeros(10)
    settings = SamplingParams(temperature=0.0, logit_bias={3: 5.0, 99: 100.0})
    assert choose(logits, [], settings) == 3
    assert choose(logits, [], SamplingParams(temperature=0.0, logit_bias={0: -1.0})) == 1
    assert not logits.any(), "they are not changed in place"


@pytest.mark.parametrize(
    "given", [{"top_p": 1e-300}, {"top_p": 1e-46}, {"min_p": 1.0}, {"top_p": 1e-300, "min_p": 1.0}]
)
def test_the_likeliest_token_is_always_kept(given):
    logits = torch.tensor([0.0, 3.0, 1.0])
    assert weigh(logits, **given).tolist() == [0, 1, 0]
    assert {choose(logits, [], SamplingParams(temperature=1.0, top_k=0, **given), u) for u in (0.0, 0.5, 0.999)} == {1}


def test_when_all_is_forbidden_the_likeliest_is_taken():
    settings = SamplingParams(temperature=0.0, no_repeat_ngram_size=1)
    assert choose(torch.tensor([0.0, 2, 1, 0, 0]), range(5), settings) == 1


LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize("size", [1e20, 1e31, 1e35, 3e38, LARGEST, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.001, 0.5, 1.0, 100.0])
def test_a_logit_of_any_size_gives_a_token_at_any_temperature(temperature, size):
    """A division by the smallest temperature must not make two infinities, whose difference is no number."""
    for extra in ({"top_k": 0, "top_p": 1.0}, {"top_k": 2, "top_p": 0.5}, {"top_k": 0, "top_p": 1.0, "min_p": 0.1}):
        settings = SamplingParams(temperature=temperature, **extra)
        for place in range(3):
            logits = torch.tensor([-1.0, 0.0, -size])
            logits[place] = size
            assert choose(logits, [], settings) == place, (extra, place)
        both = torch.tensor([0.0, size, size, -size])
        drawn = {choose(both, [], settings, draw_uniform(0, step)) for step in range(40)}
        assert drawn <= {1, 2}
        if temperature and not extra.get("top_k"):
            assert drawn == {1, 2}, "equal ones are drawn alike"
        low = torch.tensor([-size, -size, -size * 0.75, -size]) if size < math.inf else torch.tensor([-size, -size, 0])
        assert choose(low, [], settings) == 2, "all of them far below zero"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_and_penalties_of_every_size_give_a_token(dtype):
    bounds = {"repetition_penalty": 0.01, "presence_penalty": -2.0, "frequency_penalty": -2.0, "logit_bias": {1: 100.0}}
    seen = [0, 1, 1, 2]
    logits = torch.tensor([1e35, 2e37, 1.0, -1e36], dtype=dtype)
    for temperature in (0.0, 0.001, 1.0):
        settings = SamplingParams(temperature=temperature, top_k=0, top_p=1.0, **bounds)
        assert choose(logits, seen, settings, num_prompt_tokens=1) in (0, 1), "likelier than any other by far"


def test_a_token_is_where_its_random_number_falls_in_the_cumulative_distribution():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(3)) * 3
    for temperature in (0.5, 1.0, 100.0):
        sums = (logits.double() / temperature).softmax(0).cumsum(0)
        settings = SamplingParams(temperature=temperature, top_k=0, top_p=1.0)
        for step in range(50):
            uniform = draw_uniform(9, step)
            assert choose(logits, [], settings, uniform) == int((sums <= uniform).sum())
