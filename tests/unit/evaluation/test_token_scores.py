import json
import math

import numpy as np
import pytest
import torch

from lora_gpt2.core.console import SilentReporter
from lora_gpt2.core.errors import UsageError
from lora_gpt2.data.read.records import Document
from lora_gpt2.evaluation.matrix import EvaluationText, measure_matrix
from lora_gpt2.evaluation.perplexity import measure_perplexity
from lora_gpt2.evaluation.token_page import build_token_page
from lora_gpt2.evaluation.token_scores import (
    AGAIN,
    MARK,
    NEW,
    NUMBER,
    SPACE,
    TokenScores,
    check_protocol,
    iter_token_scores,
    sum_gains,
)
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.session import Session
from lora_gpt2.recipe import EvaluateSettings
from tests.builders import make_adapter

TEXTS = [
    "the cat — naïve 日本 🥚",
    "rain",
    "under another sun the dog ran in the rain " * 6,
    Document(text=" and the cat ran", origin="", prompt="the dog " * 7),
]


@pytest.fixture
def session(base):
    session = Session(base)
    session.load_in_memory({name: make_adapter(base.config, seed=seed) for seed, name in enumerate(("law", "code"))})
    return session


def score(session, texts, mixes, settings, together=False):
    text = EvaluationText(label="text", documents=texts)
    rows = {str(mix): session.select(mix) for mix in mixes}
    more = {"together": session.select(*mixes)} if together else {}
    cells = measure_matrix(session.base, rows, [text], settings, SilentReporter(), keep_tokens=True, **more)
    return list(iter_token_scores(session.base.tokenizer, [text], cells))


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(("window", "stride"), [(0, 0), (16, 16), (16, 5), (7, 1)])
def test_the_tokens_of_each_document_add_up_to_its_score_in_windows_that_overlap(session, window, stride, together):
    mixes = [Mix(), Mix.single("law"), Mix.parse("law:0.5+code:0.25")]
    settings = EvaluateSettings(window=window, stride=stride, batch_tokens=64)
    found = score(session, TEXTS, mixes, settings, together)
    for text, scores in zip(TEXTS, found, strict=True):
        for mix in mixes:
            alone = measure_perplexity(session.base, [text], settings, session.select(mix))
            logprobs = scores.logprobs[str(mix)]
            assert len(logprobs) == alone.tokens == len(scores.tokens) == len(scores.token_ids)
            assert -logprobs.sum(dtype=np.float64) == pytest.approx(alone.nll_nats, rel=1e-5)


def test_each_token_is_as_likely_as_a_pass_over_the_whole_text_says(session):
    text = str(TEXTS[0])
    (found,) = score(session, [text], [Mix.single("law")], EvaluateSettings())
    tokenizer, model = session.base.tokenizer, session.base.model
    ids = torch.tensor([[tokenizer.eos_id, *tokenizer.encode(text)]])
    adapters = session.adapters_for([Mix.single("law")])
    with torch.inference_mode():
        logits = model.logits(model(ids[:, :-1], adapters), adapters)[0]
    wanted = torch.log_softmax(logits.double(), -1).gather(1, ids[0, 1:, None])[:, 0]
    np.testing.assert_allclose(found.logprobs["law"], wanted.numpy(), atol=2e-5)


def test_a_prompt_is_seen_and_not_scored(session):
    seen, alone = score(session, [TEXTS[3], TEXTS[3].text], [Mix()], EvaluateSettings())
    assert seen.tokens == alone.tokens
    assert seen.prompt == TEXTS[3].prompt
    assert not np.allclose(seen.logprobs["base"], alone.logprobs["base"], atol=1e-3)


def test_offsets_and_pieces_cut_a_text_at_characters(session):
    found = score(session, TEXTS, [Mix()], EvaluateSettings())
    for each in found:
        assert "".join(each.pieces) == each.text
        for offset, token in zip(each.text_offset, each.tokens, strict=True):
            assert token.startswith("bytes:") or each.text[offset : offset + len(token)] == token
    assert any(token.startswith("bytes:") for token in found[0].tokens)
    egg = found[0].text.index("🥚")
    assert found[0].text_offset.count(egg) > 1, "its parts are where it is"


def make(text, tokens, **logprobs):
    offsets = [sum(map(len, tokens[:index])) for index in range(len(tokens))]
    assert "".join(tokens) == text
    values = {name: np.array(value, np.float32) for name, value in logprobs.items()}
    return TokenScores(
        source="text",
        origin="text#1",
        prompt="",
        text=text,
        token_ids=[0] * len(tokens),
        tokens=tokens,
        text_offset=offsets,
        logprobs=values,
    )


def test_words_are_put_together_and_counted_by_kind():
    tokens = ["The", " cat", ",", " don", "'t", " the", "\n", "\n", " ", " 12", " C", "at", "!?"]
    scores = make("".join(tokens), tokens, base=[-1.0] * 13, law=[-0.5] * 12 + [-3.0])
    assert [(kind, text) for kind, text, _ in scores.words] == [
        (NEW, "The"),
        (NEW, "cat"),
        (MARK, ","),
        (NEW, "don't"),
        (AGAIN, "the"),
        (SPACE, "\n"),
        (SPACE, "\n"),
        (SPACE, " "),
        (NUMBER, "12"),
        (AGAIN, "Cat"),
        (MARK, "!?"),
    ]
    kinds, words = sum_gains([scores, scores], "law", "base")
    assert sum(gain.tokens for gain in kinds.values()) == 2 * len(tokens)
    assert (words["don't"].count, words["don't"].tokens, words["don't"].nats) == (2, 4, 2.0)
    assert words["!?"].nats == -4
    assert kinds[SPACE].nats == 3
    assert sum(gain.nats for gain in kinds.values()) == 2 * (12 * 0.5 - 2)
    assert "\n" not in words


def test_spaces_of_several_bytes_are_spaces_and_a_text_may_be_empty(session):
    for text, words in (("\xa0Hello World", ["Hello", "World"]), ("a\u3000b", ["a", "b"]), ("\u3000", [])):
        (scores,) = score(session, [text], [Mix(), Mix.single("law")], EvaluateSettings())
        assert [word for kind, word, _ in scores.words if kind != SPACE] == words
        kinds, _ = sum_gains([scores], "law", "base")
        assert sum(gain.tokens for gain in kinds.values()) == len(scores.tokens)
    kinds, words = sum_gains([make("", [], base=[], law=[])], "law", "base")
    assert not words


def test_a_log_probability_that_is_not_finite_spoils_its_own_word_alone():
    scores = make("a b", ["a", " b"], base=[-1.0, -2.0], law=[-math.inf, -1.0])
    _, words = sum_gains([scores], "law", "base")
    assert words["b"].nats == 1
    assert scores.to_json()["logprobs"] == {"base": [-1.0, -2.0], "law": [None, -1.0]}
    page = build_token_page([scores], "nano")
    assert "Infinity" not in page.split("<script>")[0]


def test_the_page_has_sums_over_all_and_the_first_documents(monkeypatch):
    monkeypatch.setattr("lora_gpt2.evaluation.token_page.MAX_FIGURES", 6)
    parts = make("é x", ["", "é", " x"], base=[-1, -1, -4], law=[-1, -0.5, -2])
    page = build_token_page([parts, parts], "nano")
    run = json.loads(page.split('id="run">')[1].split("</script>")[0])
    (text,) = run["texts"]
    assert (text["documents"], text["tokens"], len(text["shown"])) == (2, 6, 1)
    assert text["shown"][0] == {
        "prompt": "",
        "pieces": ["é", " x"],
        "logprobs": {"base": [-2, -4], "law": [-1.5, -2]},
    }
    sums = text["sums"]["law"]
    assert (sums["base"], sums["adapter"]) == (2, pytest.approx(3.5 / 3, abs=1e-5))
    assert sums["gains"] == [["x", 2, 4, 2], ["é", 2, 1, 0.5]]
    assert sums["losses"] == []
    assert sum(kind[-1] for kind in sums["kinds"]) == pytest.approx(1)


def test_a_stream_has_no_documents_whose_tokens_could_be_shown():
    with pytest.raises(UsageError, match="document by document"):
        check_protocol(EvaluateSettings(protocol="stream"))
