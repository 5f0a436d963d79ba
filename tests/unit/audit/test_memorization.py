"""What is called memorised: an adapter trained to death is, a fresh one is not; and each figure by itself."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_gpt2.audit.canaries import Canary, Exposure, measure_exposure, read_canaries, write_canaries
from lora_gpt2.audit.memorization import (
    AuditSettings,
    Excerpt,
    Extraction,
    _judge,
    audit_memorization,
    choose_control,
    choose_prefixes,
    choose_sizes,
    compare_shares,
    count_by_chance,
    find_copies,
    measure_extraction,
)
from lora_gpt2.core.console import SilentReporter
from lora_gpt2.core.errors import ConflictError, DataError, UsageError
from lora_gpt2.core.locks import hold_lock
from lora_gpt2.data.ngram_index import NgramIndex
from lora_gpt2.data.successors import SuccessorTable
from lora_gpt2.evaluation.held_out import read_own_text
from lora_gpt2.inference.generate import Request, generate
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.open import open_session
from lora_gpt2.model.base import load_base
from lora_gpt2.model.lora import build_adapter
from lora_gpt2.model.runtime import choose_runtime
from lora_gpt2.recipe import GenerateSettings, build_recipe
from lora_gpt2.recipe_files import load_recipe
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.files import Origin, publish_adapter, read_drafter
from lora_gpt2.training.run import train_recipes
from tests.builders import make_base_folder

PLAIN = GenerateSettings(temperature=0.5, top_k=0, top_p=1.0, max_new_tokens=40)


@pytest.fixture(scope="module")
def learnt_store(tmp_path_factory):
    """An adapter trained long on some documents, a fresh one, and a base that is wide enough to learn them.

    The processes of a test run share it.
    """
    folder = tmp_path_factory.getbasetemp().parent / "learnt"
    with hold_lock(folder.with_suffix(".lock"), str(folder), wait_seconds=120):
        if not (folder / "store").exists():
            folder.mkdir(exist_ok=True)
            build_learnt_store(folder)
    return Store(folder / "store")


def build_learnt_store(folder):
    base_folder = make_base_folder(folder / "base", width=64, heads=4)
    generator = random.Random(3)
    rows = [" ".join(generator.choices(["cat", "dog", "rain", "sun", "the", "and", "in"], k=9)) for _ in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    recipe = build_recipe(
        {
            "name": "learnt",
            "base": str(base_folder),
            "lora": {"rank": 64, "alpha": 64},
            "data": {
                "sources": [str(folder / "rows.jsonl")],
                "block_size": 48,
                "layout": "packed",
                "near_duplicate_threshold": 0,
                "validation_fraction": 0.2,
            },
            "train": {
                "steps": 150,
                "batch_tokens": 480,
                "learning_rate": 1e-2,
                "keep_best": False,
                "sample_tokens": 0,
                "validate_every": 150,
            },
        },
        "test",
    )
    store, runtime = Store(folder / "store"), choose_runtime("float32", torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_GPT2_CACHE", str(folder / "cache"))
        train_recipes([recipe], store, SilentReporter())
    base = load_base(str(base_folder), runtime)
    origin = Origin(data=store.read_manifest("learnt").data, recipe=recipe.model_dump(mode="json"))
    publish_adapter(store, "fresh", build_adapter(base.config, recipe.lora, 1), base, origin)


@pytest.fixture
def learnt(learnt_store):
    session, _ = open_session(learnt_store, ["learnt"], load_recipe(None), "float32")
    return session


def audit(session, name, reporter, canaries=(), drafter=None):
    mix = Mix.single(name)
    own = read_own_text(session.store, name, reporter)

    def write(adapter, prompts, settings):
        return [
            output.text for output in generate(session, [Request(p, mix, i) for i, p in enumerate(prompts)], settings)
        ]

    looks = AuditSettings(size=12, windows=60, texts=10)
    return audit_memorization(
        session.base,
        session.select(mix),
        name,
        own,
        looks,
        reporter=reporter,
        write=write,
        sampling=PLAIN,
        canaries=canaries,
        drafter=drafter,
    )


def test_an_adapter_trained_to_death_is_caught_and_a_fresh_one_is_not(learnt, reporter):
    caught = audit(learnt, "learnt", reporter)
    assert caught.to_json()["memorizes"]
    assert caught.train.extracted > 8 + caught.held_out.extracted
    assert caught.base_on_train.extracted == 0
    assert "prefixes of its training text" in caught.verdict
    text = caught.extracted_examples[0].text
    own = read_own_text(learnt.store, "learnt", reporter)
    whole = own.tokenizer.decode(own.prepared.train.stream[:].tolist())
    assert text in whole
    clean = audit(learnt, "fresh", reporter)
    assert not clean.to_json()["memorizes"]
    assert clean.train == clean.base_on_train
    assert clean.copies.with_copies == 0


def test_a_drafter_that_holds_its_text_is_caught_and_a_usual_one_is_not(learnt, reporter):
    with learnt.store.open("learnt") as version:
        usual = read_drafter(version, learnt.base.tokenizer.vocab_size)
    assert len(usual)
    clean = audit(learnt, "fresh", reporter, drafter=usual)
    assert (clean.drafter.windows, clean.drafter.extracted) == (clean.train.windows, 0)
    assert clean.to_json()["extraction"]["drafter"]["mean_tokens"] < 3
    assert not clean.to_json()["memorizes"]
    stream = np.asarray(read_own_text(learnt.store, "fresh", reporter).prepared.train.stream)
    told = SuccessorTable.build(np.concatenate([np.arange(100), stream[:40], stream[:40], stream[:40]]))
    caught = audit(learnt, "fresh", reporter, drafter=told)
    assert caught.drafter.extracted >= 1
    assert "train.drafter=false" in caught.verdict
    assert audit(learnt, "fresh", reporter).drafter is None


def test_own_text_is_what_was_trained_on_and_what_was_held_out(learnt, reporter):
    own = read_own_text(learnt.store, "learnt", reporter)
    assert {part: len(documents) for part, documents in own.documents.items()} == own.prepared.report["documents"]
    held_out = read_own_text(learnt.store, "learnt", reporter).held_out
    assert held_out == (own.documents["test"] or own.documents["validation"])
    assert not {d.text for d in held_out} & {d.text for d in own.documents["train"]}


def test_no_verbatim_keeps_copies_out(learnt, reporter):
    own = read_own_text(learnt.store, "learnt", reporter)
    stream = own.prepared.train.stream
    greedy = GenerateSettings(temperature=0, max_new_tokens=40)
    prompt = ""
    mix = Mix.single("learnt")
    size = 10
    free = generate(learnt, [Request(prompt, mix)], greedy)[0]
    kept = generate(learnt, [Request(prompt, mix, no_verbatim=[NgramIndex(stream, size - 1)])], greedy)[0]
    index = NgramIndex(stream, size)
    assert (index.find(own.tokenizer.encode(prompt + free.text)) >= 0).any(), "without it there is a copy"
    assert not (index.find(own.tokenizer.encode(prompt + kept.text)) >= 0).any()


def test_greedy_decoding_gives_what_extraction_says(learnt, reporter):
    """One pass under the true tokens says the same as decoding token by token."""
    own = read_own_text(learnt.store, "learnt", reporter)
    stream, mix, size = own.prepared.train.stream, Mix.single("learnt"), 12
    found = measure_extraction(learnt.base, learnt.select(mix), stream, size, 30)
    positions = choose_prefixes(stream, size, 30, own.tokenizer.eos_id)
    decoded = []
    for place in positions:
        ids = stream[place : place + size].tolist()
        for _ in range(size):
            adapters, model = learnt.adapters_for([mix]), learnt.base.model
            ids.append(int(model.logits(model(torch.tensor([ids]), adapters), adapters)[0, -1].argmax()))
        if ids == stream[place : place + 2 * size].tolist():
            decoded.append(place)
    assert list(found.positions) == decoded
    assert 0 < found.extracted < found.windows == len(positions)


def test_a_planted_secret_that_was_learnt_is_exposed_and_another_is_not(base, tmp_path):
    canaries = write_canaries(tmp_path / "c.jsonl", 2, seed=4)
    assert read_canaries(tmp_path / "c.jsonl") == canaries
    ids = torch.tensor([[base.tokenizer.eos_id, *base.tokenizer.encode(canaries[0].text)]])[:, :48]
    base.model.requires_grad_()
    optimizer = torch.optim.Adam(base.model.parameters(), lr=0.01)
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(base.model.logits(base.model(ids[:, :-1]), None)[0], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learnt_one, other = measure_exposure(base, lambda rows: None, canaries)
    assert (learnt_one.rank, learnt_one.exposure_bits) == (1, math.log2(learnt_one.of))
    assert other.rank > 1
    assert other.p == other.rank / other.of


@pytest.mark.parametrize(
    "content",
    [
        "",
        "x",
        "{}",
        '{"text": "a 1", "form": "a {}", "secret": "2"}',
        '{"text": "a 42", "form": "a {}", "secret": "42"}',
    ],
)
def test_a_file_without_canaries_is_a_data_error(tmp_path, content):
    (tmp_path / "c.jsonl").write_text(content)
    with pytest.raises(DataError) as caught:
        read_canaries(tmp_path / "c.jsonl")
    assert "audit canaries" in caught.value.hint


def test_chances_by_hand():
    assert compare_shares(3, 3, 0, 3) == pytest.approx(1 / 20)  # one of the 20 ways to choose 3 of 6
    assert compare_shares(0, 10, 0, 10) == 1
    assert compare_shares(5, 10, 5, 10) > 0.5
    assert count_by_chance(1, 1, 0.01) == pytest.approx(0.01)
    assert count_by_chance(2, 2, 0.5) == pytest.approx(0.25)
    one = Exposure(text="a", rank=1, of=513, exposure_bits=9.0, p=1 / 513)
    clean = Extraction(windows=10, extracted=0, mean_tokens=0.0)
    assert _judge(clean, clean, 1.0, None, [one], 5) == ["1 of 1 planted secrets are exposed"]


def test_places_are_spread_and_hold_two_runs():
    assert choose_prefixes(range(100), 10, 5, -1) == [0, 20, 40, 60, 80]
    assert choose_prefixes(range(100), 10, 6, 33) == [0, 20, 33, 40, 60, 80]
    assert choose_prefixes(range(19), 10, 5, -1) == []
    assert choose_prefixes(range(21), 10, 99, -1) == [0, 1]


def test_copies_name_the_document_and_leave_common_runs_out(learnt, reporter):
    own = read_own_text(learnt.store, "learnt", reporter)
    documents = [d.text for d in own.documents["train"]]
    index = NgramIndex(own.prepared.train.stream, 6)
    found = find_copies(index, NgramIndex(np.zeros(0), 6), own, [documents[3], "", "x y z"])
    assert (found.texts, found.with_copies) == (3, 1)
    common = NgramIndex(np.array(own.tokenizer.encode(documents[3])), 6)
    assert find_copies(index, common, own, [documents[3]]).with_copies == 0, "held-out text has it too"
    assert found.longest_copy_tokens == len(own.tokenizer.encode(documents[3]))
    assert found.worst[0] == Excerpt(tokens=found.longest_copy_tokens, source="training document 4", text=documents[3])
    assert np.asarray(own.prepared.train.stream).size > 100


def test_a_copy_is_one_whatever_common_text_stands_beside_it(learnt, reporter):
    own = read_own_text(learnt.store, "learnt", reporter)
    secret, notice = (own.documents["train"][index].text for index in (3, 7))
    index, held_out = NgramIndex(own.prepared.train.stream, 6), NgramIndex(np.array(own.tokenizer.encode(notice)), 6)
    part = own.tokenizer.decode(own.tokenizer.encode(secret)[:8])
    for text in (f"{part} {notice}", f"{notice} {part}"):
        found = find_copies(index, held_out, own, [text])
        assert found.with_copies == 1, text
        assert 8 <= found.longest_copy_tokens < 8 + 6, "the notice is none of it"
    assert find_copies(index, held_out, own, [notice]).with_copies == 0


def test_a_control_without_places_does_not_hide_what_is_memorised():
    none, some, base = (
        Extraction(windows=0, extracted=0, mean_tokens=0.0),
        Extraction(windows=5, extracted=0, mean_tokens=0.0),
        Extraction(windows=200, extracted=0, mean_tokens=0.0),
    )
    assert choose_control(none, base) == choose_control(some, base) == base
    assert choose_control(Extraction(windows=100, extracted=30, mean_tokens=0.0), base).extracted == 30
    assert choose_control(none, some) == some


def test_runs_fit_short_documents(learnt, reporter):
    own = read_own_text(learnt.store, "learnt", reporter)
    lengths = sorted(len(own.tokenizer.encode(d.text)) for d in own.documents["train"])
    extraction, copies = choose_sizes(own, 50, 1024)
    assert 8 <= extraction <= lengths[-1] // 2
    assert 12 <= copies <= lengths[-1]
    assert choose_sizes(own, 50, 16)[0] == 8


def test_canaries_that_were_held_out_do_not_count_as_planted(learnt, reporter):
    own = read_own_text(learnt.store, "learnt", reporter)
    kept, held = own.documents["train"][0].text, own.documents["validation"][0].text
    codes = [Canary(text=text, form=text[:-6] + "{}", secret=text[-6:]) for text in (kept, held)]
    found = audit(learnt, "learnt", reporter, codes)
    assert [exposure.text for exposure in found.canaries] == [kept]
    assert audit(learnt, "learnt", reporter, codes[1:]).canaries == [], "none says nothing of what it would give away"


def test_canaries_are_never_written_over_a_file(tmp_path):
    first = write_canaries(tmp_path / "c.jsonl", 2, seed=0)
    with pytest.raises(ConflictError, match="exists"):
        write_canaries(tmp_path / "c.jsonl", 2, seed=1)
    assert read_canaries(tmp_path / "c.jsonl") == first
    with pytest.raises(UsageError, match="written to a file"):
        write_canaries(Path("-"), 2, seed=1)


def test_a_secret_is_ranked_among_others_alone(base, tmp_path):
    for exposure in measure_exposure(base, lambda rows: None, write_canaries(tmp_path / "c.jsonl", 2, seed=0)):
        assert exposure.of == 513


@pytest.mark.parametrize(("hits", "number"), [(1, 1), (2, 5), (5, 5), (0, 4)])
def test_what_chance_does_is_the_tail_of_the_binomial_distribution(hits, number):
    ways = sum(math.comb(number, k) * 0.01**k * 0.99 ** (number - k) for k in range(hits, number + 1))
    assert count_by_chance(hits, number, 0.01) == pytest.approx(ways)
    assert 0 < count_by_chance(3, 5000, 0.01) <= 1


def test_a_verdict_says_where_nothing_was_sampled(learnt, reporter):
    report = replace(audit(learnt, "fresh", reporter), reasons=[])
    assert "in the sampled texts" in report.verdict
    assert "no texts were sampled" in replace(report, copies=None).verdict
