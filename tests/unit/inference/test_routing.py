"""`auto`: who is a candidate, who is chosen, and that a text that changes its adapter is what it would be by hand."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from lora_gpt2.core.errors import UsageError
from lora_gpt2.inference import choose, routing
from lora_gpt2.inference.choose import AdapterChoice, choose_adapter
from lora_gpt2.inference.embedding import PIECE_TOKENS, EmbeddingMoments, embed_batch, rank_by_distance
from lora_gpt2.inference.generate import Request, generate, generate_all
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.routing import AUTO_MIX, Router
from lora_gpt2.inference.session import Session
from lora_gpt2.recipe import GenerateSettings
from lora_gpt2.store.files import Origin, publish_adapter
from lora_gpt2.store.manifest import WEIGHTS
from tests.builders import make_adapter

SETTINGS = GenerateSettings(max_new_tokens=12, temperature=1.0, top_k=0, top_p=1.0)


def publish(store, base, name, seed, **origin):
    return publish_adapter(store, name, make_adapter(base.config, seed), base, Origin(**origin))


@pytest.fixture
def session(base, store):
    for seed, name in enumerate(("law", "code"), start=1):
        publish(store, base, name, seed)
    return Session(base, store)


class Planned(Router):
    """Chooses what it was told to, in turn."""

    def __init__(self, session, names):
        super().__init__(session)
        self.plan, self.texts = list(names), []

    def choose(self, text):
        self.texts.append(text)
        return AdapterChoice(adapter=self.plan.pop(0), probability=0.9, nll_nats_per_token={})


def test_candidates_are_all_of_the_store_for_this_base_that_can_be_used(session, base, store):
    text = "the cat and the dog"
    assert Router(session).choose(text) == choose_adapter(session, text, ["code", "law"])
    damaged = publish(store, base, "bad", 3)
    path = store.resolve(damaged.reference) / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    found = Router(session).choose(text).nll_nats_per_token
    assert set(found) == {"law", "code", "base"}
    assert Router(Session(base)).choose(text).adapter == "base"


def test_a_new_version_is_scored_from_then_on(session, base, store):
    router = Router(session)
    first = router.choose("the cat").nll_nats_per_token["law"]
    publish(store, base, "law", 9)
    publish(store, base, "new", 7)
    second = router.choose("the cat").nll_nats_per_token
    assert second["law"] != first
    assert "new" in second


def test_a_choice_is_told_and_is_in_the_provenance(session):
    told = []
    router = Router(session, on_choice=told.append)
    (output,) = generate(session, [Request("the cat", AUTO_MIX, 3, router=router)], SETTINGS)
    (entry,) = output.provenance["auto"]
    assert told[0].adapter == output.adapter == entry["adapter"].partition("@")[0]
    assert entry["probability"] == told[0].probability
    assert entry["token"] == 0


def test_what_never_abstains_takes_the_likeliest_adapter(session):
    choice = Router(session, ["law", "code"], abstains=False).choose("a")
    found = choice.nll_nats_per_token
    assert set(found) == {"law", "code"}
    assert choice.adapter == min(found, key=found.get)


def test_a_text_that_changes_its_adapter_goes_on_as_if_it_had_been_continued_by_hand(session, base):
    """Four tokens by law, four by code, four by the base: each from what was there, with its own random number."""
    settings = SETTINGS.model_copy(update={"reroute_every": 4})
    router = Planned(session, ["law", "code", "base"])
    (output,) = generate(session, [Request("the cat", AUTO_MIX, 5, router=router)], settings)
    ids, prompt = base.tokenizer.encode("the cat"), "the cat"
    from lora_gpt2.inference.sampling import SamplingParams, draw_uniform, sample_tokens

    for step in range(12):
        name = ("law", "code", "base")[step // 4]
        rows = session.adapters_for([session.resolve(Mix.parse(name))])
        logits = base.model.logits(base.model(torch.tensor([ids]), rows), rows)[0, -1:].float()
        (token,) = sample_tokens(logits, [SamplingParams.from_settings(settings)], [draw_uniform(5, step)])
        if token == base.tokenizer.eos_id:
            break
        ids.append(token)
    assert output.text == base.tokenizer.decode(ids[len(base.tokenizer.encode(prompt)) :])
    assert [entry["token"] for entry in output.provenance["auto"]] == [0, 4, 8][: len(output.provenance["auto"])]
    assert router.texts[0] == prompt
    assert all(text.startswith(prompt) for text in router.texts)


@pytest.mark.parametrize("names", [["law", "code"], ["code", "law"]])
def test_a_text_that_may_change_its_adapter_obeys_no_adapters_own_format(base, store, names):
    """A format is one of the whole text, which none of them writes alone."""
    publish(store, base, "law", 1)
    publish(store, base, "code", 2, recipe={"generate": {"regex": "[A-Z]{30,40}"}})
    session, settings = Session(base, store), SETTINGS.model_copy(update={"reroute_every": 4})
    (output,) = generate(
        session, [Request("the cat", AUTO_MIX, 5, router=Planned(session, [*names, names[1]]))], settings
    )
    assert output.constraint == ""
    assert re.search("[^A-Z]", output.text)
    (alone,) = generate(session, [Request("the cat", AUTO_MIX, 5, router=Planned(session, ["code"]))], SETTINGS)
    assert alone.constraint == "regex"
    assert re.fullmatch("[A-Z]+", alone.text)


def test_neighbours_of_a_text_that_changes_its_adapter_do_not_notice(session):
    settings = SETTINGS.model_copy(update={"reroute_every": 3})
    others = [
        Request("the dog", Mix.single("code"), 1),
        Request("a", Mix(), 2),
        Request("the rain", Mix.single("law"), 3),
    ]
    router = Planned(session, ["law", "code"] * 4)
    together = generate(session, [others[0], Request("the cat", AUTO_MIX, 5, router=router), *others[1:]], settings)
    assert [together[0], *together[2:]] == generate(session, others, settings)
    alone = generate(session, [Request("the cat", AUTO_MIX, 5, router=Planned(session, ["law", "code"] * 4))], settings)
    assert together[1] == alone[0]


def test_a_choice_that_fails_ends_its_text_alone(session):
    class Failing(Planned):
        def choose(self, text):
            if not self.plan:
                raise UsageError("nothing to choose from", "…")
            return super().choose(text)

    settings = SETTINGS.model_copy(update={"reroute_every": 2})
    other = Request("the dog", Mix.single("code"), 1)
    requests = [Request("the cat", AUTO_MIX, 5, router=Failing(session, ["law"])), other]
    failed, kept = generate_all(session, requests, settings)
    assert isinstance(failed.error, UsageError)
    assert kept == generate(session, [other], settings)[0]
    assert not session.slots.pinned


@pytest.mark.parametrize("wrong", [{"num_beams": 2}, {"merge_into_base": True}])
def test_choosing_again_excludes_what_cannot_change_its_adapter(wrong):
    with pytest.raises(ValueError, match="reroute_every"):
        GenerateSettings(reroute_every=4, **wrong)


def test_an_embedding_is_the_mean_of_the_hidden_states_whatever_else_is_embedded(session, base):
    texts = [[1, 2, 3], [4], list(range(40))]
    together = embed_batch(session, Mix(), texts)
    for text, vector in zip(texts, together, strict=True):
        alone = base.model(torch.tensor([text]), None)[0].mean(0)
        assert torch.allclose(vector, alone, atol=1e-5)


def test_moments_are_those_of_pieces_and_survive_the_manifest(session, base):
    stream = np.arange(PIECE_TOKENS * 6, dtype=np.uint16) % 200
    moments = EmbeddingMoments.measure(session, stream)
    pieces = [stream[start : start + PIECE_TOKENS].tolist() for start in range(0, len(stream), PIECE_TOKENS)]
    vectors = torch.cat([embed_batch(session, Mix(), [piece]) for piece in pieces])
    assert torch.allclose(moments.mean, vectors.mean(0), atol=1e-5)
    assert torch.allclose(moments.std, vectors.std(0), atol=1e-5)
    read = EmbeddingMoments.parse(json.loads(json.dumps(moments.to_json())), base.config.n_embd)
    assert torch.allclose(read.mean, moments.mean, rtol=1e-3, atol=1e-3)
    assert EmbeddingMoments.measure(session, stream[: PIECE_TOKENS * 3]) is None


@pytest.mark.parametrize("values", [None, {}, {"mean": "x", "std": "y"}, {"mean": "AAA=", "std": 7}, [1]])
def test_moments_that_are_none_are_not_taken(values, base):
    assert EmbeddingMoments.parse(values, base.config.n_embd) is None


def test_the_nearest_is_measured_in_units_of_the_spread():
    """The first dimension is large and means nothing; the second decides."""
    near = EmbeddingMoments(torch.tensor([0.0, 1.0]), torch.tensor([100.0, 0.1]))
    far = EmbeddingMoments(torch.tensor([50.0, 3.0]), torch.tensor([100.0, 0.1]))
    assert rank_by_distance(torch.tensor([60.0, 1.2]), [far, near]) == [1, 0]


def test_of_many_adapters_only_the_nearest_and_the_unknown_are_loaded_and_scored(session, base, store, monkeypatch):
    monkeypatch.setattr(routing, "FEW", 3)
    monkeypatch.setattr(routing, "NEAREST", 2)
    vector = embed_batch(session, Mix(), [base.tokenizer.encode("the cat")])[0]
    for index in range(4):
        moments = EmbeddingMoments(vector + index, torch.ones_like(vector))
        publish(store, base, f"d{index}", 10 + index, data={"sources": [], "embedding": moments.to_json()})
    publish(store, base, "odd", 20, data={"sources": [], "embedding": {"mean": "?"}})
    router = Router(session)
    assert set(router.choose("the cat").nll_nats_per_token) == {"d0", "d1", "law", "code", "odd", "base"}
    assert not {"d2", "d3"} & {reference.partition("@")[0] for reference in session.slots.references}
    assert set(router.choose("").nll_nats_per_token) == set()


def test_a_large_store_is_listed_once_a_second(session, base, store, monkeypatch):
    monkeypatch.setattr(routing, "FEW", 1)
    router, now = Router(session), [100.0]
    monkeypatch.setattr(routing.time, "monotonic", lambda: now[0])
    assert router.list_names() == ["code", "law"]
    publish(store, base, "new", 5)
    assert router.list_names() == ["code", "law"]
    now[0] += 1.1
    assert router.list_names() == ["code", "law", "new"]


def test_training_keeps_the_moments_of_its_text(base, base_folder, store, text_file, reporter):
    from lora_gpt2.recipe_files import load_recipe
    from lora_gpt2.training.run import train_recipes

    flags = {"name": "own", "base": str(base_folder), "data.sources": (str(text_file),), "train.steps": 2}
    recipe = load_recipe(None, ["data.block_size=16", "train.sample_tokens=0"], flags)
    train_recipes([recipe], store, reporter)
    moments = EmbeddingMoments.parse(store.read_manifest("own").data["embedding"], base.config.n_embd)
    assert moments.std.gt(0).all()


def test_the_batch_of_a_choice_may_be_larger_than_the_slots(base, store, monkeypatch):
    for seed in range(5):
        publish(store, base, f"d{seed}", seed)
    monkeypatch.setattr(choose, "BATCH", 2)
    small, large = Session(base, store, max_slots=2), Session(base, store)
    found = [Router(each).choose("the cat and the dog") for each in (small, large)]
    assert found[0].adapter == found[1].adapter
    for name, value in found[0].nll_nats_per_token.items():
        assert value == pytest.approx(found[1].nll_nats_per_token[name], rel=1e-5)


def test_a_request_with_a_route_is_not_chosen_for_again(session):
    route = Planned(session, ["code"]).route("the cat")
    request = Request("the cat", Mix.single("law"), 4, route=route)
    (output,) = generate(session, [request], SETTINGS)
    assert output.text == generate(session, [replace(request, mix=Mix.single("code"), route=None)], SETTINGS)[0].text
    assert output.adapter == "code"
