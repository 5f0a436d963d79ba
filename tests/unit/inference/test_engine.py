"""Rows that join, end and move among others write what they write alone; stop texts, log-probabilities, settings."""

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_gpt2.core.errors import CorruptError, ResourceError
from lora_gpt2.data.successors import DRAFTER, SuccessorTable
from lora_gpt2.inference import decoder as decoder_module
from lora_gpt2.inference import device_sampling
from lora_gpt2.inference import engine as engine_module
from lora_gpt2.inference import sequence as sequence_module
from lora_gpt2.inference.cuda_graphs import CudaGraphDecoder
from lora_gpt2.inference.engine import Engine
from lora_gpt2.inference.generate import Request, generate, generate_all
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.sampling import SamplingParams
from lora_gpt2.inference.sequence import SequenceState, StopStringMatcher, TokenLogprobs
from lora_gpt2.inference.session import Session
from lora_gpt2.model.base import load_base
from lora_gpt2.model.runtime import choose_runtime
from lora_gpt2.recipe import GenerateSettings
from lora_gpt2.store.files import Origin, publish_adapter, read_drafter
from lora_gpt2.store.references import label_of
from lora_gpt2.store.verify import verify_on_base
from tests.builders import make_adapter, make_base_folder

OPEN = GenerateSettings(max_new_tokens=12, temperature=1.0, top_k=0, top_p=1.0)
MIXES = [Mix(), Mix.single("law"), Mix.single("code"), Mix([("law", 0.5), ("code", 0.5)])]


@pytest.fixture
def session(base, store):
    for seed, name in enumerate(("law", "code"), start=1):
        publish_adapter(store, name, make_adapter(base.config, seed), base, Origin())
    return Session(base, store)


def make_rows(session, count, seed=0):
    draw, rows = random.Random(seed), []
    for index in range(count):
        ids = [draw.randrange(200) for _ in range(draw.randint(1, 20))]
        settings = OPEN.model_copy(update={"temperature": draw.choice([0.0, 0.8, 1.3])})
        budget = draw.randint(1, 15)
        rows.append(
            SequenceState(
                index=index,
                mix=draw.choice(MIXES),
                prompt_ids=ids,
                max_new_tokens=budget,
                settings=settings,
                seed=index,
                tokenizer=session.base.tokenizer,
            )
        )
    return rows


def run_alone(session, row):
    engine = Engine(session, 1, 48)
    engine.submit(row)
    while engine.is_busy:
        engine.step()
    return row


class Replaying(CudaGraphDecoder):
    """Steps as a GPU replays them: the tensors change, and no Python runs that would count on the host."""

    def _compute(self, step):
        cache = self.cache
        counts = list(cache._num_tokens), list(cache._num_written)
        super()._compute(step)
        cache._num_tokens[:], cache._num_written[:] = counts


@pytest.mark.parametrize("decoder", [None, CudaGraphDecoder, Replaying])
def test_rows_that_join_at_any_step_write_what_they_write_alone(session, decoder):
    alone = [run_alone(session, row) for row in make_rows(session, 18)]
    for max_num_seqs in (1, 3, 8):
        check_joining(session, alone, max_num_seqs, decoder)


def check_joining(session, alone, max_num_seqs, decoder):
    rows = make_rows(session, 18)
    engine, waiting, draw = Engine(session, max_num_seqs, 48), list(rows), random.Random(1)
    if decoder:  # the step that a GPU replays, here as it is
        engine.decoder = decoder(session, engine.cache)
    largest = 0
    while engine.is_busy or waiting:
        for _ in range(draw.randint(0, 3)):
            if waiting:
                engine.submit(waiting.pop(0))
        pieces = engine.step()
        largest = max(largest, len(pieces))
        assert all(row.new_ids or row.finish_reason for row, _ in pieces)
    assert [(row.new_ids, row.text, row.finish_reason) for row in rows] == [
        (row.new_ids, row.text, row.finish_reason) for row in alone
    ]
    assert largest == max_num_seqs
    assert not engine.cache.buffer.any(), "a cache without sequences holds nothing"
    assert not engine.cache.lengths.any()
    assert {row.finish_reason for row in rows} <= {"stop", "length"}


class Counting(Replaying):
    """Also counts the steps that are launched."""

    launched = 0

    def _launch(self, *args, **options):
        self.launched += 1
        return super()._launch(*args, **options)


def make_lasting_rows(session, count=4, **settings):
    """Rows that no end-of-text token ends."""
    rows = make_rows(session, count, seed=3)
    for row in rows:
        row.settings = OPEN.model_copy(update={"temperature": 0.9, "top_k": 5, **settings})
        row.params, row.max_new_tokens = SamplingParams.from_settings(row.settings), 10
    return rows


@pytest.fixture
def no_end(monkeypatch):
    monkeypatch.setattr(SequenceState, "accept", lambda self, token, logits: accept_any(self, token))


def accept_any(sequence, token):
    text = sequence.append(token)
    return text + (sequence.finish("length") if len(sequence.new_ids) >= sequence.max_new_tokens else "")


def run_all(session, rows, decoder=None, disturb=lambda step, engine: None):
    engine = Engine(session, len(rows), 48)
    if decoder:
        engine.decoder = decoder(session, engine.cache)
    for row in rows:
        engine.submit(row)
    step = 0
    while engine.is_busy:
        engine.step()
        disturb(step, engine)
        step += 1
    assert not engine.cache.buffer.any()
    return engine


def test_a_step_is_launched_before_the_last_ones_tokens_are_known_and_only_once(session, no_end):
    expected, rows = make_lasting_rows(session), make_lasting_rows(session)
    run_all(session, expected)
    engine = run_all(session, rows, Counting)
    assert [row.new_ids for row in rows] == [row.new_ids for row in expected]
    assert engine.decoder.launched == 9, "the prefill gives the first token"
    logprobs = make_lasting_rows(session, logprobs=1)
    assert run_all(session, logprobs, Counting).decoder.launched == 9
    assert [row.new_ids for row in logprobs] == [row.new_ids for row in expected]


PENALTIES = [
    {"repetition_penalty": 1.4},
    {"presence_penalty": 0.7, "frequency_penalty": 0.3},
    {"logit_bias": {5: 4.0, 9: -100.0, 10**6: 50.0}, "repetition_penalty": 0.8, "frequency_penalty": -0.2},
    {"logit_bias": dict.fromkeys(range(20), -100.0)},
]


@pytest.mark.parametrize("decoder", [CudaGraphDecoder, Replaying])
def test_penalties_and_biases_are_applied_on_the_device_as_on_the_host(session, no_end, decoder, monkeypatch):
    """Rows with different ones side by side, greedy and sampled, and none of them is sampled here."""
    expected, rows = [
        [
            row
            for index, settings in enumerate([*PENALTIES, {}])
            for row in make_lasting_rows(session, 2, temperature=0.9 * (index % 2), **settings)
        ]
        for _ in range(2)
    ]
    run_all(session, expected)
    sampled, sample_here = [], engine_module._sample_here
    monkeypatch.setattr(engine_module, "_sample_here", lambda *given: sampled.append(1) or sample_here(*given))
    run_all(session, rows, decoder)
    assert [row.new_ids for row in rows] == [row.new_ids for row in expected]
    assert len(sampled) == 1, "after the prefill, which a CPU does not sample on the device"


def test_a_step_that_was_launched_for_nothing_leaves_no_trace(session, no_end):
    """A row is changed from outside, a row leaves, and an adapter is loaded into other memory."""
    expected, rows = make_lasting_rows(session), make_lasting_rows(session)

    def disturb(step, engine):
        running = engine.scheduler.running
        if step == 3 and running:
            running[0].new_ids[-1] = 7
        if step == 5 and len(running) > 2:
            engine.stop(running[1], "interrupted")
        if step == 6:
            session.slots.num_loads += 1

    run_all(session, expected, disturb=disturb)
    engine = run_all(session, rows, Counting, disturb)
    assert [row.new_ids for row in rows] == [row.new_ids for row in expected]
    assert 9 < engine.decoder.launched <= 13


def test_tokens_that_the_device_cannot_decide_are_sampled_from_the_right_logits(session, no_end, monkeypatch):
    """Where too many tokens are equally likely; the step after it was launched already."""
    rows, expected = make_lasting_rows(session), make_lasting_rows(session)
    with monkeypatch.context() as patched:
        patched.setattr(device_sampling, "CANDIDATES", 5)  # fewer than the top-k and one more
        engine = run_all(session, rows, Counting)
    run_all(session, expected)
    assert [row.new_ids for row in rows] == [row.new_ids for row in expected]
    assert engine.decoder.launched > 15, "most steps were needed twice"


def test_a_row_that_is_stopped_leaves_and_the_others_are_not_disturbed(session):
    rows, alone = make_rows(session, 6, seed=2), [run_alone(session, row) for row in make_rows(session, 6, seed=2)]
    for row in (*rows, *alone):
        row.finish_reason = row.finish_reason if row in alone else ""
    engine = Engine(session, 6, 48)
    for row in rows:
        row.max_new_tokens = max(row.max_new_tokens, 4)
        engine.submit(row)
    engine.step()
    engine.stop(rows[0], "interrupted")
    while engine.is_busy:
        engine.step()
    assert (rows[0].finish_reason, len(rows[0].new_ids)) == ("interrupted", 1)
    for row, single in zip(rows[1:], alone[1:], strict=True):
        assert row.new_ids[: len(single.new_ids)] == single.new_ids


def test_each_request_may_have_its_own_settings(session):
    own = GenerateSettings(max_new_tokens=2, temperature=0)
    long, short = generate(session, [Request("the", Mix(), 1), Request("the", Mix(), 1, own)], OPEN)
    assert short.tokens <= 2 < long.tokens


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("stops", "shown", "hit"),
    [
        (["cd"], "ab", True),
        (["x"], "abcdabce", False),
        (["abce", "zz"], "abcd", True),
        (["e"], "abcdabc", True),
        (["da", "cda"], "ab", True),
        (["abcdabcex"], "abcdabce", False),
    ],
)
def test_stop_texts_are_found_across_pieces_and_nothing_of_them_is_shown(stops, shown, hit, chunk):
    matcher, text, found = StopStringMatcher(stops), "abcdabce", ""
    for start in range(0, len(text), chunk):
        found += matcher.push(text[start : start + chunk])
        if matcher.is_matched:
            break
    found += "" if matcher.is_matched else matcher.finish()
    assert (found, matcher.is_matched) == (shown, hit)


def test_a_stop_text_ends_the_continuation_before_it(session):
    (whole,) = generate(session, [Request("the cat", Mix.single("law"), 3)], OPEN)
    stop = whole.text[4:6]
    pieces = []
    (cut,) = generate(
        session,
        [Request("the cat", Mix.single("law"), 3)],
        OPEN.model_copy(update={"stop": (stop,)}),
        on_text=lambda index, piece: pieces.append(piece),
    )
    assert cut.text == whole.text[: whole.text.index(stop)] == "".join(pieces)
    assert cut.finish_reason == "stop"


def test_logprobs_are_those_of_the_network(session):
    (output,) = generate(session, [Request("the cat", Mix.single("law"), 3)], OPEN.model_copy(update={"logprobs": 3}))
    base, mix = session.base, Mix.single("law")
    ids = base.tokenizer.encode("the cat")
    assert len(output.logprobs) == output.tokens
    for item in output.logprobs:
        rows = session.adapters_for([mix])
        wanted = base.model.logits(base.model(torch.tensor([ids]), rows), rows)[0, -1].log_softmax(0)
        assert item.logprob == pytest.approx(float(wanted[item.token]), abs=1e-4)
        assert [token for token, _ in item.top] == wanted.topk(3).indices.tolist()
        ids.append(item.token)
    assert "logprobs" in output.to_json()
    assert "logprobs" not in generate(session, [Request("a")], OPEN)[0].to_json()


def test_beams_and_samples_grow_side_by_side(session):
    num_beams = OPEN.model_copy(update={"num_beams": 3, "max_new_tokens": 8})
    requests = [Request("the", Mix.single("law"), 1, settings) for settings in (OPEN, num_beams, OPEN, num_beams)]
    together = generate(session, requests, OPEN)
    assert [output.text for output in together] == [generate(session, [r], OPEN)[0].text for r in requests]
    assert together[1].text != together[0].text


def test_a_prompts_own_tokens_are_scored_as_one_forward_pass_scores_them(session, monkeypatch):
    monkeypatch.setattr(decoder_module, "SCORED_TOKENS", 3)
    ids, base, mix = [5, 9, 2, 7, 7, 30, 4, 11], session.base, Mix.single("law")
    row = SequenceState(
        index=0,
        mix=mix,
        prompt_ids=ids,
        max_new_tokens=0,
        settings=OPEN.model_copy(update={"logprobs": 2}),
        seed=0,
        tokenizer=base.tokenizer,
        scores_prompt=True,
    )
    run_alone(session, row)
    assert (row.new_ids, row.finish_reason, row.text) == ([], "length", "")
    rows = session.adapters_for([mix])
    logits = base.model.logits(base.model(torch.tensor([ids]), rows), rows)[0].log_softmax(-1)
    wanted = [float(logits[place, token]) for place, token in enumerate(ids[1:])]
    assert [item.logprob for item in row.prompt_logprobs] == pytest.approx(wanted, abs=1e-5)
    assert [item.token for item in row.prompt_logprobs] == ids[1:]
    assert all(len(item.top) == 2 for item in row.prompt_logprobs)


def test_a_head_wider_than_the_vocabulary_scores_a_prompt_as_it_scores_what_it_writes(tmp_path):
    """Checkpoints pad the vocabulary, to 50,304 for example: no token has those rows, so they are no candidates."""
    folder = make_base_folder(tmp_path / "padded")
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.wte.weight"] = torch.cat([tensors["transformer.wte.weight"], 3 * torch.ones(24, 16)])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 24}))
    session = Session(load_base(str(folder), choose_runtime("float32", torch.device("cpu"))))
    written = make_row(session, Mix(), budget=8, logprobs=2)
    run_alone(session, written)
    scored = make_row(session, Mix(), budget=0, logprobs=2)
    scored.prompt_ids, scored.scores_prompt = written.ids, True
    run_alone(session, scored)
    found = scored.prompt_logprobs[len(written.prompt_ids) - 1 :]
    assert [item.token for item in found] == written.new_ids
    assert [item.logprob for item in found] == pytest.approx([item.logprob for item in written.logprobs], abs=1e-4)
    assert all(token < config["vocab_size"] for item in found for token, _ in item.top)


def test_a_row_that_cannot_grow_ends_alone(session, monkeypatch):
    draw = sequence_module.draw_uniform

    def fail_for_seed_2(seed, step):
        if seed == 2:
            raise RuntimeError("no such distribution")
        return draw(seed, step)

    rows = [
        SequenceState(
            index=k,
            mix=Mix.single("law"),
            prompt_ids=[1, 2],
            max_new_tokens=6,
            settings=OPEN,
            seed=k,
            tokenizer=session.base.tokenizer,
        )
        for k in (1, 2, 3)
    ]
    alone = [
        run_alone(
            session,
            SequenceState(
                index=k,
                mix=Mix.single("law"),
                prompt_ids=[1, 2],
                max_new_tokens=6,
                settings=OPEN,
                seed=k,
                tokenizer=session.base.tokenizer,
            ),
        )
        for k in (1, 3)
    ]
    monkeypatch.setattr(sequence_module, "draw_uniform", fail_for_seed_2)
    engine = Engine(session, 3, 48)
    for row in rows:
        engine.submit(row)
    while engine.is_busy:
        engine.step()
    assert (rows[1].finish_reason, str(rows[1].error)) == ("error", "no such distribution")
    assert [rows[0].new_ids, rows[2].new_ids] == [row.new_ids for row in alone]
    with pytest.raises(ResourceError, match="no such distribution"):
        generate(session, [Request("a", Mix(), 2)], OPEN)


def test_beams_count_as_rows_and_wide_ones_wait_for_an_empty_engine(session):
    wide = OPEN.model_copy(update={"num_beams": 4})
    rows = [
        SequenceState(
            index=k,
            mix=Mix(),
            prompt_ids=[1, 2],
            max_new_tokens=5,
            settings=settings,
            seed=k,
            tokenizer=session.base.tokenizer,
        )
        for k, settings in enumerate((OPEN, wide, OPEN))
    ]
    engine = Engine(session, 2, 48)
    for row in rows:
        engine.submit(row)
    largest = 0
    while engine.is_busy:
        engine.step()
        largest = max(largest, engine.num_running)
    assert all(row.finish_reason for row in rows)
    assert largest == 4, "alone"


def make_row(session, mix, num_beams=1, budget=30, **settings):
    """Returns a row that ends by its budget, unless something else ends it."""
    bias = {session.base.tokenizer.eos_id: -100.0}
    settings = OPEN.model_copy(update={"num_beams": num_beams, "logit_bias": bias, "temperature": 0.0, **settings})
    return SequenceState(
        index=0,
        mix=mix,
        prompt_ids=[1, 2, 3],
        max_new_tokens=budget,
        settings=settings,
        seed=0,
        tokenizer=session.base.tokenizer,
    )


def list_free(session):
    """Returns the adapters that nothing holds, and takes them out of their slots."""
    with torch.inference_mode():  # as the engine brings them in
        return sorted(label_of(name) for name in session.slots.references if session.slots.evict(name))


LAW, CODE, BOTH = MIXES[1:]


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("how", ["length", "stop text", "stopped", "all stopped", "error", "no budget"])
def test_whatever_ends_a_row_its_adapters_are_free_afterwards_and_not_before(session, monkeypatch, num_beams, how):
    budget = {"length": 3, "no budget": 0}.get(how, 30)
    stop = ()
    if how == "stop text":
        seen = run_alone(session, make_row(session, BOTH, num_beams))
        stop = (seen.text[2:4],)
        list_free(session)
    rows = [make_row(session, BOTH, num_beams, budget, stop=stop), make_row(session, LAW, num_beams, budget, stop=stop)]
    engine = Engine(session, 8, 48)
    for row in rows:
        engine.submit(row)
    engine.step()
    if budget:
        assert list_free(session) == [], "they are in use"
        assert session.slots.references
    if how == "stopped":
        for row in rows:
            engine.stop(row, "cancelled")
    elif how == "all stopped":
        assert engine.stop_all("interrupted") == [(row, "") for row in rows]
    elif how == "error":
        name = "adjust_logits" if num_beams > 1 else "adjust_row"
        module = "lora_gpt2.inference.beam" if num_beams > 1 else "lora_gpt2.inference.sequence"
        monkeypatch.setattr(f"{module}.{name}", lambda *arguments, **options: [][0])
    while engine.is_busy:
        engine.step()
    assert engine.num_running == 0
    reason = {"stopped": "cancelled", "all stopped": "interrupted", "error": "error", "stop text": "stop"}
    assert rows[0].finish_reason == reason.get(how, "length")
    assert list_free(session) == ["code", "law"]


def test_many_searches_and_rows_need_no_more_slots_than_there_are(base, store, session):
    """What has ended makes room: without that, slots would be as many as adapters were ever named."""
    for seed in range(3, 7):
        publish_adapter(store, f"a{seed}", make_adapter(base.config, seed), base, Origin())
    small = Session(base, store, max_slots=2)
    engine = Engine(small, 4, 48)
    for name in ("a3", "law", "a4", "code", "a5", "law", "a6", "a3"):
        for num_beams in (3, 1):
            row = make_row(small, Mix.single(name), num_beams, 2)
            engine.submit(row)
            while engine.is_busy:
                engine.step()
            assert len(row.new_ids) == 2
            assert len(small.slots.references) <= 2


def test_an_adapter_is_held_once_for_each_row_that_uses_it(session):
    engine = Engine(session, 8, 48)
    rows = [make_row(session, BOTH, budget=2), make_row(session, LAW, 3, budget=4), make_row(session, LAW, budget=6)]
    for row in rows:
        engine.submit(row)
    free = []
    while engine.is_busy:
        engine.step()
        free.append(list_free(session))
    assert free == [[], ["code"], [], [], [], ["law"]], "code with the first row, law with the last"


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("budget", [0, 5])
@pytest.mark.parametrize("company", [0, 1])
def test_a_row_that_is_stopped_before_its_turn_never_grows(session, num_beams, budget, company):
    engine = Engine(session, 4, 48)
    others = [make_row(session, LAW, budget=4) for _ in range(company)]
    row, last = (
        make_row(session, CODE, num_beams, budget, logprobs=int(num_beams == 1)),
        make_row(session, LAW, budget=2),
    )
    row.scores_prompt = num_beams == 1
    for each in (*others, row, last):
        engine.submit(each)
    engine.stop(row, "cancelled")
    told = []
    while engine.is_busy:
        told += [each for each, _ in engine.step()]
    assert (row.new_ids, row.text, row.finish_reason, row.error) == ([], "", "cancelled", None)
    assert (row.logprobs, row.prompt_logprobs) == ([], [])
    assert not any(each is row for each in told), "nobody hears of it"
    assert [label_of(name) for name in session.slots.references] == ["law"], "its adapter is not even loaded"
    assert [len(each.new_ids) for each in others] == [4] * company
    assert len(last.new_ids) == 2, "who stands behind it takes its turn"
    assert list_free(session) == ["law"]


def test_a_stopped_row_takes_no_room_and_a_first_reason_stays(session):
    engine = Engine(session, 1, 48)
    rows = [make_row(session, LAW, budget=2) for _ in range(4)]
    for row in rows:
        engine.submit(row)
    for row in rows[:3]:
        engine.stop(row, "cancelled")
        engine.stop(row, "interrupted")
    assert engine.num_waiting == 1, "what was stopped is not kept until its turn"
    assert [row is rows[3] for row, _ in engine.step()] == [True], "in one step, whoever stands before"
    assert [row.finish_reason for row in rows] == ["cancelled"] * 3 + [""]


def test_a_stopped_search_does_not_keep_others_waiting(session):
    engine = Engine(session, 4, 48)
    lasting, search, short = make_row(session, LAW, budget=30), make_row(session, CODE, 4), make_row(session, LAW, 1, 2)
    for row in (lasting, search, short):
        engine.submit(row)
    engine.step()
    engine.stop(search, "cancelled")
    for _ in range(2):
        engine.step()
    assert short.finish_reason == "length"
    assert not lasting.finish_reason


def test_stopping_all_ends_what_grows_searches_and_waits_with_what_each_has(session):
    engine = Engine(session, 4, 48)
    rows = [make_row(session, LAW), make_row(session, CODE, 3), make_row(session, BOTH), make_row(session, BOTH, 2)]
    for row in rows:
        engine.submit(row)
    engine.step()
    engine.step()
    assert engine.stop_all("interrupted") == [(row, "") for row in rows]
    assert not engine.is_busy
    assert [row.finish_reason for row in rows] == ["interrupted"] * 4
    assert [len(row.new_ids) for row in rows] == [2, 0, 0, 0]
    assert engine.step() == []
    assert list_free(session) == ["code", "law"]
    assert len(run_alone(session, make_row(session, BOTH, budget=3)).new_ids) == 3


def test_a_search_that_cannot_begin_fails_alone(session, monkeypatch):
    def fail(*args):
        raise RuntimeError("no room")

    monkeypatch.setattr(engine_module, "BeamSearch", fail)
    beams = GenerateSettings(num_beams=2, max_new_tokens=4)
    requests = [Request("the cat", Mix.single("law"), settings=beams), Request("the cat", Mix.single("code"))]
    failed, fine = generate_all(session, requests, OPEN)
    assert "no room" in failed.error.message
    assert fine.error is None
    assert fine.text
    assert session.slots.pinned == []


def test_log_probabilities_are_those_of_the_whole_head(session):
    """A head may have more rows than there are tokens: they take their part, as in `evaluate` and transformers."""
    logits = torch.tensor([1.0, 2.0, 3.0, 9.0])
    found = TokenLogprobs.from_logits(logits, 1, 2, vocab_size=3)
    wanted = logits.log_softmax(0)
    assert found.logprob == pytest.approx(float(wanted[1]))
    assert [token for token, _ in found.top] == [2, 1]


def test_a_drafter_with_tokens_that_are_none_is_refused(session, base, store):
    table = SuccessorTable(np.array([1, 2], np.uint32), np.array([5, 60000], np.uint16))
    origin = Origin(pages={DRAFTER: table.to_bytes()})
    publish_adapter(store, "evil", make_adapter(base.config, 3), base, origin)
    with store.open("evil") as version, pytest.raises(CorruptError, match="no table of successors"):
        read_drafter(version, base.tokenizer.vocab_size)
    (verdict,) = verify_on_base(store, [store.read_manifest("evil")], base)
    assert "no table of successors" in verdict.failure
