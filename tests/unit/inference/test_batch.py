"""Files of prompts: every line once, whatever interrupts; and the adapter that a text belongs to."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from lora_gpt2.core.errors import ConflictError, DataError, UsageError
from lora_gpt2.core.interrupt import StopRequest
from lora_gpt2.data.ngram_index import NgramIndex
from lora_gpt2.inference.batch import find_done, generate_file, read_prompts
from lora_gpt2.inference.choose import choose_adapter
from lora_gpt2.inference.generate import Request, generate
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.session import Session
from lora_gpt2.recipe import GenerateSettings
from lora_gpt2.store.files import Origin, publish_adapter
from lora_gpt2.store.manifest import Parent
from tests.builders import make_adapter

SETTINGS = GenerateSettings(max_new_tokens=6, temperature=1.0)


@pytest.fixture
def session(base, store):
    for seed, name in enumerate(("law", "code"), start=1):
        publish_adapter(store, name, make_adapter(base.config, seed), base, Origin())
    return Session(base, store)


def write_prompts(path, count=20):
    lines = [{"prompt": f"the cat {n}", "adapter": ["law", "law:0.5+code:0.5", "base"][n % 3]} for n in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_prompts(path, Mix(), 7)


def read_results(out):
    return sorted((json.loads(line) for line in out.read_text().splitlines()), key=lambda item: item["index"])


def test_each_line_gets_what_it_gets_alone(session, tmp_path, reporter):
    requests = write_prompts(tmp_path / "p.jsonl")
    assert generate_file(session, requests, tmp_path / "o.jsonl", SETTINGS, StopRequest(), reporter=reporter) == 20
    results = read_results(tmp_path / "o.jsonl")
    for place, (request, result) in enumerate(zip(requests, results, strict=True)):
        (alone,) = generate(session, [request], SETTINGS)
        assert (result["index"], result["seed"]) == (place, 7 + place)
        assert {key: result[key] for key in alone.to_json()} == alone.to_json()


def test_an_interrupted_file_goes_on_without_gaps_or_repeats(session, tmp_path, reporter):
    requests, out = write_prompts(tmp_path / "p.jsonl", 40), tmp_path / "o.jsonl"
    whole = tmp_path / "whole.jsonl"
    generate_file(session, requests, whole, SETTINGS, StopRequest(), reporter=reporter)

    class StopSoon(StopRequest):
        asked = 0

        @property
        def signal_number(self):
            self.asked += 1
            return 2 if self.asked > 9 else 0

    done = generate_file(session, requests, out, SETTINGS, StopSoon(), reporter=reporter)
    assert 0 < done < 40
    out.write_bytes(out.read_bytes() + b'{"index": 39, "prom')
    assert generate_file(session, requests, out, SETTINGS, StopRequest(), reporter=reporter) == 40
    assert read_results(out) == read_results(whole)
    size = out.stat().st_size
    assert generate_file(session, requests, out, SETTINGS, StopRequest(), reporter=reporter) == 40
    assert out.stat().st_size == size


def test_results_of_other_prompts_are_not_overwritten(session, tmp_path):
    requests, out = write_prompts(tmp_path / "p.jsonl"), tmp_path / "o.jsonl"
    for content in ('{"index": 0, "prompt": "other"}\n', "notes\n", '{"index": 99, "prompt": "x"}\n', "[]\n"):
        out.write_text(content)
        with pytest.raises(ConflictError):
            find_done(out, requests)
        assert out.read_text() == content


def test_results_of_other_settings_or_adapters_are_not_taken_for_these(session, base, store, tmp_path, reporter):
    """Whole and half files alike: what is there would be mixed with what is asked for."""
    path, out = tmp_path / "p.txt", tmp_path / "o.jsonl"
    path.write_text("one\ntwo\nthree\n")

    def run(adapter="law", seed=1, used=session, **settings):
        requests = read_prompts(path, Mix.parse(adapter), seed)
        own = SETTINGS.model_copy(update=settings)
        return generate_file(used, requests, out, own, StopRequest(), reporter=reporter)

    assert run() == 3
    out.write_text("".join(line + "\n" for line in out.read_text().splitlines()[:2]))
    before = out.read_text()
    for changed, named in (
        ({"adapter": "code"}, "adapters.0.adapter law@1 then, code@1 now"),
        ({"adapter": "law:0.5+code:0.5"}, "adapters"),
        ({"adapter": "base"}, "adapters"),
        ({"seed": 2}, r"seed \d then, \d now"),
        ({"temperature": 0.0}, r"settings.temperature 1.0 then, 0.0 now"),
        ({"max_new_tokens": 7}, "settings.max_new_tokens"),
    ):
        with pytest.raises(ConflictError, match=f"other settings .*{named}"):
            run(**changed)
        assert out.read_text() == before
    publish_adapter(store, "law", make_adapter(base.config, 9), base, Origin())
    with pytest.raises(ConflictError, match="law@1 then, law@2 now"):
        run(used=Session(base, store))
    assert run("law@1") == 3
    out.unlink()
    assert run("auto") == 3
    assert run("auto") == 3
    with pytest.raises(ConflictError, match="other settings"):
        run("auto", seed=5)


def test_results_without_a_guard_or_cut_in_another_way_are_not_taken_for_these(session, tmp_path, reporter):
    requests, out = write_prompts(tmp_path / "p.jsonl", 3), tmp_path / "o.jsonl"
    guard = [NgramIndex(np.arange(20), 3)]
    guarded = [replace(request, no_verbatim=guard) for request in requests]
    how = {"reporter": reporter}
    generate_file(session, requests, out, SETTINGS, StopRequest(), **how)
    with pytest.raises(ConflictError, match="no_verbatim None then, 4 now"):
        generate_file(session, guarded, out, SETTINGS, StopRequest(), **how)
    with pytest.raises(ConflictError, match="truncate_left None then, True now"):
        generate_file(session, requests, out, SETTINGS, StopRequest(), truncate_left=True, **how)
    out.unlink()
    for _ in range(2):
        assert generate_file(session, guarded, out, SETTINGS, StopRequest(), truncate_left=True, **how) == 3
    assert read_results(out)[0]["provenance"]["no_verbatim"] == 4


@pytest.mark.parametrize("name", ["p.JSONL", "p.ndjson"])
def test_json_lines_are_known_by_any_of_their_endings(tmp_path, name):
    assert write_prompts(tmp_path / name, 2)[1].prompt == "the cat 1"
    with pytest.raises(DataError, match="JSON lines"):
        write_prompts(tmp_path / "p.json", 2)


def test_prompts_are_read_from_text_and_bad_lines_are_named(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffone\r\n\r\nthree\n\n".encode())
    assert [(r.prompt, r.seed) for r in read_prompts(path, Mix(), 5)] == [("one", 5), ("", 6), ("three", 7)]
    path = tmp_path / "p.jsonl"
    for line in (
        "{",
        "[]",
        '{"text": "x"}',
        '{"prompt": 1}',
        '{"prompt": "a", "seed": true}',
        '{"prompt": "a", "adapter": 1}',
    ):
        path.write_text('{"prompt": "fine"}\n' + line + "\n")
        with pytest.raises(DataError, match=r"p\.jsonl:2"):
            read_prompts(path, Mix(), 0)
    path.write_text('{"prompt": "a", "adapter": "law:x"}\n')
    with pytest.raises(UsageError):
        read_prompts(path, Mix(), 0)


def sample(session, mix, tokens, seed=0):
    """Returns what a mix writes, in ASCII, so that it is the same tokens when it is read."""
    table = session.base.tokenizer.token_bytes
    bias = {token: -100.0 for token, content in enumerate(table) if not content or not content.isascii()}
    settings = GenerateSettings(max_new_tokens=tokens, temperature=1.0, top_k=0, top_p=1.0, logit_bias=bias)
    return generate(session, [Request("", mix, seed)], settings)[0].text


@pytest.mark.parametrize("name", ["law", "code", "base"])
def test_a_text_is_given_to_the_adapter_that_wrote_it(session, name):
    mix = Mix() if name == "base" else Mix.single(name)
    found = [choose_adapter(session, sample(session, mix, 40, seed), ["law", "code"]) for seed in range(5)]
    assert [choice.adapter for choice in found].count(name) >= 4
    for choice in found:
        assert set(choice.nll_nats_per_token) == {"law", "code", "base"}
        assert choice.adapter in ("base", min(choice.nll_nats_per_token, key=choice.nll_nats_per_token.get))


def test_copies_of_an_adapter_do_not_share_its_probability(session, base, store):
    text = sample(session, Mix.single("law"), 40)
    alone = choose_adapter(session, text, ["code", "law"])
    publish_adapter(store, "law-stable", make_adapter(base.config, 1), base, Origin())
    found = choose_adapter(Session(base, store), text, ["code", "law", "law-stable"])
    assert (found.adapter, found.probability) == ("law", pytest.approx(alone.probability))
    assert list(found.nll_nats_per_token) == ["code", "law", "base"]


def test_adapters_of_one_family_do_not_share_what_is_probable(session, base, store):
    """One that continues another, or is a merge of it, knows its text too; others are of no family by a merge."""
    text = sample(session, Mix.single("law"), 40)
    alone = choose_adapter(session, text, ["code", "law"])
    law, code = (store.read_manifest(name) for name in ("law", "code"))
    near = make_adapter(base.config, 1)
    near = replace(near, updates={site: replace(each, alpha=each.alpha * 0.97) for site, each in near.updates.items()})
    parents = tuple(Parent(reference=each.reference, digest=each.digest) for each in (law, code))
    for number in range(3):
        own = Origin(parents=parents[:1] if number else parents, provenance={"by": "merge" if not number else "train"})
        changed = {site: replace(each, b=each.b * (1 + number / 1e4 + 1e-4)) for site, each in near.updates.items()}
        publish_adapter(store, f"next{number}", replace(near, updates=changed), base, own)
    names = ["code", "law", "next0", "next1", "next2"]
    fresh = Session(base, store)
    found = choose_adapter(fresh, text, names)
    assert found.adapter in names[1:]
    assert found.probability >= alone.probability - 0.01
    own = Origin(parents=(Parent(reference="next2@1", digest=store.read_manifest("next2").digest),))
    publish_adapter(store, "next2", replace(near, updates=changed), base, own)  # a second generation is of it too
    again = choose_adapter(Session(base, store), text, names)
    assert (again.adapter, again.probability) == (found.adapter, pytest.approx(found.probability, abs=0.01))
    likely = sorted(found.nll_nats_per_token, key=found.nll_nats_per_token.get)
    assert found.adapter == likely[0]
    assert choose_adapter(fresh, sample(fresh, Mix(), 40), names).adapter == "base"
    even = Mix.parse("law:0.5+code:0.5")
    between = [choose_adapter(fresh, sample(fresh, even, 4, seed), names) for seed in range(8)]
    assert any(choice.adapter == "base" for choice in between), "a merge makes no family of its parents"


def test_the_likelihoods_are_those_of_one_row_alone(session):
    choice = choose_adapter(session, "the cat", ["law", "code"])
    base = session.base
    ids = torch.tensor([[base.tokenizer.eos_id, *base.tokenizer.encode("the cat")]])
    for name, mix in (("law", Mix.single("law")), ("base", Mix())):
        rows = session.adapters_for([mix])
        logits = base.model.logits(base.model(ids[:, :-1], rows), rows)[0]
        wanted = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
        assert choice.nll_nats_per_token[name] == pytest.approx(float(wanted), rel=1e-4)


def test_without_a_clear_winner_or_a_text_the_base_is_taken(session):
    assert choose_adapter(session, "", ["law"]).adapter == "base"
    assert choose_adapter(session, "the", []).adapter == "base"
    unsure = choose_adapter(session, "a", ["law", "code"])
    assert (unsure.adapter == "base") or unsure.probability >= 0.8
    assert choose_adapter(session, "the cat and " * 60, ["law", "code"]).nll_nats_per_token.keys() == {
        "law",
        "code",
        "base",
    }


@pytest.mark.parametrize("surplus", [-3, -1, 0, 1, 2, 40])
def test_of_a_text_longer_than_the_context_its_end_is_scored(session, surplus):
    """As many of its last tokens as stand, with the EOS before them, in the context."""
    base = session.base
    room = base.config.n_positions - 1
    text = "".join(chr(ord("a") + 7 * place % 26) for place in range(room + surplus + 60))
    ids = base.tokenizer.encode(text)[-(room + surplus) :]
    text = base.tokenizer.decode(ids)
    assert base.tokenizer.encode(text) == ids
    kept = torch.tensor([[base.tokenizer.eos_id, *ids[-room:]]])
    choice = choose_adapter(session, text, ["law", "code"])
    for name, mix in (("law", Mix.single("law")), ("code", Mix.single("code")), ("base", Mix())):
        rows = session.adapters_for([mix])
        logits = base.model.logits(base.model(kept[:, :-1], rows), rows)[0]
        wanted = torch.nn.functional.cross_entropy(logits, kept[0, 1:])
        assert choice.nll_nats_per_token[name] == pytest.approx(
            float(wanted), rel=1e-4
        )  # float32, in a batch of another size


def test_what_stands_before_the_end_of_a_long_text_plays_no_part(session):
    end = "xyz " * 30
    choices = [choose_adapter(session, start + end, ["law", "code"]) for start in ("", "abc " * 30, "the rain ")]
    assert choices[0] == choices[1] == choices[2]
    other = choose_adapter(session, end + "abc " * 30, ["law", "code"])
    assert other.nll_nats_per_token["base"] != pytest.approx(choices[0].nll_nats_per_token["base"], rel=1e-3)
