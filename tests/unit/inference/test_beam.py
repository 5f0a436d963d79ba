"""Beam search against transformers, setting by setting, and against trying everything."""

import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel, GPT2TokenizerFast

from lora_gpt2.core.errors import UsageError
from lora_gpt2.inference.beam import BeamSearch
from lora_gpt2.inference.engine import Engine
from lora_gpt2.inference.generate import Request, generate, generate_all
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.sequence import SequenceState, SharedSearch
from lora_gpt2.inference.session import Session
from lora_gpt2.model.base import load_base
from lora_gpt2.model.runtime import choose_runtime
from lora_gpt2.recipe import GenerateSettings
from tests.builders import make_adapter, make_base_folder

SAMPLED = GenerateSettings(max_new_tokens=8, temperature=1.0, top_k=0)
PROMPTS = [[5], [70, 81, 3, 9], [40, 41, 42, 43, 44, 45, 46, 47]]


def search_beams(session, ids, mix, budget, settings):
    search = BeamSearch(session, ids, mix, budget, settings)
    while not search.is_done:
        search.advance()
    return search.hypotheses


@pytest.fixture
def session(base):
    session = Session(base)
    session.load_in_memory({"law": make_adapter(base.config)})
    return session


@pytest.mark.parametrize("num_beams", [2, 3, 10])
@pytest.mark.parametrize(("penalty", "ngram"), [(1.0, 0), (0.8, 4), (0.0, 0), (2.0, 2)])
def test_the_best_continuation_is_that_of_transformers(session, base_folder, num_beams, penalty, ngram):
    model = GPT2LMHeadModel.from_pretrained(base_folder).eval()
    eos = session.base.tokenizer.eos_id
    settings = GenerateSettings(num_beams=num_beams, length_penalty=penalty, no_repeat_ngram_size=ngram)
    for ids in PROMPTS:
        wanted = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),
            num_beams=num_beams,
            do_sample=False,
            max_new_tokens=12,
            length_penalty=penalty,
            no_repeat_ngram_size=ngram,
            pad_token_id=eos,
            early_stopping=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        best = search_beams(session, ids, Mix(), 12, settings)[0]
        found = wanted.sequences[0, len(ids) :].tolist()
        assert list(best.ids) == [token for token in found if token != eos]
        assert best.score == pytest.approx(float(wanted.sequences_scores[0]), abs=1e-4)


def test_with_as_many_beams_as_continuations_the_best_of_all_is_found(session):
    base, mix = session.base, Mix.single("law")
    rows = session.adapters_for([mix])
    logits = base.model.logits(base.model(torch.tensor([[7]]), rows), rows)[0, -1]
    first = logits.log_softmax(-1)
    best, vocab = (-torch.inf, ()), base.config.vocab_size
    for token in range(vocab - 1):
        ids = torch.tensor([[7, token]])
        second = base.model.logits(base.model(ids, rows), rows)[0, -1].log_softmax(-1)
        value, other = (first[token] + second).max(0)
        if float(value) > best[0]:
            best = (float(value), (token, int(other)))
    settings = GenerateSettings(num_beams=64, length_penalty=0.0)
    found = search_beams(session, [7], mix, 2, settings)
    longest = [hypothesis for hypothesis in found if len(hypothesis.ids) == 2]
    assert longest[0].ids == best[1]
    assert all(a.score >= b.score for a, b in itertools.pairwise(found))


def test_generate_uses_beams_and_stops_at_stop_texts(session):
    settings = GenerateSettings(num_beams=3, max_new_tokens=10)
    (output,) = generate(session, [Request("the cat", Mix.single("law"), 1)], settings)
    again = generate(session, [Request("the cat", Mix.single("law"), 2)], settings)[0]
    assert (output.text, output.tokens) == (again.text, again.tokens), "nothing is drawn"
    assert len(output.text) >= 4, "there is something to stop at"
    stop = output.text[2:4]
    (cut,) = generate(session, [Request("the cat", Mix.single("law"))], settings.model_copy(update={"stop": (stop,)}))
    assert stop not in cut.text
    assert cut.finish_reason == "stop"


@pytest.mark.parametrize("stop", ["e", " c", "the", "a t"])
def test_a_stop_string_ends_a_beam_as_in_transformers(session, base_folder, stop):
    model, tokenizer = GPT2LMHeadModel.from_pretrained(base_folder), GPT2TokenizerFast.from_pretrained(base_folder)
    prompt = tokenizer("the cat", return_tensors="pt")
    options = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 8, "length_penalty": 1.0}
    found = model.generate(
        **prompt, **options, do_sample=False, stop_strings=[stop], tokenizer=tokenizer, pad_token_id=0
    )
    wanted = [tokenizer.decode(ids[prompt["input_ids"].shape[1] :], skip_special_tokens=True) for ids in found]
    settings = GenerateSettings(num_beams=4, max_new_tokens=8, length_penalty=1.0, stop=(stop,))
    outputs = generate(session, [Request("the cat", beam_rank=rank) for rank in range(4)], settings)
    assert [output.text for output in outputs] == [text.partition(stop)[0].rstrip("!") for text in wanted]


def test_several_texts_of_a_search_are_its_best_and_searched_for_once(session, monkeypatch):
    settings = GenerateSettings(num_beams=4, max_new_tokens=8)
    ids = session.base.tokenizer.encode("the cat")
    wanted = search_beams(session, ids, Mix.single("law"), 8, settings)
    steps, advance = [], BeamSearch.advance
    monkeypatch.setattr(BeamSearch, "advance", lambda self: (steps.append(self), advance(self)))
    requests = [Request("the cat", Mix.single("law"), rank, beam_rank=rank) for rank in (2, 0, 3, 1)]
    sampled = [Request("the cat", Mix.single("law"), seed, SAMPLED) for seed in (1, 2)]
    outputs = generate(session, [*requests, *sampled], settings)
    assert [output.text for output in outputs[:4]] == [
        session.base.tokenizer.decode(wanted[rank].ids) for rank in (2, 0, 3, 1)
    ]
    assert [output.finish_reason for output in outputs[:4]] == [wanted[rank].finish_reason for rank in (2, 0, 3, 1)]
    assert len(set(steps)) == 1
    assert [output.text for output in outputs[4:]] == [generate(session, [each], settings)[0].text for each in sampled]
    with pytest.raises(UsageError, match="5 texts of 4 beams"):
        generate(session, [Request("the cat", beam_rank=4)], settings)


def test_who_asks_for_more_texts_than_a_search_finds_gets_the_last_one_again(session):
    settings = GenerateSettings(num_beams=4, max_new_tokens=8, choice=(" a", " b"))
    outputs = generate_all(session, [Request("the cat", beam_rank=rank) for rank in range(4)], settings)
    assert [output.error for output in outputs] == [None] * 4
    assert {output.text for output in outputs[:2]} == {" a", " b"}
    assert {output.text for output in outputs[1:]} == {outputs[1].text}


def test_a_search_goes_on_for_the_others_when_one_is_stopped(session):
    settings = GenerateSettings(num_beams=3, max_new_tokens=6)
    shared = SharedSearch()
    rows = [
        SequenceState(
            index=rank,
            mix=Mix(),
            prompt_ids=[1, 2, 3],
            max_new_tokens=6,
            settings=settings,
            seed=0,
            tokenizer=session.base.tokenizer,
            shared_search=shared,
            beam_rank=rank,
        )
        for rank in range(3)
    ]
    engine = Engine(session, 3, 48)
    for row in rows:
        engine.submit(row)
    engine.step()
    assert engine.num_running == 3, "one search of three beams"
    engine.stop(rows[0], "cancelled")
    while engine.is_busy:
        engine.step()
    wanted = search_beams(session, [1, 2, 3], Mix(), 6, settings)
    assert [tuple(row.new_ids) for row in rows] == [(), wanted[1].ids, wanted[2].ids]


@pytest.fixture(scope="module")
def ending_folder(tmp_path_factory):
    """A base that likes to end: EOS is among the likeliest tokens at most steps, and seldom the likeliest."""
    folder = make_base_folder(tmp_path_factory.mktemp("ending") / "base", tied=False)
    tensors = load_file(folder / "model.safetensors")
    head, bias = tensors["lm_head.weight"], tensors["transformer.ln_f.bias"]
    head[-1] += 1.5 * bias / bias.square().sum()  # EOS' logit is this much higher, whatever the text
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def search_in_transformers(folder, ids, num_beams, budget, penalty):
    """Returns the hypotheses of transformers, best first: ids without EOS, score, and whether EOS ended it."""
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    eos = model.config.eos_token_id
    found = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        num_beams=num_beams,
        num_return_sequences=num_beams,
        do_sample=False,
        max_new_tokens=budget,
        length_penalty=penalty,
        pad_token_id=eos,
        early_stopping=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    hypotheses = []
    for sequence, score in zip(found.sequences[:, len(ids) :].tolist(), found.sequences_scores.tolist(), strict=True):
        own = sequence[: sequence.index(eos)] if eos in sequence else sequence
        hypotheses.append((tuple(own), score, "stop" if eos in sequence else "length"))
    return hypotheses


@pytest.mark.parametrize("penalty", [-1.0, 0.8, 2.0])
@pytest.mark.parametrize(("num_beams", "budget"), [(2, 8), (3, 12), (6, 6), (6, 1)])
def test_every_continuation_that_is_kept_is_that_of_transformers_where_texts_end(
    ending_folder, num_beams, budget, penalty
):
    """An end counts only among the first `num_beams` candidates; whatever ends later in the list does not."""
    session = Session(load_base(str(ending_folder), choose_runtime("float32", torch.device("cpu"))))
    settings = GenerateSettings(num_beams=num_beams, length_penalty=penalty)
    reasons = set()
    for ids in PROMPTS:
        wanted = search_in_transformers(ending_folder, ids, num_beams, budget, penalty)
        found = search_beams(session, ids, Mix(), budget, settings)
        assert [(hypothesis.ids, hypothesis.finish_reason) for hypothesis in found] == [
            (own, reason) for own, _, reason in wanted
        ]
        # sums of up to 12 float32 log-probabilities of two implementations
        assert [hypothesis.score for hypothesis in found] == pytest.approx([score for _, score, _ in wanted], abs=1e-4)
        reasons |= {hypothesis.finish_reason for hypothesis in found}
    assert penalty > 1 or "stop" in reasons, "texts ended by themselves; a large penalty prefers the longest"
