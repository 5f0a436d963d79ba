"""Laws of training on another machine: the same bytes, nothing lost with it, nothing published twice."""

import os
import tempfile

import pytest

from lora_gpt2.core.errors import CorruptError, Interrupted
from lora_gpt2.data.prepared import prepare_data
from lora_gpt2.model.checkpoint import Checkpoint
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.manifest import MANIFEST, parse_manifest
from lora_gpt2.training.remote import LocalMailbox, RemoteTask, publish_delivered, read_folder, run_task, write_folder
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


def read_weights(files):
    return {name: files[name] for name in files if name.endswith(".safetensors")}


def deliver_all(mailbox):
    return {parse_manifest(files[MANIFEST]).name: read_weights(files) for files in mailbox.delivered}


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


def test_what_comes_back_is_byte_for_byte_what_is_trained_here(task, texts, expected, tmp_path):
    mailbox = LocalMailbox()
    assert run_task(task, texts, mailbox) == ""
    assert deliver_all(mailbox) == expected
    assert sum(mailbox.tokens.values()) > 0
    assert not mailbox.find_state(task.key), "of a task that is done nothing is kept"
    store = Store(tmp_path / "driver")
    assert [publish_delivered(store, files) for files in sorted(mailbox.delivered, key=str)] != []
    assert store.list_names() == ["d0", "d1", "d2"]
    for name in expected:
        with store.open(name) as version:
            assert read_weights(version.read_files()) == expected[name]
            assert "train" in version.manifest.recipe


class Lost(BaseException):
    """The machine is gone: nothing here is caught."""


def test_another_machine_goes_on_where_a_lost_one_left_off(task, texts, expected, monkeypatch):
    mailbox, steps, advance = LocalMailbox(), [], Trainer._advance

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
    assert [parse_manifest(files[MANIFEST]).name for files in mailbox.delivered].count("d2") == 2
    assert len(steps) <= 8 + 12 - 6, "it did not begin anew"


def test_a_machine_that_is_told_to_stop_leaves_its_task_to_another(task, texts, expected, monkeypatch, tmp_path):
    """Whose temporary folder is another one."""
    mailbox, steps, advance = LocalMailbox(), [], Trainer._advance

    def stop(self, active):
        steps.append(self.step)
        advance(self, active)
        if len(steps) == 8:
            os.kill(os.getpid(), 15)

    monkeypatch.setattr(Trainer, "_advance", stop)
    with pytest.raises(Interrupted):
        run_task(task, texts, mailbox)
    assert sum(name.endswith(".checkpoint") for name in mailbox.find_state(task.key)) == 1, "the newest"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    assert run_task(task, texts, mailbox) == ""
    assert deliver_all(mailbox) == expected
    assert len(steps) == 12, "nothing was trained twice"


def test_what_fails_is_said_and_the_others_come_back(task, texts, expected, recipes):
    hot = recipes[1].train.model_copy(update={"learning_rate": 1e38, "max_grad_norm": 0.0, "steps": 40})
    mixed = [recipes[0], recipes[1].model_copy(update={"train": hot}), recipes[2]]
    mailbox = LocalMailbox()
    found = run_task(RemoteTask(key=task.key, recipes=mixed, num_slots=2), texts, mailbox)
    assert "'d1' diverged at step" in found
    assert sorted(deliver_all(mailbox)) == ["d0", "d2"]


def test_a_version_that_was_damaged_on_its_way_is_not_published(task, texts, expected, tmp_path):
    mailbox, store = LocalMailbox(), Store(tmp_path / "driver")
    run_task(task, texts, mailbox)
    files = mailbox.delivered[0]
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
