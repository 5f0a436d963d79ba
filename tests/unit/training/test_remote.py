"""Laws of training on another machine: the same bytes, nothing lost with it, nothing published twice."""

import os
from contextlib import suppress

import pytest

from lora_gpt2.core.errors import CorruptError, Interrupted, UsageError
from lora_gpt2.data.prepared import prepare_data
from lora_gpt2.model.checkpoint import Checkpoint
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.exchange import read_version_files
from lora_gpt2.store.manifest import MANIFEST, parse_manifest
from lora_gpt2.training.candidates import read_candidates
from lora_gpt2.training.checkpoint import RunFolder
from lora_gpt2.training.grouped_search import GroupTask
from lora_gpt2.training.mailbox import Mailbox, read_folder, write_folder
from lora_gpt2.training.ray_training import _Driver, find_key
from lora_gpt2.training.remote import RemoteTask, _open_folder, publish_delivered, run_remote_group, run_task
from lora_gpt2.training.rounds import GroupRound, Publication
from lora_gpt2.training.run import train_recipes
from lora_gpt2.training.start import inherit_shape
from lora_gpt2.training.task_inputs import TaskInputs, check_sendable, collect_inputs
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
    return TaskInputs(texts=[read_folder(prepare_data(r.data, tokenizer, reporter).path) for r in recipes])


@pytest.fixture
def mailbox(tmp_path):
    return Mailbox(tmp_path / "states")


def read_weights(files):
    return {name: files[name] for name in files if name.endswith(".safetensors")}


def deliver_all(mailbox):
    return {parse_manifest(files[MANIFEST]).name: read_weights(files) for files in mailbox._mail.versions}


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
    assert run_task(task, texts, mailbox) == {}
    assert deliver_all(mailbox) == expected
    mailbox.forget_state(task.key)
    assert not mailbox.find_state(task.key)
    assert not list((tmp_path / "cache" / "tasks").iterdir())
    store = Store(tmp_path / "driver")
    assert [publish_delivered(store, files) for files in sorted(mailbox._mail.versions, key=str)] != []
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
    assert run_task(task, texts, mailbox) == {}
    assert deliver_all(mailbox) == expected
    assert [parse_manifest(files[MANIFEST]).name for files in mailbox._mail.versions].count("d2") == 2
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
    assert run_task(task, texts, mailbox) == {}
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
    text, names = TaskInputs(texts=[read_folder(data.path)]), ["law.0", "law.1"]
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
    (files,) = mailbox.collect().versions
    assert publish_delivered(store, files) == "law@1"
    assert publish_delivered(store, files, once=True) == "law@1"
    rows = read_candidates(store, "law@1")
    assert [(row.is_best, row.steps, row.settings) for row in rows] == [
        (True, 9, {"train.learning_rate": 1}),
        (False, 4, {"train.learning_rate": 0}),
    ]
    assert outcome.report is not None
    mailbox.forget_state("key")
    assert not losses
    with pytest.raises(CorruptError, match="is gone"):
        run(survivors=names, until=9, is_begun=True)


def test_what_fails_is_said_and_the_others_come_back(task, texts, mailbox, expected, recipes):
    hot = recipes[1].train.model_copy(update={"learning_rate": 1e38, "max_grad_norm": 0.0, "steps": 40})
    mixed = [recipes[0], recipes[1].model_copy(update={"train": hot}), recipes[2]]
    found = run_task(RemoteTask(key=task.key, recipes=mixed, num_slots=2), texts, mailbox)
    assert list(found) == ["d1"]
    assert found["d1"].startswith("diverged at step")
    assert sorted(deliver_all(mailbox)) == ["d0", "d2"]


def test_a_version_that_was_damaged_on_its_way_is_not_published(task, texts, mailbox, expected, tmp_path):
    store = Store(tmp_path / "driver")
    run_task(task, texts, mailbox)
    files = mailbox._mail.versions[0]
    with pytest.raises(CorruptError):
        publish_delivered(store, {**files, "adapter_model.safetensors": files["adapter_model.safetensors"][:-1] + b"x"})
    assert store.list_names() == []


@pytest.mark.parametrize("init_from", ["law", "auto"])
def test_what_a_recipe_continues_from_and_replays_is_sent_with_it(
    recipes, store, reporter, mailbox, tmp_path, monkeypatch, init_from
):
    """Byte for byte as here, on two machines of which one is lost; the parents do not come back."""
    train_recipes([recipes[2].model_copy(update={"name": name}) for name in ("law", "other")], store, reporter)
    replayed = tmp_path / "general.txt"
    replayed.write_text(make_text(40, seed=9))
    train = recipes[0].train.model_copy(update={"forget": 0.01, "replay": (str(replayed),), "replay_tokens": 512})
    lora = recipes[0].lora.model_copy(update={"init_from": init_from})
    recipe = recipes[0].model_copy(update={"name": "law", "train": train, "lora": lora})
    here = Store(tmp_path / "here")
    for name in ("law", "other"):
        files = read_version_files(store, name)[1]
        write_folder({f"{name}/1/{path}": content for path, content in files.items()}, here.root)
        here.use_version(name, 1)
    train_recipes([recipe], here, reporter, num_slots=1)
    known = inherit_shape(recipe, store)
    data = prepare_data(known.data, Checkpoint.open(known.base).load_tokenizer(), reporter)
    inputs = collect_inputs([known], [data], store, reporter)
    assert inputs.parent_references == ({"law@1"} if init_from == "law" else {"law@1", "other@1"})
    os.remove(replayed)
    os.remove(recipe.data.sources[0])
    advance, lost = Trainer._advance, []

    def lose(self, active):
        advance(self, active)
        if self.step == 5 and not lost:
            lost.append(self)
            raise Lost

    monkeypatch.setattr(Trainer, "_advance", lose)
    task = RemoteTask(key="key", recipes=[known], num_slots=1)
    with pytest.raises(Lost):
        run_task(task, inputs, mailbox)
    state = mailbox.find_state("key")
    assert not [name for name in state if "store/law/1/" in name or "store/other/1" in name]
    assert run_task(task, inputs, mailbox) == {}
    mail = mailbox.collect()
    (files,) = mail.versions
    assert publish_delivered(store, files) == "law@2"
    found, expected = (read_version_files(each, "law@2") for each in (store, here))
    assert read_weights(found[1]) == read_weights(expected[1])
    assert found[0].parents == expected[0].parents
    assert found[0].recipe == expected[0].recipe
    assert [text for text in mail.messages if text.startswith("law: continues from ")]
    assert not [text for text in mail.messages if "law@2" in text.partition(":")[0] or "no run to resume" in text]


def test_a_machine_that_was_given_up_for_lost_replaces_nothing_later(mailbox):
    mailbox.keep_state("key", 4, {"state/a": b"four"})
    mailbox.keep_state("key", 8, {"state/a": b"eight"})
    mailbox.keep_state("key", 6, {"state/a": b"six"})
    assert mailbox.find_state("key") == {"state/a": b"eight"}
    mailbox.keep_state("key", 8, {"state/b": b"eight"})
    assert mailbox.find_state("key") == {"state/b": b"eight"}
    assert len(list(mailbox.folder.iterdir())) == 1


def test_domains_are_dealt_to_devices_evenly_and_a_task_that_has_begun_keeps_its_own(store, reporter, tmp_path):
    run = RunFolder(path=tmp_path / "run")
    run.path.mkdir()
    driver = _Driver(store=store, run=run, reporter=reporter, recipes="", is_resumed=True)
    driver.divide(list("abcdefg"), 8, 3)
    assert driver.tasks == [["a", "d", "g"], ["b", "e"], ["c", "f"]]
    driver.divide(list("abcdefg"), 2, 3)
    assert [len(task) for task in driver.tasks] == [2, 1, 1, 1, 1, 1]
    driver.divide(list("abcdefg"), 4, 1)
    assert driver.tasks == [list("aceg"), list("bdf")]
    Mailbox(driver.states).keep_state(find_key(list("bdf")), 3, {"state/a": b""})
    driver.published = {"b": "b@1", "a": "a@1"}
    driver.divide(list("abcdefgh"), 8, 1)
    assert driver.tasks == [list("bdf"), list("cegh")], "b is needed to go on, a is not"
    driver.read_ledger()
    assert driver.tasks == [list("bdf"), list("cegh")]


def test_what_is_not_sent_is_refused(recipes, tmp_path):
    folder = recipes[0].lora.model_copy(update={"init_from": str(tmp_path)})
    with pytest.raises(UsageError, match="not of other folders"):
        check_sendable([recipes[0].model_copy(update={"lora": folder})])
    tracked = recipes[0].train.model_copy(update={"trackers": ("csv",)})
    with pytest.raises(UsageError, match="trackers"):
        check_sendable([recipes[0].model_copy(update={"train": tracked})])


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
