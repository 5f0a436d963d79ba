"""Laws of the budget of forgetting."""

import json
import os

import pytest
import torch

from lora_gpt2.core.console import SilentReporter
from lora_gpt2.core.errors import Interrupted, MismatchError
from lora_gpt2.core.interrupt import StopRequest
from lora_gpt2.data.prepared import prepare_data
from lora_gpt2.evaluation.general import read_general
from lora_gpt2.model.base import load_base
from lora_gpt2.model.fused import TrainingAdapters
from lora_gpt2.model.runtime import Runtime
from lora_gpt2.training.diagnosis import diagnose_curve
from lora_gpt2.training.process_group import ProcessGroup
from lora_gpt2.training.replay import BUNDLED, open_replay, write_text
from lora_gpt2.training.run import train_recipes
from lora_gpt2.training.slot import FIRST_PENALTY, TrainingSlot
from lora_gpt2.training.trainer import Trainer
from tests.builders import make_text
from tests.unit.training.test_trainer import make_recipe, weights_of

BUDGET = 0.05


@pytest.fixture
def general(tmp_path):
    path = tmp_path / "general.jsonl"
    path.write_text(make_text(60, seed=5, words="a man of the town went over to see what they had been told"))
    return path


def bounded(base_folder, text_file, general, name="one", **train):
    own = {"forget": BUDGET, "replay": [str(general)], "replay_tokens": 512, "replay_fraction": 0.5}
    return make_recipe(base_folder, text_file, name, **{**own, **train})


def make_trainer(recipes, reporter, dtype=torch.float32):
    base = load_base(recipes[0].base, Runtime(torch.device("cpu"), dtype))
    slots = [TrainingSlot(recipe=r, data=prepare_data(r.data, base.tokenizer, reporter)) for r in recipes]
    return Trainer(base, slots, reporter, replay=open_replay(recipes, base, reporter))


def test_a_budget_is_kept_and_without_it_much_more_is_forgotten(base_folder, text_file, general, reporter):
    recipes = [
        bounded(base_folder, text_file, general, "kept", steps=60),
        bounded(base_folder, text_file, general, "free", steps=60, forget=None),
    ]
    trainer = make_trainer(recipes, reporter)
    kept, free = trainer.train(StopRequest())
    for slot_id, outcome in enumerate((kept, free)):
        trainer.bank.load(slot_id, outcome.adapter)
    divergence = [trainer.replay.measure_divergence(trainer.base, TrainingAdapters(trainer.bank, [k])) for k in (0, 1)]
    assert divergence[0] == pytest.approx(kept.slot.best_divergence, rel=1e-4)
    assert divergence[0] < 1.1 * BUDGET < divergence[1] / 3
    assert free.validation_nll < kept.validation_nll < kept.base_nll - 0.05
    assert free.slot.best_divergence is None
    assert kept.slot.penalty != free.slot.penalty == FIRST_PENALTY


def test_the_gradient_is_that_of_the_loss_plus_penalty_times_divergence(base_folder, text_file, general, reporter):
    trainer = make_trainer([bounded(base_folder, text_file, general)], reporter)
    runner, slot = trainer.runner, trainer.slots[0]
    for _ in range(3):
        trainer.run_step([0])
    found = []
    for penalty in (0.0, 1.0, 3.0):
        slot.penalty = penalty
        batches, _ = trainer.micro_batches.build([0])
        runner.compute_gradients(batches)
        found.append(runner.gradient.clone())
    one, three = found[1] - found[0], found[2] - found[0]
    assert one.norm() > 1e-3
    assert torch.allclose(three, 3 * one, atol=1e-5)
    batches, _ = trainer.micro_batches.build([0])
    replayed = [batch for batch in batches if batch.reference is not None]
    value, change = float(runner.divergences), 1e-2 * one / one.norm()
    trainer.bank.flat.sub_(change)
    runner.compute_gradients(replayed)
    assert float(runner.divergences) - value == pytest.approx(-float((one * change).sum()), rel=0.1)


def test_with_others_it_computes_what_it_computes_alone(base_folder, text_file, general, reporter):
    recipes = [
        bounded(base_folder, text_file, general, "a", seed=3, steps=10, lora={"dropout": 0.1}),
        make_recipe(base_folder, text_file, "b", steps=8, replay=[str(general)], replay_tokens=512),
        bounded(base_folder, text_file, general, "c", seed=4, steps=12, forget=0.5, replay_fraction=0.25),
    ]
    together = make_trainer(recipes, reporter).train(StopRequest())
    for recipe, one in zip(recipes, together, strict=True):
        (alone,) = make_trainer([recipe], reporter).train(StopRequest())
        assert one.slot.penalty == pytest.approx(alone.slot.penalty, rel=1e-3)
        for site, update in alone.adapter.updates.items():
            assert torch.allclose(one.adapter.updates[site].b, update.b, atol=5e-5)


def test_several_processes_add_up_to_one(base_folder, text_file, general, reporter):
    recipe = bounded(base_folder, text_file, general, batch_tokens=128)
    whole = make_trainer([recipe], reporter)
    whole.run_step([0])
    whole.runner.compute_gradients(whole.micro_batches.build([0])[0])
    parts = []
    for rank in range(2):
        part = make_trainer([recipe], reporter)
        part.run_step([0])
        part.micro_batches.process_group = ProcessGroup(rank, 2)
        part.runner.compute_gradients(part.micro_batches.build([0])[0])
        parts.append(part.runner)
    assert torch.allclose(parts[0].gradient + parts[1].gradient, whole.runner.gradient, atol=1e-5)
    assert torch.allclose(parts[0].divergences + parts[1].divergences, whole.runner.divergences, atol=1e-6)


def test_resumed_equals_uninterrupted(base_folder, text_file, general, store, reporter, monkeypatch):
    recipe = bounded(base_folder, text_file, general, steps=8)
    advance = Trainer._advance

    def interrupt(self, active):
        advance(self, active)
        if self.step == 5:
            os.kill(os.getpid(), 2)

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(Trainer, "_advance", interrupt)
        train_recipes([recipe], store, reporter)
    written = general.read_text()
    general.write_text(written + make_text(5, seed=9))
    with pytest.raises(MismatchError, match="replay"):
        train_recipes([recipe], store, reporter, resume=True)
    general.write_text(written)
    (resumed,) = train_recipes([recipe], store, reporter, resume=True).adapters
    (whole,) = train_recipes([recipe.model_copy(update={"name": "whole"})], store, reporter).adapters
    assert weights_of(store, "one") == weights_of(store, "whole")
    assert resumed.divergence == whole.divergence
    assert "nats from the base, of 0.05" in whole.forgetting


def test_a_budget_that_is_exceeded_is_reported(base_folder, text_file, general, store, reporter):
    recipe = bounded(base_folder, text_file, general, steps=3, learning_rate=0.3, forget=1e-4)
    (report,) = train_recipes([recipe], store, reporter).adapters
    assert report.divergence > 1e-4
    assert "exceeds the budget" in report.forgetting
    steps = (
        {"validation_loss": 3.0, "step": 5},
        {"validation_loss": 2.9, "step": 10},
        {"validation_loss": 2.8, "step": 15},
    )
    said = diagnose_curve([each | {"loss": 3.0} for each in steps], 15, 2.0, 5000, 10, exceeds=True)
    assert said == "step 10 is kept, which exceeds the budget of forgetting least; without it, step 15 would be"


def test_the_base_writes_what_is_replayed_once_and_ends_texts_itself(base, base_folder, text_file, store, reporter):
    first = write_text(base, 300, reporter)
    before = first.stat().st_mtime_ns
    assert write_text(base, 300, reporter) == first
    assert first.stat().st_mtime_ns == before
    assert first.read_text() == write_text(base, 300, reporter).read_text()
    assert len(first.read_text().splitlines()) > 1
    recipe = make_recipe(base_folder, text_file, forget=0.5, replay="generated", replay_tokens=300)
    (report,) = train_recipes([recipe], store, reporter).adapters
    assert 0 < report.divergence < 0.6


def test_english_that_comes_with_the_package_is_replayed_unless_another_text_is_named(base, base_folder, text_file):
    recipe = make_recipe(base_folder, text_file, forget=0.5, replay_tokens=512)
    replay = open_replay([recipe], base, SilentReporter())
    assert replay.hidden.shape[:2] == (512 // 16, 16)
    passages = [json.loads(line)["text"] for line in BUNDLED.read_text().splitlines()]
    assert len(passages) > 100
    assert all(300 < len(text) < 5000 for text in passages)
    general = {tuple(words[k : k + 8]) for words in map(str.split, read_general()) for k in range(len(words))}
    replayed = {tuple(words[k : k + 8]) for words in map(str.split, passages) for k in range(len(words))}
    assert not general & replayed, "or what is reported as forgotten would be too little"


def test_bfloat16_keeps_the_budget_too(base_folder, text_file, general, reporter):
    recipe = bounded(base_folder, text_file, general, steps=40, dtype="bfloat16")
    (trained,) = make_trainer([recipe], reporter, torch.bfloat16).train(StopRequest())
    assert trained.slot.best_divergence < 1.2 * BUDGET
    assert all(update.a.dtype == torch.float32 for update in trained.adapter.updates.values())
