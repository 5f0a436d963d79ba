"""The mark is found in marked text, in no other, and only with its key."""

import pytest

from lora_gpt2.core.errors import DataError
from lora_gpt2.evaluation.watermark import detect_watermark
from lora_gpt2.inference.generate import Request, generate
from lora_gpt2.inference.session import Session
from lora_gpt2.recipe import GenerateSettings

OPEN = GenerateSettings(temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=47)


def write(base, **settings):
    """Returns text of ten samples; the tiny base writes much that is not UTF-8, so its bytes are kept to letters."""
    letters = {token: -100.0 for token, b in enumerate(base.tokenizer.token_bytes) if not b.isalpha()}
    settings = OPEN.model_copy(update={"logit_bias": letters, **settings})
    return "".join(
        output.text for output in generate(Session(base), [Request("a", (), s) for s in range(10)], settings)
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
        assert report.green_fraction < 0.35
    assert detect_watermark(other, base.tokenizer, 99).is_marked(4.0)


def test_marking_is_repeatable_and_the_same_in_a_batch(base):
    settings = OPEN.model_copy(update={"watermark": True})
    requests = [Request("the cat", (), seed) for seed in (1, 2, 3)]
    together = [output.text for output in generate(Session(base), requests, settings)]
    assert together == [generate(Session(base), [request], settings)[0].text for request in requests]
    assert together != [output.text for output in generate(Session(base), requests, OPEN)]


def test_a_text_too_short_to_tell_is_refused(base):
    with pytest.raises(DataError, match="at least 16"):
        detect_watermark("short", base.tokenizer, 1)
