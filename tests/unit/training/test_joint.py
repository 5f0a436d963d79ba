"""Several slots in one run: each stops, fails and settles for itself."""

import json
import os

import pytest
import torch
from safetensors.torch import load

from lora_gpt2.core.dirs import find_trackers_dir
from lora_gpt2.core.errors import TrainingDiverged
from lora_gpt2.core.interrupt import StopRequest
from lora_gpt2.data.prepared import prepare_data
from lora_gpt2.model.base import load_base
from lora_gpt2.model.runtime import Runtime
from lora_gpt2.training.checkpoint import RunFolder, open_run_folder
from lora_gpt2.training.optimizer import GROWTH_STEPS, START_SCALE, GradScaler, SlotAdamW
from lora_gpt2.training.process_group import ProcessGroup
from lora_gpt2.training.run import train_recipes
from lora_gpt2.training.slot import TrainingSlot
from lora_gpt2.training.trackers import track
from lora_gpt2.training.trainer import MAX_SKIPS, Trainer
from tests.builders import make_text
from tests.unit.training.test_trainer import are_equal, make_recipe, make_trainer, script_validations, weights_of

CPU = torch.device("cpu")


@pytest.fixture
def other_text(tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text(make_text(60, seed=7, words="le chat et le chien dans la pluie sous un soleil"))
    return path


def test_a_slot_that_stops_early_frees_its_rows_and_the_other_is_as_alone(base_folder, text_file, other_text, reporter):
    recipes = [
        make_recipe(base_folder, text_file, "one", steps=12, validate_every=1, patience=3),
        make_recipe(base_folder, other_text, "two", steps=12, validate_every=5, lora={"dropout": 0.3}),
    ]
    trainer = make_trainer(recipes, reporter)
    script_validations(trainer, {0: [5.0, 4.0, 4.5, 3.0, 3.1, 3.0, 3.2]})
    rows = []
    original = trainer.runner.run
    trainer.runner.run = lambda batches, hyperparams: (
        rows.append(sum(len(batch.inputs) for batch in batches)) or original(batches, hyperparams)
    )
    one, two = trainer.train(StopRequest())
    assert one.slot.stopped
    assert (one.slot.best_step, one.slot.last_step) == (4, 7)
    assert rows == [8] * 7 + [4] * 5
    assert one.slot.records[-1]["step"] == one.slot.last_step
    (alone,) = make_trainer([recipes[1]], reporter).train(StopRequest())
    for site, update in alone.adapter.updates.items():
        assert torch.allclose(two.adapter.updates[site].b, update.b, atol=2e-5), "also with dropout"


def test_one_domains_divergence_does_not_hurt_the_others(base_folder, text_file, other_text, store, reporter):
    hot = make_recipe(base_folder, text_file, "hot", learning_rate=1e38, max_grad_norm=0.0)
    calm = make_recipe(base_folder, other_text, "calm", steps=8)
    with pytest.raises(TrainingDiverged, match=r"'hot' diverged at step 1.*published: calm@1") as caught:
        train_recipes([hot, calm], store, reporter)
    assert "1e+38" in caught.value.message
    assert store.list_names() == ["calm"]
    train_recipes([calm.model_copy(update={"name": "alone"})], store, reporter)
    one, other = (load(weights_of(store, name)) for name in ("calm", "alone"))
    assert all(torch.allclose(one[key], tensor, atol=2e-5) for key, tensor in other.items())
    assert all(tensor.any() for tensor in one.values())
    with pytest.raises(TrainingDiverged, match="published: calm@1"):
        train_recipes([hot, calm], store, reporter, resume=True)
    assert store.list_versions("calm") == [1], "what is published is not published again"


def test_a_step_that_is_not_finite_changes_nothing():
    flat = torch.ones(2, 3)
    optimizer = SlotAdamW(flat)
    gradient = torch.tensor([[1.0, 2, 3], [float("nan"), 1, 1]])
    optimizer.step(gradient, torch.full((2,), 0.1), torch.zeros(2), torch.tensor([True, False]))
    assert not torch.equal(flat[0], torch.ones(3))
    assert torch.equal(flat[1], torch.ones(3))
    assert not optimizer.exp_avg[1].any()
    assert optimizer.steps[:, 0].tolist() == [1, 0]


def test_the_loss_scale_halves_on_overflow_and_doubles_after_many_good_steps():
    scale, active = GradScaler(3, CPU), torch.tensor([True, True, False])
    for step in range(GROWTH_STEPS):
        scale.update(torch.tensor([True, step != 3, False]), active)
    assert scale.values.tolist() == [2 * START_SCALE, START_SCALE / 2, START_SCALE]


def half_trainer(base_folder, text_file, reporter, **train):
    base = load_base(str(base_folder), Runtime(CPU, torch.float16))
    recipe = make_recipe(base_folder, text_file, **train)
    return Trainer(
        base, [TrainingSlot(recipe=recipe, data=prepare_data(recipe.data, base.tokenizer, reporter))], reporter
    )


def test_float16_trains_with_loss_scaling_and_its_skips_are_counted(base_folder, text_file, reporter):
    trainer = half_trainer(base_folder, text_file, reporter, steps=60, validate_every=60)
    trainer.runner.grad_scaler.values.fill_(2.0**22)  # so large that the first steps overflow
    (trained,) = trainer.train(StopRequest())
    domain = trained.slot
    assert trained.validation_nll < trained.base_nll - 0.3
    assert 0 < domain.num_skipped < MAX_SKIPS
    assert domain.records[0]["loss"] is None
    assert domain.records[domain.num_skipped]["loss"] > 0
    assert trainer.runner.optimizer.steps.item() == 60 - domain.num_skipped


def test_more_than_twenty_skips_in_a_row_are_divergence(base_folder, text_file, reporter):
    trainer = half_trainer(base_folder, text_file, reporter, steps=60, validate_every=60)
    trainer.bank.flat_cast.fill_(float("inf"))
    trainer.bank.refresh_casts = lambda: None
    with pytest.raises(TrainingDiverged, match="step 21"):
        trainer.train(StopRequest())


def test_looking_ahead_changes_nothing_but_when_python_learns_of_it(base_folder, text_file, other_text, reporter):
    def train(lookahead):
        recipes = [
            make_recipe(base_folder, text_file, validate_every=4, steps=9),
            make_recipe(base_folder, other_text, "two", steps=7, learning_rate=1e38, max_grad_norm=0.0),
        ]
        trainer = make_trainer(recipes, reporter)
        trainer.lookahead = lookahead
        (one,) = trainer.train(StopRequest())
        return one, trainer.slots[1]

    (now, failed_now), (later, failed_later) = train(0), train(2)
    strip = [{k: v for k, v in r.items() if k not in ("seconds", "memory_bytes")} for r in now.slot.records]
    assert strip == [{k: v for k, v in r.items() if k not in ("seconds", "memory_bytes")} for r in later.slot.records]
    assert failed_now.failure
    assert failed_now.failure == failed_later.failure
    assert all(torch.equal(now.adapter.updates[s].a, u.a) for s, u in later.adapter.updates.items())


def test_lora_plus_moves_b_faster_by_its_ratio(base_folder, text_file, reporter):
    steps = {"steps": 1, "warmup_fraction": 0.0, "keep_best": False}
    plain = make_trainer([make_recipe(base_folder, text_file, **steps)], reporter)
    plus = make_trainer([make_recipe(base_folder, text_file, loraplus_lr_ratio=16, **steps)], reporter)
    before = plain.bank.read(0)
    (one,), (other,) = plain.train(StopRequest()), plus.train(StopRequest())
    for site, update in before.updates.items():
        moved, faster = one.adapter.updates[site], other.adapter.updates[site]
        assert torch.equal(moved.a - update.a, faster.a - update.a)
        assert torch.allclose(16 * (moved.b - update.b), faster.b - update.b, rtol=1e-4, atol=1e-6)
        assert moved.b.any()


@pytest.mark.parametrize("change", [{"label_smoothing": 0.2}, {"neftune_noise_alpha": 10}, {"lora": {"dropout": 0.3}}])
def test_what_regularises_changes_training_and_is_repeatable(base_folder, text_file, reporter, change):
    made = []
    for options in ({}, change, change):
        (trained,) = make_trainer([make_recipe(base_folder, text_file, steps=3, **options)], reporter).train(
            StopRequest()
        )
        made.append(trained.adapter)
    plain, first, second = made
    assert are_equal(first, second)
    assert not are_equal(first, plain)


def test_checkpointing_gives_the_same_adapter(base_folder, text_file, reporter):
    made = []
    for checkpointing in (False, True):
        recipe = make_recipe(base_folder, text_file, gradient_checkpointing=checkpointing, lora={"dropout": 0.2})
        (trained,) = make_trainer([recipe], reporter).train(StopRequest())
        made.append(trained.adapter)
    for site, update in made[0].updates.items():
        assert torch.allclose(made[1].updates[site].a, update.a, atol=1e-6), site


def test_each_process_takes_its_share_and_the_shares_add_up_to_the_whole(base_folder, text_file, reporter):
    recipe = make_recipe(base_folder, text_file, batch_tokens=80, micro_batch_tokens=32)
    whole = make_trainer([recipe], reporter)
    whole.runner.compute_gradients(whole.micro_batches.build([0])[0])
    total = torch.zeros_like(whole.runner.gradient)
    for rank in range(3):
        part = make_trainer([recipe], reporter)
        part.micro_batches.process_group = ProcessGroup(rank, 3)
        part.runner.compute_gradients(part.micro_batches.build([0])[0])
        total += part.runner.gradient
    assert torch.allclose(total, whole.runner.gradient, rtol=1e-4, atol=1e-7)
    assert total.any()


def test_trackers_get_every_number(base_folder, text_file, store, reporter):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = make_recipe(base_folder, text_file, trackers=["tensorboard"], validate_every=3)
    train_recipes([recipe], store, reporter)
    folder = open_run_folder(store.root, ["one"]).path
    events = min((path.parent for path in find_trackers_dir().rglob("*tfevents*")), key=lambda path: len(path.parts))
    found = EventAccumulator(str(events)).Reload()
    lines = [json.loads(line) for line in (folder / "one.metrics.jsonl").read_text().splitlines()]
    assert [event.value for event in found.Scalars("one/loss")] == pytest.approx([line["loss"] for line in lines])
    assert [event.step for event in found.Scalars("one/validation_loss")] == [3, 6]
    os.utime(folder / "identity.json", (0, 0))
    with track([recipe], RunFolder(path=folder), reporter):
        assert len(list(find_trackers_dir().iterdir())) == 2, "a run that began at another time has a folder of its own"
