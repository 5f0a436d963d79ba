"""No row depends on another: what a row computes is a function of its own tokens, mix and seed.

Neighbours are poisoned with finite values whose products overflow, and with infinities and NaN where a bank can hold
them. They sit in other slots of the batch, in idle slots between used ones, and in rows of the cache that were used
before. Each law fails on a bank that multiplies by zero instead of masking (commit 45c3e45).
"""

import asyncio
import random
from collections import Counter

import pytest
import torch

from lora_gpt2.core.errors import CorruptError
from lora_gpt2.inference.choose import choose_adapter
from lora_gpt2.inference.cuda_graphs import CudaGraphDecoder
from lora_gpt2.inference.engine import Engine
from lora_gpt2.inference.generate import Request, generate
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.sequence import SequenceState
from lora_gpt2.inference.session import Session
from lora_gpt2.model.bank import AdapterBank
from lora_gpt2.model.base import load_base
from lora_gpt2.model.batch_adapters import BatchAdapters
from lora_gpt2.model.lora import Adapter, LoraUpdate, merge_ranks
from lora_gpt2.model.prepacked import prepack_weights
from lora_gpt2.model.runtime import Runtime
from lora_gpt2.recipe import GenerateSettings, LoraSettings, ServeSettings
from lora_gpt2.serving.api import Server
from tests.builders import make_adapter
from tests.serving import ask_async, serving

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HUGE = {torch.float32: 3e38, torch.bfloat16: 3e38, torch.float16: 65_504.0}


def fill(adapter, value):
    """Returns the adapter with every value set to one number."""
    return Adapter(
        updates={
            site: LoraUpdate(torch.full_like(u.a, value), torch.full_like(u.b, value), u.alpha)
            for site, u in adapter.updates.items()
        }
    )


def open_bank(base, sound, slots, poisons):
    """Returns a bank with sound adapters in the first of `slots` and poisoned ones in the next."""
    ranks = merge_ranks(adapter.ranks for adapter in sound)
    bank = AdapterBank(base.config, ranks, len(slots), "inference", base.model.wte.weight)
    for slot, adapter in zip(slots, sound, strict=False):
        bank.load(slot, adapter)
    for slot, value in zip(slots[len(sound) :], poisons, strict=False):
        bank.load(slot, fill(make_adapter(base.config), HUGE[base.runtime.dtype]))
        if value is not None:  # as it would be after an overflow: no adapter is loaded like this
            for views in bank.sites.values():
                views.lora_a[slot] = value
    return bank


@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_poisoned_slots_change_no_other_row_of_a_batch(base_folder, dtype, is_packed):
    if is_packed and (
        dtype != torch.float32 or not {"fbgemm", "x86"} & set(torch.backends.quantized.supported_engines)
    ):
        return  # packed weights compute in float32, on x86
    base = load_base(str(base_folder), Runtime(CPU, dtype))
    if is_packed:
        prepack_weights(base.model)
    sound = [
        make_adapter(base.config, 1),
        make_adapter(base.config, 2, LoraSettings(rank=2, targets=("mlp.c_fc", "lm_head"))),
    ]
    tokens = torch.randint(0, base.config.vocab_size, (1, 9), generator=torch.Generator().manual_seed(0))
    num_poisoned_rows = 0
    for seed in range(24):
        draw = random.Random(seed)
        slots = draw.sample(range(6), draw.randint(4, 6))
        slots = [sorted(slots).index(slot) for slot in slots]
        poisons = draw.sample([None, torch.inf, -torch.inf, torch.nan], 2)
        weights = torch.zeros(6, len(slots))
        for row in weights:
            for slot in draw.sample(slots[:2], draw.randint(0, 2)):
                row[slot] = draw.choice([-16.0, -0.5, 0.25, 1.0])
        bad = (
            [row for row in range(6) if draw.random() < 0.4] if seed % 3 else []
        )  # of every third, in idle slots alone
        for row in bad:
            weights[row, draw.choice(slots[2:4])] = draw.choice([1.0, -16.0])
        num_poisoned_rows += len(bad)
        poisoned, clean = (run(base, tokens, open_bank(base, sound, slots, each), weights) for each in (poisons, ()))
        rest = [row for row in range(6) if row not in bad]
        assert torch.isfinite(clean[rest]).all(), "the control: sound rows are finite"
        assert torch.equal(poisoned[rest], clean[rest]), "bitwise, because all shapes are the same"
        assert all(not torch.isfinite(poisoned[row]).all() for row in bad), "the poison must be one"
    assert num_poisoned_rows > 20


def run(base, tokens, bank, weights):
    active = BatchAdapters(bank, weights)
    return base.model.logits(base.model(tokens.expand(len(weights), -1), active), active)


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e39])
@pytest.mark.parametrize("factor", ["a", "b"])
def test_an_adapter_that_is_not_finite_in_the_banks_dtype_is_refused_and_the_slot_stays_as_it_was(
    base_folder, factor, value
):
    base = load_base(str(base_folder), Runtime(CPU, torch.float16))
    bad = make_adapter(base.config)
    getattr(bad.updates["h.1.mlp.c_fc"], factor)[0, 0] = min(value, 1e38) if value == value else value
    session = Session(base)
    session.load_in_memory({"law": make_adapter(base.config, 3)})
    before = session.slots.bank.flat.clone()
    with pytest.raises(CorruptError, match=r"h\.1\.mlp\.c_fc are not finite in float16"):
        session.slots.bank.load(0, bad)
    with pytest.raises(CorruptError):
        session.load_in_memory({"bad": bad})
    assert torch.equal(session.slots.bank.flat[: len(before)], before)
    assert session.slots.references == ["law"]


SETTINGS = GenerateSettings(max_new_tokens=8, temperature=1.0, top_k=0, top_p=1.0)
SOUND = [Mix(), Mix.single("law"), Mix.single("code"), Mix([("law", 0.5), ("code", -16.0)])]
BAD = [Mix.single("bad"), Mix.single("worse"), Mix([("law", 1.0), ("bad", -16.0)])]


def open_session(base_folder, dtype):
    base = load_base(str(base_folder), Runtime(CPU, dtype))
    huge = HUGE[dtype]
    session = Session(base)
    session.load_in_memory({"bad": fill(make_adapter(base.config), huge), "law": make_adapter(base.config, 1)})
    session.load_in_memory({"worse": fill(make_adapter(base.config), huge / 1e3), "code": make_adapter(base.config, 2)})
    return session


def make_row(session, draw, index, mix, num_beams):
    ids = [draw.randrange(200) for _ in range(draw.randint(1, 20))]
    settings = SETTINGS.model_copy(update={"temperature": draw.choice([0.0, 1.0]), "num_beams": num_beams})
    return SequenceState(
        index=index,
        mix=mix,
        prompt_ids=ids,
        max_new_tokens=draw.randint(1, 8),
        settings=settings,
        seed=index,
        tokenizer=session.base.tokenizer,
    )


@pytest.mark.parametrize("is_static", [False, True], ids=["eager", "static"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_beside_and_after_poisoned_ones_write_what_they_write_alone(base_folder, dtype, is_static):
    session = open_session(base_folder, dtype)
    draw = random.Random(1)
    mixes = [draw.choice(BAD) if index % 3 == 0 else draw.choice(SOUND) for index in range(40)]
    num_beams = [3 if index % 7 == 0 else 1 for index in range(40)]
    rows = [
        make_row(session, random.Random(i), i, mix, b) for i, (mix, b) in enumerate(zip(mixes, num_beams, strict=True))
    ]
    alone = []
    for index, (mix, width) in enumerate(zip(mixes, num_beams, strict=True)):
        row = make_row(session, random.Random(index), index, mix, width)
        own = open_session(base_folder, dtype) if mix in BAD else session
        engine = Engine(own, 1, 48)
        engine.submit(row)
        while engine.is_busy:
            engine.step()
        alone.append(row)
    engine = Engine(session, 4, 48)
    if is_static:
        engine.decoder = CudaGraphDecoder(session, engine.cache)
    for row in rows:
        engine.submit(row)
    while engine.is_busy:
        engine.step()
    for row, single in zip(rows, alone, strict=True):
        assert (row.finish_reason == "error") == (row.mix in BAD)
        if row.mix in BAD:
            assert isinstance(row.error, CorruptError)
            assert "not finite" in row.error.message
        elif dtype == torch.float32:  # in 16 bits two likely tokens may change places by rounding
            assert row.new_ids == single.new_ids
        assert row.mix in BAD or row.finish_reason in ("stop", "length")
    assert not engine.cache.buffer.any(), "a cache without rows holds nothing"


def test_what_padding_wrote_behind_a_shorter_prompt_is_gone(base_folder):
    session = open_session(base_folder, torch.float32)
    engine = Engine(session, 2, 48)
    for index, ids in enumerate(([1, 2], list(range(30)))):
        engine.submit(
            SequenceState(
                index=index,
                mix=Mix(),
                prompt_ids=ids,
                max_new_tokens=4,
                settings=SETTINGS,
                seed=0,
                tokenizer=session.base.tokenizer,
            )
        )
    engine.step()
    assert engine.cache.buffer[:, :, 0, :, :2].any()
    assert not engine.cache.buffer[:, :, 0, :, 2:].any()


def test_an_adapter_that_fails_on_a_text_is_not_chosen_for_it(base_folder):
    session = open_session(base_folder, torch.float32)
    choice = choose_adapter(session, "the cat and the dog", ["bad", "law", "code"])
    assert choice.nll_nats_per_token["bad"] == float("inf")
    assert choice.adapter != "bad"
    assert 0 < choice.probability <= 1


@pytest.mark.parametrize("num_answers", [160, pytest.param(10_000, marks=pytest.mark.slow)])
def test_served_answers_are_right_beside_poisoned_ones(base_folder, num_answers):
    session = open_session(base_folder, torch.float32)
    models = {"base": Mix(), "law": Mix.single("law"), "code": Mix.single("code")}
    models["law:0.5+code:0.5"] = Mix([("law", 0.5), ("code", 0.5)])
    prompts = ["the cat", "a dog and the rain", "under", "the " * 12]
    greedy = GenerateSettings(temperature=0, max_new_tokens=6)
    wanted = {
        (model, prompt): generate(session, [Request(prompt, mix)], greedy)[0].text
        for model, mix in models.items()
        for prompt in prompts
    }
    assert len(set(wanted.values())) > 8
    server = Server(session=session, defaults=greedy, limits=ServeSettings(max_num_seqs=8, max_waiting=64))
    wrong, counts = [], Counter()

    async def ask_one(port, number, room):
        draw = random.Random(number)
        model = draw.choice(["bad", "worse", "law:1+bad:-16"]) if draw.random() < 0.3 else draw.choice(list(models))
        prompt = draw.choice(prompts)
        async with room:
            status, answer = await ask_async(port, {"model": model, "prompt": prompt, "seed": 0})
        counts[status] += 1
        if model in models and (status != 200 or answer["choices"][0]["text"] != wanted[model, prompt]):
            wrong.append((model, prompt, status, answer))
        if model not in models and (status, answer["error"]["code"]) != (503, "adapter_unusable"):
            wrong.append((model, prompt, status, answer))

    async def ask_all(port):
        room = asyncio.Semaphore(32)
        await asyncio.gather(*(ask_one(port, number, room) for number in range(num_answers)))

    with serving(server) as port:
        asyncio.run(ask_all(port))
    assert wrong == []
    assert counts[503] > num_answers / 5
    assert counts[200] + counts[503] == num_answers
