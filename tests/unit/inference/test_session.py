"""Slots: who comes, who goes, and that nobody's numbers change by it."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from lora_gpt2.core.errors import NotFoundError, UsageError
from lora_gpt2.inference import session as session_module
from lora_gpt2.inference.engine import Engine
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.sequence import SequenceState
from lora_gpt2.inference.session import Session
from lora_gpt2.model.lora import Adapter, LoraUpdate
from lora_gpt2.model.probe import compute_logits
from lora_gpt2.recipe import GenerateSettings, LoraSettings
from lora_gpt2.store.changes import collect_garbage, remove_adapter, roll_back
from lora_gpt2.store.files import Origin, publish_adapter
from tests.builders import make_adapter

NAMES = ("a", "b", "c", "d")


@pytest.fixture
def filled(base, store):
    for seed, name in enumerate(NAMES, start=1):
        publish_adapter(store, name, make_adapter(base.config, seed, LoraSettings(rank=seed)), base, Origin())
    return store


def logits(session, name):
    return compute_logits(session.base, session.select(Mix.single(name)))


def test_the_least_recently_used_makes_room(base, filled):
    session = Session(base, filled, max_slots=2)
    for name, loaded in (("a", ["a"]), ("b", ["a", "b"]), ("a", ["b", "a"]), ("c", ["a", "c"]), ("b", ["c", "b"])):
        session.load([name])
        assert session.slots.references == loaded
    session.load(["a", "b", "c", "d"])
    assert set(session.slots.references) == set(NAMES), "a batch that needs more gets them"


def test_a_session_remembers_the_manifests_that_were_named_last(base, filled, monkeypatch):
    monkeypatch.setattr(session_module, "MOST_MANIFESTS", 2)
    session = Session(base, filled)
    mixes = {name: session.resolve(Mix.single(name)) for name in "abac"}
    found = {name: session.find_manifests(mix)[0] for name, mix in mixes.items()}
    assert found["b"] is None
    assert (found["a"].name, found["c"].name) == ("a", "c")


def test_coming_and_going_changes_nobodys_numbers(base, filled):
    wanted = {name: logits(Session(base, filled), name) for name in NAMES}
    session = Session(base, filled, max_slots=2)
    for name in "abcdacbdbbadcabd":
        assert torch.allclose(logits(session, name), wanted[name], atol=1e-5)
        assert len(session.slots.references) <= 2
    assert len({float(value.sum()) for value in wanted.values()}) == 4


def test_a_batch_keeps_what_it_needs_while_others_make_room(base, filled):
    session = Session(base, filled, max_slots=2)
    session.load(["a", "b"])
    mixes = [Mix.single("b"), Mix([("c", 0.5), ("d", 0.5)]), Mix()]
    together = base.model(torch.tensor([[1, 2, 3]] * 3), session.adapters_for(mixes))
    for row, mix in enumerate(mixes):
        alone = base.model(torch.tensor([[1, 2, 3]]), Session(base, filled).adapters_for([mix]))
        assert torch.allclose(together[row], alone[0], atol=1e-5)


def test_who_waits_for_a_version_shares_one_copy_of_it(base, filled, monkeypatch):
    loads, load = [], session_module.load_adapter

    def count(store, name, base):
        loads.append(name)
        time.sleep(0.02)
        return load(store, name, base)

    monkeypatch.setattr(session_module, "load_adapter", count)
    session = Session(base, filled)
    (reference,) = session.resolve(Mix.single("a")).references
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(session.fetch, [reference] * 8))
    assert loads == [reference]
    assert len({id(each) for each in found}) == 1
    del found
    session.fetch(reference)
    assert len(loads) == 2, "it is not kept for nobody"


def test_a_resolved_mix_stays_what_it_is_when_others_publish_and_roll_back(base, filled):
    session = Session(base, filled)
    mix = session.resolve(Mix.single("a"))
    assert mix == Mix.single(f"a@1#{filled.read_manifest('a').pin}")
    before = compute_logits(base, session.select(mix))
    publish_adapter(filled, "a", make_adapter(base.config, 9), base, Origin())
    assert session.resolve(Mix.single("a"))[0][0].startswith("a@2#")
    newer = compute_logits(base, session.select(session.resolve(Mix.single("a"))))
    collect_garbage(filled, keep=1)
    again = compute_logits(base, session.select(mix))
    assert torch.allclose(again, before, atol=1e-5), "also when its version is gone"
    assert not torch.allclose(newer, before)
    with pytest.raises(NotFoundError):
        session.resolve(Mix.single("nothing"))
    publish_adapter(filled, "a", make_adapter(base.config, 8), base, Origin())
    roll_back(filled, "a", 2)
    assert session.resolve(Mix.single("a", 0.5))[0][1] == 0.5


def test_the_same_weights_scaled_otherwise_are_another_adapter(base, filled):
    """Also for a session that has those of before in a slot, and for what pins a version."""
    session, adapter = Session(base, filled), make_adapter(base.config, 3)
    publish_adapter(filled, "swap", adapter, base, Origin())
    before, first = session.resolve(Mix.single("swap")), filled.read_manifest("swap")
    strong = compute_logits(base, session.select(before))
    collect_garbage(filled)
    remove_adapter(filled, "swap")
    scaled = replace(adapter, updates={site: replace(each, alpha=1e-3) for site, each in adapter.updates.items()})
    publish_adapter(filled, "swap", scaled, base, Origin())
    after, second = session.resolve(Mix.single("swap")), filled.read_manifest("swap")
    assert first.digest == second.digest
    assert before != after
    assert not torch.allclose(compute_logits(base, session.select(after)), strong)
    for pin in (first.pin, "0000"):
        with pytest.raises(NotFoundError, match="replaced"):
            filled.read_manifest(f"swap@1#{pin}")
        with pytest.raises(NotFoundError, match="replaced"):
            remove_adapter(filled, f"swap#{pin}")
    assert filled.read_manifest(f"swap@1#{second.digest[:16]}") == second


def test_adapters_in_memory_go_by_their_own_names(base):
    session = Session(base)
    session.load_in_memory({"mine": make_adapter(base.config, 1)})
    first = logits(session, "mine")
    assert session.resolve(Mix.single("mine")) == Mix.single("mine")
    session.load_in_memory({"mine": make_adapter(base.config, 2)})
    assert not torch.allclose(logits(session, "mine"), first)
    assert session.slots.references == ["mine"]
    with pytest.raises(UsageError, match="no store"):
        session.load(["other"])


def test_what_is_held_keeps_its_slot_and_what_is_dropped_leaves_nothing(base, filled):
    session = Session(base, filled, max_slots=2)
    session.load(["a", "b"])
    session.slots.pin(Mix.single("a"))
    session.slots.pin(Mix([("a", 1.0), ("b", 0.5)]))
    session.load(["c"])
    assert session.slots.references == ["a", "b", "c"], "nobody could make room"
    session.slots.unpin(Mix([("a", 1.0), ("b", 0.5)]))
    session.load(["d"])
    assert session.slots.references == ["a", "c", "d"], "b was released, a is still held once"
    assert not session.slots.evict("a")
    assert not session.slots.evict("b"), "it is gone already"
    assert session.slots.evict("c")
    session.slots.unpin(Mix.single("a"))
    assert session.slots.evict("a")
    wanted = logits(Session(base, filled), "d")
    assert torch.allclose(logits(session, "d"), wanted, atol=1e-5)


def test_an_adapter_that_is_removed_while_in_use_is_used_to_the_end(base, filled):
    session = Session(base, filled, max_slots=1)
    wanted = Engine(Session(base, filled), 1, 48)
    rows = [make_row(base), make_row(base)]
    wanted.submit(rows[0])
    while wanted.is_busy:
        wanted.step()
    engine = Engine(session, 2, 48)
    engine.submit(rows[1])
    engine.step()
    remove_adapter(filled, "a")
    collect_garbage(filled, keep=1)
    other = make_row(base, "b@1")
    engine.submit(other)
    while engine.is_busy:
        engine.step()
    assert rows[1].new_ids == rows[0].new_ids
    assert other.finish_reason
    with pytest.raises(NotFoundError):
        Session(base, filled).load(["a"])


def make_row(base, name="a@1"):
    settings = GenerateSettings(temperature=0, logit_bias={base.tokenizer.eos_id: -100.0})
    return SequenceState(
        index=0,
        mix=Mix.single(name),
        prompt_ids=[1, 2, 3],
        max_new_tokens=12,
        settings=settings,
        seed=0,
        tokenizer=base.tokenizer,
    )


def test_a_name_and_number_that_come_back_are_another_adapter(base, filled):
    session = Session(base, filled)
    old = session.resolve(Mix.single("a"))
    before = compute_logits(base, session.select(old))
    remove_adapter(filled, "a")
    with pytest.raises(NotFoundError):
        session.resolve(Mix.single("a"))
    with pytest.raises(NotFoundError):
        session.resolve(Mix.single("a@1"))
    publish_adapter(filled, "a", make_adapter(base.config, 77), base, Origin())
    new = session.resolve(Mix.single("a"))
    assert new != old
    assert filled.read_manifest("a").version == 1, "numbers begin again"
    after = compute_logits(base, session.select(new))
    assert (after - before).abs().max() > 0.1
    assert torch.allclose(compute_logits(base, session.select(old)), before, atol=1e-5), (
        "who holds the old one keeps it"
    )
    with pytest.raises(NotFoundError, match="replaced"):
        Session(base, filled).load([old[0][0]])


def test_a_load_that_fails_leaves_no_slot_with_another_ones_weights(base, filled, monkeypatch):
    session = Session(base, filled, max_slots=1)
    session.load(["a"])
    wanted = logits(Session(base, filled), "d")

    def fail(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(session.slots, "_build_bank", fail)
    with pytest.raises(RuntimeError):
        session.load(["d"])
    monkeypatch.undo()
    assert "d" not in session.slots.references
    assert torch.allclose(logits(session, "d"), wanted, atol=1e-5)


def add_up(base, weighted):
    """Returns one adapter that is a weighted sum: its A are those of all below each other, its B carry the weights."""
    updates = {}
    for site in next(iter(weighted))[0].updates:
        parts = [(adapter.updates[site], weight) for adapter, weight in weighted]
        a = torch.cat([update.a for update, _ in parts])
        b = torch.cat([update.b * (update.scaling * weight) for update, weight in parts], dim=1)
        updates[site] = LoraUpdate(a, b, alpha=float(a.shape[0]))  # alpha over rank is 1
    return Adapter(updates=updates)


WEIGHTS = [
    (1.0, 0.0),
    (-1.0, 0.0),
    (-0.5, 0.0),
    (0.25, 0.0),
    (2.0, 0.0),
    (-16.0, 0.0),
    (0.6, 0.4),
    (0.6, -0.4),
    (-0.6, 0.4),
    (-1.5, -0.5),
    (1.0, -1.0),
    (0.0, -0.5),
    (0.0, 0.0),
]


@pytest.mark.parametrize("folded", [False, True])
def test_a_mix_is_the_weighted_sum_of_its_adapters_signs_included(base, folded):
    """Computed as one adapter of the sum, whose weight is 1: beside it, and written into the weights."""
    law, code = (make_adapter(base.config, seed, LoraSettings(rank=2 + seed)) for seed in (1, 2))
    plain, seen = compute_logits(base), []
    for first, second in WEIGHTS:
        session = Session(base)
        session.load_in_memory({"law": law, "code": code, "sum": add_up(base, [(law, first), (code, second)])})
        mix = Mix([("law", first), ("code", second)]) if second else Mix.single("law", first)
        wanted = compute_logits(base, session.select(Mix.single("sum")))
        found = (
            compute_logits(session.merge_into_base(mix).base) if folded else compute_logits(base, session.select(mix))
        )
        size = max(1.0, float(wanted.abs().max()))
        assert torch.allclose(found, wanted, atol=1e-4 * size), (first, second)  # float32, summed in another order
        assert torch.allclose(found, plain, atol=1e-5) is (first == second == 0)
        seen.append(found)
    for one, other in ((0, 1), (2, 3), (6, 7), (7, 8), (6, 8)):
        assert (seen[one] - seen[other]).abs().max() > 0.01, "weights and their signs matter"


def test_each_row_of_a_batch_has_its_own_weights_and_signs(base):
    law, code = (make_adapter(base.config, seed) for seed in (1, 2))
    session = Session(base)
    session.load_in_memory({"law": law, "code": code})
    mixes = [Mix([("law", first), ("code", second)]) for first, second in WEIGHTS] + [
        Mix(),
        Mix([("code", -0.5), ("law", 0.25)]),
    ]
    tokens = torch.tensor([[5, 9, 2, 7]])
    rows = session.adapters_for(mixes)
    together = base.model.logits(base.model(tokens.expand(len(mixes), -1), rows), rows)
    for place, mix in enumerate(mixes):
        weighted = [({"law": law, "code": code}[name], weight) for name, weight in mix] or [(law, 0.0)]
        alone = Session(base)
        alone.load_in_memory({"sum": add_up(base, weighted)})
        one = alone.adapters_for([Mix.single("sum")])
        wanted = base.model.logits(base.model(tokens, one), one)[0]
        size = max(1.0, float(wanted.abs().max()))
        assert torch.allclose(together[place], wanted, atol=1e-4 * size), mix  # float32, summed in another order


def test_an_adapter_and_its_negative_are_the_plain_base(base):
    session, adapter = Session(base), make_adapter(base.config, 1)
    session.load_in_memory({"law": adapter, "twin": adapter})
    for mix in (Mix([("law", 0.7), ("twin", -0.7)]), Mix([("twin", -2.0), ("law", 2.0)])):
        # what cancels is as large as an adapter's effect, of which float32 keeps seven digits
        assert torch.allclose(compute_logits(base, session.select(mix)), compute_logits(base), atol=1e-3)


def test_a_mix_is_written_with_its_signs():
    assert Mix.parse(["law:-0.5", "code:16", "x:-16", "y:+1"]) == (
        ("law", -0.5),
        ("code", 16.0),
        ("x", -16.0),
        ("y", 1.0),
    )
    assert Mix.parse("law:1e+0+code:+5e-1+x:.5") == (("law", 1.0), ("code", 0.5), ("x", 0.5))
    assert Mix.parse("law+code@3") == Mix.parse(["law", "code@3"]) == (("law", 0.5), ("code@3", 0.5))
    assert Mix.parse("a+b+c").references == ["a", "b", "c"]
    for wrong in ("law+code:0.5", ["law", "code:0.5"]):
        with pytest.raises(UsageError, match="law has no weight"):
            Mix.parse(wrong)
    for wrong in ("law:-16.1", "law:17", "law:-inf", "law:nan", "law:-", "law:--1"):
        with pytest.raises(UsageError, match="within ±16"):
            Mix.parse([wrong])
