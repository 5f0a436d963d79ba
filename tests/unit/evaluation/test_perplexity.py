import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lora_gpt2.core.console import SilentReporter
from lora_gpt2.core.errors import DataError, UsageError
from lora_gpt2.data.read.records import Document
from lora_gpt2.evaluation.bootstrap import find_interval, resample_ratio
from lora_gpt2.evaluation.matrix import EvaluationText, LabelledSource, measure_matrix, read_sources
from lora_gpt2.evaluation.perplexity import (
    Score,
    ScoringWindows,
    iter_document_windows,
    iter_stream_windows,
    measure_perplexity,
)
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.session import Session
from lora_gpt2.recipe import DataSettings, EvaluateSettings
from tests.builders import make_adapter

TEXTS = ["the cat and the dog", "rain", "under another sun the dog ran in the rain " * 6, ""]


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 40, 41])
@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 3), (8, 1), (40, 20)])
def test_document_windows_score_every_token_once_with_all_the_context_there_is(length, window, stride):
    scored = []
    for span in iter_document_windows(length, window, stride):
        assert span.end - span.begin <= window
        for target in range(span.first, span.end + 1):
            scored.append(target)
            assert target - span.begin >= min(target, window - stride + 1)
    assert scored == list(range(1, length + 1))


def huggingface_windows(length, max_length, stride):
    """The loop of transformers' documentation ("Perplexity of fixed-length models"): scored target positions."""
    previous, result = 0, []
    for begin in range(0, length, stride):
        end = min(begin + max_length, length)
        target_length = end - previous
        labels = list(range(begin, end))[-target_length:]
        result.append((begin, end, [position for position in labels if position > begin]))
        previous = end
        if end == length:
            break
    return result


@pytest.mark.parametrize("length", [2, 8, 9, 30, 33])
@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 4), (8, 1)])
def test_stream_windows_are_those_of_the_documentation(length, window, stride):
    wanted = [w for w in huggingface_windows(length, window, stride) if w[2]]
    found = [(s.begin, s.end + 1, list(range(s.first, s.end + 1))) for s in iter_stream_windows(length, window, stride)]
    assert [f for f in found if f[2]] == wanted


def by_hand(base, ids, spans):
    """NLL of the scored positions, one window at a time."""
    total = 0.0
    for begin, end, positions in spans:
        logits = base.model.logits(base.model(torch.tensor([ids[begin : end - 1]])), None)[0]
        for position in positions:
            total += F.cross_entropy(logits[position - begin - 1], torch.tensor(ids[position])).item()
    return total


def test_documents_by_hand(base):
    settings = EvaluateSettings(window=16, stride=8, batch_tokens=64)
    score = measure_perplexity(base, TEXTS, settings)
    total, tokens = 0.0, 0
    for text in TEXTS:
        ids = [base.tokenizer.eos_id, *base.tokenizer.encode(text)]
        spans = [(w.begin, w.end + 1, range(w.first, w.end + 1)) for w in iter_document_windows(len(ids) - 1, 16, 8)]
        total += by_hand(base, ids, spans)
        tokens += len(ids) - 1
    assert score.tokens == tokens
    assert score.nll_nats == pytest.approx(total, rel=1e-5)
    assert (score.words, score.bytes) == (sum(len(t.split()) for t in TEXTS), sum(map(len, TEXTS)))
    assert score.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert score.word_perplexity == pytest.approx(math.exp(total / score.words), rel=1e-4)
    assert score.bits_per_byte == pytest.approx(total / math.log(2) / score.bytes, rel=1e-5)


def test_a_stream_by_hand(base):
    settings = EvaluateSettings(window=16, stride=8, protocol="stream", batch_tokens=16)
    ids = base.tokenizer.encode("\n\n".join(TEXTS))
    score = measure_perplexity(base, TEXTS, settings)
    assert score.tokens == len(ids) - 1
    assert score.nll_nats == pytest.approx(by_hand(base, ids, huggingface_windows(len(ids), 16, 8)), rel=1e-5)


def test_the_batch_does_not_change_the_score(base):
    scores = [measure_perplexity(base, TEXTS, EvaluateSettings(batch_tokens=n)).nll_nats for n in (1, 100, 10_000)]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-6)


def test_uniform_logits_give_the_vocabulary_size(base):
    base.model.ln_f.weight.data.zero_()
    base.model.ln_f.bias.data.zero_()
    for protocol in ("document", "stream"):
        score = measure_perplexity(base, TEXTS, EvaluateSettings(protocol=protocol))
        assert score.perplexity == pytest.approx(base.config.vocab_size, rel=1e-5)


def test_figures_that_overflow_are_infinite():
    score = Score(nll_nats=1e6, tokens=10, words=0, bytes=10)
    assert (score.perplexity, score.word_perplexity) == (math.inf, math.inf)


@pytest.mark.parametrize(("window", "stride"), [(49, 0), (8, 9), (1, 1)])
def test_windows_that_do_not_fit_are_refused(base, window, stride):
    with pytest.raises(UsageError) as caught:
        measure_perplexity(base, TEXTS, EvaluateSettings(window=window, stride=stride))
    assert "<= 48" in caught.value.message
    assert "evaluate.window" in caught.value.hint


def test_nothing_to_score_is_a_data_error(base):
    for texts in ([], ["", ""]):
        with pytest.raises(DataError):
            measure_perplexity(base, texts, EvaluateSettings())


def test_a_prompt_is_seen_and_not_scored(base):
    settings = EvaluateSettings(window=16, stride=8)
    documents = [Document("the dog ran in the rain " * 4, "", "the cat and "), Document("rain", "", "")]
    score = measure_perplexity(base, documents, settings)
    total, tokens = 0.0, 0
    for document in documents:
        prompt, own = base.tokenizer.encode(document.prompt), base.tokenizer.encode(document.text)
        ids = [base.tokenizer.eos_id, *prompt, *own]
        spans = [(w.begin, w.end + 1, range(w.first, w.end + 1)) for w in iter_document_windows(len(ids) - 1, 16, 8)]
        kept = [(begin, end, [p for p in positions if p > len(prompt)]) for begin, end, positions in spans]
        total += by_hand(base, ids, kept)
        tokens += len(own)
    assert (score.tokens, score.bytes) == (tokens, sum(len(d.text) for d in documents))
    assert score.nll_nats == pytest.approx(total, rel=1e-5)


def test_a_prompt_longer_than_the_window_leaves_every_token_of_the_text_scored(base):
    document = Document("the rain", "", "the cat and the dog " * 10)
    score = measure_perplexity(base, [document], EvaluateSettings(window=8, stride=4))
    assert score.tokens == len(base.tokenizer.encode("the rain"))


@pytest.fixture
def lineup(base):
    session = Session(base)
    session.load_in_memory(
        {name: make_adapter(base.config, seed) for seed, name in enumerate(("law", "code"), start=1)}
    )
    mixes = [Mix(), Mix.single("law"), Mix.single("code")]
    rows = {name: session.select(mix) for name, mix in zip(("base", "law", "code"), mixes, strict=True)}
    return rows, session.select(*mixes)


def test_the_matrix_measures_each_adapter_on_each_source(base, tmp_path, lineup):
    rows, together = lineup
    (tmp_path / "a.txt").write_text("the cat \r\n and the dog")
    sources = [
        *read_sources([LabelledSource("a", str(tmp_path / "a.txt"))], DataSettings(), SilentReporter()),
        EvaluationText(label="b", documents=TEXTS),
    ]
    assert [d.text for d in sources[0].documents] == ["the cat\n and the dog"], "cleaned as for training"
    raw = read_sources([LabelledSource("a", str(tmp_path / "a.txt"))], DataSettings(profile="raw"), SilentReporter())
    assert [d.text for d in raw[0].documents] == ["the cat \r\n and the dog"]
    for how in (None, together):
        cells = measure_matrix(base, rows, sources, EvaluateSettings(), SilentReporter(), together=how)
        assert [(c.adapter, c.source) for c in cells] == [(a, s) for s in "ab" for a in ("base", "law", "code")]
        for cell in cells[3:]:
            alone = measure_perplexity(base, TEXTS, EvaluateSettings(), rows[cell.adapter])
            assert cell.score.nll_nats == pytest.approx(alone.nll_nats, rel=1e-6)
        assert cells[4].score != cells[3].score
        assert cells[4].ratio == pytest.approx(cells[4].score.perplexity / cells[3].score.perplexity)
        assert cells[3].ratio == 1.0
    assert set(cells[0].to_json()) == {
        "adapter",
        "source",
        "tokens",
        "nll_nats_per_token",
        "perplexity",
        "word_perplexity",
        "bits_per_byte",
        "documents",
        "perplexity_interval",
        "ratio_to_base",
        "profile",
        "documents_trained_on",
        "ratio_interval",
    }


def test_batches_hold_several_adapters_only_where_that_is_asked_for(base, lineup):
    windows = ScoringWindows(base, [TEXTS], EvaluateSettings())
    sizes = {
        mixes: [len({c for c, _ in batch}) for batch in windows._iter_batches(3, mixes)] for mixes in (True, False)
    }
    assert sizes == {True: [3], False: [1, 1, 1]}
    seen = []
    windows.measure(lambda choices: seen.append(choices), 2, can_mix=True, on_tokens=seen.append)
    assert seen[0] == [0] * len(windows.windows) + [1] * len(windows.windows)
    assert seen[1] == 2 * windows.forward_tokens


def test_intervals_hold_the_figure_and_narrow_with_the_number_of_documents(base, lineup):
    rows, _ = lineup
    generator = random.Random(1)
    texts = [" ".join(generator.choices(["the", "cat", "dog", "rain", "another"], k=6)) for _ in range(64)]
    wide, narrow = (
        measure_matrix(
            base, rows, [EvaluationText(label="a", documents=texts[:count])], EvaluateSettings(), SilentReporter()
        )[1]
        for count in (8, 64)
    )
    for cell in (wide, narrow):
        assert cell.interval[0] < cell.score.perplexity < cell.interval[1]
        assert cell.ratio_interval[0] < cell.ratio < cell.ratio_interval[1]
    assert narrow.interval[1] - narrow.interval[0] < wide.interval[1] - wide.interval[0]
    few = measure_matrix(
        base, rows, [EvaluationText(label="a", documents=texts[:3])], EvaluateSettings(), SilentReporter()
    )
    assert few[1].interval is None


def test_a_bootstrap_of_a_mean_agrees_with_its_formula():
    generator = np.random.default_rng(0)
    values = generator.normal(5, 2, size=400)
    means = resample_ratio(values[None], np.ones(400))[:, 0]
    low, high = find_interval(means, len(values))
    # 1,000 draws of a mean that deviates by 0.1: their mean deviates by 0.003, their spread by 2.2 %
    assert means.mean() == pytest.approx(values.mean(), abs=0.02)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


FOREIGN = ["Über größere Öfen", "水の上を歩く 猫", "naïve — “quoted” 🎉\u00a0end", "plain"]


@pytest.mark.parametrize("protocol", ["document", "stream"])
def test_sizes_are_utf_8_bytes_and_words_of_the_original_text(base, protocol):
    score = measure_perplexity(base, FOREIGN, EvaluateSettings(protocol=protocol))
    text = "".join(FOREIGN) if protocol == "document" else "\n\n".join(FOREIGN)
    size = len(text.encode("utf-8"))
    first = 0 if protocol == "document" else len(base.tokenizer.token_bytes[base.tokenizer.encode(text)[0]])
    assert score.bytes == pytest.approx(size - first), "what a stream does not score is in no figure"
    assert score.words == pytest.approx(11 * (size - first) / size)
    assert score.bits_per_byte == pytest.approx(score.nll_nats / math.log(2) / score.bytes)
    assert score.word_perplexity == pytest.approx(math.exp(score.nll_nats / score.words))


@pytest.mark.parametrize(("window", "stride"), [(2, 2), (16, 16), (32, 32), (32, 16)])
def test_bits_per_byte_of_a_uniform_model_depend_on_no_window(base, window, stride):
    """Without overlap the first token of each window is not scored, and none of its bytes may count."""
    base.model.ln_f.weight.data.zero_()
    base.model.ln_f.bias.data.zero_()
    text = "xyz qvw " * 40  # each byte is a token
    score = measure_perplexity(base, [text], EvaluateSettings(protocol="stream", window=window, stride=stride))
    assert len(base.tokenizer.encode(text)) == len(text)
    assert score.bits_per_byte == pytest.approx(math.log2(base.config.vocab_size), rel=1e-5)


def test_a_foreign_prompt_counts_in_no_size_and_each_source_has_its_own(base):
    documents = [Document("größer", "", "Über Öfen und "), Document("水", "", ""), "猫 猫"]
    one, other = ScoringWindows(base, [documents, FOREIGN], EvaluateSettings()).measure(lambda columns: None)[0]
    assert (one.bytes, one.words) == (8 + 3 + 7, 4)
    assert (other.bytes, other.words) == (len("".join(FOREIGN).encode()), 11)
    assert one.tokens == sum(len(base.tokenizer.encode(text)) for text in ("größer", "水", "猫 猫"))


def test_a_uniform_model_takes_as_many_bits_as_its_vocabulary_in_any_script(base):
    """Every byte of these is a token of its own, so that bits per byte are those per token."""
    base.model.ln_f.weight.data.zero_()
    base.model.ln_f.bias.data.zero_()
    for texts in (["水の上", "猫"], ["ßüö", "é"], ["xyz"]):
        score = measure_perplexity(base, texts, EvaluateSettings())
        assert score.tokens == len("".join(texts).encode())
        assert score.bits_per_byte == pytest.approx(math.log2(base.config.vocab_size), rel=1e-5)  # float32 logits
