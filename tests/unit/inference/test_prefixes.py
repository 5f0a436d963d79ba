"""A beginning that was read before is not read again, and nobody can tell."""

import dataclasses
import time

import pytest
import torch

from lora_gpt2.inference import engine as module
from lora_gpt2.inference import prefixes
from lora_gpt2.inference.engine import Engine, group_by_room, split_by_beginning
from lora_gpt2.inference.generate import Request, generate
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.prefixes import BLOCK, PrefixCache, count_shared
from lora_gpt2.inference.sequence import SequenceState
from lora_gpt2.inference.session import Session
from lora_gpt2.model.base import load_base
from lora_gpt2.model.runtime import choose_runtime
from lora_gpt2.recipe import GenerateSettings
from lora_gpt2.store.files import Origin, publish_adapter
from tests.builders import make_adapter, make_base_folder

SETTINGS = GenerateSettings(max_new_tokens=8, temperature=1.0, top_k=0, top_p=1.0)
HEADER = "the cat and the dog in the rain, and the man on the hill with a hat; " * 2


@pytest.fixture(scope="module")
def long_base(tmp_path_factory):
    return load_base(
        str(make_base_folder(tmp_path_factory.mktemp("long") / "base", context=320)),
        choose_runtime("float32", torch.device("cpu")),
    )


@pytest.fixture
def open_session(long_base, store):
    for seed, name in enumerate(("law", "code"), start=1):
        publish_adapter(store, name, make_adapter(long_base.config, seed), long_base, Origin())
    return lambda size=2**27: Session(long_base, store, prefix_bytes=size)


@pytest.fixture
def read(monkeypatch):
    """Counts the tokens that prefills compute."""
    counts = []
    real = module.Decoder.prefill

    def prefill(self, sequences, first, found=None):
        known = [sum(block.shape[3] for block in blocks) for blocks in found or [()] * len(sequences)]
        counts.append(sum(len(each.ids) - count for each, count in zip(sequences, known, strict=True)))
        return real(self, sequences, first, found)

    monkeypatch.setattr(module.Decoder, "prefill", prefill)
    return counts


def ask(ends, mix="law", settings=None):
    return [Request(HEADER + end, Mix.parse(mix), seed, settings=settings) for seed, end in enumerate(ends)]


ENDS = ["the cat", "a dog and", "", "rain", "the man with the hat and the dog in the rain"]


@pytest.mark.parametrize("mix", ["law", "base", "law:0.6+code:0.4"])
def test_prompts_that_begin_alike_are_read_once_and_continue_as_if_alone(open_session, read, mix):
    session = open_session()
    together = generate(session, ask(ENDS, mix), SETTINGS)
    shared = sum(read)
    read.clear()
    assert together == generate(open_session(0), ask(ENDS, mix), SETTINGS)
    assert shared < sum(read) / 2
    read.clear()
    assert generate(session, ask(ENDS, mix), SETTINGS) == together
    assert sum(read) <= len(ENDS) * BLOCK


def test_logits_after_a_known_beginning_are_those_of_reading_it_anew(open_session):
    def read_logits(session, texts):
        engine, kept = Engine(session, 4, 300), []
        sequences = [make_sequence(session, index, text, "code") for index, text in enumerate(texts)]
        real = engine.decoder.prefill
        engine.decoder.prefill = lambda *given: kept.append(real(*given)) or kept[-1]
        for sequence in sequences:
            engine.submit(sequence)
        engine.step()
        return torch.cat([found.logits.clone() for found in kept])

    session = open_session()
    texts = [HEADER + end for end in ENDS[:4]]
    read_logits(session, [HEADER])
    assert session.prefixes.num_bytes
    assert torch.allclose(read_logits(session, texts), read_logits(open_session(0), texts), atol=1e-4)


def make_sequence(session, index, text, mix):
    resolved = session.resolve(Mix.parse(mix))
    session.load(resolved.references)
    return SequenceState(
        index=index,
        mix=resolved,
        prompt_ids=session.base.tokenizer.encode(text),
        max_new_tokens=4,
        settings=SETTINGS,
        seed=index,
        tokenizer=session.base.tokenizer,
    )


def test_another_mix_another_version_and_adapters_in_memory_share_nothing(open_session, long_base, store, read):
    session = open_session()
    generate(session, ask(["a"]), SETTINGS)
    size = len(long_base.tokenizer.encode(HEADER + "a"))
    for mix in ("code", "base", "law:0.5"):
        read.clear()
        generate(session, ask(["a"], mix), SETTINGS)
        assert read == [size]
    publish_adapter(store, "law", make_adapter(long_base.config, 7), long_base, Origin())
    read.clear()
    new = generate(session, ask(["a"]), SETTINGS)
    assert read == [size]
    assert new == generate(open_session(0), ask(["a"]), SETTINGS)
    session.load_in_memory({"own": make_adapter(long_base.config, 3)})
    first = generate(session, ask(["a"], "own"), SETTINGS)
    session.load_in_memory({"own": make_adapter(long_base.config, 4)})
    read.clear()
    assert generate(session, ask(["a"], "own"), SETTINGS) != first
    assert read == [size]


def test_a_text_that_goes_on_with_what_was_written_reads_only_what_is_new(open_session, read):
    session = open_session()
    (output,) = generate(session, ask([""]), SETTINGS)
    read.clear()
    longer = Request(HEADER + output.text + " and", Mix.single("law"), 1)
    found = generate(session, [longer], SETTINGS)
    assert sum(read) <= 2 * BLOCK + 8
    assert found == generate(open_session(0), [longer], SETTINGS)


def test_prompts_whose_log_probabilities_are_wanted_are_read_whole(open_session, long_base):
    session = open_session()
    generate(session, ask(["a"]), SETTINGS)
    sequence = make_sequence(session, 0, HEADER + "a", "law")
    sequence.scores_prompt = True
    engine = Engine(session, 1, 300)
    engine.submit(sequence)
    engine.step()
    assert len(sequence.prompt_logprobs) == len(sequence.prompt_ids) - 1


def test_memory_is_bounded_and_the_least_recently_used_goes():
    row = torch.randn(2, 2, 2, 160, 4)
    size = row[:, :, :, :BLOCK].nbytes
    cache = PrefixCache(6 * size)
    first, second = list(range(80)), list(range(100, 196))
    cache.store("m", first, row)
    assert len(cache.find("m", first)) == 4  # the last token is computed
    assert cache.find("m", [*first, 5])[4].equal(row[:, :, :, 64:80])
    assert cache.find("other", first) == []
    cache.store("m", second, row)
    assert cache.num_bytes <= 6 * size
    assert len(cache.find("m", [*second, 1])) == 6
    assert cache.find("m", first) == []
    cache.store("m", list(range(300, 460)), row)  # more than there is room for
    assert cache.num_bytes <= 6 * size
    nothing = PrefixCache(0)
    nothing.store("m", first, row)
    assert nothing.find("m", first) == []


def test_short_beginnings_are_not_kept():
    cache = PrefixCache(2**20)
    cache.store("m", list(range(prefixes.WORTHWHILE - 1)), torch.zeros(1, 2, 1, 80, 2))
    assert cache.num_bytes == 0


def test_what_two_texts_share_is_counted_in_whole_blocks():
    assert count_shared([1] * 40, [1] * 35 + [2]) == 32
    assert count_shared([1], [2]) == 0
    assert count_shared([1] * 16, [1] * 16) == 16


def test_leaders_are_read_before_those_that_begin_like_them(open_session):
    session = open_session()
    texts = [(HEADER + "a", "law"), (HEADER + "b", "law"), ("short", "law"), (HEADER + "c", "code"), ("short", "law")]
    sequences = [make_sequence(session, index, *text) for index, text in enumerate(texts)]
    leaders, followers = split_by_beginning(session, sequences)
    assert ([s.index for s in leaders], [s.index for s in followers]) == ([0, 2, 3, 4], [1])


def test_a_group_is_no_longer_than_a_row_has_room_for(open_session):
    session = open_session()
    lengths, known = [300, 40, 310, 20], [18, 0, 18, 0]
    sequences = [make_sequence(session, k, "", "law") for k in range(4)]
    for sequence, length in zip(sequences, lengths, strict=True):
        sequence.prompt_ids = [1] * length
    groups = group_by_room(sequences, [[torch.zeros(0)] * count for count in known], 320)
    assert sorted(index for group in groups for index in group) == [0, 1, 2, 3]
    for group in groups:
        longest = max(known[index] * BLOCK for index in group)
        assert longest + max(lengths[index] - known[index] * BLOCK for index in group) <= 320


def test_adapters_of_the_same_weights_with_another_alpha_share_nothing(long_base, store):
    adapter = make_adapter(long_base.config, 1)
    publish_adapter(store, "one", adapter, long_base, Origin())
    publish_adapter(store, "two", replace_scale(adapter, 8.0), long_base, Origin())
    manifests = [store.read_manifest(name) for name in ("one", "two")]
    assert manifests[0].digest == manifests[1].digest
    expected = generate(Session(long_base, store, prefix_bytes=0), ask(["a"], "two"), SETTINGS)
    session = Session(long_base, store)
    assert generate(session, ask(["a"], "one"), SETTINGS) != expected
    assert generate(session, ask(["a"], "two"), SETTINGS) == expected


def replace_scale(adapter, factor):
    updates = {k: dataclasses.replace(update, alpha=update.alpha * factor) for k, update in adapter.updates.items()}
    return dataclasses.replace(adapter, updates=updates)


def test_the_beginning_of_a_text_outlives_its_end():
    row = torch.randn(1, 2, 1, 160, 2)
    size = row[:, :, :, :BLOCK].nbytes
    cache = PrefixCache(10 * size)
    cache.store("m", list(range(160)), row)
    cache.store("m", list(range(500, 580)), row)
    assert len(cache.find("m", list(range(160)))) == 5


def test_a_full_cache_takes_a_long_text_in_little_time():
    row = torch.zeros(1, 2, 1, 1024, 1)
    cache = PrefixCache(500 * row[:, :, :, :BLOCK].nbytes)
    for start in range(0, 20_000, 1024):
        cache.store("m", range(start, start + 1024), row)
    began = time.perf_counter()
    for start in range(30_000, 50_000, 1024):
        cache.store("m", range(start, start + 1024), row)
    assert time.perf_counter() - began < 0.4, "20 texts; it was 80 ms for one"
