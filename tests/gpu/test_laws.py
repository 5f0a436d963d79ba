"""What a step may cost on a GPU: copies, waits and kernels, counted on the pretended device."""

from dataclasses import replace

import pytest
import torch

from lora_gpt2.core.interrupt import StopRequest
from lora_gpt2.data.prepared import prepare_data
from lora_gpt2.inference.choose import AdapterChoice
from lora_gpt2.inference.engine import Engine
from lora_gpt2.inference.generate import Request, generate, iter_pieces
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.routing import AUTO_MIX, Router
from lora_gpt2.inference.sequence import SequenceState
from lora_gpt2.inference.session import Session
from lora_gpt2.model.base import load_base
from lora_gpt2.model.runtime import Runtime
from lora_gpt2.recipe import GenerateSettings, build_recipe
from lora_gpt2.training.replay import open_replay
from lora_gpt2.training.samples import generate_sample
from lora_gpt2.training.slot import TrainingSlot
from lora_gpt2.training.step import SlotHyperparams
from lora_gpt2.training.trainer import Trainer
from tests.builders import make_adapter, make_base_folder
from tests.pretended_device import CUDA, DOWNLOAD, UPLOAD, WAIT, pretend_cuda

NAMES = ("a", "b", "c", "d")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real device is there, and tested")


@pytest.fixture
def log():
    with pretend_cuda() as found:
        yield found


def open_session(folder, dtype=torch.float32):
    base = load_base(str(folder), Runtime(CUDA, dtype))
    session = Session(base)
    session.load_in_memory({name: make_adapter(base.config, seed) for seed, name in enumerate(NAMES)})
    return session


def make_trainer(folder, text_file, reporter, sampler=None, **settings):
    steps = {"a": 12, "b": 7, "c": 12}  # the middle one stops: slots 0 and 2 remain
    base = load_base(str(folder), Runtime(CUDA, settings.pop("dtype", torch.float32)))
    recipes = [
        build_recipe(
            {
                "name": name,
                "data": {"sources": [str(text_file)], "block_size": 16, **settings.get("data", {})},
                "lora": {"rank": 2, **settings.get("lora", {})},
                "train": {
                    "steps": count,
                    "batch_tokens": 64,
                    "learning_rate": 1e-2,
                    "seed": seed,
                    "validate_every": 6,
                    "sample_tokens": 4,
                    **settings.get("train", {}),
                },
            },
            name,
        )
        for seed, (name, count) in enumerate(steps.items())
    ]
    data = prepare_data(recipes[0].data, base.tokenizer, reporter)
    slots = [TrainingSlot(recipe=recipe, data=data) for recipe in recipes]
    return Trainer(base, slots, reporter, sampler=sampler, replay=open_replay(recipes, base, reporter))


@pytest.mark.parametrize(
    "settings",
    [
        {"data": {"layout": "packed"}},
        {"train": {"label_smoothing": 0.1, "gradient_checkpointing": True}},
        {"train": {"dtype": "float16"}, "dtype": torch.float16},
        {"train": {"loraplus_lr_ratio": 4.0}, "lora": {"targets": ["c_attn.q", "mlp.c_fc", "lm_head"]}},
        {"train": {"neftune_noise_alpha": 5.0}, "lora": {"dropout": 0.2}},
        {"train": {"forget": 2.0, "replay_tokens": 256}, "lora": {"targets": ["mlp.c_fc", "lm_head"]}},
    ],
    ids=str,
)
def test_training_waits_for_nothing_and_every_step_is_captured(base_folder, text_file, reporter, log, settings):
    trainer = make_trainer(base_folder, text_file, reporter, sampler=generate_sample, **settings)
    trained = trainer.train(StopRequest())
    assert len(trained) == 3
    assert all(outcome.validation_nll < outcome.base_nll for outcome in trained)
    assert trainer.runner.graphs is not None, "also after a slot has left"


def test_a_training_step_has_two_uploads_and_one_download_at_most(base_folder, text_file, reporter, log):
    trainer = make_trainer(base_folder, text_file, reporter, lora={"dropout": 0.1})
    for _ in range(5):
        trainer.run_step([0, 1, 2])
    log.clear()
    trainer.run_step([0, 1, 2])
    assert (log.count(UPLOAD), log.count(DOWNLOAD), log.count(WAIT)) == (1, 1, 0), log.moves
    assert log.operations["graph.replay"] == 2


def make_sequences(session, count=4, **settings):
    return [
        SequenceState(
            index=k,
            mix=Mix.single(NAMES[k % 4]),
            prompt_ids=session.base.tokenizer.encode("the cat"),
            max_new_tokens=12,
            settings=GenerateSettings(max_new_tokens=12, **settings),
            seed=k,
            tokenizer=session.base.tokenizer,
        )
        for k in range(count)
    ]


def test_an_adapter_is_loaded_by_two_uploads(base_folder, log):
    """Its factors and its scalings, whatever the number of sites: a copy of its own for each of XL's takes 10 ms."""
    session = open_session(base_folder)
    adapter = make_adapter(session.base.config, 7)
    log.clear()
    session.slots.bank.load(2, adapter)
    assert (log.count(UPLOAD), log.count(DOWNLOAD) + log.count(WAIT)) == (2, 0), log.moves
    found = session.slots.bank.read(2)
    assert all(torch.equal(found.updates[site].a, update.a) for site, update in adapter.updates.items())


SAMPLING = [
    {},
    {"temperature": 0},
    {"temperature": 1.3, "top_k": 5, "min_p": 0.05},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "logit_bias": {3: 2.0}},
    {"regex": "[a-z ]+"},
]


@pytest.mark.parametrize("settings", SAMPLING, ids=str)
def test_a_decode_step_has_one_upload_and_one_download(base_folder, log, settings):
    session = open_session(base_folder)
    engine, sequences = Engine(session, 4, 40), make_sequences(session, **settings)
    for sequence in sequences:
        engine.submit(sequence)
    engine.step()
    engine.step()
    log.clear()
    engine.step()
    if any(sequence.finish_reason for sequence in sequences):
        pytest.skip("a sequence ended too early")
    assert (log.count(UPLOAD), log.count(DOWNLOAD) + log.count(WAIT)) == (1, 1), log.moves
    assert log.operations["graph.replay"] == 1


ADJUSTED = (
    [{"repetition_penalty": 1.5}, {"frequency_penalty": 0.8}, {"logit_bias": {4: 9.0}}, {}],
    [{"regex": "[a-z]{3,8}"}, {"choice": (" yes", " no"), "temperature": 0}, {}, {"json_schema": {"type": "integer"}}],
)


@pytest.mark.parametrize("adjusted", ADJUSTED, ids=["penalties", "constraints"])
def test_penalties_biases_and_constraints_are_those_of_the_cpu(base_folder, adjusted):
    requests = [Request("the cat sat", Mix.single(name), seed) for seed, name in enumerate(NAMES)]
    own = [GenerateSettings(max_new_tokens=10, **settings) for settings in adjusted]
    requests = [replace(request, settings=each) for request, each in zip(requests, own, strict=True)]
    base = load_base(str(base_folder), Runtime(torch.device("cpu"), torch.float32))
    session = Session(base)
    session.load_in_memory({name: make_adapter(base.config, seed) for seed, name in enumerate(NAMES)})
    expected = generate(session, requests, GenerateSettings())
    with pretend_cuda() as log:
        found = generate(open_session(base_folder), requests, GenerateSettings())
        assert log.operations["graph.replay"]
    assert [output.text for output in found] == [output.text for output in expected]


class Turns(Router):
    """Chooses one adapter after the other."""

    def choose(self, text):
        self.turn = getattr(self, "turn", -1) + 1
        return AdapterChoice(adapter=NAMES[self.turn % 4], probability=1.0, nll_nats_per_token={})


def test_a_text_that_changes_its_adapter_is_that_of_the_cpu(base_folder):
    settings = GenerateSettings(max_new_tokens=14, temperature=1.0, top_k=8, reroute_every=3)

    def write(session):
        others = [Request("the dog", Mix.single(name), seed) for seed, name in enumerate(NAMES[:2])]
        requests = [*others, Request("the cat", AUTO_MIX, 7, router=Turns(session))]
        return [output.text for output in generate(session, requests, settings)]

    base = load_base(str(base_folder), Runtime(torch.device("cpu"), torch.float32))
    session = Session(base)
    session.load_in_memory({name: make_adapter(base.config, seed) for seed, name in enumerate(NAMES)})
    expected = write(session)
    with pretend_cuda() as log:
        assert write(open_session(base_folder)) == expected
        assert log.operations["graph.replay"]


def test_calls_reuse_the_steps_that_were_captured(base_folder, log):
    session = open_session(base_folder)
    requests = [Request("the cat", Mix.single(name)) for name in NAMES]
    first = generate(session, requests, GenerateSettings(max_new_tokens=6))
    captured = dict(session.idle_engine.decoder._captured)
    second = generate(session, requests[:3], GenerateSettings(max_new_tokens=5))
    assert {key: session.idle_engine.decoder._captured[key] for key in captured} == captured
    assert [output.text[:5] for output in first[:3]] == [output.text[:5] for output in second]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("failing", range(3))
def test_what_fails_in_a_step_leaves_nothing_for_the_next_text(base_folder, log, monkeypatch, error, failing):
    """Engines are kept here: one whose step was left half done would go on with the rows of before."""
    session = open_session(base_folder)
    settings = GenerateSettings(max_new_tokens=5, temperature=0)
    one, other = Request("the cat", Mix.single("a")), Request("under another sun the dog", Mix.single("b"))
    wanted, _ = generate(session, [one, other], settings)
    engine = session.idle_engine

    def fail(method, calls):
        def wrapper(*args, **more):
            found = method(*args, **more)
            calls.append(0)
            if len(calls) > failing:
                raise error
            return found

        return wrapper

    calls = []
    monkeypatch.setattr(engine.decoder, "prefill", fail(engine.decoder.prefill, calls))
    monkeypatch.setattr(engine.decoder, "step", fail(engine.decoder.step, calls))
    with pytest.raises(error):
        generate(session, [other, other], settings)
    assert session.slots.pinned == []
    assert generate(session, [one], settings)[0].text == wanted.text
    assert session.idle_engine is not engine
    kept = session.idle_engine
    stream = iter_pieces(session, [one], settings)
    next(stream)
    stream.close()
    assert session.slots.pinned == []
    assert session.idle_engine is kept, "one that was left between two steps is used again"
    assert generate(session, [one], settings)[0].text == wanted.text


def count_kernels(compute, log):
    log.clear()
    compute()
    return log.num_kernels


def test_the_kernels_of_a_layer_may_only_become_fewer(tmp_path, log, text_file, reporter):
    """Without Triton, so more than on a GPU with it."""
    training, decoding = [], []
    for layers in (2, 4):
        folder = make_base_folder(tmp_path / str(layers), layers=layers, width=32, heads=2, context=48)
        trainer = make_trainer(
            folder, text_file, reporter, lora={"targets": ["c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]}
        )
        batches, _ = trainer.micro_batches.build([0, 1, 2])
        zeros, ones = torch.zeros(3), torch.ones(3)

        hyperparams = SlotHyperparams(
            learning_rates=zeros, weight_decays=zeros, max_grad_norms=ones, is_active=ones.bool()
        )
        given = trainer.runner.copy_to_device(batches, hyperparams)
        training.append(count_kernels(lambda given=given, trainer=trainer: trainer.runner.compute(*given), log))
        session = open_session(folder)
        engine = Engine(session, 4, 40)
        for sequence in make_sequences(session):
            engine.submit(sequence)
        engine.step()
        engine.step()
        (step,) = engine.decoder._captured.values()
        decoding.append(count_kernels(lambda engine=engine, step=step: engine.decoder._compute(step), log))
    per_layer = [(found[1] - found[0]) / 2 for found in (training, decoding)]
    assert per_layer == [72, 27]
