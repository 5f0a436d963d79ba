"""Training over two machines of a Ray cluster, one of which is lost on the way: slow, Ray takes seconds to start."""

import time
from dataclasses import replace

import pytest
import torch

from lora_gpt2.core.console import SilentReporter
from lora_gpt2.core.errors import (
    DataError,
    InterruptedRunError,
    MismatchError,
    NotFoundError,
    ResourceError,
    UsageError,
)
from lora_gpt2.evaluation.matrix import EvaluationText
from lora_gpt2.evaluation.run import evaluate_texts
from lora_gpt2.recipe import Recipe
from lora_gpt2.recipe_files import set_values
from lora_gpt2.store.catalog import Store
from lora_gpt2.training.ray_training import train_on_ray
from lora_gpt2.training.run import train_recipes
from lora_gpt2.training.tune import tune
from tests.builders import make_text
from tests.unit.training.test_trainer import make_recipe

pytestmark = pytest.mark.slow
STEPS = 400


@pytest.fixture
def recipes(base_folder, tmp_path):
    found = []
    for index in range(4):
        path = tmp_path / f"d{index}.jsonl"
        path.write_text(make_text(60, seed=index))
        found.append(make_recipe(base_folder, path, f"d{index}", checkpoint_every=10, steps=STEPS + index))
    return found


@pytest.fixture
def cluster():
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    made = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    yield made
    made.shutdown()


class Watching(SilentReporter):
    """Calls a function once a share of the tokens has been trained on."""

    def __init__(self, share, action):
        super().__init__()
        self.share, self.action, self.messages = share, action, []

    def message(self, text):
        self.messages.append(text)

    def task(self, title, total, unit):
        return _Task(self, total) if title == "training on Ray" else super().task(title, total, unit)


class _Task:
    def __init__(self, reporter, total):
        self.reporter, self.left = reporter, total * reporter.share

    def __enter__(self):
        return self

    def __exit__(self, *rest):
        return None

    def advance(self, amount):
        self.left -= amount
        if self.left < 0 and self.reporter.action:
            action, self.reporter.action = self.reporter.action, None
            action()


def read_weights(store, name):
    with store.open(name) as version:
        return version.read_file("adapter_model.safetensors")


def test_a_machine_that_is_lost_costs_no_adapter_and_changes_none(recipes, cluster, store, reporter, tmp_path, capsys):
    first = cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    began = time.monotonic()

    def lose():
        with capsys.disabled():
            print(f"\n{time.monotonic() - began:5.1f} s: a node is killed")
        cluster.remove_node(first, allow_graceful=False)

    watching = Watching(0.4, lose)
    report = train_on_ray(recipes, store, watching, cluster.address, num_slots=2)
    with capsys.disabled():
        print(*watching.messages, f"{time.monotonic() - began:5.1f} s: done", sep="\n")
    assert watching.action is None, "the node was killed"
    assert [str(item) for item in report.adapters] == ["d0@1", "d1@1", "d2@1", "d3@1"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = Store(tmp_path / "alone")
        for pair in ((recipes[3], recipes[1]), (recipes[2], recipes[0])):  # dealt, the longest first
            train_recipes(pair, alone, reporter, num_slots=2)
    finally:
        torch.set_num_threads(threads)
    for name in alone.list_names():
        assert read_weights(store, name) == read_weights(alone, name)
    assert (store.root / "d0" / "1" / "report.html").is_file()


def test_a_driver_goes_on_and_says_what_failed(recipes, cluster, store, tmp_path):
    train_recipes([_shorten(recipes[1].model_copy(update={"name": "d0"}))], store, SilentReporter())
    recipes[0] = recipes[0].model_copy(update={"lora": recipes[0].lora.model_copy(update={"init_from": "d0"})})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    broken = tmp_path / "d1.jsonl"
    text = broken.read_text()
    broken.write_text('{"no": 1')
    with pytest.raises(DataError, match=r"'d1' has no usable text: .*published: d0@2, d2@1, d3@1"):
        train_on_ray(recipes, store, SilentReporter(), cluster.address, num_slots=3)
    with pytest.raises(InterruptedRunError, match="3 are published"):
        train_on_ray(recipes, store, SilentReporter(), cluster.address)
    broken.write_text(text)
    other = [r.model_copy(update={"train": r.train.model_copy(update={"seed": 7})}) for r in recipes]
    with pytest.raises(MismatchError):
        train_on_ray(other, store, SilentReporter(), cluster.address, resume=True)
    (tmp_path / "d3.jsonl").write_text(make_text(60, seed=77))
    report = train_on_ray(recipes, store, SilentReporter(), cluster.address, resume=True)
    assert [str(item) for item in report.adapters] == ["d0@2", "d1@1", "d2@1", "d3@2"], "and what has changed"
    assert [parent.reference for parent in store.read_manifest("d0@2").parents] == ["d0@1"]


def test_a_search_over_two_machines_is_the_search_on_one_though_one_is_lost(
    recipes, cluster, store, reporter, tmp_path, capsys
):
    first = cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    grid = {"tune.targets": [["mlp.c_fc"]], "lora.targets": ["mlp.c_fc"], "tune.ranks": [2, 3, 4]}
    recipe = Recipe.model_validate(set_values(recipes[0].model_dump(exclude_unset=True), grid))
    began = time.monotonic()

    def lose():
        with capsys.disabled():
            print(f"\n{time.monotonic() - began:5.1f} s: a node is killed")
        cluster.remove_node(first, allow_graceful=False)

    watching = Watching(0.4, lose)
    report = tune(recipe, store, watching, num_candidates=6, ray=cluster.address)
    with capsys.disabled():
        print(*watching.messages, f"{time.monotonic() - began:5.1f} s: done", sep="\n")
    assert watching.action is None, "the node was killed"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = Store(tmp_path / "alone")
        whole = tune(recipe, alone, reporter, num_candidates=6)
        grouped = tune(recipe.model_copy(update={"name": "d9"}), alone, reporter, num_candidates=6, num_slots=3)
    finally:
        torch.set_num_threads(threads)
    found, expected = (  # tests have another general text, machines have the real one
        [replace(each, general_perplexity=None) for each in item.candidates] for item in (report, grouped)
    )
    assert found == expected
    assert read_weights(store, "d0") == read_weights(alone, "d9")
    assert [each.settings for each in report.candidates] == [each.settings for each in whole.candidates]
    assert str(report.adapter) == str(whole.adapter) == "d0@1"
    assert tune(recipe, store, reporter, num_candidates=6, ray=cluster.address, resume=True) == report
    assert tune(recipe, store, reporter, num_candidates=6, num_slots=3, resume=True) == report


def test_a_matrix_is_the_same_over_two_machines_though_one_is_lost(recipes, cluster, store, reporter, capsys):
    train_recipes([_shorten(recipe) for recipe in recipes], store, reporter)
    first = cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    texts = [
        EvaluationText(label=f"t{index}", documents=[make_text(9, seed=10 * index + n) for n in range(6)])
        for index in range(4)
    ]
    recipe = Recipe(base=recipes[0].base)
    here = evaluate_texts(texts, ["all"], store, recipe, reporter)
    began = time.monotonic()

    def lose(text):
        if "tasks; " in text:
            cluster.remove_node(first, allow_graceful=False)

    reporter = SilentReporter()
    reporter.message = lose
    there = evaluate_texts(texts, ["all"], store, recipe, reporter, ray=cluster.address)
    with capsys.disabled():
        print(f"\n{time.monotonic() - began:5.1f} s, a node was killed at the beginning")
    for one, other in zip([*there.cells, *there.forgetting], [*here.cells, *here.forgetting], strict=True):
        assert (one.adapter, one.source, one.trained_on) == (other.adapter, other.source, other.trained_on)
        assert one.score.nll_nats == pytest.approx(other.score.nll_nats, rel=1e-6)
        assert one.interval == pytest.approx(other.interval) if other.interval else one.interval is None
    assert {**there.to_json(), "cells": 0, "forgetting": 0} == {**here.to_json(), "cells": 0, "forgetting": 0}


def _shorten(recipe):
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 4})})


def test_an_error_on_a_machine_is_the_error_of_the_command(recipes, cluster, store, reporter, monkeypatch):
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    monkeypatch.setattr("lora_gpt2.evaluation.run.fingerprint_base", lambda checkpoint: "0" * 64)
    with pytest.raises(MismatchError, match="another base"):
        evaluate_texts(
            [EvaluationText(label="a", documents=["the cat"])],
            [],
            store,
            Recipe(base=recipes[0].base),
            reporter,
            ray=cluster.address,
        )


def test_what_cannot_be_done_is_said_before_anything_begins(recipes, store, reporter):
    continued = recipes[0].model_copy(update={"lora": recipes[0].lora.model_copy(update={"init_from": "law"})})
    with pytest.raises(NotFoundError, match="law"):
        train_on_ray([continued], store, reporter, "auto")
    with pytest.raises(UsageError, match="part of the Ray cluster"):
        train_on_ray(recipes, store, reporter, "ray://head:10001")
    with pytest.raises(UsageError, match="no address"):
        train_on_ray(recipes, store, reporter, "head")
    pytest.importorskip("ray")
    with pytest.raises(ResourceError, match="no Ray cluster"):
        train_on_ray(recipes, store, reporter, "127.0.0.1:1")
