"""Laws of the search by successive halving."""

import json
import os
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load

from lora_gpt2.core.console import SilentReporter
from lora_gpt2.core.errors import Interrupted, InterruptedRunError, MismatchError, TrainingDiverged, UsageError
from lora_gpt2.data.prepared import prepare_data
from lora_gpt2.data.tokenizer import load_tokenizer
from lora_gpt2.recipe import BLOCKS
from lora_gpt2.recipe_files import set_values
from lora_gpt2.training.candidates import CANDIDATES, list_candidates
from lora_gpt2.training.halving import SuccessiveHalving, average_weights, rate
from lora_gpt2.training.memory import count_fitting, estimate_memory
from lora_gpt2.training.plan import read_shape
from lora_gpt2.training.run import train_recipes
from lora_gpt2.training.run_status import ALL, request_stop
from lora_gpt2.training.slot import TrainingSlot
from lora_gpt2.training.trainer import Trainer
from lora_gpt2.training.tune import tune
from lora_gpt2.training.validation import HeldOutLosses
from tests.unit.training.test_trainer import make_recipe, weights_of


def make_search(base_folder, text_file, **values):
    recipe = make_recipe(base_folder, text_file, "law", steps=16)
    grid = {"tune.ranks": [1, 2, 3], "tune.learning_rate_factors": [0.01, 0.5, 1.0], "tune.targets": [["mlp.c_fc"]]}
    changed = set_values(recipe.model_dump(exclude_unset=True), {"lora.targets": ["mlp.c_fc"], **grid, **values})
    return type(recipe).model_validate(changed)


def test_half_of_the_candidates_go_on_at_each_rung():
    halving = SuccessiveHalving.build(8, 192)
    assert halving.rungs == (16, 48, 120)
    assert halving.count_steps(192) == 8 * 16 + 4 * 32 + 2 * 72 + 72, "2.46 runs"
    assert SuccessiveHalving.build(16, 480).rungs == (20, 48, 120, 300)
    assert SuccessiveHalving.build(8, 3).rungs == (1,)
    assert SuccessiveHalving.build(5, 100).rungs == (25, 62)
    assert SuccessiveHalving.build(2, 100).rungs == (62,)
    assert SuccessiveHalving.build(2, 1).rungs == ()
    for candidates in range(2, 70):
        for steps in (1, 2, 5, 17, 1000):
            rungs = SuccessiveHalving.build(candidates, steps).rungs
            assert list(rungs) == sorted(set(rungs))
            assert not rungs or 0 < rungs[0] <= rungs[-1] < steps
            assert len(rungs) <= candidates.bit_length() - 1


def test_the_average_is_of_recent_weights_and_a_rung_compares_it():
    average, weights = torch.zeros(1), [torch.tensor([float(step)]) for step in range(1, 101)]
    for step, value in enumerate(weights, start=1):
        average_weights(average, value, step)
    assert 88 < float(average) < 92, "with an exponent of 8, nine tenths of the way"
    slots = [
        SimpleNamespace(failure="", stopped=False, best_excess=0.0, best_nll=nll, rung=None)
        for nll in (3.0, 3.1, 3.2, 9.0)
    ]
    measured = [2.9, 2.5, 3.0, 2.4]
    SuccessiveHalving(num_candidates=4, rungs=(5, 9)).stop_losers(4, slots, measured.__getitem__)
    assert not any(slot.stopped for slot in slots)
    SuccessiveHalving(num_candidates=4, rungs=(5, 9)).stop_losers(5, slots, measured.__getitem__)
    assert [slot.stopped for slot in slots] == [True, False, True, False]


def test_a_validation_for_a_rung_alone_is_compared_there_and_changes_nothing_else(base_folder, text_file, reporter):
    recipe = make_search(base_folder, text_file, **{"train.validate_every": 4, "train.patience": 1})
    slot = TrainingSlot(recipe=recipe, data=prepare_data(recipe.data, load_tokenizer(Path(recipe.base), 0), reporter))
    slot.last_step = 4
    assert slot.record_validation(4, 3.0)
    slot.last_step = 6
    assert not slot.record_validation(6, 2.0)
    assert (slot.best_nll, slot.best_step, slot.validations_without_improvement) == (3.0, 4, 0)
    assert rate(slot, 2.5) == (0.0, 2.0)
    again = TrainingSlot(recipe=recipe, data=slot.data)
    again.restore_progress(json.loads(json.dumps(slot.progress_to_json())))
    assert rate(again, 2.5) == (0.0, 2.0)
    slot.last_step = 8
    assert not slot.record_validation(8, 3.5)
    assert slot.stopped
    assert rate(slot, 9.0) == (0.0, 3.0)


def test_candidates_are_the_recipe_and_an_even_draw_from_its_grid(base_folder, text_file):
    recipe = make_search(base_folder, text_file, **{"tune.dropouts": [0.0, 0.1], "tune.step_fractions": [0.5, 1.0]})
    found = list_candidates(recipe, 12)
    assert found == list_candidates(recipe, 12)
    assert found[0] == (recipe.model_copy(), {})
    assert len({repr(candidate) for candidate, _ in found}) == 12
    ranks = Counter(candidate.lora.rank for candidate, _ in found[1:])
    assert max(ranks.values()) - min(ranks.values()) <= 2
    assert {candidate.train.steps for candidate, _ in found} == {8, 16}
    assert {round(candidate.train.learning_rate / recipe.train.learning_rate, 3) for candidate, _ in found} == {
        0.01,
        0.5,
        1.0,
    }
    for candidate, settings in found:
        assert all(key.split(".")[0] in ("train", "lora") for key in settings)
        assert candidate.lora.targets == ("mlp.c_fc",)
    small = set_values(recipe.model_dump(), {"tune.ranks": [2], "tune.learning_rate_factors": [1.0]})
    assert len(list_candidates(type(recipe).model_validate(small), 12)) == 4, "no more than the grid has"
    assert recipe.tune.targets == (("mlp.c_fc",),)
    assert type(recipe)().tune.targets[0] == BLOCKS


def test_the_best_is_published_as_if_it_had_been_trained_alone(base_folder, text_file, store, reporter, monkeypatch):
    tested, steps = [], []
    measure, launch = HeldOutLosses.measure_test, Trainer._launch
    monkeypatch.setattr(HeldOutLosses, "measure_test", lambda self, *a: tested.append(a[0]) or measure(self, *a))
    monkeypatch.setattr(Trainer, "_launch", lambda self, ids: steps.append(len(ids)) or launch(self, ids))
    recipe = make_search(base_folder, text_file)
    report = tune(recipe, store, reporter, num_candidates=8)
    assert str(report.adapter) == "law@1"
    assert steps == [8] + [4] * 3 + [2] * 6 + [1] * 6
    assert len(tested) == 1, "test text is for the best alone"
    assert [candidate.steps for candidate in report.candidates].count(16) == 1
    (best,) = [candidate for candidate in report.candidates if candidate.is_best]
    assert best == report.candidates[0]
    assert all(candidate.general_perplexity > 0 for candidate in report.candidates)
    assert CANDIDATES in store.read_manifest("law").files
    alone = type(recipe).model_validate(set_values(recipe.model_dump(), {**best.settings, "name": "alone"}))
    train_recipes([alone], store, reporter)
    one, other = (load(weights_of(store, name)) for name in ("law", "alone"))
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[key], tensor, atol=2e-5) for key, tensor in other.items())


def test_a_search_that_was_interrupted_goes_on_and_is_not_repeated(
    base_folder, text_file, store, reporter, monkeypatch
):
    recipe = make_search(base_folder, text_file)
    whole = tune(recipe.model_copy(update={"name": "whole"}), store, reporter)
    advance = Trainer._advance

    def interrupt(self, active):
        advance(self, active)
        if self.step == 5:
            os.kill(os.getpid(), 2)

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(Trainer, "_advance", interrupt)
        tune(recipe, store, reporter)
    assert store.list_names() == ["whole"]
    resumed = tune(recipe, store, reporter, resume=True)
    assert resumed.candidates == whole.candidates
    assert weights_of(store, "law") == weights_of(store, "whole")
    assert tune(recipe, store, reporter, resume=True) == resumed
    assert store.list_versions("law") == [1]


def test_a_search_in_groups_is_the_same_search(base_folder, text_file, store, reporter, monkeypatch):
    recipe = make_search(base_folder, text_file, **{"tune.dropouts": [0.0, 0.2]})
    whole = tune(recipe.model_copy(update={"name": "whole"}), store, reporter, num_candidates=7)
    tested = []
    measure = HeldOutLosses.measure_test
    monkeypatch.setattr(HeldOutLosses, "measure_test", lambda self, *a: tested.append(a[0]) or measure(self, *a))
    grouped = tune(recipe.model_copy(update={"name": "grouped"}), store, reporter, num_candidates=7, num_slots=3)
    assert len(tested) == 1
    assert [c.settings for c in grouped.candidates] == [c.settings for c in whole.candidates]
    assert [c.steps for c in grouped.candidates] == [c.steps for c in whole.candidates]
    for one, other in zip(grouped.candidates, whole.candidates, strict=True):
        assert one.validation_perplexity == pytest.approx(other.validation_perplexity, rel=1e-5)
        assert one.general_perplexity == pytest.approx(other.general_perplexity, rel=1e-4)
    one, other = (load(weights_of(store, name)) for name in ("grouped", "whole"))
    assert all(torch.allclose(one[key], tensor, atol=2e-5) for key, tensor in other.items())
    again = tune(recipe.model_copy(update={"name": "grouped"}), store, reporter, num_candidates=7, resume=True)
    assert (again, store.list_versions("grouped")) == (grouped, [1])


@pytest.mark.parametrize("step", [1, 3, 5, 11])
def test_a_search_in_groups_goes_on_wherever_it_was_killed(step, base_folder, text_file, store, reporter, monkeypatch):
    recipe = make_search(base_folder, text_file, **{"train.checkpoint_every": 2})
    search = partial(tune, recipe, store, reporter, num_candidates=5, num_slots=2)
    whole = tune(recipe.model_copy(update={"name": "whole"}), store, reporter, num_candidates=5, num_slots=2)
    advance, seen = Trainer._advance, []

    def lose(self, active):
        advance(self, active)
        seen.append(self.step)
        if seen.count(step) == 2 or (step == 11 and self.step == step):
            raise KeyboardInterrupt  # nothing is saved

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "_advance", lose)
        search()
    with pytest.raises(InterruptedRunError, match="interrupted search"):
        search()
    with pytest.raises(MismatchError):
        other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": 3})})
        tune(other, store, reporter, num_candidates=5, num_slots=2, resume=True)
    resumed = search(resume=True)
    assert resumed.candidates == whole.candidates
    assert weights_of(store, "law") == weights_of(store, "whole")
    assert store.list_versions("law") == [1]


@pytest.mark.parametrize(("step", "num_begun", "rung"), [(2, 3, 4), (6, 5, 10)])
def test_a_search_in_groups_that_is_told_to_end_publishes_the_best_so_far(
    step, num_begun, rung, base_folder, text_file, store, reporter, monkeypatch
):
    """From a page, in the first round, before the last group began, or in the second."""
    recipe = make_search(base_folder, text_file)
    search = partial(tune, recipe, store, reporter, num_candidates=5, num_slots=2)
    states, advance = [], Trainer._advance

    def ask(self, active):
        advance(self, active)
        states.append([json.loads(path.read_text())["state"] for path in self.run.path.parent.glob("*/status.json")])
        if self.step == step and len(self.slots) == 2:
            request_stop(self.run.path, ALL)
            self.run.status._polled = 0.0

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_advance", ask)
        report = search()
    assert str(report.adapter) == "law@1"
    assert len(report.candidates) == num_begun
    assert {step + 1, rung} <= {candidate.steps for candidate in report.candidates} <= {step + 1, 4, rung}
    best = min(candidate.validation_perplexity for candidate in report.candidates)
    assert [c.validation_perplexity for c in report.candidates if c.is_best] == [best]
    assert any("waiting" in state for state in states), "a group whose turn it is not"
    assert search(resume=True) == report
    assert max(candidate.steps for candidate in search(fresh=True).candidates) == 16
    assert store.list_versions("law") == [1, 2]


def interrupt_at(monkeypatch, step):
    advance = Trainer._advance

    def interrupt(self, active):
        advance(self, active)
        if self.step == step:
            os.kill(os.getpid(), 2)

    monkeypatch.setattr(Trainer, "_advance", interrupt)


def test_fresh_sets_aside_a_search_of_the_other_kind_too(base_folder, text_file, store, reporter, monkeypatch):
    recipe = make_search(base_folder, text_file)
    search = partial(tune, recipe, store, reporter, num_candidates=4)
    for before, after in ((0, 2), (2, 0)):
        with monkeypatch.context() as patched, pytest.raises(Interrupted):
            interrupt_at(patched, 3)
            search(num_slots=before)
        found = search(num_slots=after, fresh=True)
        assert search(num_slots=after, resume=True).adapter == found.adapter, "nothing else is left to resume"
    assert store.list_versions("law") == [1, 2]


def test_a_search_in_groups_is_published_beside_a_version_of_the_same_weights(base_folder, text_file, store, reporter):
    recipe = make_search(base_folder, text_file, **{"tune.ranks": [2], "tune.learning_rate_factors": [0.01]})
    train_recipes([recipe], store, reporter)
    report = tune(recipe, store, reporter, num_candidates=2, num_slots=1)
    assert report.candidates[0].settings == {}
    assert str(report.adapter) == "law@2"
    assert weights_of(store, "law@1") == weights_of(store, "law@2")


@pytest.mark.parametrize("slots", [0, 2])
def test_a_search_with_a_budget_goes_on_with_the_steps_that_it_had(
    slots, base_folder, text_file, store, reporter, monkeypatch
):
    recipe = make_search(base_folder, text_file)
    search = partial(tune, recipe, store, reporter, num_candidates=4, num_slots=slots)
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr("lora_gpt2.training.tune._fit_steps", lambda *arguments: 12)
        interrupt_at(patched, 2)
        search(budget_seconds=1.0)
    monkeypatch.setattr("lora_gpt2.training.tune._fit_steps", lambda *arguments: 24)
    assert max(c.steps for c in search(budget_seconds=1.0, resume=True).candidates) == 12


@pytest.mark.parametrize("slots", [0, 2])
def test_a_search_goes_on_from_the_version_that_it_began_with(
    slots, base_folder, text_file, store, reporter, monkeypatch
):
    first = make_recipe(base_folder, text_file, "law", steps=2)
    train_recipes([first], store, reporter)
    recipe = make_search(base_folder, text_file, **{"lora.init_from": "law", "train.steps": 6})
    search = partial(tune, recipe, store, reporter, num_candidates=3, num_slots=slots)
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        interrupt_at(patched, 2)
        search()
    train_recipes([first.model_copy(update={"train": first.train.model_copy(update={"steps": 3})})], store, reporter)
    report = search(resume=True)
    assert (str(report.adapter), report.adapter.parents) == ("law@3", ("law@1",))
    assert search(resume=True) == report


def test_searches_of_the_same_name_do_not_share_what_they_keep(base_folder, text_file, store, reporter, monkeypatch):
    recipe = make_search(base_folder, text_file)
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        interrupt_at(patched, 5)
        tune(recipe, store, reporter, num_candidates=4, num_slots=2)
    assert str(tune(recipe, store, reporter, num_candidates=6, num_slots=2).adapter) == "law@1"
    assert str(tune(recipe, store, reporter, num_candidates=2).adapter) == "law@2"
    assert str(tune(recipe, store, reporter, num_candidates=4, num_slots=2, resume=True).adapter) == "law@3"


def test_candidates_that_do_not_fit_into_memory_take_turns(base_folder, text_file, store, reporter, monkeypatch):
    recipe = make_search(base_folder, text_file)
    config, runtime = read_shape(recipe)
    candidates = [candidate for candidate, _ in list_candidates(recipe, 4)]
    sizes = [count_fitting(config, candidates, runtime, budget) for budget in (10**10, 0)]
    assert sizes == [4, 1]
    needed = estimate_memory(config, candidates[:2], runtime, candidates, averages=True).peak
    assert 1 <= count_fitting(config, candidates, runtime, needed - 1) < 4
    monkeypatch.setattr("lora_gpt2.training.grouped_search.measure_budget", lambda device: 0)
    assert str(tune(recipe, store, reporter, num_candidates=3).adapter) == "law@1"


def test_candidates_that_diverge_lose_and_nothing_is_published_if_all_do(base_folder, text_file, store, reporter):
    hot = {"train.max_grad_norm": 0.0, "tune.learning_rate_factors": [1.0, 1e2], "train.learning_rate": 1e36}
    for slots in (0, 2):
        with pytest.raises(TrainingDiverged):
            tune(make_search(base_folder, text_file, **hot), store, reporter, num_candidates=4, num_slots=slots)
    assert store.list_names() == []
    hot |= {"tune.learning_rate_factors": [1e-38, 1.0], "tune.ranks": [2]}
    recipe = make_search(base_folder, text_file, **hot)
    report = tune(recipe, store, reporter, num_candidates=3, fresh=True)
    assert report.candidates[0].settings["train.learning_rate"] == pytest.approx(0.01)
    assert str(report.adapter) == "law@1"


def test_a_budget_of_time_decides_the_steps(base_folder, text_file, store, reporter):
    short, long = (
        max(c.steps for c in tune(recipe, store, reporter, num_candidates=2, budget_seconds=seconds).candidates)
        for recipe, seconds in ((make_search(base_folder, text_file, name=f"b{s}"), s) for s in (0.2, 2.0))
    )
    assert short < long
    with pytest.raises(UsageError, match="at least two"):
        tune(make_search(base_folder, text_file), store, reporter, num_candidates=1)


def test_the_progress_of_a_search_ends_where_its_total_is(base_folder, text_file, store):
    tasks = {}

    class Reporter(SilentReporter):
        @contextmanager
        def task(self, title, total, unit):
            tasks[title] = [total, 0]
            yield SimpleNamespace(advance=lambda amount, note="": tasks[title].__setitem__(1, tasks[title][1] + amount))

    tune(make_search(base_folder, text_file), store, Reporter())
    assert tasks["training"][0] == tasks["training"][1] > 0


@pytest.mark.parametrize("options", [{"num_slots": 2}, {"ray": "auto"}])
def test_a_search_in_groups_is_led_by_one_process(options, base_folder, text_file, store, reporter, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="one process"):
        tune(make_search(base_folder, text_file), store, reporter, **options)
