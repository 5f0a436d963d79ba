"""SIGKILL at every kind of moment of a run: resumed, it must end bit-equal to one that was never killed.

A child process counts moments (each file operation that matters, each gradient, update, validation and line of
metrics) and kills itself at the chosen one; the sweep covers the whole run from reading the text to the last rename.
"""

import json
import os
import signal
import sys
import traceback

import pytest

from lora_gpt2.store.catalog import Store
from lora_gpt2.store.manifest import METRICS, WEIGHTS
from lora_gpt2.training import publish as publish_module
from lora_gpt2.training.checkpoint import RunFolder, open_run_folder
from lora_gpt2.training.optimizer import SlotAdamW
from lora_gpt2.training.run import train_recipes
from lora_gpt2.training.step import StepRunner
from lora_gpt2.training.trainer import Trainer
from tests.builders import make_text
from tests.unit.training.test_trainer import make_recipe

POINTS = 44
MOMENTS = [
    (os, "fsync"),
    (os, "replace"),
    (os, "rename"),
    (os, "unlink"),
    (os, "mkdir"),
    (StepRunner, "compute_gradients"),
    (SlotAdamW, "step"),
    (Trainer, "_validate"),
    (RunFolder, "append_metrics"),
    (RunFolder, "save"),
]
VOLATILE = ("seconds", "memory_bytes")


@pytest.fixture
def recipes(base_folder, text_file, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(make_text(60, seed=7, words="le chat et le chien dans la pluie"))
    common = {"checkpoint_every": 2, "validate_every": 3, "sample_tokens": 2}
    return [
        make_recipe(base_folder, text_file, "one", steps=6, lora={"dropout": 0.2}, **common),
        make_recipe(base_folder, other, "two", steps=5, neftune_noise_alpha=5, micro_batch_tokens=32, **common),
    ]


def in_child(tmp_path, work, name):
    """Runs `work` in a fork with caches and store of its own; returns its wait status and the moments it counted."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.environ["LORA_GPT2_CACHE"] = str(tmp_path / name / "cache")
            work(Store(tmp_path / name / "store"), writer)
            code = 0
        except BaseException:  # noqa: BLE001 - the parent asserts on the code
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    os.close(writer)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(reader) as pipe:
        counted = pipe.read()
    return status, len(counted)


def count_and_kill(kill_at, writer):
    """Writes a byte per moment; at the chosen one the process is gone."""
    count = 0

    def wrap(original):
        def moment(*args, **kwargs):
            nonlocal count
            count += 1
            os.write(writer, b".")
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return moment

    for place, name in MOMENTS:
        setattr(place, name, wrap(getattr(place, name)))


def trainer_of(recipes, reporter, kill_at=0, resume=False):
    def work(store, writer):
        publish_module.render_report = lambda *args: {}  # drawing is slow, and nothing of the run depends on it
        count_and_kill(kill_at, writer)
        train_recipes(recipes, store, reporter, resume=resume)

    return work


def outcome(tmp_path, name):
    """Returns what a run left: versions, weights, and metrics without what a clock says, of the store and the run."""
    store = Store(tmp_path / name / "store")
    os.environ["LORA_GPT2_CACHE"] = str(tmp_path / name / "cache")
    folder = open_run_folder(store.root, ["one", "two"]).path
    found = {}
    for adapter in ("one", "two"):
        version = store.resolve(adapter)
        found[adapter] = (store.list_versions(adapter), (version / WEIGHTS).read_bytes())
        for path in (version / METRICS, folder / f"{adapter}.metrics.jsonl"):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[adapter, path.name] = [{k: v for k, v in line.items() if k not in VOLATILE} for line in lines]
    return found


@pytest.mark.parametrize("number", [4, pytest.param(POINTS, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_resumes_bit_equal(recipes, reporter, tmp_path, monkeypatch, number):
    monkeypatch.setenv("LORA_GPT2_CACHE", "")
    status, moments = in_child(tmp_path, trainer_of(recipes, reporter), "whole")
    assert status == 0
    wanted = outcome(tmp_path, "whole")
    assert [line["step"] for line in wanted["one", METRICS]] == [1, 2, 3, 4, 5, 6]
    assert moments >= POINTS
    points = sorted({1 + index * (moments - 1) // (number - 1) for index in range(number)})
    assert len(points) > number // 2
    for point in points:
        name = f"killed-{point}"
        status, counted = in_child(tmp_path, trainer_of(recipes, reporter, kill_at=point), name)
        assert os.WIFSIGNALED(status), f"moment {point} was never reached"
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert counted == point
        status, _ = in_child(tmp_path, trainer_of(recipes, reporter, resume=True), name)
        assert status == 0, f"after moment {point} the run could not be resumed"
        assert outcome(tmp_path, name) == wanted, f"after moment {point} the outcome differs"


def test_the_sweep_would_see_a_lost_step(recipes, reporter, tmp_path, monkeypatch):
    """The positive control: a resumed run that forgets AdamW's moments must not pass."""
    monkeypatch.setenv("LORA_GPT2_CACHE", "")
    _, moments = in_child(tmp_path, trainer_of(recipes, reporter), "whole")
    status, _ = in_child(tmp_path, trainer_of(recipes, reporter, kill_at=moments * 2 // 3), "killed")
    assert os.WIFSIGNALED(status)
    restored = Trainer.restore

    def forget(self, tensors, state):
        restored(self, tensors, state)
        self.runner.optimizer.exp_avg.zero_()

    monkeypatch.setattr(Trainer, "restore", forget)
    status, _ = in_child(tmp_path, trainer_of(recipes, reporter, resume=True), "killed")
    assert status == 0
    assert outcome(tmp_path, "killed") != outcome(tmp_path, "whole")
