"""The server as OpenAI's own client and as badly behaved ones meet it."""

import asyncio
import base64
import dataclasses
import http.client
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from urllib.parse import quote

import pytest
import torch
from openai import NotFoundError, OpenAI

from lora_gpt2.core.console import SilentReporter
from lora_gpt2.core.errors import ConflictError, UsageError
from lora_gpt2.core.pages import read_asset, render_page
from lora_gpt2.inference.choose import choose_adapter
from lora_gpt2.inference.engine import Engine
from lora_gpt2.inference.generate import Request, generate
from lora_gpt2.inference.history import LocalLog
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.session import Session
from lora_gpt2.model.base import load_base
from lora_gpt2.model.runtime import choose_runtime
from lora_gpt2.rating.preferences import read_preferences
from lora_gpt2.recipe import GenerateSettings, LoraSettings, ServeSettings
from lora_gpt2.serving.api import Server
from lora_gpt2.serving.http import bind, build_http
from lora_gpt2.serving.middleware import Access
from lora_gpt2.serving.protocol import CompletionBody
from lora_gpt2.store.changes import collect_garbage, remove_adapter
from lora_gpt2.store.files import Origin, publish_adapter
from lora_gpt2.store.manifest import WEIGHTS
from tests.builders import make_adapter, make_base_folder
from tests.serving import ask, ask_async, serving

TURNS = {"user": "U: {content}", "assistant": "A: {content}"}
GREEDY = GenerateSettings(temperature=0, max_new_tokens=12, chat_turns=TURNS)
LIMITS = ServeSettings(
    max_num_seqs=8, max_waiting=32, header_timeout_seconds=1, body_timeout_seconds=1, send_timeout_seconds=2
)


@pytest.fixture
def server(base, trained):
    return Server(session=Session(base, trained), defaults=GREEDY, limits=LIMITS, access=Access(admin_key="adm"))


@pytest.fixture
def port(server):
    with serving(server) as number:
        yield number


@pytest.fixture
def client(port):
    with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as found:
        yield found


def alone(base, store, mix, prompt="the cat", settings=GREEDY, seed=0):
    return generate(Session(base, store), [Request(prompt, mix, seed)], settings)[0]


LAW, CODE = Mix.single("law"), Mix.single("code")


def test_the_official_client_gets_what_generate_writes(client, base, trained):
    mixes = {"law": LAW, "law@1": LAW, "base": Mix(), "law:0.6+code:0.4": Mix([("law", 0.6), ("code", 0.4)])}
    answers = {}
    for model, mix in mixes.items():
        answer = client.completions.create(model=model, prompt="the cat", max_tokens=12, seed=0)
        wanted = alone(base, trained, mix)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (wanted.text, wanted.finish_reason)
        assert answer.usage.completion_tokens == wanted.tokens
        assert answer.usage.prompt_tokens == len(base.tokenizer.encode("the cat"))
        assert answer.provenance == wanted.provenance | {"seeds": [0]}
        answers[model] = answer.choices[0].text
    assert len(set(answers.values())) == 3, "law and law@1 are one"


def test_streams_several_prompts_and_n(client, base, trained):
    settings = {"temperature": 1.0, "seed": 5, "max_tokens": 10, "n": 2, "extra_body": {"top_k": 0}}
    prompts = ["the cat", "a"]
    texts, reasons, usage = ["", "", "", ""], {}, None
    for piece in client.completions.create(
        model="law", prompt=prompts, stream=True, stream_options={"include_usage": True}, **settings
    ):
        usage = piece.usage or usage
        for choice in piece.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    whole = client.completions.create(model="law", prompt=prompts, **settings)
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage == whole.usage
    assert usage.prompt_tokens == sum(len(base.tokenizer.encode(prompt)) for prompt in prompts), (
        "each once, not n times"
    )
    sampled = GenerateSettings(temperature=1.0, max_new_tokens=10, top_k=0)
    each = [prompts[0], prompts[0], prompts[1], prompts[1]]
    wanted = [alone(base, trained, LAW, prompt, sampled, 5 + index).text for index, prompt in enumerate(each)]
    assert texts == wanted


def test_a_version_is_as_old_as_it_is_and_a_mix_as_its_newest_adapter(client, trained):
    law, mix = client.models.retrieve("law@1"), client.models.retrieve("law:0.5+code:0.5")
    times = {name: int(trained.read_manifest(name).created.timestamp()) for name in ("law", "code")}
    assert law.created == client.models.retrieve("law").created == times["law"]
    assert mix.created == max(times.values())


def test_echo_and_logprobs(client, base, trained):
    prompt = "the cat and"
    answer = client.completions.create(model="law", prompt=prompt, max_tokens=4, echo=True, logprobs=2).choices[0]
    assert answer.text.startswith(prompt)
    scores, ids = answer.logprobs, base.tokenizer.encode(prompt)
    assert scores.tokens[: len(ids)] == [base.tokenizer.token_bytes[i].decode() for i in ids]
    assert scores.token_logprobs[0] is None
    rows = Session(base, trained).adapters_for([LAW])
    wanted = base.model.logits(base.model(torch.tensor([ids]), rows), rows)[0].log_softmax(-1)
    given = scores.token_logprobs[1 : len(ids)]
    assert given == pytest.approx([float(wanted[k, token]) for k, token in enumerate(ids[1:])], abs=1e-4)
    for top, token, logprob in zip(scores.top_logprobs, scores.tokens, scores.token_logprobs, strict=True):
        assert top is None or (len(top) == 2 + (token not in dict(list(top.items())[:2])) and top[token] == logprob)
    assert scores.text_offset[:3] == [0, len(scores.tokens[0]), len(scores.tokens[0]) + len(scores.tokens[1])]
    only = client.completions.create(model="law", prompt=prompt, max_tokens=0, echo=True, logprobs=0).choices[0]
    assert (only.text, len(only.logprobs.token_logprobs)) == (prompt, len(ids))
    streamed = []
    for piece in client.completions.create(model="law", prompt=prompt, max_tokens=4, logprobs=1, stream=True):
        for choice in piece.choices:
            streamed += choice.logprobs.token_logprobs
    assert streamed == pytest.approx(scores.token_logprobs[len(ids) :], abs=1e-5)


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_end_where_a_stop_string_ends_the_text(client, stream):
    asked = {"model": "law", "prompt": "the cat", "max_tokens": 12, "temperature": 0, "logprobs": 1}
    asked |= {"extra_body": {"structured_outputs": {"regex": "[a-z ]+"}}}  # letters, not parts of characters
    whole = client.completions.create(**asked).choices[0]
    assert "".join(whole.logprobs.tokens) == whole.text
    stop = whole.text[len(whole.text) // 2 :][:3]
    answer = client.completions.create(**asked, stop=[stop], stream=stream)
    choices = [piece.choices[0] for piece in answer] if stream else answer.choices
    text = "".join(choice.text for choice in choices)
    tokens = [token for choice in choices for token in choice.logprobs.tokens]
    offsets = [offset for choice in choices for offset in choice.logprobs.text_offset]
    assert text == whole.text[: whole.text.index(stop)]
    assert tokens == whole.logprobs.tokens[: len(tokens)]
    assert len("".join(tokens[:-1])) < len(text) <= len("".join(tokens))
    assert offsets == whole.logprobs.text_offset[: len(tokens)]


def test_token_ids_as_prompt_beams_and_stop(client, base):
    ids = base.tokenizer.encode("the cat")
    text = client.completions.create(model="law", prompt="the cat", max_tokens=8).choices[0].text
    assert client.completions.create(model="law", prompt=ids, max_tokens=8).choices[0].text == text
    both = client.completions.create(model="law", prompt=[ids, ids], max_tokens=8)
    assert [choice.text for choice in both.choices] == [text, text]
    stopped = client.completions.create(model="law", prompt=ids, max_tokens=8, stop=[text[1:3]])
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (text[: text.index(text[1:3])], "stop")
    beams = client.completions.create(model="law", prompt=ids, max_tokens=8, extra_body={"num_beams": 4})
    assert beams.choices[0].finish_reason in ("stop", "length")
    several = client.completions.create(model="law", prompt=ids, max_tokens=8, n=3, extra_body={"num_beams": 4})
    assert several.choices[0].text == beams.choices[0].text
    assert len({choice.text for choice in several.choices}) == 3


def test_models_are_the_base_and_its_adapters(client):
    assert [model.id for model in client.models.list()] == ["base", "code", "law", "auto"]
    assert client.models.retrieve("law").version == 1
    assert client.models.retrieve("law:0.5+code:0.5").id == "law:0.5+code:0.5"
    with pytest.raises(NotFoundError):
        client.models.retrieve("nobody")


def test_what_is_published_is_picked_up_and_what_is_removed_is_gone(client, base, trained):
    before = client.completions.create(model="law", prompt="the cat").choices[0].text
    publish_adapter(trained, "law", make_adapter(base.config, 9), base, Origin())
    after = client.completions.create(model="law", prompt="the cat")
    assert after.provenance["adapters"][0]["adapter"] == "law@2"
    assert after.choices[0].text == alone(base, trained, LAW).text != before
    assert client.completions.create(model="law@1", prompt="the cat").choices[0].text == before
    remove_adapter(trained, "law")
    with pytest.raises(NotFoundError) as caught:
        client.completions.create(model="law", prompt="the cat")
    assert caught.value.code == "model_not_found"
    (trained.resolve("code") / WEIGHTS).write_bytes(b"damage")
    status, _, answer = ask_completion(client.base_url.port, model="code")
    assert (status, answer["error"]["code"]) == (503, "adapter_unusable")
    assert ask_completion(client.base_url.port, model="base")[0] == 200


def test_an_adapter_of_another_base_is_no_model_of_this_server(port, trained, tmp_path):
    other = load_base(str(make_base_folder(tmp_path / "other", seed=7)), choose_runtime("float32"))
    publish_adapter(trained, "foreign", make_adapter(other.config), other, Origin())
    status, _, answer = ask_completion(port, model="foreign")
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert "another base" in answer["error"]["message"]


def ask_completion(port, **body):
    return ask(port, "/v1/completions", {"model": "law", "prompt": "the", "max_tokens": 3, **body})


BAD = [
    *({"temperature": value} for value in (-1, 101, 1e-40, "0.7", True, [])),
    *({"top_p": value} for value in (0, 1.5, -0.1, "1")),
    *({"top_k": value} for value in (-1, 1.5, "all", 10**9)),
    *({"max_tokens": value} for value in (-1, 10**9, True, 1.5, "9", 10**7)),
    *({"n": value} for value in (0, -1, 10**6, 1.5, True, "2")),
    *({"seed": value} for value in (2**64, 1.5, "a", True)),
    *({"min_p": value} for value in (-0.1, 1.1)),
    *({"stop": value} for value in ("", ["a"] * 33, 5, [1], ["x" * 201])),
    *({"logit_bias": value} for value in ({"5": 101}, {"x": 1}, [5], {"5": "a"})),
    *({"logprobs": value} for value in (-1, 21, True, "1")),
    *({"prompt": value} for value in (5, [], [[]], ["a", 5], {"a": 1}, [True], [-1], [10**9], [1.5], "\ud800")),
    *({"model": value} for value in (5, "", None, ["law"])),
    {"frequency_penalty": 3},
    {"presence_penalty": -3},
    {"repetition_penalty": 0},
    {"num_beams": 0},
    {"num_beams": 65},
    {"num_beams": 2, "logprobs": 1},
    {"num_beams": 2, "watermark": True},
    {"num_beams": 2, "n": 3},
    {"num_beams": 65},
    {"repetition_penalty": 1e-40},
    {"length_penalty": 6},
    {"no_repeat_ngram_size": -1},
    {"stream": 1},
    {"echo": "yes"},
    {"best_of": 3},
    {"suffix": "x"},
    {"temprature": 1},
    {"stream_options": {"include_usage": True}},
    {"truncate": "right"},
    {"watermark": 1},
    {"n": 65},
    {"logit_bias": {"99999999": -100}},
    {"stream": True, "stream_options": {"foo": True}},
    {"prompt": ["a"] * 65},
]


UNNAMED = ("num_beamslogprobs", "num_beamswatermark", "prompt")  # together, or too many prompts, which is n's limit


def test_every_bad_parameter_is_answered_400_and_named(port):
    assert len(BAD) >= 60
    for body in BAD:
        status, _, answer = ask_completion(port, **body)
        assert status == 400, (body, answer)
        error = answer["error"]
        assert error["param"] in body or "".join(body) in UNNAMED or body == {"temperature": 1e-40}, (body, error)
        assert error["param"] or set(body) & set(error["message"].split()), error["message"]
        assert error["type"] == "invalid_request_error"
    assert "did you mean 'temperature'" in ask_completion(port, temprature=1)[2]["error"]["message"]
    for model in (
        "nobody",
        "law@7",
        "law:x",
        "law:99",
        "law+law",
        "base+law",
        "../law",
        "a" * 300,
        "law+",
        ":",
        "@",
        "law#x",
        "law@1#0",
    ):
        assert ask_completion(port, model=model)[0] == 404, model
        assert ask(port, f"/v1/models/{quote(model)}")[0] == 404, model
    status, _, answer = ask_completion(port, model="+".join(f"a{k}" for k in range(9)))
    assert (status, "at most 8" in answer["error"]["message"]) == (400, True)


def test_a_prompt_that_does_not_fit_is_refused_or_cut(port, base):
    context = base.config.n_positions
    for length, wanted, status in (
        (context, 1, 400),
        (context - 3, 3, 200),
        (context - 3, 4, 400),
        (context + 9, 3, 400),
    ):
        found, _, answer = ask_completion(port, prompt=[5] * length, max_tokens=wanted)
        assert found == status, answer
        if status == 400:
            assert answer["error"]["code"] == "context_length_exceeded"
    assert ask_completion(port, prompt=[5] * (context + 9), truncate="left")[0] == 200
    assert ask_completion(port, prompt="")[2]["usage"]["prompt_tokens"] == 1, "an empty prompt is EOS"
    limit = ask(port, "/v1/completions", {"model": "law", "prompt": [5] * (context - 2)})
    assert limit[2]["usage"]["completion_tokens"] <= 2, "what was not asked for is what fits"


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[]", {}, 400),
        (b"", {}, 400),
        (b"null", {}, 400),
        (b"\xff\xfe", {}, 400),
        (b'{"model": "law", "model": "code"}', {}, 400),
        (b'{"model": "law", "temperature": NaN}', {}, 400),
        (b"[" * 100_000, {}, 400),
        (b'{"a":' * 5_000, {}, 400),
        (b"1" * 5000, {}, 400),
        (b"{}", {"Content-Type": "text/plain"}, 415),
        (b"{}", {"Content-Type": ""}, 415),
        (b"x" * 1_100_000, {}, 413),
        (b"{}", {"Host": "evil.example"}, 403),
        (b"{}", {"Host": ""}, 403),
        (b"", {"Content-Length": "x"}, 400),
    ],
)
def test_bodies_that_are_no_requests_are_refused(port, content, headers, status):
    found, _, answer = ask(port, "/v1/completions", content, headers)
    assert found == status
    assert status == 400 or answer["error"]["message"]
    assert ask_completion(port)[0] == 200


HALF = b'"\\ud800"'
POSTED = ("/v1/completions", "/v1/choices", "/v1/adapters/load", "/v1/adapters/unload")


@pytest.mark.parametrize("path", POSTED)
def test_half_a_surrogate_pair_anywhere_in_a_body_is_answered_400(port, path):
    admin = {"Authorization": "Bearer adm"}
    bodies = [
        b'{"name": %s}',
        b'{"model": %s}',
        b'{"model": "law", "prompt": %s}',
        b'{"model": "law", "user": %s}',
        b'{"model": "law", "stop": ["a", %s]}',
        b"{%s: 1}",
        b'{"models": ["law", %s], "chosen": "law", "prompt": "x"}',
        b'{"model": "law", "logit_bias": {%s: 1}}',
    ]
    for body in bodies:
        for half in (HALF, b'"\\uDFFFx"', b'"\xed\xa0\x80"'):
            status, _, answer = ask(port, path, body % half, admin)
            assert status == 400, (path, body)
            assert set(answer["error"]) == {"message", "type", "param", "code"}
            assert answer["error"]["type"] == "invalid_request_error"
    whole = b'{"model": "law", "prompt": "\\ud83d\\ude00", "max_tokens": 1}'
    assert ask(port, "/v1/completions", whole)[0] == 200


@pytest.mark.parametrize(
    "path", ["/%00", "/%ED%A0%80", "/" + "a" * 5000, "/v1/models/%00", "/v1/models/%ED%A0%80", "/?x=%ED%A0%80"]
)
def test_odd_paths_are_no_server_error(port, path):
    assert ask(port, path)[0] in (200, 400, 404, 414)


def test_the_smallest_top_p_keeps_the_likeliest_token(port):
    _, _, greedy = ask(port, "/v1/completions", {"model": "law", "prompt": "the", "max_tokens": 5, "temperature": 0})
    given = {"temperature": 1, "top_p": 1e-300, "top_k": 0, "min_p": 1}
    status, _, answer = ask(port, "/v1/completions", {"model": "law", "prompt": "the", "max_tokens": 5, **given})
    assert (status, answer["choices"][0]["text"]) == (200, greedy["choices"][0]["text"])


def test_a_blind_choice_is_kept_with_its_versions_and_nothing_else_is(base, trained, run, tmp_path):
    log = LocalLog(tmp_path / "state" / "lora-gpt2" / "choices.jsonl", SilentReporter())
    texts = [" sat", " ran", " hid"]
    choice = {"prompt": "the cat", "models": ["base", "law", "law:0.6+code:0.4"], "chosen": "law", "seed": 3}
    choice["texts"] = texts
    with serving(Server(session=Session(base, trained), defaults=GREEDY, limits=LIMITS, vote_log=log)) as port:
        assert ask(port, "/v1/choices", choice)[::2] == (200, {"kept": True})
        for wrong in (
            {**choice, "chosen": "x"},
            {**choice, "models": ["law"]},
            {**choice, "texts": texts[:2]},
            {**choice, "texts": [1, 2, 3]},
            {},
            b"x",
        ):
            assert ask(port, "/v1/choices", wrong)[0] == 400
        assert ask(port, "/v1/choices", {**choice, "models": ["law", "nobody"], "texts": []})[0] == 404
        for same in ("law@1", "law:1"):
            assert ask(port, "/v1/choices", {**choice, "models": ["law", same], "texts": []})[0] == 400
        assert ask(port, "/v1/choices", choice, [("Content-Type", "text/plain")])[0] == 415
    (line,) = log.path.read_text(encoding="utf-8").splitlines()
    kept = json.loads(line)
    assert kept["models"] == ["base", "law@1", "law@1:0.6+code@1:0.4"]
    assert (kept["chosen"], kept["prompt"], kept["seed"], kept["base"]) == ("law@1", "the cat", 3, base.name)
    found = [(pair.chosen, pair.rejected) for pair in read_preferences([str(log.path)]).pairs]
    assert found == [(" ran", " sat"), (" ran", " hid")]
    with serving(Server(session=Session(base, trained), defaults=GREEDY, limits=LIMITS)) as port:
        assert ask(port, "/v1/choices", choice)[2] == {"kept": False}
    code, out, _ = run("rate", "--recorded", "page", "--json")
    assert code == 0
    assert json.loads(out)["ranking"][0]["adapter"] == "law@1"


def test_routes_health_metrics_and_admin(port, server):
    assert ask(port, "/v1/nothing")[0] == 404
    assert ask(port, "/v1/completions")[0] == 405
    assert ask(port, "/healthz")[2] == {"status": "ok"}
    assert ask(port, "/readyz")[2]["status"] == "ready"
    assert ask(port, "/v1/adapters")[0] == 401
    admin = {"Authorization": "Bearer adm"}
    assert ask(port, "/v1/adapters/load", {"name": "law"}, admin)[2] == {"loaded": ["law@1"]}
    assert ask(port, "/v1/adapters", headers=admin)[2]["loaded"] == ["law@1"]
    assert ask(port, "/v1/adapters/unload", {"name": "law"}, admin)[2] == {"unloaded": ["law@1"]}
    assert ask(port, "/v1/adapters/unload", {"name": "law"}, admin)[0] == 409
    assert ask(port, "/v1/adapters/load", {"name": "nobody"}, admin)[0] == 404
    assert ask(port, "/v1/adapters/load", {"name": 5}, admin)[0] == 400
    ask_completion(port, max_tokens=3)
    ask(port, "/v1/embeddings", {"model": "base", "input": "the cat"})
    text = ask(port, "/metrics")[2].decode()
    assert 'lora_gpt2_requests_total{route="completions",status="200"} 1.0' in text
    assert 'lora_gpt2_requests_total{route="completions",status="405"} 1.0' in text
    assert 'lora_gpt2_requests_total{route="other",status="404"} 1.0' in text
    assert "lora_gpt2_generation_tokens_total 3.0" in text
    assert "lora_gpt2_adapter_loads_total 2.0" in text
    server.is_draining = True
    assert ask(port, "/readyz")[0] == 503
    assert ask_completion(port)[0] == 503


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_answered_in_the_grace_period_gets_an_error(base, trained, monkeypatch, stream):
    """And what was written of it until then is counted."""
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: time.sleep(0.1) or step(self))
    limits = LIMITS.model_copy(update={"shutdown_grace_seconds": 0.5})
    server = Server(session=Session(base, trained), defaults=GREEDY, limits=limits)
    with serving(server) as port, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask_completion, port, stream=stream, max_tokens=40)
        while not server.metrics.generation_tokens._value.get():
            time.sleep(0.01)
        server.runner.should_exit = True
        status, _, answer = waiting.result(timeout=20)
    if stream:
        assert status == 200
        assert b"the server was shut down" in answer
        assert answer.rstrip().endswith(b"data: [DONE]")
    else:
        assert status == 503
        assert "shut down" in answer["error"]["message"]
    assert server.runner.was_cut_off
    assert 0 < server.metrics.generation_tokens._value.get() < 40


def test_an_adapter_that_a_request_brought_in_can_be_unloaded(port):
    admin = {"Authorization": "Bearer adm"}
    assert ask_completion(port)[0] == 200
    assert ask(port, "/v1/adapters/unload", {"name": "law"}, admin)[::2] == (200, {"unloaded": ["law@1"]})


def test_a_key_is_asked_on_every_route_and_origins_only_where_allowed(base, trained):
    access = Access(key="secret", admin_key="adm", hosts=("box.example",), origins=("https://page.example",))
    with serving(Server(session=Session(base, trained), defaults=GREEDY, limits=LIMITS, access=access)) as port:
        basic = base64.b64encode(b"me:secret").decode()
        for path in ("/", "/v1/models", "/healthz", "/metrics", "/v1/adapters", "/nothing"):
            assert ask(port, path)[0] == 401
            assert ask(port, path, headers={"Authorization": "Bearer wrong"})[0] == 401
            for value in ("Bearer secret", f"Basic {basic}", "Bearer adm"):
                wanted = {"/nothing": 404, "/v1/adapters": 200 if value == "Bearer adm" else 401}.get(path, 200)
                assert ask(port, path, headers={"Authorization": value})[0] == wanted, (path, value)
        assert ask(port, "/v1/models", headers={"Authorization": "Basic ???"})[0] == 401
        good = {"Authorization": "Bearer secret", "Origin": "https://page.example"}
        assert ask(port, "/v1/models", headers=good)[1]["access-control-allow-origin"] == "https://page.example"
        other = {**good, "Origin": "https://evil.example"}
        assert "access-control-allow-origin" not in ask(port, "/v1/models", headers=other)[1]
        for host, status in (
            ("box.example", 200),
            ("BOX.example:80", 200),
            ("[::1]:9", 200),
            ("x.example", 403),
            ("evilbox.example", 403),
            ("xlocalhost", 403),
        ):
            assert ask(port, "/v1/models", headers={**good, "Host": host})[0] == status


def test_an_overload_is_answered_at_once_and_nobody_is_cut_off(base, trained):
    limits = ServeSettings(max_num_seqs=4, max_waiting=8)  # clients share this process: they may be slow to send, too
    with serving(Server(session=Session(base, trained), defaults=GREEDY, limits=limits)) as port:

        async def flood():
            body = {"model": "law", "prompt": "the", "max_tokens": 30, "logit_bias": {str(base.tokenizer.eos_id): -100}}
            return await asyncio.gather(*(ask_async(port, body) for _ in range(300)))

        answers = asyncio.run(flood())
        statuses = [status for status, _ in answers]
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 12
        assert len({answer["choices"][0]["text"] for status, answer in answers if status == 200}) == 1
        assert ask_completion(port)[0] == 200, "and it goes on"
        retry = [headers["retry-after"] for headers in asyncio.run(refuse_some(port)) if "retry-after" in headers]
        assert retry
        assert all(int(seconds) >= 1 for seconds in retry)


async def refuse_some(port):
    calls = (asyncio.to_thread(ask_completion, port, prompt=["the"] * 8, max_tokens=30) for _ in range(8))
    return [headers for _, headers, _ in await asyncio.gather(*calls)]


def test_slow_clients_are_let_go_and_stop_nobody(port):
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(60)]
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for place, connection in enumerate(slow):
        connection.sendall((b"POST /v1/comp", head, head + b"Content-Length: 500\r\n\r\n{")[place % 3])
    started = time.monotonic()
    assert all(ask_completion(port)[0] == 200 for _ in range(20))
    assert time.monotonic() - started < 10
    for place, connection in enumerate(slow):
        connection.settimeout(10)
        answer = b"".join(iter(lambda c=connection: c.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 408") if place % 3 == 2 else answer == b"", answer
        connection.close()


@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_a_client_that_goes_frees_its_row(base, trained, count):
    server = Server(
        session=Session(base, trained), defaults=GREEDY, limits=LIMITS.model_copy(update={"max_num_seqs": 2})
    )
    body = json.dumps({"model": "law", "prompt": "the", "max_tokens": 40, "stream": True, "n": 4})
    with serving(server) as port:
        for place in range(count):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                + f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            if place % 2:
                connection.recv(64)
            connection.close()
        deadline = time.monotonic() + 10
        while server.worker.num_admitted and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.worker.num_admitted == 0
        assert ask_completion(port)[0] == 200
        assert not server.session.slots.pinned


def test_a_constraint_that_is_too_complex_is_the_clients_mistake(port):
    """Not one of this server, which a balancer would take out of service."""
    status, _, answer = ask_completion(port, guided_regex="(a{1000}){1000}b", max_tokens=8)
    assert status == 400
    assert "make it simpler" in answer["error"]["message"]


def test_numbers_that_are_allowed_never_break_the_engine(port, server, base):
    """Every bound at once: what divides by nothing, or adds what is too large, is somebody's trouble alone."""
    extremes = {
        "logit_bias": {str(k): 100 * (-1) ** k for k in range(0, base.tokenizer.vocab_size, 7)},
        "repetition_penalty": 0.01,
        "temperature": 0.001,
        "top_p": 1e-9,
        "min_p": 1,
        "frequency_penalty": -2,
        "presence_penalty": -2,
        "no_repeat_ngram_size": 1,
        "max_tokens": 20,
    }
    for dropped in (None, *extremes):
        body = {key: value for key, value in extremes.items() if key != dropped}
        assert ask_completion(port, **body)[0] == 200, dropped
    assert server.worker.error is None


def test_an_adapter_called_like_the_base_is_the_adapter(base, base_folder, store):
    named = dataclasses.replace(base, name="law")
    publish_adapter(store, "law", make_adapter(base.config, 1), base, Origin())
    with serving(Server(session=Session(named, store), defaults=GREEDY, limits=LIMITS)) as port:
        assert ask_completion(port)[2]["provenance"]["adapters"][0]["adapter"] == "law@1"


def test_a_reader_that_takes_nothing_is_cut_off(base, trained):
    limits = LIMITS.model_copy(update={"send_timeout_seconds": 1})
    server = Server(session=Session(base, trained), defaults=GREEDY, limits=limits)
    body = json.dumps({"model": "law", "prompt": ["the"] * 5, "max_tokens": 40, "logprobs": 20, "echo": True})
    with serving(server, send_buffer=4096) as port:
        stuck = []
        for _ in range(6):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.connect(("127.0.0.1", port))
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            stuck.append(connection)
        deadline = time.monotonic() + 60
        while not server.worker.num_admitted and time.monotonic() < deadline:
            time.sleep(0.01)
        held = server.runner.server_state.connections
        while (held or server.worker.num_admitted) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not held, "every one was let go"
        for connection in stuck:
            connection.close()
        assert ask_completion(port)[0] == 200


def test_an_engine_that_fails_tells_everybody_and_begins_anew(server, port, monkeypatch):
    engine = type(server.worker._engine)
    step, failures = engine.step, [2]

    def break_sometimes(self):
        if failures[0]:
            failures[0] -= 1
            raise RuntimeError("injected")
        return step(self)

    monkeypatch.setattr(engine, "step", break_sometimes)
    for _ in range(2):
        status, _, answer = ask_completion(port)
        assert (status, answer["error"]["type"]) == (500, "server_error")
    assert failures == [0]
    assert ask_completion(port)[0] == 200
    assert ask(port, "/healthz")[0] == 200


def test_an_engine_that_fails_for_good_ends_the_server(base, trained, monkeypatch):
    server = Server(session=Session(base, trained), defaults=GREEDY, limits=LIMITS)
    monkeypatch.setattr(type(server.worker._engine), "step", lambda self: 1 / 0)
    bound, http = bind("127.0.0.1", 0), build_http(server)
    server.worker.start()
    thread = threading.Thread(target=http.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not http.started:
        time.sleep(0.01)
    port = bound.getsockname()[1]
    for stream in (True, False, True):  # a stream's end must not look like a success of the engine
        status, _, answer = ask_completion(port, stream=stream)
        assert (status, b"engine failed" in answer) == (200, True) if stream else status == 500
    thread.join(timeout=20)
    assert not thread.is_alive(), "the server has ended by itself"
    assert isinstance(server.worker.error, ZeroDivisionError)


class Churn(threading.Thread):
    """Publishes new versions, removes others and collects what is old, until it is told to stop."""

    def __init__(self, base, store, names):
        super().__init__(daemon=True)
        self.base, self.store, self.names, self.known, self.is_over = base, store, names, {}, False
        for name in names:
            self.publish(name, 50 + len(self.known), 4)

    def publish(self, name, seed, rank):
        adapter = make_adapter(self.base.config, seed, LoraSettings(rank=rank))
        self.known[name, publish_adapter(self.store, name, adapter, self.base, Origin()).digest] = adapter

    def run(self):
        draw, seed = random.Random(7), 100
        while not self.is_over:
            name, seed = draw.choice(self.names), seed + 1
            with suppress(ConflictError):  # somebody reads just now what is to go
                if draw.random() < 0.7 or not self.store.has_adapter(name):
                    self.publish(name, seed, draw.choice([2, 8]))
                else:
                    remove_adapter(self.store, name)
                collect_garbage(self.store, keep=1)
            time.sleep(0.01)


def ask_under_churn(base, store, count, names=("one", "two", "three", "four")):
    """Returns the statuses of many requests while adapters come and go, and how many texts are the wrong ones.

    Each text is computed again, alone, from the adapter whose hash the answer names.
    """
    churn = Churn(base, store, names)
    session = Session(base, store, max_slots=3)
    answers, draw = [], random.Random(3)

    async def one(port):
        body = {"model": draw.choice(names), "prompt": "the cat", "max_tokens": draw.randint(1, 8)}
        answers.append((body, *await ask_async(port, body)))

    async def many(port):
        for first in range(0, count, 16):
            await asyncio.gather(*(one(port) for _ in range(16)))
            while len(churn.known) < len(names) + first // 8 and churn.is_alive():  # at any speed, two are published
                await asyncio.sleep(0.01)

    with serving(Server(session=session, defaults=GREEDY, limits=LIMITS)) as port:
        churn.start()
        asyncio.run(many(port))
        churn.is_over = True
        churn.join()
    wrong, texts, single = 0, {}, Session(base)
    for body, status, answer in answers:
        if status == 200:
            digest = answer["provenance"]["adapters"][0]["sha256"]
            if (key := (digest, body["max_tokens"])) not in texts:
                single.load_in_memory({"known": churn.known[body["model"], digest]})  # it was published under that name
                settings = GREEDY.model_copy(update={"max_new_tokens": body["max_tokens"]})
                texts[key] = generate(single, [Request("the cat", Mix.single("known"))], settings)[0].text
            wrong += answer["choices"][0]["text"] != texts[key]
    assert len(churn.known) >= len(names) + (count - 16) // 8, "adapters were published meanwhile"
    return [status for _, status, _ in answers], wrong


@pytest.mark.parametrize("count", [96, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_answer_comes_from_a_wrong_adapter_while_adapters_come_and_go(base, store, count):
    statuses, wrong = ask_under_churn(base, store, count)
    assert wrong == 0
    assert len(statuses) == count
    assert set(statuses) <= {200, 404, 429}, "404 while one is removed"
    assert statuses.count(200) > count / 2


def test_a_switch_for_the_whole_process_would_fail_that_test(base, store, monkeypatch):
    last = [Mix()]
    resolve, adapters_for = Session.resolve, Session.adapters_for
    monkeypatch.setattr(Session, "resolve", lambda self, mix: last.__setitem__(0, resolve(self, mix)) or last[0])

    def switched(self, mixes):
        is_loaded = any(name in self.slots.references for name in last[0].references)
        return adapters_for(self, [last[0] if is_loaded else mix for mix in mixes])

    monkeypatch.setattr(Session, "adapters_for", switched)
    assert ask_under_churn(base, store, 96)[1] > 0


def test_auto_is_a_model_that_says_what_it_chose(client, port, base, trained):
    assert [model.id for model in client.models.list()] == ["base", "code", "law", "auto"]
    prompts = ["the cat", "the dog and the rain"]
    answer = client.completions.create(model="auto", prompt=prompts, n=2, seed=0)
    routes = answer.provenance["auto"]
    for index, prompt in enumerate(prompts):
        chosen = choose_adapter(Session(base, trained), prompt, ["code", "law"])
        for k in (0, 1):
            (entry,) = routes[2 * index + k]
            assert entry["adapter"].partition("@")[0] == chosen.adapter
            assert entry["probability"] == pytest.approx(chosen.probability, abs=1e-4)
            text = alone(base, trained, Mix.parse(chosen.adapter), prompt, seed=2 * index + k).text
            assert answer.choices[2 * index + k].text == text
    used = {entry["adapter"] for (entry,) in routes}
    assert {item["adapter"] for item in answer.provenance["adapters"]} == used - {"base"}, "of all choices"
    assert ask_completion(port, model="auto:0.5")[0] == 404
    assert ask_completion(port, model="auto", prompt=[[1, 2, 3], [4]])[0] == 200
    assert ask_completion(port, model="auto", prompt=7)[0] == 400


def test_auto_may_choose_again_and_a_stream_ends_with_all_choices(base, trained):
    defaults = GREEDY.model_copy(update={"reroute_every": 3})
    with serving(Server(session=Session(base, trained), defaults=defaults, limits=LIMITS)) as number:
        body = {"model": "auto", "prompt": "the cat", "stream": True, "max_tokens": 8}
        connection = http.client.HTTPConnection("127.0.0.1", number, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        lines = connection.getresponse().read().decode().split("\n\n")
        connection.close()
        whole = ask_completion(number, **body | {"stream": False})[2]
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    last = next(event for event in reversed(events) if "provenance" in event)["provenance"]["auto"]
    assert [entry["token"] for entry in last[0]] == [0, 3, 6]
    assert last == whole["provenance"]["auto"]
    assert "".join(choice["text"] for event in events for choice in event["choices"]) == whole["choices"][0]["text"]


def test_models_say_when_they_were_made(port, store):
    for model in ask(port, "/v1/models")[2]["data"]:
        assert isinstance(model["created"], int)
        if model["id"] not in ("base", "auto"):
            assert model["created"] == int(store.read_manifest(model["id"]).created.timestamp())


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "/v1/responses", "/generate", "/models"])
def test_a_route_of_another_server_is_answered_with_ours(port, path):
    for method, body in (("POST", {"model": "law", "messages": []}), ("GET", None)):
        status, _, answer = ask(port, path, body, method=method)
        assert status in (404, 405)
        assert "/v1/completions" in answer["error"]["message"] or path == "/models"


BODIES = {
    "/v1/completions": {"model": "law", "prompt": "the", "max_tokens": 2},
    "/v1/chat/completions": {"model": "law", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    "/v1/embeddings": {"model": "law", "input": "the"},
}


def mangle(draw, body):
    """Returns the bytes of a request's body with something wrong with it, most of the time."""
    values = [None, True, -1, 0, 1.5, 2**70, "x", "", [], {}, [[]], ["a", 1], {"a": 1}, "\ud800", "law", "a" * 3000]
    key = draw.choice([*body, "stop", "n", "logit_bias", "stream", "echo", "logprobs", "top_k", "new"])
    body = {**body, key: draw.choice(values)}
    content = json.dumps(body).encode()
    if draw.random() < 0.3:
        place = draw.randrange(len(content))
        content = (
            content[:place] + draw.choice([b"", b"\x00", b"\xff", b'"', b"}", b"[", b"NaN"]) + content[place + 1 :]
        )
    return content


@pytest.mark.parametrize("count", [80, pytest.param(20_000, marks=pytest.mark.slow)])
def test_no_malformed_request_is_a_server_error_and_none_leaves_anything(server, port, count):
    draw, codes = random.Random(5), set()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for _ in range(count):
        others = ["/v1/adapters/load", "/v1/models/" + "%2e" * draw.randrange(9), *list(BODIES)[1:] * 2]
        path = draw.choice(["/v1/completions"] * 6 + others)
        method = draw.choice(["POST"] * 9 + ["GET", "PUT", "DELETE", "OPTIONS", "HEAD"])
        headers = {
            "Content-Type": draw.choice(["application/json"] * 9 + ["text/html", "a" * 500, "application/json;"])
        }
        content = mangle(draw, BODIES.get(path, BODIES["/v1/completions"]))
        connection.request(method, path, content, headers)
        answer = connection.getresponse()
        answer.read()
        codes.add(answer.status)
    connection.close()
    assert max(codes) < 500, codes
    assert {200, 400, 404, 405, 415} <= codes
    assert server.worker.num_admitted == 0
    assert not server.session.slots.pinned
    assert ask_completion(port)[0] == 200


def start_process(base_folder, store, *options):
    command = [sys.executable, "-m", "lora_gpt2", "serve", "--port", "0", "--base", base_folder, "--store", store.root]
    command += options
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    line = process.stderr.readline()
    if "at http://127.0.0.1:" not in line:
        process.kill()
        pytest.fail(line + process.stderr.read())
    return process, int(line.partition("127.0.0.1:")[2].partition("/")[0])


def test_sigterm_lets_what_has_begun_end(base_folder, trained):
    process, port = start_process(base_folder, trained)
    body = {"model": "law", "prompt": "the", "max_tokens": 40, "n": 8, "stream": True}
    content = json.dumps(body)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(30)
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode())
        received = connection.recv(100)
        process.send_signal(signal.SIGTERM)
        while piece := connection.recv(65536):
            received += piece
    assert b"data: [DONE]" in received
    with process:
        assert process.wait(timeout=20) == 143
        assert "what had begun was answered" in process.stderr.read()


@pytest.mark.parametrize(("asked", "drains"), [(signal.SIGTERM, True), (signal.SIGINT, False)])
def test_a_server_that_leaves_says_so_first_and_still_answers(base_folder, trained, asked, drains):
    process, port = start_process(base_folder, trained, "--set", "serve.lameduck_seconds=3")
    with process:
        assert ask(port, "/readyz")[0] == 200
        process.send_signal(asked)
        began = time.monotonic()
        if drains:
            while ask(port, "/readyz")[0] == 200:
                assert time.monotonic() - began < 2
                time.sleep(0.02)
            assert ask(port, "/healthz")[0] == 200
            status, _, answer = ask(port, "/v1/completions", {"model": "law", "prompt": "the", "max_tokens": 4})
            assert (status, answer["provenance"]["adapters"][0]["adapter"]) == (200, "law@1")
        assert process.wait(timeout=20) == 128 + asked
        assert (time.monotonic() - began >= 3) == drains


def test_a_port_that_is_taken_and_a_host_for_all_are_refused(run, base_folder, trained):
    taken = bind("127.0.0.1", 0)
    taken.listen()
    port = taken.getsockname()[1]
    with pytest.raises(ConflictError, match=f"port {port} on 127.0.0.1 is taken"):
        bind("127.0.0.1", port)
    taken.close()
    with pytest.raises(UsageError, match="no address of this machine"):
        bind("no.such.host.invalid", 0)
    code, _, err = run("serve", "--host", "0.0.0.0", "--base", base_folder)
    assert code == 2
    assert "LORA_GPT2_API_KEY" in err


@pytest.mark.parametrize("script", ["runs", "training", "tokens"])
def test_the_pages_of_runs_have_what_their_scripts_use(script):
    values = {"title": "t", "runs": [], "can_train": True, "lead": "", "events": "events", "stop": "stop"}
    more = {"verdict": "", "figures": [], "notes": [], "settings": [], "run": {}, "base": "b"}
    page = render_page(f"{script}.html", linked=True, **values, **more)
    assert not re.search(r"<script(?! src| type=.application/json)|<style|style=|onclick|https?://", page)
    used = set(re.findall(r'\$\("([\w-]+)"\)', read_asset(f"{script}.js")))
    assert len(used) > 10
    assert used <= set(re.findall(r'id="([\w-]+)"', page))
    assert "innerHTML" not in read_asset(f"{script}.js")


def test_the_pages_files_are_served_and_belong_together(port):
    """What the browser tests would see broken first, where there is no browser."""
    status, headers, page = ask(port, "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    page = page.decode()
    assert headers["content-security-policy"].startswith("default-src 'self'")
    assert not re.search(r"<script(?! src)|<style|style=|onclick|https?://", page), "inline or from outside"
    files = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert sorted(files) == ["app.js", "icon.svg", "style.css", "training/"]
    admin = {"Authorization": "Bearer adm"}  # which training asks for
    assert all(ask(port, f"/{name}", headers=admin)[0] == 200 for name in files)
    code = ask(port, "/app.js")[2].decode()
    modules = set(re.findall(r'from "\./(\w+\.js)"', code))
    assert modules == {"dom.js", "history.js", "judge.js", "result.js"}
    code += "".join(ask(port, f"/{name}")[2].decode() for name in modules)
    used = set(re.findall(r'\$\("(\w+)"\)', code))
    assert len(used) > 10
    assert used <= set(re.findall(r'id="(\w+)"', page))
    assert "innerHTML" not in code
    fields = {
        "model",
        "prompt",
        "stream",
        "truncate",
        "logprobs",
        "seed",
        "temperature",
        "top_k",
        "top_p",
        "max_tokens",
    }
    assert fields <= set(CompletionBody.model_fields)
    assert all(field in code for field in fields)


def test_a_model_is_any_mix_that_the_command_line_takes(port):
    for model in ("law:+0.6+code:0.4", "law:6e-1+code:4e-1", "law:0.6+code:0.4"):
        status, _, answer = ask_completion(port, model=model, max_tokens=2)
        assert (status, [row["adapter"] for row in answer["provenance"]["adapters"]]) == (200, ["law@1", "code@1"])


def test_an_adapter_is_unloaded_whatever_became_of_it_in_the_store(port, base, trained):
    admin = {"Authorization": "Bearer adm"}
    assert ask(port, "/v1/adapters/load", {"name": "law"}, admin)[0] == 200
    publish_adapter(trained, "law", make_adapter(base.config, 9), base, Origin())
    assert ask(port, "/v1/adapters/unload", {"name": "law"}, admin)[2] == {"unloaded": ["law@1"]}
    assert ask(port, "/v1/adapters/load", {"name": "law"}, admin)[2] == {"loaded": ["law@2"]}
    assert ask(port, "/v1/adapters/unload", {"name": "law@1"}, admin)[0] == 409
    remove_adapter(trained, "law")
    assert ask(port, "/v1/adapters/unload", {"name": "law"}, admin)[2] == {"unloaded": ["law@2"]}
    assert ask(port, "/v1/adapters/unload", {"name": "nobody"}, admin)[0] == 409
