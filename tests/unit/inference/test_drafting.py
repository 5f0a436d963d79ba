"""With drafts or without, a text is the same, token by token; drafts that bring nothing stop."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lora_gpt2.core.errors import CorruptError
from lora_gpt2.data.ngram_index import NgramIndex
from lora_gpt2.data.successors import DRAFTER, SuccessorTable
from lora_gpt2.inference import drafting
from lora_gpt2.inference.decoder import Decoder
from lora_gpt2.inference.drafting import MOST_DRAFTED, Drafter, limit_drafts
from lora_gpt2.inference.engine import Engine
from lora_gpt2.inference.generate import Request, generate
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.open import load_for_inference
from lora_gpt2.inference.sequence import SequenceState
from lora_gpt2.inference.session import Session
from lora_gpt2.recipe import GenerateSettings
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.files import Origin, publish_adapter
from tests.builders import make_adapter, make_base_folder

PROMPTS = ["the cat and the dog and the cat and the", "a b a b a b a", "rain rain rain rain", "the man on the hill"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = make_base_folder(tmp_path_factory.mktemp("packed") / "base", context=160)
    return load_for_inference(str(folder), "float16")


@pytest.fixture
def session(packed):
    found = Session(packed)
    found.load_in_memory({name: make_adapter(packed.config, seed) for seed, name in enumerate(("law", "code"))})
    return found


@pytest.fixture
def checks(monkeypatch):
    """The drafts that were checked."""
    seen = []
    real = Decoder.check_drafts

    def check(self, sequences, drafts):
        seen.append([list(draft) for draft in drafts])
        return real(self, sequences, drafts)

    monkeypatch.setattr(Decoder, "check_drafts", check)
    return seen


def make_requests(**settings):
    own = GenerateSettings(**{"max_new_tokens": 60, "temperature": 0, **settings})
    mixes = ["law", "code", "base", "law:0.6+code:0.4"]
    return [
        Request(prompt, Mix.parse(mix), seed, settings=own)
        for seed, (prompt, mix) in enumerate(zip(PROMPTS, mixes, strict=True))
    ]


def write_plainly(session, requests):
    plain = [replace(r, settings=r.settings.model_copy(update={"speculate": False})) for r in requests]
    return [generate(session, [request], GenerateSettings())[0] for request in plain]


def show(output):
    found = output.to_json()
    found["provenance"]["settings"].pop("speculate")
    found["logprobs"] = [item["token"] for item in found.get("logprobs", [])]
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.3, "top_k": 3},
        {"temperature": 1.0, "top_k": 0, "top_p": 0.5},
        {"repetition_penalty": 1.05, "frequency_penalty": 0.1},
        {"no_repeat_ngram_size": 4},
        {"logit_bias": {10: 3.0, 11: 2.5}, "temperature": 0.5},
        {"watermark": True, "temperature": 0.2},
        {"regex": "(ab){30}"},
        {"stop": ["e", "ththe"]},
        {"logprobs": 2},
        {"max_new_tokens": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("is_batch", [False, True], ids=["alone", "batch"])
def test_a_text_is_the_same_with_drafts_and_without(session, checks, settings, is_batch):
    requests = make_requests(**settings)
    expected = write_plainly(session, requests)
    assert not checks
    if is_batch:
        found = generate(session, requests, GenerateSettings())
    else:
        found = [generate(session, [request], GenerateSettings())[0] for request in requests]
    assert list(map(show, found)) == list(map(show, expected))
    for one, other in zip(found, expected, strict=True):
        for item, wanted in zip(one.logprobs, other.logprobs, strict=True):
            assert item.logprob == pytest.approx(wanted.logprob, abs=1e-3)
    assert checks or settings.get("max_new_tokens") == 3 or "no_repeat_ngram_size" in settings


def test_drafts_are_accepted_where_a_text_repeats_itself(session, checks):
    (output,) = generate(session, make_requests()[:1], GenerateSettings())
    assert output.tokens == 60
    assert len(checks) < 60 / 2, "several tokens a step"


def test_copies_that_are_forbidden_are_not_drafted_into_the_text(session):
    index = NgramIndex(session.base.tokenizer.encode("the cat and the dog and the cat and the dog"), 4)
    requests = [replace(request, no_verbatim=[index]) for request in make_requests()]
    found = generate(session, requests, GenerateSettings())
    assert [output.text for output in found] == [output.text for output in write_plainly(session, requests)]


def test_the_context_is_filled_to_the_last_token_and_not_beyond(session, packed):
    prompt = "a b " * 60
    ids = packed.tokenizer.encode(prompt)[: packed.config.n_positions - 9]
    request = replace(make_requests()[1], prompt=packed.tokenizer.decode(ids))
    (output,) = generate(session, [request], GenerateSettings())
    assert output.text == write_plainly(session, [request])[0].text
    assert output.tokens <= packed.config.n_positions - len(packed.tokenizer.encode(request.prompt))


def test_what_was_not_accepted_leaves_nothing_in_the_cache(session, packed, monkeypatch):
    monkeypatch.setattr(Drafter, "draft", lambda self, ids, most: [7] * most)
    engine = Engine(session, 2, 100)
    for index in range(2):
        engine.submit(
            SequenceState(
                index=index,
                mix=Mix(),
                prompt_ids=packed.tokenizer.encode(PROMPTS[index]),
                max_new_tokens=20,
                settings=GenerateSettings(temperature=0),
                seed=0,
                tokenizer=packed.tokenizer,
            )
        )
    for _ in range(4):
        engine.step()
    assert engine.scheduler.running
    for row, sequence in enumerate(engine.scheduler.running):
        assert int(engine.cache.lengths[row]) == sequence.num_cached
        assert not engine.cache.buffer[:, :, row, :, sequence.num_cached :].any()
        assert engine.cache.buffer[:, :, row, :, : sequence.num_cached].any()


def test_nothing_is_drafted_where_a_pass_over_more_tokens_is_dear(session, base, checks):
    generate(Session(base), [replace(make_requests()[2], settings=None)], GenerateSettings(temperature=0))
    assert not checks, "weights that are not packed"
    generate(session, [make_requests()[2]] * 9, GenerateSettings())
    assert not any(sum(map(bool, drafts)) for drafts in checks if len(drafts) > 8), "many rows"
    assert [limit_drafts(count) for count in (1, 2, 4, 8, 16)] == [MOST_DRAFTED, MOST_DRAFTED, 3, 1, 0]


def test_the_draft_is_what_followed_the_last_tokens_the_last_time():
    drafter = Drafter()
    ids = [1, 2, 3, 4, 9, 9, 1, 2, 3, 5, 6, 1, 2, 3]
    assert drafter.draft(ids, 3) == [5, 6, 1]
    assert drafter.draft([*ids, 5, 6], 2) == [1, 2]
    assert Drafter().draft([1, 2, 3], 4) == []
    assert Drafter().draft([5], 4) == []


def test_the_training_text_is_asked_where_the_text_itself_says_nothing():
    table = SuccessorTable.build(np.tile(np.array([7, 8, 9, 30], dtype=np.uint16), 5))
    assert Drafter(table).draft([1, 2, 7, 8], 3) == [9, 30, 7]
    assert Drafter(table).draft([7, 8, 5, 1, 7, 8], 3) == [5, 1, 7], "the text itself goes before"
    drafter, ids = Drafter(table), [7, 8] * 60
    for step in range(60):  # look-ups that bring nothing rest, the table is then asked
        draft = drafter.draft(ids[: 30 + step], 2)
        drafter.record(0)
    assert draft == []
    fresh = Drafter(table)
    for step in range(8):
        if (draft := fresh.draft(ids[: 30 + 2 * step], 2)) == [9, 30]:
            break
        fresh.record(0)
    assert draft == [9, 30]


def test_each_row_drafts_from_its_own_adapters_text(packed, checks, tmp_path):
    store, table = Store(tmp_path), SuccessorTable.build(np.tile(np.array([60, 61, 62], dtype=np.uint16), 5))
    for seed, (name, pages) in enumerate({"law": {DRAFTER: table.to_bytes()}, "code": {}}.items()):
        publish_adapter(store, name, make_adapter(packed.config, seed), packed, Origin(pages=pages))
    session = Session(packed, store)
    mixes = [session.resolve(Mix.parse(mix)) for mix in ("law:0.2+code:0.8", "law", "code", "base")]
    session.load_slot_weights(mixes)
    found = [session.find_successors(mix) for mix in mixes]
    assert [None if each is None else each.to_bytes() for each in found] == [table.to_bytes()] * 2 + [None] * 2
    requests = make_requests(temperature=0.4)
    expected = write_plainly(session, requests)
    assert list(map(show, generate(session, requests, GenerateSettings()))) == list(map(show, expected))
    (store.resolve("law") / DRAFTER).write_bytes(b"other")
    with pytest.raises(CorruptError, match=DRAFTER):
        Session(packed, store).load(["law"])


def test_drafts_that_bring_nothing_rest_and_are_tried_again():
    drafter, ids, tried = Drafter(), [1, 2] * 200, []
    for step in range(100):
        draft = drafter.draft(ids[: 100 + step], 4)
        tried.append(bool(draft))
        if draft:
            drafter.record(0)
    first = tried.index(False)
    assert first <= 6
    assert sum(tried[first:]) <= 1 + (100 - first) // drafting.RETRY_AFTER
    assert any(tried[first:])


def test_packed_logits_of_several_tokens_are_those_of_one_at_a_time(packed):
    """What the law rests on: the same numbers, whatever the length of a pass."""
    ids = torch.tensor([packed.tokenizer.encode(PROMPTS[0])])
    whole = packed.model.logits(packed.model(ids, None), None)
    for end in range(1, ids.shape[1]):
        part = packed.model.logits(packed.model(ids[:, :end], None), None)
        assert torch.allclose(part[0, -1], whole[0, end - 1], atol=1e-4)
