"""The folder of a run: what it belongs to, what is kept, what is set aside."""

import json

import pytest
import torch

from lora_gpt2.core.errors import Interrupted, MismatchError
from lora_gpt2.core.interrupt import StopRequest
from lora_gpt2.training.checkpoint import RunFolder, open_run_folder
from lora_gpt2.training.run import train_recipes
from tests.unit.training.test_trainer import StopAt, make_recipe, make_trainer

IDENTITY = {
    "passes": {"one": {"size": 64}},
    "order": ["one"],
    "base": "abc",
    "adapters": {
        "one": {"data": "d1", "lora": {"rank": 2, "targets": ["c_attn", "c_fc"]}, "train": {"max_grad_norm": None}}
    },
}


def changed(**changes):
    """Returns the identity with values at dotted keys: `a__b=1`; `...` takes the key away."""
    copy = json.loads(json.dumps(IDENTITY))
    for key, value in changes.items():
        *path, last = key.split("__")
        place = copy
        for part in path:
            place = place[int(part)] if isinstance(place, list) else place[part]
        if value is ...:
            del place[last]
        elif isinstance(place, list):
            place[int(last)] = value
        else:
            place[last] = value
    return copy


OTHERS = [
    ("base", {"base": "abd"}),
    ("adapters.one.lora.rank", {"adapters__one__lora__rank": 3}),
    ("adapters.one.lora.rank", {"adapters__one__lora__rank": ...}),
    ("adapters.one.lora.targets.1", {"adapters__one__lora__targets__1": "c_proj"}),
    ("adapters.one.lora.targets.1", {"adapters__one__lora__targets": ["c_attn"]}),
    ("adapters.one.train.max_grad_norm", {"adapters__one__train__max_grad_norm": 1.0}),
    ("adapters.one.train.max_grad_norm", {"adapters__one__train__max_grad_norm": ...}),
    ("adapters.two.data", {"adapters__two": {"data": "d2"}}),
    ("order.1", {"order": ["one", "two"]}),
    ("processes", {"processes": 2}),
]


@pytest.mark.parametrize(("key", "changes"), OTHERS, ids=lambda value: str(value))
@pytest.mark.parametrize("more_on_disk", [False, True])
def test_a_run_is_resumed_only_by_what_it_was_made_of(tmp_path, key, changes, more_on_disk):
    """Whichever of the two has a key more, or another value."""
    run, other = RunFolder(path=tmp_path), changed(**changes)
    here, there = (IDENTITY, other) if more_on_disk else (other, IDENTITY)
    run.begin(there)
    with pytest.raises(MismatchError) as caught:
        run.check_identity(here, free=("passes",))
    assert f"{key}: " in caught.value.message
    assert "then" in caught.value.message
    assert "--resume" in caught.value.hint
    assert run.check_identity(there, free=("passes",)) == ""


@pytest.mark.parametrize("more_on_disk", [False, True])
def test_what_differs_under_free_keys_alone_is_said_and_excuses_nothing_else(tmp_path, more_on_disk):
    run, other = RunFolder(path=tmp_path), changed(passes__one__depth=2, passes__one__size=32)
    here, there = (IDENTITY, other) if more_on_disk else (other, IDENTITY)
    run.begin(there)
    said = run.check_identity(here, free=("passes",))
    assert "passes.one.size: 32 then, 64 now" in said if more_on_disk else "passes.one.size: 64 then, 32 now" in said
    assert "passes.one.depth" in said
    with pytest.raises(MismatchError, match=r"passes\.one\.size"):
        run.check_identity(here)
    with pytest.raises(MismatchError, match="base: abc then, abd now") as caught:
        run.check_identity({**here, "base": "abd"}, free=("passes",))
    assert "passes" not in caught.value.message


def test_a_new_run_sets_all_of_the_old_one_aside(tmp_path, reporter):
    run = RunFolder(path=tmp_path)
    run.begin({"name": "old"})
    for step in (4, 5):
        run.save(step, {"x": torch.full((2,), float(step))}, {"step": step})
    run.append_metrics("one", [{"step": 5}])
    old = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    run.begin({"name": "new"})
    assert run.load(reporter) is None
    assert run.list_checkpoints() == []
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["identity.json"]
    assert run.check_identity({"name": "new"}) == ""
    assert sorted(path.name for path in (tmp_path / "previous").iterdir()) == old
    assert RunFolder(path=tmp_path / "previous").load(reporter)[1] == {"step": 5}, "and it can still be read"
    run.save(1, {"x": torch.ones(2)}, {"step": 1})
    tensors, state = run.load(reporter)
    assert (state, tensors["x"].tolist()) == ({"step": 1}, [1, 1]), "not the higher step of the old run"


def test_a_finished_run_keeps_what_it_published_and_no_checkpoint(tmp_path, reporter):
    run = RunFolder(path=tmp_path)
    run.begin(IDENTITY)
    assert run.read_published() == []
    for step in (1, 2, 3):
        run.save(step, {"x": torch.zeros(1)}, {"step": step})
    assert len(run.list_checkpoints()) == 2
    run.finish(["one@1"])
    assert run.list_checkpoints() == []
    assert run.load(reporter) is None
    assert run.read_published() == ["one@1"]
    run.begin(IDENTITY)
    assert run.read_published() == [], "a run begun anew is not finished"


def stop(trainer, step):
    with pytest.raises(Interrupted):
        trainer.train(StopAt(trainer, step))


def test_resuming_goes_on_from_the_last_run_that_was_begun(base_folder, text_file, reporter, tmp_path):
    """A run stopped late, another begun in its place and stopped early: the second goes on, from its own step."""
    run = RunFolder(path=tmp_path / "run")
    old, new = (make_recipe(base_folder, text_file, seed=seed) for seed in (1, 2))
    for recipe, step in ((old, 5), (new, 1)):
        run.begin({"seed": recipe.train.seed})
        stop(make_trainer([recipe], reporter, run), step)
    resumed = make_trainer([new], reporter, run)
    resumed.restore(*run.load(reporter))
    assert resumed.step == 1
    (one,), (whole,) = resumed.train(StopRequest()), make_trainer([new], reporter).train(StopRequest())
    assert all(torch.equal(one.adapter.updates[site].b, update.b) for site, update in whole.adapter.updates.items())
    lines = (tmp_path / "run" / "one.metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_leaves_no_checkpoint_on_the_disk(base_folder, text_file, store, reporter, monkeypatch):
    saved, save = [], RunFolder.save

    def note(self, step, tensors, state):
        save(self, step, tensors, state)
        saved.append((step, len(self.list_checkpoints())))

    monkeypatch.setattr(RunFolder, "save", note)
    train_recipes([make_recipe(base_folder, text_file, steps=3, checkpoint_every=1)], store, reporter)
    assert saved == [(1, 1), (2, 2), (3, 2)], "while it goes on there are some"
    run = open_run_folder(store.root, ["one"])
    assert run.list_checkpoints() == []
    assert run.read_published() == ["one@1"]
