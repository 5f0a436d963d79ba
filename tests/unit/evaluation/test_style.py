"""Figures of style, against values worked out by hand."""

import math

import pytest

from lora_gpt2.evaluation.style import (
    FUNCTION_WORDS,
    cut_pieces,
    measure_delta,
    measure_distinct,
    measure_divergence,
    measure_readability,
    measure_repeated_ngrams,
    split_words,
)


def test_words_are_small_and_keep_their_apostrophes():
    assert split_words("Don't stop, O’Neill: café_x 2x!") == ["don't", "stop", "o’neill", "café", "x", "2x"]


def test_distinct_counts_over_all_texts():
    assert measure_distinct(["a b a b", "a c"], 1) == 3 / 6
    assert measure_distinct(["a b a b", "a c"], 2) == 3 / 4  # ab ba ab | ac
    assert measure_distinct(["a"], 2) is None


def test_repetition_is_within_a_text():
    assert measure_repeated_ngrams(["a b c d a b c d a b c d"]) == pytest.approx(1 - 4 / 9)
    assert measure_repeated_ngrams(["a b c d e", "a b c d e"]) == 0
    assert measure_repeated_ngrams(["a b c"]) is None


def test_a_domains_repetition_is_that_of_pieces_as_long_as_the_texts():
    assert cut_pieces("a b c d e", 2) == ["a b", "c d", "e"]
    assert cut_pieces("a b", 0) == []
    domain = "once upon a time there was one. " * 20
    assert measure_repeated_ngrams(cut_pieces(domain, 7)) == 0 < measure_repeated_ngrams([domain])


def test_readability_by_its_formula():
    text = "The cat sat. The dog ran away!"  # 22 letters, 7 words, 2 sentences
    assert measure_readability(text) == pytest.approx(4.71 * 22 / 7 + 0.5 * 7 / 2 - 21.43)
    assert measure_readability('He ran. "I see!" She sat.') == measure_readability("He ran. I see! She sat.")
    assert measure_readability("...") is None


def test_divergence_is_zero_for_equals_and_one_for_strangers():
    assert measure_divergence("the cat", "the cat") == pytest.approx(0)
    assert measure_divergence("aaaa", "bbbb") == pytest.approx(1)
    # runs of one letter: p = (1/2, 1/2, 0), q = (1/2, 0, 1/2); half of each differs wholly
    assert measure_divergence("ab", "ac", 1) == pytest.approx(0.5)
    assert measure_divergence("ab", "abc") is None


def test_delta_by_hand():
    def chunk(number):  # 500 words, of which `number` are "the"
        return " ".join(["the"] * number + ["zebra"] * (500 - number))

    domain = " ".join(chunk(number) for number in (10, 20, 30, 40, 50))
    spread = math.sqrt(250) / 500  # the standard deviation of 10..50, of n - 1
    assert measure_delta(chunk(30), domain) == pytest.approx(0)
    assert measure_delta(chunk(80), domain) == pytest.approx((50 / 500) / spread)
    assert measure_delta(chunk(30), chunk(30)) is None, "one chunk has no spread"
    assert len(set(FUNCTION_WORDS)) >= 80
