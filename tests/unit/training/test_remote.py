"""Laws of training on another machine: the same bytes, nothing lost with it, nothing published twice."""

import os
from contextlib import suppress

import pytest

from lora_gpt2.core.errors import CorruptError, Interrupted
from lora_gpt2.data.prepared import prepare_data
from lora_gpt2.model.checkpoint import Checkpoint
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.manifest import MANIFEST, parse_manifest
from lora_gpt2.training.candidates import read_candidates
from lora_gpt2.training.grouped_search import GroupTask
from lora_gpt2.training.remote import (
    Mailbox,
    RemoteTask,
    _open_folder,
    publish_delivered,
    read_folder,
    run_remote_group,
    run_task,
    write_folder,
)
from lora_gpt2.training.rounds import GroupRound, Publication
from lora_gpt2.training.run import train_recipes
from lora_gpt2.training.trainer import Trainer
from tests.builders import make_text
from tests.unit.training.test_trainer import make_recipe


@pytest.fixture
def recipes(base_folder, tmp_path):
    found = []
    for index, settings in enumerate(({"steps": 9}, {"steps": 5, "lora": {"dropout": 0.2}}, {"steps": 7})):
        path = tmp_path / f"d{index}.jsonl"
        path.write_text(make_text(60, seed=index))
        found.append(make_recipe(base_folder, path, f"d{index}", checkpoint_every=2, **settings))
    return found


@pytest.fixture
def task(recipes, tmp_path):
    return RemoteTask(key=f"test-{tmp_path.name}-{os.getpid()}", recipes=recipes, num_slots=2)


@pytest.fixture
def texts(recipes, reporter):
    """The text of each domain; the files themselves are gone, as they are on another machine."""
    tokenizer = Checkpoint.open(recipes[0].base).load_tokenizer()
    return [read_folder(prepare_data(recipe.data, tokenizer, reporter).path) for recipe in recipes]


@pytest.fixture
def mailbox(tmp_path):
    return Mailbox(tmp_path / "states")


def read_weights(files):
    return {name: files[name] for name in files if name.endswith(".safetensors")}


def deliver_all(mailbox):
    return {parse_manifest(files[MANIFEST]).name: read_weights(files) for files in mailbox._delivered}


@pytest.fixture
def expected(recipes, texts, store, reporter):
    train_recipes(recipes, store, reporter, num_slots=2)
    found = {}
    for name in store.list_names():
        with store.open(name) as version:
            found[name] = read_weights(version.read_files())
    for recipe in recipes:
        os.remove(recipe.data.sources[0])
    return found


def test_what_comes_back_is_byte_for_byte_what_is_trained_here(task, texts, mailbox, expected, tmp_path):
    assert run_task(task, texts, mailbox) == ""
    assert deliver_all(mailbox) == expected
    mailbox.keep_state(task.key, {})
    assert not mailbox.find_state(task.key)
    assert not list((tmp_path / "cache" / "tasks").iterdir())
    store = Store(tmp_path / "driver")
    assert [publish_delivered(store, files) for files in sorted(mailbox._delivered, key=str)] != []
    assert store.list_names() == ["d0", "d1", "d2"]
    for name in expected:
        with store.open(name) as version:
            assert read_weights(version.read_files()) == expected[name]
            assert "train" in version.manifest.recipe


class Lost(BaseException):
    """The machine is gone: nothing here is caught."""


def test_another_machine_goes_on_where_a_lost_one_left_off(task, texts, mailbox, expected, monkeypatch):
    steps, advance = [], Trainer._advance

    def count(self, active):
        if len(steps) == 8:  # d2 is published, d0 is on its way
            raise Lost
        steps.append(self.step)
        advance(self, active)

    monkeypatch.setattr(Trainer, "_advance", count)
    with pytest.raises(Lost):
        run_task(task, texts, mailbox)
    first = deliver_all(mailbox)
    assert list(first) == ["d2"]
    monkeypatch.setattr(Trainer, "_advance", lambda self, active: steps.append(self.step) or advance(self, active))
    assert run_task(task, texts, mailbox) == ""
    assert deliver_all(mailbox) == expected
    assert [parse_manifest(files[MANIFEST]).name for files in mailbox._delivered].count("d2") == 2
    assert len(steps) <= 8 + 12 - 6, "it did not begin anew"


def test_a_machine_that_is_told_to_stop_leaves_its_task_to_another(
    task, texts, mailbox, expected, monkeypatch, tmp_path
):
    """Whose cache is another one."""
    steps, advance = [], Trainer._advance

    def stop(self, active):
        steps.append(self.step)
        advance(self, active)
        if len(steps) == 8:
            os.kill(os.getpid(), 15)

    monkeypatch.setattr(Trainer, "_advance", stop)
    with pytest.raises(Interrupted):
        run_task(task, texts, mailbox)
    assert sum(name.endswith(".checkpoint") for name in mailbox.find_state(task.key)) == 1, "the newest"
    monkeypatch.setenv("LORA_GPT2_CACHE", str(tmp_path / "elsewhere"))
    assert run_task(task, texts, mailbox) == ""
    assert deliver_all(mailbox) == expected
    assert len(steps) == 12, "nothing was trained twice"


def test_what_a_killed_task_left_is_removed_by_the_next_and_what_another_works_in_is_not(tmp_path):
    with suppress(Lost), _open_folder() as killed:
        lock = killed.with_name(f"{killed.name}.lock")
        raise Lost
    killed.mkdir()
    lock.touch()
    with _open_folder() as busy:
        assert not killed.exists()
        with _open_folder() as other:
            assert busy.exists()
            assert busy != other
    assert not list(busy.parent.iterdir())


def test_a_group_of_candidates_goes_on_elsewhere_in_each_round(recipes, store, reporter, mailbox, monkeypatch):
    """Rounds to steps 4 and 9, and the publication, each on machines that are lost on the way."""
    data = prepare_data(recipes[0].data, Checkpoint.open(recipes[0].base).load_tokenizer(), reporter)
    text, names = read_folder(data.path), ["law.0", "law.1"]
    train = recipes[0].train
    candidates = [
        recipes[0].model_copy(update={"name": n, "train": train.model_copy(update={"steps": 9, "learning_rate": rate})})
        for n, rate in zip(names, (1e-3, 1e-2), strict=True)
    ]
    settings = {name: {"train.learning_rate": index} for index, name in enumerate(names)}
    advance, losses = Trainer._advance, [(2, 2), (2, 3), (1, 6), (1, 9)]

    def lose(self, active):
        advance(self, active)
        if losses and losses[0] == (len(active), self.step):
            losses.pop(0)
            raise Lost

    monkeypatch.setattr(Trainer, "_advance", lose)

    def run(**values):
        task = GroupTask(recipes=candidates, group=GroupRound(settings=settings, **values))
        while True:
            with suppress(Lost):
                return run_remote_group("key", task, text, mailbox)

    first = run(survivors=names, until=4)
    assert sorted(first.standings) == names
    assert all(standing.is_running for standing in first.standings.values())
    second = run(survivors=["law.1"], until=9, is_begun=True)
    assert [second.standings[name].is_running for name in names] == [False, True]
    assert second.standings["law.0"].best == first.standings["law.0"].best
    publication = Publication(order=["law.1", "law.0"], name="law", description="d", rows={})
    outcome = run(publication=publication, is_begun=True)
    (files,) = mailbox.collect()[0]
    assert publish_delivered(store, files) == "law@1"
    assert publish_delivered(store, files, once=True) == "law@1"
    rows = read_candidates(store, "law@1")
    assert [(row.is_best, row.steps, row.settings) for row in rows] == [
        (True, 9, {"train.learning_rate": 1}),
        (False, 4, {"train.learning_rate": 0}),
    ]
    assert outcome.report is not None
    mailbox.keep_state("key", {})
    assert not losses
    with pytest.raises(CorruptError, match="is gone"):
        run(survivors=names, until=9, is_begun=True)


def test_what_fails_is_said_and_the_others_come_back(task, texts, mailbox, expected, recipes):
    hot = recipes[1].train.model_copy(update={"learning_rate": 1e38, "max_grad_norm": 0.0, "steps": 40})
    mixed = [recipes[0], recipes[1].model_copy(update={"train": hot}), recipes[2]]
    found = run_task(RemoteTask(key=task.key, recipes=mixed, num_slots=2), texts, mailbox)
    assert "'d1' diverged at step" in found
    assert sorted(deliver_all(mailbox)) == ["d0", "d2"]


def test_a_version_that_was_damaged_on_its_way_is_not_published(task, texts, mailbox, expected, tmp_path):
    store = Store(tmp_path / "driver")
    run_task(task, texts, mailbox)
    files = mailbox._delivered[0]
    with pytest.raises(CorruptError):
        publish_delivered(store, {**files, "adapter_model.safetensors": files["adapter_model.safetensors"][:-1] + b"x"})
    assert store.list_names() == []


def test_no_path_leads_out_of_a_folder(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c.txt").write_bytes(b"1")
    files = read_folder(tmp_path / "a")
    assert files == {"a/b/c.txt": b"1"}
    assert write_folder(files, tmp_path / "there") == tmp_path / "there" / "a"
    assert read_folder(tmp_path / "there" / "a") == files
    with pytest.raises(CorruptError, match="leads out"):
        write_folder({"a/../../x": b""}, tmp_path / "there")
    assert not (tmp_path / "x").exists()
