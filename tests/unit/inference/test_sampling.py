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
    choose_token,
    forbid_ngrams,
    penalise_repetition,
    warp_logits,
)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.9), (50, 0.95), (1, 0.5), (500, 0.01)])
def test_shaping_equals_transformers(temperature, top_k, top_p):
    logits = torch.randn(200, generator=torch.Generator().manual_seed(1)) * 3
    shape = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    wanted = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        wanted = TopKLogitsWarper(top_k)(None, wanted)
    if top_p < 1:
        wanted = TopPLogitsWarper(top_p)(None, wanted)
    assert torch.equal(warp_logits(logits, **shape), wanted[0])


def test_the_repetition_penalty_equals_transformers():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    seen = torch.tensor([3, 7, 7, 49])
    wanted = RepetitionPenaltyLogitsProcessor(1.7)(seen[None], logits[None])[0]
    assert torch.equal(penalise_repetition(logits, seen, 1.7), wanted)
    assert not torch.equal(wanted, logits)


def test_draws_follow_the_distribution_and_the_seed():
    logits = torch.tensor([0.0, math.log(3), -torch.inf])
    settings = SamplingParams(temperature=1.0, top_k=0, top_p=1.0)
    none = torch.tensor([], dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(
        torch.tensor([choose_token(logits, none, settings, generator) for _ in range(4000)]), minlength=3
    )
    assert counts[2] == 0
    # 4,000 draws: the share deviates by 0.0068; four of them
    assert counts[1] / 4000 == pytest.approx(0.75, abs=0.03)
    assert choose_token(logits, none, SamplingParams(temperature=0.0), generator) == 1
    draws = [[choose_token(logits, none, settings, torch.Generator().manual_seed(s)) for _ in range(5)] for s in (1, 1)]
    assert draws[0] == draws[1]


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
    assert torch.equal(warp_logits(logits, **shape), wanted[0])


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
    logits, none = torch.zeros(10), torch.tensor([], dtype=torch.long)
    settings = SamplingParams(temperature=0.0, logit_bias={3: 5.0, 99: 100.0})
    assert choose_token(logits, none, settings, torch.Generator()) == 3
    assert choose_token(logits, none, SamplingParams(temperature=0.0, logit_bias={0: -1.0}), torch.Generator()) == 1


@pytest.mark.parametrize(
    "given", [{"top_p": 1e-300}, {"top_p": 1e-46}, {"min_p": 1.0}, {"top_p": 1e-300, "min_p": 1.0}]
)
def test_the_likeliest_token_is_always_kept(given):
    logits, none = torch.tensor([0.0, 3.0, 1.0]), torch.tensor([], dtype=torch.long)
    settings = SamplingParams(temperature=1.0, top_k=0, **given)
    assert torch.isfinite(warp_logits(logits, 1.0, **given)).tolist() == [False, True, False]
    assert choose_token(logits, none, settings, torch.Generator().manual_seed(0)) == 1


def test_when_all_is_forbidden_the_likeliest_is_taken():
    settings = SamplingParams(temperature=0.0, no_repeat_ngram_size=1)
    seen = torch.arange(5)
    assert choose_token(torch.tensor([0.0, 2, 1, 0, 0]), seen, settings, torch.Generator()) == 1


EMPTY = torch.tensor([], dtype=torch.long)
LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize("size", [1e20, 1e31, 1e35, 3e38, LARGEST, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.001, 0.5, 1.0, 100.0])
def test_a_logit_of_any_size_gives_a_token_at_any_temperature(temperature, size):
    """A division by the smallest temperature must not make two infinities, whose difference is no number."""
    generator = torch.Generator().manual_seed(0)
    for extra in ({"top_k": 0, "top_p": 1.0}, {"top_k": 2, "top_p": 0.5}, {"top_k": 0, "top_p": 1.0, "min_p": 0.1}):
        settings = SamplingParams(temperature=temperature, **extra)
        for place in range(3):
            logits = torch.tensor([-1.0, 0.0, -size])
            logits[place] = size
            assert choose_token(logits, EMPTY, settings, generator) == place, (extra, place)
        both = torch.tensor([0.0, size, size, -size])
        drawn = {choose_token(both, EMPTY, settings, generator) for _ in range(40)}
        assert drawn <= {1, 2}
        if temperature and not extra.get("top_k"):
            assert drawn == {1, 2}, "equal ones are drawn alike"
        low = torch.tensor([-size, -size, -size * 0.75, -size]) if size < math.inf else torch.tensor([-size, -size, 0])
        assert choose_token(low, EMPTY, settings, generator) == 2, "all of them far below zero"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_and_penalties_of_every_size_give_a_token(dtype):
    bounds = {"repetition_penalty": 0.01, "presence_penalty": -2.0, "frequency_penalty": -2.0, "logit_bias": {1: 100.0}}
    generator, seen = torch.Generator().manual_seed(0), torch.tensor([0, 1, 1, 2])
    logits = torch.tensor([1e35, 2e37, 1.0, -1e36], dtype=dtype)
    for temperature in (0.0, 0.001, 1.0):
        settings = SamplingParams(temperature=temperature, top_k=0, top_p=1.0, **bounds)
        assert choose_token(logits, seen, settings, generator, num_prompt_tokens=1) in (0, 1), (
            "likelier than any other by far"
        )


def test_what_no_bound_reaches_is_drawn_as_it_is():
    """The control: what stays finite by itself is not changed by the bound."""
    logits = torch.randn(50, generator=torch.Generator().manual_seed(3)) * 1e3
    for temperature in (0.001, 1.0, 100.0):
        settings = SamplingParams(temperature=temperature, top_k=0, top_p=1.0)
        wanted = torch.multinomial((logits / temperature).softmax(0), 1, generator=torch.Generator().manual_seed(5))
        assert choose_token(logits, EMPTY, settings, torch.Generator().manual_seed(5)) == int(wanted)
