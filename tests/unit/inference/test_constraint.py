"""What a constraint forbids does not come out, under any way of sampling, beside any neighbour."""

import itertools
import json
import random
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lora_gpt2.audit import run as audit_run
from lora_gpt2.core.errors import UsageError
from lora_gpt2.data.tokenizer import Tokenizer
from lora_gpt2.inference import constraint as module
from lora_gpt2.inference.constraint import adopt_constraint, start_constraint, unpack_words
from lora_gpt2.inference.generate import Request, generate, generate_all
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.session import Session
from lora_gpt2.recipe import GenerateSettings
from lora_gpt2.recipe_files import load_recipe
from lora_gpt2.store.files import Origin, publish_adapter
from tests.builders import make_adapter

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}
CHOICES = (" yes", " no", " né")


def settings(**values):
    return GenerateSettings(**{"max_new_tokens": 40, "temperature": 2.0, "top_k": 0, "top_p": 1.0, **values})


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0},
        {"top_k": 50, "top_p": 0.9},
        {"top_k": 3, "min_p": 0.2},
        {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1},
        {"logit_bias": {5: 100.0, 6: -100.0}, "frequency_penalty": 2.0},
        {"watermark": True},
        {"num_beams": 3},
    ],
)
def test_outputs_are_what_the_constraint_accepts_however_they_are_sampled(base, sampling):
    session = Session(base)
    requests = [Request("the cat", seed=seed) for seed in range(6)]
    for text in (output.text for output in generate(session, requests, settings(choice=CHOICES, **sampling))):
        assert text in CHOICES
    for output in generate(session, requests, settings(regex="[0-9]{2}-[a-c]+é", **sampling)):
        assert output.finish_reason == "length" or re.fullmatch("[0-9]{2}-[a-c]+é", output.text)
    for output in generate(session, requests, settings(json_schema=SCHEMA, **sampling)):
        value = json.loads(output.text)
        assert list(value) == ["n", "ok"]
        assert output.finish_reason == "stop"


def test_a_grammar_derives_its_output(base):
    grammar = 'start: "(" start ")" | "x"'
    outputs = generate(Session(base), [Request("a", seed=seed) for seed in range(8)], settings(grammar=grammar))
    for output in outputs:
        depth = output.text.count("(")
        assert output.finish_reason == "length" or output.text == "(" * depth + "x" + ")" * depth


def test_an_output_that_may_go_on_ends_with_eos_only_where_it_is_complete(base):
    outputs = generate(Session(base), [Request("a", seed=seed) for seed in range(40)], settings(regex="a(bc)*"))
    assert any(output.finish_reason == "stop" for output in outputs)
    for output in outputs:
        assert output.finish_reason == "length" or re.fullmatch("a(bc)*", output.text)
        assert output.constraint == "regex"


def test_neighbours_with_and_without_constraints_do_not_notice_each_other(base):
    session = Session(base)
    own = [settings(), settings(choice=CHOICES), settings(json_schema=SCHEMA), settings(regex="[xy]{3}")]
    requests = [Request("the cat", seed=7, settings=each) for each in own]
    together = generate(session, requests, GenerateSettings())
    assert together == [generate(session, [request], GenerateSettings())[0] for request in requests]


def test_probabilities_are_those_of_the_model_among_what_is_allowed(base):
    """With choices of one token each, temperature 1 samples them in proportion to their probability."""
    session, count = Session(base), 600
    ids = base.tokenizer.encode("the cat")
    logits = base.model.logits(base.model(torch.tensor([ids]), None), None)[0, -1]
    tokens = [base.tokenizer.encode(choice)[0] for choice in ("a", "q", "z")]
    expected = logits[tokens].softmax(0)
    requests = [Request("the cat", seed=seed) for seed in range(count)]
    outputs = generate(session, requests, settings(choice=("a", "q", "z"), temperature=1.0))
    shares = torch.tensor([sum(output.text == choice for output in outputs) / count for choice in ("a", "q", "z")])
    assert (shares - expected).abs().max() < 4 * (0.25 / count) ** 0.5


def test_beam_search_finds_the_likeliest_choice(base):
    choices = ("ab", "cd", "the", "dog")
    (output,) = generate(Session(base), [Request("the cat")], settings(choice=choices, num_beams=8, length_penalty=0.0))
    prompt = base.tokenizer.encode("the cat")

    def score(choice):
        ids = base.tokenizer.encode(choice)
        logprobs = base.model.logits(base.model(torch.tensor([prompt + ids]), None), None)[0].log_softmax(-1)
        return sum(float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(ids))

    assert score(output.text) >= max(map(score, choices)) - 1e-4


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"regex": "("}, "generate.regex cannot be used: unclosed group"),
        ({"regex": "(?=a)"}, "look-around"),
        ({"json_schema": {"not": {}}}, 'Unimplemented keys: \\["not"\\]'),
        ({"json_schema": {"type": "objct"}}, "Invalid type"),
        ({"grammar": "nothing of the kind"}, "generate.grammar cannot be used"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_its_reason(base, values, reason):
    with pytest.raises(UsageError, match=reason):
        generate(Session(base), [Request("a")], settings(**values))


def test_only_one_constraint_at_a_time_and_an_empty_schema_is_one():
    with pytest.raises(ValueError, match="only one of"):
        settings(regex="a", choice=("b",))
    assert settings(json_schema={}).constraint == "json_schema"
    assert settings(regex="a", constrained=False).constraint == ""


def test_words_and_truth_values_are_the_same_tokens(base):
    constraint = start_constraint(settings(choice=CHOICES), base.tokenizer)
    allowed = constraint.find_allowed()
    assert torch.equal(unpack_words(constraint.find_words()[None], len(allowed))[0], allowed)
    begins = [base.tokenizer.token_bytes[token] for token in allowed.nonzero().flatten().tolist()]
    assert all(any(choice.encode().startswith(piece) for choice in CHOICES) for piece in begins)
    assert not allowed[base.tokenizer.eos_id]


def test_a_constraint_is_compiled_once_and_copies_do_not_share_what_they_took(base):
    first = start_constraint(settings(regex="ab|cd"), base.tokenizer)
    compiled = module._compile.cache_info().misses
    second = start_constraint(settings(regex="ab|cd"), base.tokenizer)
    assert module._compile.cache_info().misses == compiled
    first.accept(base.tokenizer.encode("a")[0])
    assert first.find_allowed().nonzero().flatten().tolist() == base.tokenizer.encode("b")
    assert int(second.find_allowed().sum()) >= 2


def test_no_text_wears_out_the_constraint_of_another(base, monkeypatch):
    """Copies of a matcher share its lexer, whose states are limited."""
    monkeypatch.setattr(module, "MOST_STATES", 250)
    draw, own = random.Random(0), settings(regex=r"(.{0,40}[xyz]){3}.{0,30}end")
    for _ in range(12):
        constraint = start_constraint(own, base.tokenizer)
        for _ in range(20):
            constraint.accept(draw.choice(constraint.find_allowed().nonzero().flatten().tolist()))
    constraint = start_constraint(own, base.tokenizer)
    with pytest.raises(UsageError, match="cannot go on"):
        for _ in range(100):
            copy = constraint.copy()
            for _ in range(20):
                copy.accept(draw.choice(copy.find_allowed().nonzero().flatten().tolist()))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_token_that_stops_is_text_where_the_text_may_not_end(base, num_beams):
    """A model whose texts end at a line end can still write two lines that a grammar wants."""
    line_end = base.tokenizer.encode("\n")[0]
    base = replace(base, tokenizer=Tokenizer(base.tokenizer.backend, base.tokenizer.eos_id, more_ends=[line_end]))
    own = settings(regex="- (eggs|milk)\n- (tea|rice)", num_beams=num_beams, max_new_tokens=40)
    (found,) = generate(Session(base), [Request("the cat", seed=1)], own)
    assert re.fullmatch(own.regex, found.text)
    free = settings(regex="a(.|\n)*", num_beams=num_beams, max_new_tokens=30, logit_bias={line_end: 100.0})
    (found,) = generate(Session(base), [Request("the cat", seed=1)], free)
    assert ("\n" in found.text, found.finish_reason) == (False, "stop")


def test_a_constraint_that_breaks_ends_its_own_sequence_alone(base, monkeypatch):
    session, calls = Session(base), itertools.count()
    real = module.Constraint.find_allowed

    def find(self):
        if next(calls) == 2:
            raise UsageError("the constraint cannot go on: too complex", "make it simpler")
        return real(self)

    monkeypatch.setattr(module.Constraint, "find_allowed", find)
    requests = [Request("the cat", seed=1, settings=settings(regex="[a-z]+")), Request("the dog", seed=2)]
    broken, other = generate_all(session, requests, settings(max_new_tokens=6))
    assert isinstance(broken.error, UsageError)
    assert other == generate(session, requests[1:], settings(max_new_tokens=6))[0]


def test_an_adapter_generates_under_the_constraint_of_its_recipe_unless_told_otherwise(base, store):
    recipe = {"generate": {"choice": ["yes", "no"], "temperature": 0.1}}
    publish_adapter(store, "judge", make_adapter(base.config, 1), base, Origin(recipe=recipe))
    publish_adapter(store, "law", make_adapter(base.config, 2), base, Origin())
    session = Session(base, store)

    def write(mix, **values):
        (output,) = generate(session, [Request("the cat", Mix.parse(mix), seed=3)], settings(**values))
        return output

    assert write("judge").text in ("yes", "no")
    assert write("judge").provenance["settings"]["choice"] == ["yes", "no"]
    assert write("judge:0.5").constraint == "choice"
    assert write("judge", regex="x{3}").text == "xxx"
    for mix, values in (("judge", {"constrained": False}), ("law", {}), ("judge+law", {}), ("base", {})):
        assert write(mix, **values).constraint == ""


def test_a_recipe_from_elsewhere_that_holds_nonsense_is_refused(base, store):
    def adopt(recipe):
        manifest = publish_adapter(store, "odd", make_adapter(base.config, 1), base, Origin(recipe=recipe))
        return adopt_constraint(settings(), [manifest])

    with pytest.raises(UsageError, match="own constraint cannot be used"):
        adopt({"generate": {"choice": 7}})
    assert adopt({"generate": "nothing"}).constraint == ""
    assert adopt({"generate": {"regex": "a", "constrained": False}}).constraint == ""
    assert adopt_constraint(settings(), [None]).constraint == ""


def test_a_beam_search_in_which_nothing_is_left_goes_on_with_what_is_allowed(base):
    own = settings(choice=(" a a a a a",), num_beams=2, no_repeat_ngram_size=1)
    other = Request("the dog", seed=2)
    found = generate_all(Session(base), [Request("the cat", settings=own), other], settings(max_new_tokens=6))
    assert found[0].text == " a a a a a"
    assert found[1] == generate(Session(base), [other], settings(max_new_tokens=6))[0]


@pytest.mark.parametrize(
    "values",
    [
        {
            "json_schema": {
                "$ref": "#/$defs/a0",
                "$defs": {f"a{k}": {"type": "array", "items": {"$ref": f"#/$defs/a{k + 1}"}} for k in range(5000)},
            }
        },
        {"grammar": "start: a0\n" + "".join(f'a{k}: "y" a{k + 1}\n' for k in range(5000))},
    ],
    ids=["schema", "grammar"],
)
def test_chains_that_would_end_the_process_are_refused(base, values):
    with pytest.raises(UsageError, match="references or rules"):
        start_constraint(settings(**values), base.tokenizer)


def test_all_tokens_that_end_a_text_may_end_a_constrained_one(base):
    """A base of chats says `<|im_end|>`: the mask that allows only EOS would let it run on."""
    end = base.tokenizer.encode("z")[0]
    tokenizer = Tokenizer(base.tokenizer.backend, base.tokenizer.eos_id, end)
    constraint = start_constraint(settings(regex="[a-y]+"), tokenizer)
    assert not constraint.find_allowed()[end], "nothing is complete yet"
    constraint.accept(base.tokenizer.encode("a")[0])
    allowed = constraint.find_allowed()
    assert allowed[end]
    assert allowed[base.tokenizer.eos_id]
    constraint.accept(end)
    assert constraint.is_finished


def test_a_guard_of_copies_holds_for_the_adapters_of_its_own_prompt(monkeypatch):
    streams = {"law": np.arange(30), "code": np.arange(100, 130)}
    monkeypatch.setattr(
        audit_run,
        "read_own_text",
        lambda store, name, *_: SimpleNamespace(prepared=SimpleNamespace(train=SimpleNamespace(stream=streams[name]))),
    )
    requests = [Request("x", Mix.single("law")), Request("x"), Request("x", Mix.parse("law:0.5+code:0.5"))]
    guarded = audit_run.forbid_copies(requests, 5, None, load_recipe(None), None)
    assert [[int(index.stream[0]) for index in request.no_verbatim] for request in guarded] == [[0], [], [0, 100]]
