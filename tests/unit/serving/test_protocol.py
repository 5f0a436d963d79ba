"""A request's body becomes rows, and rows become counts: every bound from both sides."""

import json

import pytest

from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.sequence import SequenceState, TokenLogprobs
from lora_gpt2.inference.session import Session
from lora_gpt2.recipe import GenerateSettings, ServeSettings
from lora_gpt2.serving.answers import ApiError
from lora_gpt2.serving.choices import CompletionChoice, count_usage
from lora_gpt2.serving.protocol import MAX_SEED, build_sequences, count_cut, list_prompts, parse_body
from lora_gpt2.serving.worker import StepOutput

LIMITS, DEFAULTS = ServeSettings(max_choices=8), GenerateSettings(max_new_tokens=5)


@pytest.fixture
def session(base):
    return Session(base)


def make_body(**body):
    return parse_body(json.dumps({"model": "base", "max_tokens": 2, **body}).encode())


def rows_of(session, seed=0, **body):
    return build_sequences(make_body(**body), session, DEFAULTS, LIMITS, seed)


def choice_of(sequence, num_tokens):
    choice = CompletionChoice(sequence, parse_body(b'{"model": "base"}'))
    choice.add(
        StepOutput(
            index=0,
            text="",
            logprobs=(),
            prompt_logprobs=(),
            num_tokens=num_tokens,
            finish_reason="stop",
            error=None,
        )
    )
    return choice


def refusal(session, **body):
    with pytest.raises(ApiError) as caught:
        rows_of(session, **body)
    return caught.value.status, caught.value.param


SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "any", "schema": SCHEMA, "strict": True}}


@pytest.mark.parametrize(
    ("body", "kind", "value"),
    [
        ({"response_format": FORMAT}, "json_schema", SCHEMA),
        ({"response_format": {"type": "json_object"}}, "json_schema", {"type": "object"}),
        ({"guided_json": SCHEMA}, "json_schema", SCHEMA),
        ({"guided_json": json.dumps(SCHEMA)}, "json_schema", SCHEMA),
        ({"guided_regex": "[0-9]+"}, "regex", "[0-9]+"),
        ({"guided_choice": ["a", "b"]}, "choice", ("a", "b")),
        ({"guided_grammar": 'start: "x"'}, "grammar", 'start: "x"'),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", SCHEMA),
        ({"structured_outputs": {"choice": ["a"], "regex": None}}, "choice", ("a",)),
        ({"structured_outputs": {"json_object": True}}, "json_schema", {"type": "object"}),
        ({"response_format": {"type": "text"}}, "", None),
        ({"response_format": {"type": "text"}, "guided_regex": "b"}, "regex", "b"),
        ({"structured_outputs": {}}, "regex", "z"),
        ({"structured_outputs": {"choice": None, "json_object": False}}, "regex", "z"),
        ({}, "regex", "z"),
    ],
)
def test_clients_constrain_as_they_do_elsewhere_and_go_before_the_servers_default(session, body, kind, value):
    defaults = DEFAULTS.model_copy(update={"regex": "z"})
    content = json.dumps({"model": "base", "max_tokens": 2, **body}).encode()
    (sequence,) = build_sequences(parse_body(content), session, defaults, LIMITS, 0)
    assert sequence.settings.constraint == kind
    assert (sequence.constraint is None) == (kind == "")
    assert not kind or getattr(sequence.settings, kind) == value


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_regex"),
        ({"response_format": FORMAT, "guided_json": SCHEMA}, "guided_json"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"nothing": 1}}, "structured_outputs"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {}}, "response_format"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[]"}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [""]}, "guided_choice"),
        ({"guided_choice": ["a"] * 1001}, "guided_choice"),
        ({"structured_outputs": {"json": 0}}, "structured_outputs"),
        ({"structured_outputs": {"regex": 7}}, "structured_outputs"),
    ],
)
def test_constraints_that_are_none_get_400_with_the_parameter(session, body, param):
    assert refusal(session, **body) == (400, param)


@pytest.mark.parametrize("body", [{"guided_regex": "("}, {"guided_json": {"not": {}}}], ids=str)
def test_constraints_that_cannot_be_compiled_are_refused(session, body):
    with pytest.raises(ApiError, match="cannot be used") as caught:
        rows_of(session, **body)
    assert caught.value.status == 400


def test_token_ids_end_below_the_size_of_the_vocabulary(session):
    size = session.base.tokenizer.vocab_size
    for ids in ([0], [size - 1], [size - 1, 0, 5]):
        assert [row.prompt_ids for row in rows_of(session, prompt=ids)] == [ids]
    assert [row.prompt_ids for row in rows_of(session, prompt=[[0], [size - 1]])] == [[0], [size - 1]]
    for ids in ([size], [size + 1], [0, size], [size, 0], [[0], [size]], [[size], [0]], [[5, size, 5]], [2**40], [-1]):
        assert refusal(session, prompt=ids) == (400, "prompt"), ids
    with pytest.raises(ApiError, match=f"below {size}"):
        rows_of(session, prompt=[size])


def test_a_prompt_is_a_text_or_ids_or_a_list_of_either():
    for prompt, found in (
        ("a", ["a"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([5], [[5]]),
        ([5, 6], [[5, 6]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ):
        assert list_prompts(prompt) == found
    for prompt in (None, 5, [], [[]], ["a", 5], [5, "a"], [[5], []], [[5], "a"], [True], [1.0], [[True]], {"a": 1}):
        with pytest.raises(ApiError) as caught:
            list_prompts(prompt)
        assert (caught.value.status, caught.value.param) == (400, "prompt")


def test_null_is_left_out():
    nulls = dict.fromkeys(("n", "stream", "echo", "seed", "stop", "temperature", "logprobs", "max_tokens", "prompt"))
    assert parse_body(json.dumps({"model": "base", **nulls}).encode()) == parse_body(b'{"model": "base"}')
    with pytest.raises(ApiError, match="model"):
        parse_body(b'{"model": null}')
    assert parse_body(b'{"model": "base", "stop_token_ids": null}') == parse_body(b'{"model": "base"}')
    with pytest.raises(ApiError, match="there is no parameter 'nn'"):
        parse_body(b'{"model": "base", "nn": 0}')


def test_offsets_are_those_of_the_text_also_beside_a_broken_character(session):
    tokenizer = session.base.tokenizer
    broken, whole = tokenizer.encode("\U0001f642"), tokenizer.encode(" the cat")
    for ids in ([broken[0], *whole], [*whole, *broken, *whole], [*broken[:2], *broken, *whole, broken[0]]):
        body = make_body(prompt=ids, max_tokens=0, logprobs=0, echo=True)
        (row,) = build_sequences(body, session, DEFAULTS, LIMITS, 0)
        choice = CompletionChoice(row, body)
        scored = tuple(TokenLogprobs(token=token, logprob=-1.0, top=()) for token in ids[1:])
        choice.add(
            StepOutput(
                index=0, text="", logprobs=(), prompt_logprobs=scored, num_tokens=0, finish_reason="length", error=None
            )
        )
        shown = choice.take_json()
        for token, offset in zip(shown["logprobs"]["tokens"], shown["logprobs"]["text_offset"], strict=True):
            if not token.startswith("bytes:"):
                assert shown["text"][offset:].startswith(token), (shown["text"], token, offset)


def test_each_prompt_has_n_rows_side_by_side_with_seeds_that_count_up(session):
    rows = rows_of(session, 7, prompt=[[5], [6, 7, 8], [9, 9]], n=2)
    assert [(row.index, row.prompt_ids, row.seed) for row in rows] == [
        (0, [5], 7),
        (1, [5], 8),
        (2, [6, 7, 8], 9),
        (3, [6, 7, 8], 10),
        (4, [9, 9], 11),
        (5, [9, 9], 12),
    ], "equal prompts would otherwise have equal texts"
    assert [row.seed for row in rows_of(session, MAX_SEED, prompt="a", n=2)] == [MAX_SEED, 0], "a seed has 63 bits"


@pytest.mark.parametrize(("lengths", "choices"), [([4], 1), ([4], 3), ([1, 6], 1), ([1, 6], 2), ([5, 1, 2], 2)])
def test_usage_counts_each_prompt_once_and_every_continuation(session, lengths, choices):
    rows = rows_of(session, prompt=[[7] * length for length in lengths], n=choices)
    assert len(rows) == len(lengths) * choices
    answers = [choice_of(row, row.index + 1) for row in rows]
    written = sum(range(1, len(rows) + 1))
    assert count_usage(answers, choices) == {
        "prompt_tokens": sum(lengths),
        "completion_tokens": written,
        "total_tokens": sum(lengths) + written,
    }


def test_a_token_that_ends_a_row_is_not_counted_as_written(session):
    row = SequenceState(
        index=0,
        mix=Mix(),
        prompt_ids=[1, 2],
        max_new_tokens=5,
        settings=DEFAULTS,
        seed=0,
        tokenizer=session.base.tokenizer,
    )
    row.finish("stop")
    assert count_usage([choice_of(row, len(row.new_ids))], 1) == {
        "prompt_tokens": 2,
        "completion_tokens": 0,
        "total_tokens": 2,
    }


def test_as_many_rows_are_taken_as_are_allowed_and_not_one_more(session):
    assert len(rows_of(session, prompt=["a"] * 4, n=2)) == 8
    assert refusal(session, prompt=["a"] * 3, n=3) == (400, "n")
    assert len(rows_of(session, prompt=["a"] * 2, num_beams=4)) == 2
    assert refusal(session, prompt=["a"] * 3, num_beams=3) == (400, "num_beams")
    assert refusal(session, prompt="a", n=3, num_beams=2) == (400, "num_beams")
    two = rows_of(session, prompt=["a", "b"], n=2, num_beams=3)
    assert [row.beam_rank for row in two] == [0, 1, 0, 1]
    assert two[0].shared_search is two[1].shared_search is not two[2].shared_search


def test_a_prompt_and_what_is_asked_for_fill_the_context_and_no_more(session):
    context = session.base.config.n_positions
    (row,) = rows_of(session, prompt=[5] * (context - 2), max_tokens=2)
    assert (len(row.prompt_ids), row.max_new_tokens) == (context - 2, 2)
    assert refusal(session, prompt=[5] * (context - 1), max_tokens=2) == (400, "prompt")
    assert refusal(session, prompt=[5], max_tokens=4096) == (400, "prompt"), "the context is the limit that is named"
    (row,) = rows_of(session, prompt=[5] * context, max_tokens=0)
    assert (len(row.prompt_ids), row.max_new_tokens) == (context, 0), "only the prompt is read"
    assert refusal(session, prompt=[5] * (context + 1), max_tokens=0) == (400, "prompt")
    (row,) = rows_of(session, prompt=[5] * (context - 1), max_tokens=None)
    assert row.max_new_tokens == 1, "what was not asked for is what fits"
    assert refusal(session, prompt=[5] * context, max_tokens=None) == (400, "prompt")
    (row,) = rows_of(session, prompt=list(range(context + 9)), truncate="left", max_tokens=3)
    assert row.prompt_ids == list(range(12, context + 9)), "its end is kept, with room for what is asked"
    assert row.max_new_tokens == 3
    for count in (0, 3):
        body = {"prompt": list(range(context + 9)), "truncate": "left", "max_tokens": count}
        (row,), (dropped,) = rows_of(session, **body), count_cut(make_body(**body), session, DEFAULTS)
        assert dropped == context + 9 - len(row.prompt_ids) == 9 + count
    (row,) = rows_of(session, prompt="")
    assert row.prompt_ids == [session.base.tokenizer.eos_id]
