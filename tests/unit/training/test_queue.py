"""Laws of training more domains than there are slots."""

import itertools
import math
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from lora_gpt2.core.errors import DataError, Interrupted, MismatchError, ResourceError, TrainingDiverged
from lora_gpt2.model.base import load_base
from lora_gpt2.model.runtime import Runtime
from lora_gpt2.store.catalog import Store
from lora_gpt2.training.checkpoint import open_run_folder
from lora_gpt2.training.memory import MOST_SLOTS, estimate_memory, list_concurrent
from lora_gpt2.training.plan import fit_to_memory, plan_run, read_shape
from lora_gpt2.training.run import train_recipes
from lora_gpt2.training.run_reader import RunReader
from lora_gpt2.training.run_status import ALL, request_stop
from lora_gpt2.training.trainer import Trainer
from tests.builders import make_text
from tests.unit.training.test_trainer import make_recipe, weights_of

SETTINGS = [
    {"steps": 9, "seed": 1},
    {"steps": 5, "seed": 2, "lora": {"rank": 4, "targets": ["c_attn.q", "lm_head"]}},
    {"steps": 12, "seed": 3, "lora": {"dropout": 0.2}},
    {"steps": 7, "loraplus_lr_ratio": 4.0},
    {"steps": 6, "lora": {"init": "pissa"}, "weight_decay": 0.1},
    {"steps": 8, "validate_every": 1, "patience": 1, "learning_rate": 0.06},
]


@pytest.fixture
def recipes(base_folder, tmp_path):
    found = []
    for index, settings in enumerate(SETTINGS):
        path = tmp_path / f"d{index}.jsonl"
        path.write_text(make_text(60, seed=index))
        found.append(make_recipe(base_folder, path, f"d{index}", **settings))
    return found


def kill_at(monkeypatch, step):
    advance = Trainer._advance

    def interrupt(self, active):
        advance(self, active)
        if self.step == step:
            os.kill(os.getpid(), 2)

    monkeypatch.setattr(Trainer, "_advance", interrupt)


def assert_close(one, other):
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[key], tensor, atol=5e-5) for key, tensor in other.items())


def test_each_adapter_of_a_queue_equals_the_one_trained_alone(recipes, store, reporter, tmp_path, monkeypatch):
    launched = []
    launch = Trainer._launch
    monkeypatch.setattr(Trainer, "_launch", lambda self, ids: launched.append(len(ids)) or launch(self, ids))
    report = train_recipes(recipes, store, reporter, num_slots=2)
    assert [str(item) for item in report.adapters] == [f"d{index}@1" for index in range(6)]
    assert max(launched) == 2
    assert sum(launched) == sum(item.steps for item in report.adapters)
    assert launched.count(1) <= 6, "who waits takes a slot that is free"
    alone = Store(tmp_path / "alone")
    for recipe, item in zip(recipes, report.adapters, strict=True):
        (own,) = train_recipes([recipe], alone, reporter).adapters
        assert_close(load(weights_of(store, recipe.name)), load(weights_of(alone, recipe.name)))
        assert (item.steps, item.best_step, item.train_tokens) == (own.steps, own.best_step, own.train_tokens)
        assert item.validation_perplexity == pytest.approx(own.validation_perplexity, rel=1e-4)
        assert item.test_perplexity == pytest.approx(own.test_perplexity, rel=1e-4)


@pytest.mark.parametrize("step", [pytest.param(3, marks=pytest.mark.slow), 20])
def test_a_queue_goes_on_where_it_was_stopped_and_publishes_nothing_twice(
    recipes, store, reporter, tmp_path, monkeypatch, step
):
    whole = Store(tmp_path / "whole")
    wanted = train_recipes(recipes, whole, reporter, num_slots=2).adapters
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        kill_at(patched, step)
        train_recipes(recipes, store, reporter, num_slots=2)
    done = store.list_names()
    report = train_recipes(recipes, store, reporter, num_slots=2, resume=True)
    assert [(item.name, item.version, item.steps) for item in report.adapters] == [
        (item.name, item.version, item.steps) for item in wanted
    ]
    for recipe in recipes:
        assert weights_of(store, recipe.name) == weights_of(whole, recipe.name)
        assert store.list_versions(recipe.name) == [1]
    assert step < 14 or done
    again = train_recipes(recipes, store, reporter, num_slots=2, resume=True)
    assert again.already_complete
    assert [str(item) for item in again.adapters] == [f"d{index}@1" for index in range(6)]


def test_what_was_published_before_a_crash_is_not_published_again(recipes, store, reporter, monkeypatch):
    published = []
    save = Trainer.save_checkpoint

    def crash(self):
        if self.queue.finished and not published:
            published.append(store.list_names())
            raise RuntimeError("killed between publishing and the checkpoint")
        save(self)

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(Trainer, "save_checkpoint", crash)
        train_recipes(
            [r.model_copy(update={"train": r.train.model_copy(update={"checkpoint_every": 1})}) for r in recipes],
            store,
            reporter,
            num_slots=3,
        )
    assert published[0]
    train_recipes(
        [r.model_copy(update={"train": r.train.model_copy(update={"checkpoint_every": 1})}) for r in recipes],
        store,
        reporter,
        num_slots=3,
        resume=True,
    )
    assert all(store.list_versions(recipe.name) == [1] for recipe in recipes)


def test_a_domain_that_diverges_leaves_its_slot_to_the_next(recipes, store, reporter):
    hot = recipes[2].train.model_copy(update={"learning_rate": 1e38, "max_grad_norm": 0.0, "steps": 40})
    mixed = [recipes[0], recipes[2].model_copy(update={"train": hot}), *recipes[3:]]
    with pytest.raises(TrainingDiverged, match=r"'d2' diverged at step .*published: d0@1, d3@1, d4@1, d5@1") as caught:
        train_recipes(mixed, store, reporter, num_slots=2)
    assert list(caught.value.report.failures) == ["d2"]
    assert [each.steps for each in caught.value.report.adapters] == [mixed[k].train.steps for k in (0, 2, 3, 4)]
    assert store.list_names() == ["d0", "d3", "d4", "d5"]


def test_a_text_that_cannot_be_read_stops_its_own_domain_alone(recipes, store, reporter, monkeypatch):
    """Also when the run is killed and goes on."""
    for index, content in ((1, b"\x00" * 50), (4, b'{"no": 1')):
        Path(recipes[index].data.sources[0]).write_bytes(content)
    recipes = [r.model_copy(update={"train": r.train.model_copy(update={"checkpoint_every": 1})}) for r in recipes]
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        kill_at(patched, 8)
        train_recipes(recipes, store, reporter, num_slots=2)
    with pytest.raises(
        DataError, match=r"'d1' has no usable text: .*'d4' has no .*; published: d0@1, d2@1, d3@1, d5@1"
    ):
        train_recipes(recipes, store, reporter, num_slots=2, resume=True)
    assert store.list_names() == ["d0", "d2", "d3", "d5"]
    with pytest.raises(DataError, match="d4"):
        train_recipes([recipes[1], recipes[4]], store, reporter, num_slots=2)
    with pytest.raises(DataError, match="d1"):
        train_recipes(recipes[:2], store, reporter)


def test_a_text_that_was_repaired_or_has_changed_after_a_kill_trains_alone(recipes, store, reporter, monkeypatch):
    recipes = [r.model_copy(update={"train": r.train.model_copy(update={"checkpoint_every": 1})}) for r in recipes[:4]]
    path = Path(recipes[1].data.sources[0])
    good = path.read_text()
    path.write_bytes(b"\x00" * 50)
    with pytest.raises(DataError, match=r"'d1' .*published: d0@1, d2@1, d3@1"):
        train_recipes(recipes, store, reporter, num_slots=2)
    with pytest.raises(DataError, match=r"'d1' has no usable text: .*published: d0@1, d2@1, d3@1"):
        train_recipes(recipes, store, reporter, num_slots=2, resume=True)
    path.write_text(good)
    train_recipes(recipes, store, reporter, num_slots=2, resume=True)
    assert list_all_versions(store) == {f"d{n}": [1] for n in range(4)}
    again = Store(store.root.parent / "again")
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        kill_at(patched, 13)  # one is published by then, two are training
        train_recipes(recipes, again, reporter, num_slots=2)
    done = again.list_names()
    assert 0 < len(done) < 4
    waiting = next(index for index in range(4) if f"d{index}" not in done)
    Path(recipes[waiting].data.sources[0]).write_text(make_text(60, seed=77))
    for section, change in (("train", {"steps": 30}), ("lora", {"targets": ("c_attn.q", "mlp.c_fc")})):
        other = [r.model_copy(update={section: getattr(r, section).model_copy(update=change)}) for r in recipes]
        with pytest.raises(MismatchError, match="the run to resume differs"):
            train_recipes(other, again, reporter, num_slots=2, resume=True)
    train_recipes(recipes, again, reporter, num_slots=2, resume=True)
    assert list_all_versions(again) == {f"d{n}": [1] for n in range(4)}, "what was published stays"


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 4), (2, 0)])
def test_a_queue_goes_on_with_the_slots_that_it_had(recipes, store, reporter, monkeypatch, before, after):
    """Whatever memory has room for now."""
    recipes = [*recipes[:2], *recipes[3:5]]
    expected = Store(store.root.with_name("expected"))
    train_recipes(recipes, expected, reporter, num_slots=before)
    recipes = [r.model_copy(update={"train": r.train.model_copy(update={"checkpoint_every": 1})}) for r in recipes]
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        kill_at(patched, 8)
        train_recipes(recipes, store, reporter, num_slots=before)
    assert store.list_names(), "some are published, and not again"
    train_recipes(recipes, store, reporter, num_slots=after, resume=True)
    assert all(store.list_versions(recipe.name) == [1] for recipe in recipes)
    for recipe in recipes:
        assert_close(load(weights_of(store, recipe.name)), load(weights_of(expected, recipe.name)))


def test_a_folder_without_text_stops_its_own_domain_alone_and_no_plan(recipes, store, reporter, tmp_path):
    (tmp_path / "empty").mkdir()
    data = recipes[1].data.model_copy(update={"sources": (str(tmp_path / "empty"),)})
    mixed = [recipes[0], recipes[1].model_copy(update={"data": data}), recipes[2]]
    plan = plan_run(mixed, store, reporter, num_slots=2, probe=False)
    whole = plan_run([mixed[0], mixed[2]], store, reporter, num_slots=2, probe=False)
    assert list(plan.left_out) == ["d1"]
    assert (plan.recipes, plan.tokens, plan.memory) == (whole.recipes, whole.tokens, whole.memory)
    with pytest.raises(DataError, match="empty"):
        plan_run([mixed[1]], store, reporter, num_slots=2, probe=False)
    with pytest.raises(DataError, match=r"'d1' has no usable text: .*published: d0@1, d2@1"):
        train_recipes(mixed, store, reporter, num_slots=2)


def test_the_rows_of_a_bank_are_as_large_as_those_who_wait_need(recipes):
    config, runtime = read_shape(recipes[0])
    wide = recipes[0].model_copy(update={"lora": recipes[0].lora.model_copy(update={"rank": 64})})
    small = wide.model_copy(update={"train": wide.train.model_copy(update={"batch_tokens": 16})})
    alone = estimate_memory(config, [recipes[0]], runtime)
    assert estimate_memory(config, [recipes[0]], runtime, [recipes[0], small]).adapters > 4 * alone.adapters


def test_a_plan_of_a_queue_is_that_of_the_largest_that_train_at_the_same_time(recipes, store, reporter):
    plan = plan_run(recipes, store, reporter, num_slots=2, probe=False)
    config, runtime = read_shape(recipes[0])
    estimate = partial(estimate_memory, config, runtime=runtime, waiting=recipes, take_turns=True)
    pairs = [estimate(pair).peak for pair in itertools.combinations(recipes, 2)]
    alone = [estimate([recipe]).peak for recipe in recipes]
    assert alone[0] > estimate([recipes[0]], take_turns=False).peak, "publishing leaves gaps"
    assert (plan.num_slots, len(plan.recipes)) == (2, 6)
    assert max(alone) < plan.memory.peak <= max(pairs)
    whole = plan_run(recipes, store, reporter, probe=False)
    assert plan.memory.peak < whole.memory.peak
    assert plan.tokens == whole.tokens
    fitted, num_slots = fit_to_memory(recipes, store, max(alone), reporter, 0)
    assert (num_slots, fitted) == (1, recipes)
    with pytest.raises(ResourceError, match="nothing fits"):
        fit_to_memory(recipes, store, 1000, reporter, 0)


def test_as_many_slots_as_memory_has_room_for(recipes, base_folder, store, reporter):
    base = load_base(str(base_folder), Runtime(torch.device("cpu"), torch.float32))
    enough = estimate_memory(base.config, recipes, base.runtime).peak

    def count(recipes, budget, num_slots=0):
        return len(list_concurrent(base.config, recipes, base.runtime, budget, num_slots))

    assert count(recipes, enough) == 6
    one = max(estimate_memory(base.config, [recipe], base.runtime).peak for recipe in recipes)
    assert count(recipes, one) == 1
    assert count(recipes * 4, 10**12) == MOST_SLOTS
    assert count(recipes, one, 3) == 3, "what was asked for"
    assert count(recipes * 4, one, None) == 24
    assert len(train_recipes(recipes, store, reporter, num_slots=0).adapters) == 6


def ask_at(monkeypatch, step, *names):
    """Leaves requests to stop in the folder of the run, as the page does, after so many steps."""
    advance = Trainer._advance

    def ask(self, active):
        advance(self, active)
        if self.step == step:
            for name in names:
                request_stop(self.run.path, name)
            self.run.status._polled = -math.inf  # it looks twice a second

    monkeypatch.setattr(Trainer, "_advance", ask)


def read_run(store, recipes):
    return RunReader(open_run_folder(store.root, [recipe.name for recipe in recipes]).path)


def test_one_adapter_stops_on_request_and_is_kept_and_its_slot_goes_to_the_next(recipes, store, reporter, monkeypatch):
    ask_at(monkeypatch, 2, "d2")
    report = train_recipes(recipes, store, reporter, num_slots=2)
    steps = {item.name: item.steps for item in report.adapters}
    assert steps.pop("d2") == 3, "it was the first to train, and made the step in which the request came"
    assert all(steps[f"d{index}"] == SETTINGS[index]["steps"] for index in (0, 1, 3, 4))
    run = read_run(store, recipes)
    assert run.status["state"] == "done"
    assert {name: tuple(state) for name, state in run.status["adapters"].items()} == {
        item.name: ("published", str(item)) for item in report.adapters
    }
    assert {name: len(curves.points) for name, curves in run.curves.items()} == {"d2": 3, **steps}


def test_when_all_stop_those_that_train_are_kept_and_the_others_wait_for_resume(recipes, store, reporter, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as caught:
        ask_at(patch, 3, ALL)
        train_recipes(recipes, store, reporter, num_slots=2)
    assert "--resume trains the 4 that wait" in caught.value.hint
    assert store.list_names() == ["d0", "d2"], "the two longest began"
    states = read_run(store, recipes).status
    assert states["state"] == "stopped"
    assert [state for state, _ in states["adapters"].values()].count("waiting") == 4
    report = train_recipes(recipes, store, reporter, num_slots=2, resume=True)
    assert {item.name: item.steps for item in report.adapters if item.name not in ("d0", "d2")} == {
        "d1": 5,
        "d3": 7,
        "d4": 6,
        "d5": report.adapters[-1].steps,
    }
    assert [item.version for item in report.adapters] == [1] * 6, "what was kept is not trained again"
    assert read_run(store, recipes).status["state"] == "done"


def test_a_run_without_a_queue_stops_on_request_too(recipes, store, reporter, monkeypatch):
    ask_at(monkeypatch, 2, ALL)
    report = train_recipes(recipes[:2], store, reporter)
    assert [(item.name, item.steps) for item in report.adapters] == [("d0", 3), ("d1", 3)]
    assert not list(open_run_folder(store.root, ["d0", "d1"]).path.glob("step-*.checkpoint")), "it is done"


def list_all_versions(store):
    return {name: store.list_versions(name) for name in store.list_names()}


def test_a_folder_that_has_grown_trains_what_is_new(recipes, store, reporter, monkeypatch):
    """After a run that was interrupted with other domains, and after one that is over."""
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        kill_at(patched, 11)
        train_recipes(recipes[:3], store, reporter, num_slots=1)
    assert store.list_names() == []
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        kill_at(patched, 14)
        train_recipes(recipes[:3], store, reporter, num_slots=1, resume=True)
    assert list_all_versions(store) == {"d2": [1]}
    trained = []
    launch = Trainer._launch

    def note(self, ids):
        trained.extend(self.slots[slot_id].name for slot_id in ids)
        launch(self, ids)

    monkeypatch.setattr(Trainer, "_launch", note)
    num_left = sum(r.train.steps for r in recipes[:4]) - 14
    report = train_recipes(recipes[:4], store, reporter, num_slots=1, resume=True)
    assert [str(item) for item in report.adapters] == ["d0@1", "d1@1", "d2@1", "d3@1"]
    assert set(trained) == {"d0", "d1", "d3"}, "d2 is there"
    assert len(trained) == num_left, "and what was in training went on"
    trained.clear()
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        kill_at(patched, 3)
        train_recipes(recipes[:5], store, reporter, num_slots=2, resume=True)
    report = train_recipes(recipes[:5], store, reporter, num_slots=2, resume=True)
    assert trained == ["d4"] * 6
    assert list_all_versions(store) == {f"d{index}": [1] for index in range(5)}
    assert [str(item) for item in report.adapters] == [f"d{index}@1" for index in range(5)]
    report = train_recipes(recipes[:5], store, reporter, num_slots=2, resume=True)
    assert report.already_complete
    assert len(report.adapters) == 5


def test_a_queue_whose_broken_text_was_taken_away_goes_on(recipes, store, reporter, monkeypatch):
    """Or put right: its run is that of names which are not all in training."""
    path = Path(recipes[1].data.sources[0])
    path.write_bytes(b"\x00" * 50)
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        kill_at(patched, 14)
        train_recipes(recipes[:3], store, reporter, num_slots=1)
    launched, launch = [], Trainer._launch
    monkeypatch.setattr(Trainer, "_launch", lambda self, ids: launched.append(ids) or launch(self, ids))
    report = train_recipes([recipes[0], recipes[2], recipes[4]], store, reporter, num_slots=1, resume=True)
    assert len(launched) == sum(recipes[k].train.steps for k in (0, 2, 4)) - 14
    assert [str(each) for each in report.adapters] == ["d0@1", "d2@1", "d4@1"]


def test_an_interruption_tells_what_was_published(recipes, store, reporter, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(Interrupted) as caught:
        kill_at(patched, 14)
        train_recipes(recipes[:3], store, reporter, num_slots=1)
    assert [str(each) for each in caught.value.report.adapters] == ["d2@1"]


def test_a_domain_may_be_called_what_a_failure_is_called(recipes, store, reporter, tmp_path):
    path = tmp_path / "diverged at noon.txt"
    path.write_bytes(b"\x00" * 50)
    data = recipes[1].data.model_copy(update={"sources": (str(path),)})
    odd = recipes[1].model_copy(update={"name": "diverged", "data": data})
    with pytest.raises(DataError, match="'diverged' has no usable text"):
        train_recipes([recipes[0], odd], store, reporter, num_slots=2)


def test_a_version_that_a_kill_left_unused_is_put_in_use_when_the_folder_grows(recipes, store, reporter, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(Store, "use_version", lambda self, *arguments: (_ for _ in ()).throw(RuntimeError("killed")))
        train_recipes(recipes[:1], store, reporter, num_slots=1)
    assert (store.list_names(), store.list_versions("d0")) == ([], [1])
    train_recipes([recipes[0], recipes[4]], store, reporter, num_slots=1, resume=True)
    assert list_all_versions(store) == {"d0": [1], "d4": [1]}


def test_what_was_continued_or_rolled_back_stays_when_the_folder_grows(recipes, store, reporter):
    train_recipes(recipes[:2], store, reporter, num_slots=2)
    values = recipes[0].model_dump(exclude_unset=True)
    values |= {"lora": {"init_from": "d0"}, "data": {**values["data"], "sources": recipes[2].data.sources}}
    train_recipes([type(recipes[0]).model_validate(values)], store, reporter)
    assert store.read_current("d0") == 2
    train_recipes(recipes[:3], store, reporter, num_slots=2, resume=True)
    assert list_all_versions(store) == {"d0": [1, 2], "d1": [1], "d2": [1]}
    assert store.read_current("d0") == 2
    store.use_version("d0", 1)
    train_recipes(recipes[:4], store, reporter, num_slots=2, resume=True)
    assert list_all_versions(store)["d0"] == [1, 2]
    assert store.read_current("d0") == 1


def test_what_has_changed_is_trained_again_and_only_that(recipes, store, reporter):
    train_recipes(recipes[:3], store, reporter, num_slots=2)
    longer = recipes[1].model_copy(update={"train": recipes[1].train.model_copy(update={"steps": 6})})
    Path(recipes[2].data.sources[0]).write_text(make_text(60, seed=77))
    train_recipes([recipes[0], longer, recipes[2]], store, reporter, num_slots=2, resume=True)
    assert list_all_versions(store) == {"d0": [1], "d1": [1, 2], "d2": [1, 2]}
    train_recipes([recipes[0], longer, recipes[2]], store, reporter, num_slots=2)
    assert list_all_versions(store) == {"d0": [1, 2], "d1": [1, 2, 3], "d2": [1, 2, 3]}, "without --resume, all"
