"""Chats as OpenAI's own client asks for them, and embeddings."""

import json

import pytest
import torch
from openai import BadRequestError, OpenAI

import lora_gpt2 as lg
from lora_gpt2.core.console import SilentReporter
from lora_gpt2.core.errors import ConflictError, DataError, UsageError
from lora_gpt2.data.pipeline import read_clean
from lora_gpt2.inference.chat import ChatFormat, Message
from lora_gpt2.inference.chat_loop import ChatLoop
from lora_gpt2.inference.choose import choose_adapter
from lora_gpt2.inference.generate import Request, generate
from lora_gpt2.inference.history import LocalLog
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.routing import AUTO_MIX
from lora_gpt2.inference.session import Session
from lora_gpt2.recipe import GenerateSettings, ServeSettings
from lora_gpt2.recipe_files import load_recipe
from lora_gpt2.serving.api import Server
from lora_gpt2.store.files import Origin, publish_adapter
from tests.builders import make_adapter
from tests.serving import ask, serving

GREEDY = GenerateSettings(temperature=0, max_new_tokens=8)
TURNS = {"user": "U: {content}", "assistant": "A: {content}"}
RECIPES = {
    "named": {"generate": {"chat_turns": TURNS}},
    "listed": {"data": {"template": "{messages}", "item_template": "{role}> {content}"}},
    "field": {"data": {"template": "{story}", "item_template": "{role}> {content}"}},
    "plain": {"data": {"item_template": "{role}: {content}"}},
}
HELLO = [{"role": "user", "content": "the cat"}]


@pytest.fixture
def chatty(base, store):
    for seed, (name, recipe) in enumerate(RECIPES.items(), start=1):
        publish_adapter(store, name, make_adapter(base.config, seed), base, Origin(recipe=recipe))
    reading = ["chats.jsonl: chats in 'messages', loss from the first answer on (data.item_template='…')"]
    origin = Origin(recipe=RECIPES["plain"], data={"sources": [], "reading": reading})
    publish_adapter(store, "recognised", make_adapter(base.config, 9), base, origin)
    return store


@pytest.fixture
def port(base, chatty):
    with serving(Server(session=Session(base, chatty), defaults=GREEDY, limits=ServeSettings())) as number:
        yield number


@pytest.fixture
def client(port):
    with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as found:
        yield found


def write(base, store, name, prompt, stop=(), **settings):
    request = Request(prompt, Mix.parse(name), 0)
    return generate(Session(base, store), [request], GREEDY.model_copy(update={"stop": stop, **settings}))[0].text


@pytest.mark.parametrize(
    ("name", "prompt", "stop"),
    [
        ("named", "U: the cat\nA:", ("\nU:", "\nA:")),
        ("listed", "user> the cat\nassistant>", ("\nsystem>", "\nuser>", "\nassistant>")),
        ("recognised", "user: the cat\nassistant:", ("\nsystem:", "\nuser:", "\nassistant:")),
        ("named:0.5", "U: the cat\nA:", ("\nU:", "\nA:")),
    ],
)
def test_a_chat_is_the_text_that_the_adapter_was_trained_on(client, base, chatty, name, prompt, stop):
    answer = client.chat.completions.create(model=name, messages=HELLO)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == write(base, chatty, name, prompt, stop).lstrip(" ")
    assert answer.object == "chat.completion"
    assert answer.usage.prompt_tokens == len(base.tokenizer.encode(prompt))
    assert answer.provenance["adapters"][0]["adapter"].startswith(name.partition(":")[0])


def test_earlier_turns_and_the_system_come_first_and_parts_of_text_are_joined(client, base, chatty):
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]
    messages = [
        {"role": "developer", "content": "Be."},
        *HELLO,
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": parts},
    ]
    answer = client.chat.completions.create(model="named", messages=messages, max_completion_tokens=5)
    prompt = "Be.\nU: the cat\nA: a\nU: the cat\nA:"
    expected = write(base, chatty, "named", prompt, ("\nU:", "\nA:"), max_new_tokens=5)
    assert answer.choices[0].message.content == expected.lstrip(" ")


def test_streams_choices_and_logprobs(client):
    how = {"model": "named", "messages": HELLO, "n": 2, "temperature": 1.0, "seed": 5}
    whole = client.chat.completions.create(**how, logprobs=True, top_logprobs=2)
    for choice in whole.choices:
        assert len(choice.logprobs.content) >= 1
        assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in choice.logprobs.content)
    pieces, roles, usage = ["", ""], [None, None], None
    for chunk in client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}):
        assert chunk.object == "chat.completion.chunk"
        usage = chunk.usage or usage
        for choice in chunk.choices:
            pieces[choice.index] += choice.delta.content or ""
            roles[choice.index] = roles[choice.index] or choice.delta.role
    assert pieces == [choice.message.content for choice in whole.choices]
    assert roles == ["assistant", "assistant"]
    assert usage == whole.usage


def test_an_answer_may_be_constrained(client):
    answer = client.chat.completions.create(
        model="named", messages=HELLO, extra_body={"structured_outputs": {"choice": [" yes", " no"]}}
    )
    assert answer.choices[0].message.content in (" yes", " no"), "exactly what was allowed"


@pytest.mark.parametrize("name", ["base", "plain", "field", "plain+named", "listed+named"])
def test_a_model_without_chats_is_refused_with_the_reason(client, name):
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(model=name, messages=HELLO)
    assert caught.value.param == "model"
    assert "chats" in caught.value.message


def test_auto_takes_the_likeliest_of_the_adapters_that_were_trained_on_chats(client, base, chatty):
    answer = client.chat.completions.create(model="auto", messages=HELLO)
    names = ["listed", "named", "recognised"]
    chosen = choose_adapter(Session(base, chatty), "the cat", names, abstains=False)
    ((entry,),) = answer.provenance["auto"]
    assert entry["adapter"].partition("@")[0] == chosen.adapter
    assert entry["probability"] == pytest.approx(chosen.probability, abs=1e-4)
    same = client.chat.completions.create(model=chosen.adapter, messages=HELLO)
    assert answer.choices[0].message.content == same.choices[0].message.content


def test_auto_without_any_adapter_of_chats_is_refused(base, store):
    publish_adapter(store, "plain", make_adapter(base.config, 1), base, Origin())
    with serving(Server(session=Session(base, store), defaults=GREEDY, limits=ServeSettings())) as port:
        status, _, answer = ask(port, "/v1/chat/completions", {"model": "auto", "messages": HELLO})
    assert (status, answer["error"]["param"]) == (400, "model")
    defaults = GREEDY.model_copy(update={"chat_turns": {"user": "Q {content}", "assistant": "{content}"}})
    with serving(Server(session=Session(base, store), defaults=defaults, limits=ServeSettings())) as port:
        status, _, answer = ask(port, "/v1/chat/completions", {"model": "auto", "messages": HELLO})
    assert (status, answer["provenance"]["adapters"][0]["adapter"]) == (200, "plain@1"), "the server says how turns are"


def test_turns_set_for_the_server_are_for_models_that_have_none(base, chatty):
    defaults = GREEDY.model_copy(update={"chat_turns": {"user": "Q {content}", "assistant": "{content}"}})
    with serving(Server(session=Session(base, chatty), defaults=defaults, limits=ServeSettings())) as port:
        status, _, answer = ask(port, "/v1/chat/completions", {"model": "base", "messages": HELLO})
        assert status == 200
        assert answer["choices"][0]["message"]["content"] == write(base, chatty, "base", "Q the cat\n", ("\nQ",))
        status, _, answer = ask(port, "/v1/chat/completions", {"model": "named", "messages": HELLO})
        assert answer["usage"]["prompt_tokens"] == len(base.tokenizer.encode("U: the cat\nA:"))


def test_the_oldest_messages_make_room_and_the_answer_says_so(port, base):
    messages = [{"role": "system", "content": "S"}]
    for index in range(9):
        messages += [{"role": "user", "content": f"u{index}"}, {"role": "assistant", "content": f"a{index}"}]
    messages.append({"role": "user", "content": "last"})
    status, _, answer = ask(port, "/v1/chat/completions", {"model": "named", "messages": messages, "max_tokens": 10})
    assert status == 200
    assert 0 < answer["provenance"]["dropped_messages"] < 18
    assert answer["usage"]["prompt_tokens"] + 10 <= base.config.n_positions
    many = {"model": "named", "messages": messages[-1:], "max_completion_tokens": 8192}
    status, _, answer = ask(port, "/v1/chat/completions", many)
    assert (status, answer["provenance"]["dropped_messages"]) == (200, 0)
    messages[-1]["content"] = "long " * 40
    status, _, answer = ask(port, "/v1/chat/completions", {"model": "named", "messages": messages})
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "context_length_exceeded", "messages")


def test_an_answer_ends_with_its_own_turn_and_long_beginnings_are_no_error():
    wrapped = ChatFormat({"user": "[INST] {content} [/INST]", "assistant": "{content}</s>"})
    assert wrapped.list_stops() == ("</s>", "\n[INST]")
    assert wrapped.render([Message("user", "hi")]) == "[INST] hi [/INST]\n"
    long = ChatFormat({"user": "x" * 500 + "{content}", "assistant": "A: {content}"})
    assert all(len(stop) <= 200 for stop in long.list_stops())


@pytest.fixture
def loop(base, chatty, tmp_path):
    pieces = []
    log = LocalLog(tmp_path / "log.jsonl", SilentReporter())
    found = ChatLoop(
        session=Session(base, chatty),
        settings=GREEDY,
        seed=0,
        log=log,
        on_text=lambda _, piece: pieces.append(piece),
        mix=Mix.single("named"),
    )
    found.pieces = pieces
    return found


def test_a_chat_at_the_keyboard_is_the_one_over_http(loop, port):
    messages = []
    for typed in ("the cat", "and rain"):
        loop.run(typed)
        messages.append({"role": "user", "content": typed})
        _, _, answer = ask(port, "/v1/chat/completions", {"model": "named", "messages": messages, "temperature": 0})
        messages.append(answer["choices"][0]["message"])
        assert list(map(vars, loop.messages)) == messages
    assert "".join(loop.pieces) == "".join(m["content"] for m in messages if m["role"] == "assistant")
    assert loop.run("/show").startswith("user: the cat\nassistant:")


def test_a_chat_is_taken_back_tried_again_saved_and_loaded(loop, tmp_path):
    loop.run("/system be brief")
    loop.run("the cat")
    one = loop.messages
    assert [message.role for message in one] == ["system", "user", "assistant"]
    loop.run("and")
    assert loop.run("/undo") == f"assistant: {one[-1].content}"
    assert loop.messages == one
    loop.settings = GREEDY.model_copy(update={"temperature": 2.0, "top_k": 0})
    loop.run("/retry")
    assert loop.messages[:2] == one[:2]
    assert loop.messages != one
    path = tmp_path / "chat.jsonl"
    loop.run(f"/save {path}")
    saved = loop.messages
    assert "cleaning" not in loop.run("/new")
    assert loop.messages == saved[:1]
    loop.run(f"/load {path}")
    assert loop.messages == saved
    (document,) = read_clean([str(path)], load_recipe(None, ["data.min_characters=1"]).data, SilentReporter()).documents
    assert saved[1].content in document.prompt + document.text, "it is a row to train on"
    (tmp_path / "bad.json").write_text('{"messages": 5}')
    for line, error in (
        (f"/load {tmp_path}/bad.json", DataError),
        ("", UsageError),
        ("/retry", UsageError),
        ("/bogus", UsageError),
        ("x " * 400, UsageError),
        (f"/save {tmp_path}/bad.json", ConflictError),
    ):
        with pytest.raises(error):
            loop.run(line)
        assert loop.messages == saved


def test_those_that_chat_are_compared_and_chosen(loop):
    loop.run("the cat")
    shown = loop.run("/compare")
    assert [line[4:] for line in shown.splitlines() if line.startswith("=== ")] == ["listed", "named", "recognised"]
    before = loop.messages
    loop.mix = AUTO_MIX
    assert "adapter " in loop.run("the cat")
    loop.run("/use base")
    with pytest.raises(UsageError, match="not trained on chats"):
        loop.run("and")
    assert loop.messages[: len(before)] == before
    for _ in range(9):
        loop.mix = Mix.single("named")
        said = loop.run("the rain in the sun")
    assert "left out, to make room" in said


def test_python_answers_a_chat_as_http_does(base, chatty, port, base_folder):
    model = lg.load(str(base_folder), store=chatty.root)
    for name in ("named", "auto"):
        found = model.chat(HELLO, name, temperature=0, max_new_tokens=8)
        _, _, answer = ask(port, "/v1/chat/completions", {"model": name, "messages": HELLO, "temperature": 0})
        assert found.text == answer["choices"][0]["message"]["content"]
    allowed = model.chat(HELLO, "named", choice=[" yes", " no"], temperature=0)
    assert allowed.text in (" yes", " no")
    for messages, adapter in (
        ([], "named"),
        ([{"role": "tool", "content": "x"}], "named"),
        (HELLO, None),
        (["x"], "auto"),
    ):
        with pytest.raises(UsageError):
            model.chat(messages, adapter)


def test_auto_answers_a_chat_that_says_nothing(client):
    answer = client.chat.completions.create(model="auto", messages=[{"role": "user", "content": ""}])
    assert answer.choices[0].message.role == "assistant"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"mesages": 1}, "mesages"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"stop": [f"x{k}" for k in range(40)]}, "stop"),
        ({"n": 100}, "n"),
    ],
)
def test_bad_requests_get_400_with_the_parameter(port, change, param):
    status, _, answer = ask(port, "/v1/chat/completions", {"model": "named", "messages": HELLO, **change})
    assert (status, answer["error"]["param"]) == (400, param), answer


def test_a_model_that_is_none_and_a_body_that_is_none(port):
    assert ask(port, "/v1/chat/completions", {"model": "nobody", "messages": HELLO})[0] == 404
    assert ask(port, "/v1/chat/completions", {"model": "named", "messages": "x"})[0] == 400


def embed(session, name, text):
    tokens = torch.tensor([session.base.tokenizer.encode(text) or [session.base.tokenizer.eos_id]])
    mixes = [session.resolve(Mix.parse(name))]
    return session.base.model(tokens, session.adapters_for(mixes))[0].mean(0)


@pytest.mark.parametrize("name", ["base", "named", "named:0.5+plain:0.5"])
def test_embeddings_are_means_of_hidden_states_each_for_itself(client, base, chatty, name):
    session, texts = Session(base, chatty), ["the cat", "a", "", "the dog and the rain " * 2]
    answer = client.embeddings.create(model=name, input=texts, encoding_format="float")
    assert answer.usage.prompt_tokens == sum(len(base.tokenizer.encode(text) or [0]) for text in texts)
    for text, item in zip(texts, answer.data, strict=True):
        assert torch.allclose(torch.tensor(item.embedding), embed(session, name, text), atol=1e-5)
    packed = client.embeddings.create(model=name, input=texts[0])  # the client asks for base64
    assert torch.allclose(torch.tensor(packed.data[0].embedding), embed(session, name, texts[0]), atol=1e-5)
    ids = client.embeddings.create(model=name, input=base.tokenizer.encode("the cat"), encoding_format="float")
    assert torch.allclose(torch.tensor(ids.data[0].embedding), embed(session, name, "the cat"), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": ""}, None),
        ({"input": 5}, "input"),
        ({"input": []}, "input"),
        ({"input": [99999]}, "input"),
        ({"input": "a" * 2000}, "input"),
        ({"input": ["a"] * 3000}, "input"),
        ({"dimensions": 3}, "dimensions"),
        ({"encoding_format": "x"}, "encoding_format"),
        ({"model": "nobody"}, "model"),
    ],
)
def test_bad_embeddings_requests_are_named(port, change, param):
    status, _, answer = ask(port, "/v1/embeddings", {"model": "base", "input": "a", **change})
    assert (answer.get("error", {}).get("param"), status) == (
        param,
        200 if param is None else 404 if "model" in change else 400,
    )


def test_many_inputs_are_embedded_in_batches(port, base):
    texts = ["the cat " * (1 + k % 4) for k in range(600)]
    status, _, answer = ask(port, "/v1/embeddings", {"model": "named", "input": texts})
    assert status == 200
    found = torch.tensor([item["embedding"] for item in answer["data"]])
    assert torch.allclose(found[:4].repeat(150, 1), found, atol=1e-5)


def test_an_adapter_trained_on_chats_can_be_talked_to(run, base_folder, tmp_path, store):
    rows = [
        {"messages": [{"role": "user", "content": f"say {k}"}, {"role": "assistant", "content": f"it is {k}"}]}
        for k in range(60)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    few = ["--steps", 2, "--set", "data.block_size=16", "--set", "train.sample_tokens=0"]
    code, _, err = run("train", path, "--name", "talk", "--base", base_folder, *few)
    assert code == 0, err
    from lora_gpt2.model.base import load_base
    from lora_gpt2.model.runtime import choose_runtime

    base = load_base(str(base_folder), choose_runtime("float32"))
    with serving(Server(session=Session(base, store), defaults=GREEDY, limits=ServeSettings())) as port:
        status, _, answer = ask(port, "/v1/chat/completions", {"model": "talk", "messages": HELLO})
    assert status == 200, answer
    assert answer["usage"]["prompt_tokens"] == len(base.tokenizer.encode("user: the cat\nassistant:"))
