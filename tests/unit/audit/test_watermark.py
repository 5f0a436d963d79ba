"""The mark is found in marked text, in no other, and only with its key."""

import itertools
import math

import pytest
import torch

from lora_gpt2.audit.watermark import detect_watermark
from lora_gpt2.core.errors import DataError
from lora_gpt2.inference.generate import Request, generate
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.sampling import watermark_logits
from lora_gpt2.inference.session import Session
from lora_gpt2.recipe import GenerateSettings

OPEN = GenerateSettings(temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=47)


def write(base, samples=10, **settings):
    """Returns text of some samples; the tiny base writes much that is not UTF-8, so its bytes are kept to letters."""
    letters = {token: -100.0 for token, b in enumerate(base.tokenizer.token_bytes) if not b.isalpha()}
    settings = OPEN.model_copy(update={"logit_bias": letters, **settings})
    return "".join(
        output.text for output in generate(Session(base), [Request("a", Mix(), s) for s in range(samples)], settings)
    )


def test_marked_text_is_told_from_unmarked_and_only_with_the_key(base):
    marked, plain = write(base, watermark=True), write(base)
    other = write(base, watermark=True, watermark_key=99)
    key = OPEN.watermark_key
    found = detect_watermark(marked, base.tokenizer, key)
    assert found.is_marked(4.0)
    assert found.p_value < 1e-4
    assert found.green_fraction > 0.4
    for text in (plain, other):
        report = detect_watermark(text, base.tokenizer, key)
        assert not report.is_marked(4.0)
        # by chance 0.25 of some 460 pairs, which deviates by 0.02: five of them
        assert report.green_fraction < 0.35
    assert detect_watermark(other, base.tokenizer, 99).is_marked(4.0)


def test_marking_is_repeatable_and_the_same_in_a_batch(base):
    settings = OPEN.model_copy(update={"watermark": True})
    requests = [Request("the cat", Mix(), seed) for seed in (1, 2, 3)]
    together = [output.text for output in generate(Session(base), requests, settings)]
    assert together == [generate(Session(base), [request], settings)[0].text for request in requests]
    assert together != [output.text for output in generate(Session(base), requests, OPEN)]


def test_a_text_too_short_to_tell_is_refused(base):
    with pytest.raises(DataError, match="at least 16"):
        detect_watermark("short", base.tokenizer, 1)


PLAIN = "the cat and the dog run in the rain under another sun; then they ran on and on, and nobody saw them again. "


def count_by_hand(text, tokenizer, key):
    """Returns how many different pairs of tokens a text has, and in how many the second one is what writing marks."""
    ids = tokenizer.encode(text)
    pairs = set(itertools.pairwise(ids))
    flat = torch.zeros(tokenizer.vocab_size)
    marked = {first: watermark_logits(flat, torch.tensor([first]), key) > 0 for first, _ in pairs}
    return len(pairs), sum(bool(marked[first][second]) for first, second in pairs)


@pytest.mark.parametrize("key", [OPEN.watermark_key, 1, 99])
@pytest.mark.parametrize("kind", ["plain", "marked", "repeated", "other language"])
def test_the_report_is_the_binomial_test_of_the_different_pairs(base, kind, key):
    text = {
        "plain": PLAIN,
        "marked": write(base, 2, watermark=True),
        "repeated": PLAIN * 7,
        "other language": "Üben über Ödland, größer — 水の上を歩く",
    }[kind]
    report = detect_watermark(text, base.tokenizer, key)
    pairs, green = count_by_hand(text, base.tokenizer, key)
    assert report.tokens == pairs
    assert report.green_fraction == pytest.approx(green / pairs)
    z_score = (green - 0.25 * pairs) / math.sqrt(0.25 * 0.75 * pairs)
    assert report.z_score == pytest.approx(z_score)
    assert report.p_value == pytest.approx(0.5 * math.erfc(z_score / math.sqrt(2)))
    assert [report.is_marked(report.z_score + change) for change in (-1e-9, 0, 1e-9)] == [True, False, False]


def test_marking_makes_a_quarter_of_the_vocabulary_likelier_by_the_same_amount(base):
    vocab, key = base.tokenizer.vocab_size, OPEN.watermark_key
    change = watermark_logits(torch.zeros(vocab), torch.tensor([5, 7]), key)
    assert sorted(set(change.tolist())) == [0.0, 2.0]
    assert int((change > 0).sum()) == int(vocab * 0.25)
    assert torch.equal(change, watermark_logits(torch.zeros(vocab), torch.tensor([7]), key)), "by the token before"
    assert not torch.equal(change, watermark_logits(torch.zeros(vocab), torch.tensor([5]), key))


@pytest.mark.parametrize("times", [3, 20])
def test_a_text_that_repeats_itself_is_no_surer_than_once(base, times):
    """Twice holds every pair, that of its end and its beginning too; more often holds no other."""
    for text in (PLAIN, "a b c d e f g h "):
        once = detect_watermark(text * 2, base.tokenizer, OPEN.watermark_key)
        assert detect_watermark(text * times, base.tokenizer, OPEN.watermark_key) == once
        single = detect_watermark(text, base.tokenizer, OPEN.watermark_key)
        assert once.tokens - single.tokens <= 1, "and twice only the one between"
