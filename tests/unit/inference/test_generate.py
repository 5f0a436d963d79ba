import pytest
import torch

from lora_gpt2.core.errors import UsageError
from lora_gpt2.core.interrupt import StopRequest
from lora_gpt2.inference.generate import Request, encode_prompt, fit_prompt, generate, iter_outputs
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.session import Session
from lora_gpt2.model.prepacked import prepack_weights
from lora_gpt2.model.probe import compute_logits, measure_difference
from lora_gpt2.recipe import GenerateSettings, LoraSettings
from lora_gpt2.store.files import Origin, publish_adapter
from tests.builders import make_adapter

SETTINGS = GenerateSettings(max_new_tokens=12, temperature=1.0, top_k=0, top_p=1.0)
GREEDY = GenerateSettings(max_new_tokens=12, temperature=0)


@pytest.fixture
def session(base, store):
    for seed, name in enumerate(("law", "code"), start=1):
        settings = LoraSettings(rank=3 + seed, alpha=8)
        publish_adapter(store, name, make_adapter(base.config, seed, settings), base, Origin())
    return Session(base, store)


def law(weight=1.0):
    return Mix.single("law", weight)


def test_greedy_decoding_with_the_cache_equals_running_the_whole_text_each_time(session):
    (output,) = generate(session, [Request("the cat", law())], GREEDY)
    ids = session.base.tokenizer.encode("the cat")
    expected = []
    for _ in range(12):
        rows = session.adapters_for([law()])
        token = int(session.base.model.logits(session.base.model(torch.tensor([ids]), rows), rows)[0, -1].argmax())
        if token == session.base.tokenizer.eos_id:
            break
        expected.append(token)
        ids.append(token)
    assert output.text == session.base.tokenizer.decode(expected)
    assert output.tokens == len(expected)


def test_a_request_gives_the_same_alone_and_in_any_batch(session):
    requests = [
        Request("the cat", law(), 1),
        Request("a", Mix.single("code"), 2),
        Request("the dog and the rain", Mix(), 3),
        Request("", Mix([("law", 0.6), ("code", 0.4)]), 4),
        Request("the cat", law(), 5),
    ]
    together = generate(session, requests, SETTINGS)
    alone = [generate(session, [request], SETTINGS)[0] for request in requests]
    assert together == alone
    assert len({output.text for output in together}) > 1


def test_seeds_repeat_and_differ(session):
    texts = [generate(session, [Request("the", law(), seed)], SETTINGS)[0].text for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_swapping_changes_the_text_and_coming_back_restores_it(session):
    mixes = [Mix(), law(), Mix.single("code"), law(), Mix()]
    texts = [generate(session, [Request("the cat and", mix, 1)], SETTINGS)[0].text for mix in mixes]
    assert texts[0] == texts[4]
    assert texts[1] == texts[3]
    assert len({texts[0], texts[1], texts[2]}) == 3


def test_the_stream_is_the_text(session):
    pieces = {0: "", 1: ""}

    def take(index, piece):
        assert piece
        pieces[index] += piece

    outputs = generate(session, [Request("the", law(), 1), Request("a", Mix(), 2)], SETTINGS, on_text=take)
    assert [output.text for output in outputs] == [pieces[0], pieces[1]]


def test_eos_ends_a_row_and_the_others_go_on(session, monkeypatch):
    plans = {"the": [5, 6, session.base.tokenizer.eos_id], "a": [7] * 12}

    def adjust(logits, ids, *rest, **options):
        token = plans["the" if ids[: len(the)] == the else "a"].pop(0)
        return torch.full_like(logits, -torch.inf).index_fill(0, torch.tensor(token), 0.0)

    the = session.base.tokenizer.encode("the")
    monkeypatch.setattr("lora_gpt2.inference.sequence.adjust_row", adjust)
    first, second = generate(session, [Request("the"), Request("a")], SETTINGS)
    assert (first.tokens, first.finish_reason) == (2, "stop")
    assert (second.tokens, second.finish_reason) == (12, "length")


def test_stopping_keeps_the_text_so_far(session):
    stop = StopRequest()
    pieces = []

    def interrupt(index, piece):
        pieces.append(piece)
        if len(pieces) == 3:
            stop.signal_number = 2

    (output,) = generate(session, [Request("the cat", law(), 1)], SETTINGS, on_text=interrupt, stop=stop)
    assert output.finish_reason == "interrupted"
    assert output.text == "".join(pieces)


def test_what_was_held_back_for_a_stop_string_is_kept_by_who_interrupts(session):
    whole = generate(session, [Request("the cat", law(), 1)], SETTINGS)[0].text
    settings = SETTINGS.model_copy(update={"stop": (whole[2:] + " and more",)})  # begins, and is never complete

    asked, pieces = [], []

    class Later(StopRequest):
        @property
        def signal_number(self):
            asked.append(1)
            return 2 if len(asked) > 7 else 0

        @signal_number.setter
        def signal_number(self, value):
            assert value == 0

    (output,) = generate(
        session, [Request("the cat", law(), 1)], settings, on_text=lambda _, piece: pieces.append(piece), stop=Later()
    )
    shorter = SETTINGS.model_copy(update={"max_new_tokens": output.tokens})
    same = generate(session, [Request("the cat", law(), 1)], shorter)
    assert output.finish_reason == "interrupted"
    assert len(output.text) > 2
    assert output.text == same[0].text == "".join(pieces)


@pytest.mark.parametrize(("length", "budget"), [(1, 12), (36, 12), (40, 8), (47, 1)])
def test_what_fits_the_context_of_48_is_continued_to_its_end(session, length, budget):
    ids, found = encode_prompt(session.base.tokenizer, "x" * length, 48, SETTINGS, False)
    assert (len(ids), found) == (length, budget)
    (output,) = generate(session, [Request("x" * length)], SETTINGS)
    assert output.tokens == budget or output.finish_reason == "stop"


@pytest.mark.parametrize("length", [48, 49, 1000])
def test_a_prompt_without_room_is_refused_or_truncated(session, length):
    with pytest.raises(UsageError) as caught:
        generate(session, [Request("x" * length)], SETTINGS)
    assert f"{length} tokens" in caught.value.message
    assert "--truncate left" in caught.value.hint
    ids, budget = encode_prompt(session.base.tokenizer, "y" + "x" * length, 48, SETTINGS, True)
    assert (len(ids), budget) == (36, 12)
    assert generate(session, [Request("x" * length)], SETTINGS, truncate_left=True)[0].prompt == "x" * length


@pytest.mark.parametrize("prompt", ["", " ", "\n", "😀", "مرحبا", "a\u200d", "\0", "<|endoftext|>"])
def test_odd_prompts_are_continued(session, prompt):
    (output,) = generate(session, [Request(prompt, law(), 1)], SETTINGS)
    assert output.prompt == prompt
    output.text.encode()


def test_mixes_are_parsed_and_described():
    assert Mix.parse(["law:0.6", "code:0.4"]) == Mix([("law", 0.6), ("code", 0.4)])
    assert Mix.parse(["law@2"]) == Mix.single("law@2")
    assert Mix.parse(["base"]) == Mix.parse([]) == ()
    assert [str(mix) for mix in (Mix(), law(), law(0.5))] == ["base", "law", "law:0.5"]
    for bad in (["law:x"], ["law:nan"], ["law:inf"], ["law:99"], ["law", "law"], ["base", "law"], ["base:1"]):
        with pytest.raises(UsageError):
            Mix.parse(bad)


def test_adapters_of_growing_rank_join_a_session(base, store):
    session = Session(base, store)
    for rank in (2, 6, 4):
        publish_adapter(store, f"r{rank}", make_adapter(base.config, rank, LoraSettings(rank=rank)), base, Origin())
    outputs = {}
    for rank in (2, 6, 4, 2, 6):
        (output,) = generate(session, [Request("the cat", Mix.single(f"r{rank}"), 1)], SETTINGS)
        assert outputs.setdefault(rank, output.text) == output.text
    assert len(set(outputs.values())) == 3
    with pytest.raises(UsageError, match="no store"):
        Session(base).load(["law"])


def test_merged_weights_write_the_same_and_leave_the_base_alone(session, base):
    before = {key: tensor.clone() for key, tensor in base.model.state_dict().items()}
    for mix in (law(), Mix([("law", 0.5), ("code", 0.5)]), Mix()):
        requests = [Request("the cat", mix, seed) for seed in (1, 2)]
        plain = generate(session, requests, SETTINGS)
        merged = generate(session, requests, SETTINGS.model_copy(update={"merge_into_base": True}))
        assert [output.text for output in merged] == [output.text for output in plain]
        assert merged[0].provenance["adapters"] == plain[0].provenance["adapters"]
        assert merged[0].adapter == plain[0].adapter
        folded = session.merge_into_base(session.resolve(mix))
        wanted = compute_logits(base, session.select(session.resolve(mix)))
        assert measure_difference(compute_logits(folded.base), wanted) < 1e-4
    assert all(torch.equal(tensor, before[key]) for key, tensor in base.model.state_dict().items())
    with pytest.raises(UsageError, match="one adapter or mix"):
        generate(session, [Request("a", law()), Request("a")], SETTINGS.model_copy(update={"merge_into_base": True}))
    prepack_weights(base.model)
    mix = session.resolve(law())
    difference = measure_difference(
        compute_logits(session.merge_into_base(mix).base), compute_logits(base, session.select(mix))
    )
    assert 0 < difference < 0.02, "packed weights are merged into, and rounded once more"


def test_a_stop_ends_each_continuation_once(session):
    stop = StopRequest()
    seen = []

    def interrupt(index, piece):
        stop.signal_number = 2

    requests = [Request("the cat", law(), n) for n in range(3)]
    for index, output in iter_outputs(session, requests, SETTINGS, on_text=interrupt, stop=stop):
        seen.append((index, output.finish_reason))
    assert sorted(seen) == [(0, "interrupted"), (1, "interrupted"), (2, "interrupted")]


@pytest.mark.parametrize("length", [1, 30, 36, 37, 47, 48, 100])
def test_truncating_makes_room_for_what_was_asked_for(length):
    ids = list(range(length))
    kept, budget = fit_prompt(ids, 12, 48, truncate_left=True)
    assert (kept, budget) == (ids[-36:], 12)
    assert fit_prompt(ids[:47], 12, 48, truncate_left=False) == (ids[:47], min(12, 48 - min(length, 47)))
    assert fit_prompt(ids, 40, 48, truncate_left=True)[0] == ids[-max(24, 8) :], "half of the context is the prompt's"
