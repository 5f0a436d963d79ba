"""Laws of training, on a tiny base."""

import errno
import json
import math
import os
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load

from lora_gpt2.core.console import SilentReporter
from lora_gpt2.core.errors import (
    ConflictError,
    Interrupted,
    MismatchError,
    ResourceError,
    TrainingDiverged,
    UsageError,
)
from lora_gpt2.core.interrupt import StopRequest
from lora_gpt2.core.locks import hold_lock
from lora_gpt2.data.inspect import list_documents
from lora_gpt2.data.prepared import prepare_data
from lora_gpt2.evaluation.perplexity import measure_perplexity
from lora_gpt2.model.base import load_base
from lora_gpt2.model.fused import TrainingAdapters
from lora_gpt2.model.probe import select_base
from lora_gpt2.model.runtime import Runtime, choose_runtime
from lora_gpt2.recipe import DataSettings, build_recipe
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.files import load_adapter
from lora_gpt2.store.manifest import WEIGHTS
from lora_gpt2.training import publish as publish_module
from lora_gpt2.training import run as run_module
from lora_gpt2.training import validation as validation_module
from lora_gpt2.training.checkpoint import RunFolder, open_run_folder
from lora_gpt2.training.run import train_recipes
from lora_gpt2.training.slot import TrainingSlot
from lora_gpt2.training.trainer import Trainer
from lora_gpt2.training.validation import measure_blocks
from tests.builders import make_text

CPU = torch.device("cpu")


def make_recipe(base_folder, source, name="one", **train):
    """A short run without the samples that are written at each validation: the CLI tests have those."""
    sizes = {"steps": 6, "batch_tokens": 64, "micro_batch_tokens": 64, "sample_tokens": 0}
    train = {**sizes, "learning_rate": 1e-2, **train}
    lora = train.pop("lora", {})
    return build_recipe(
        {
            "name": name,
            "base": str(base_folder),
            "data": {"sources": [str(source)], "block_size": 16},
            "lora": {"rank": 2, **lora},
            "train": {"dtype": "float32", **train},
        },
        "test",
    )


@pytest.fixture
def other_text(tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text(make_text(60, seed=7, words="le chat et le chien dans la pluie sous un soleil"))
    return path


def weights_of(store, name):
    return (store.resolve(name) / WEIGHTS).read_bytes()


def make_trainer(recipes, reporter, run=None, dtype=torch.float32):
    base = load_base(recipes[0].base, Runtime(CPU, dtype))
    domains = [TrainingSlot(recipe=r, data=prepare_data(r.data, base.tokenizer, reporter)) for r in recipes]
    return Trainer(base, domains, reporter, run)


def test_one_recipe_may_fill_two_slots(base_folder, text_file, reporter):
    recipe = make_recipe(base_folder, text_file)
    trainer = make_trainer([recipe, recipe], reporter)
    trainer.run_step([0, 1])
    first, second = (trainer.bank.read(slot).updates for slot in (0, 1))
    assert all(update.b.any() and torch.equal(update.b, second[site].b) for site, update in first.items())


def test_training_lowers_the_loss_and_leaves_the_base_untouched(base_folder, text_file, reporter):
    trainer = make_trainer([make_recipe(base_folder, text_file, steps=60)], reporter)
    before = {name: tensor.clone() for name, tensor in trainer.base.model.state_dict().items()}
    (trained,) = trainer.train(StopRequest())
    assert trained.validation_nll < trained.base_nll - 0.5
    after = trainer.base.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert any(update.b.any() for update in trained.adapter.updates.values())


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(base_folder, text_file, store, reporter):
    for seed in (0, 0, 1):
        train_recipes([make_recipe(base_folder, text_file, seed=seed, lora={"dropout": 0.2})], store, reporter)
    first, second, third = (weights_of(store, f"one@{version}") for version in (1, 2, 3))
    assert first == second
    assert first != third


@pytest.mark.parametrize("clip", [0.5, 0.0])
def test_trained_together_equals_trained_alone(base_folder, text_file, other_text, store, reporter, clip):
    recipes = [
        make_recipe(base_folder, text_file, "one", max_grad_norm=clip),
        make_recipe(
            base_folder,
            other_text,
            "two",
            steps=4,
            learning_rate=3e-3,
            batch_tokens=48,
            seed=5,
            max_grad_norm=clip,
            lora={"rank": 3, "targets": ["c_attn.q", "c_attn.v", "mlp.c_proj"]},
        ),
    ]
    together = make_trainer(recipes, reporter).train(StopRequest())
    for recipe, joint in zip(recipes, together, strict=True):
        (alone,) = make_trainer([recipe], reporter).train(StopRequest())
        assert joint.slot.train_tokens == alone.slot.train_tokens
        assert joint.adapter.ranks == alone.adapter.ranks
        for site, update in alone.adapter.updates.items():
            for half in ("a", "b"):
                ours, theirs = getattr(joint.adapter.updates[site], half), getattr(update, half)
                assert torch.allclose(ours, theirs, atol=2e-5), site
    one, two = together
    assert one.adapter.ranks != two.adapter.ranks


def test_accumulated_batches_equal_whole_ones(base_folder, text_file, reporter):
    gradients = []
    for micro in (16, 32, 1000):
        trainer = make_trainer([make_recipe(base_folder, text_file, micro_batch_tokens=micro)], reporter)
        trainer.runner.compute_gradients(trainer.micro_batches.build([0])[0])
        gradients.append(trainer.runner.gradient.clone())
    assert gradients[0].abs().max() > 0
    for other in gradients[1:]:
        assert torch.allclose(gradients[0], other, rtol=1e-4, atol=1e-6)


def test_sliced_targets_train_only_their_blocks(base_folder, text_file, reporter):
    recipe = make_recipe(base_folder, text_file, weight_decay=0.1, lora={"targets": ["c_attn.q", "c_attn.v"]})
    (trained,) = make_trainer([recipe], reporter).train(StopRequest())
    b = trained.adapter.updates["h.0.attn.c_attn"].b
    assert b[:16, :2].any()
    assert b[32:, 2:].any()
    assert not b[16:32].any()
    assert not b[:16, 2:].any()
    assert not b[32:, :2].any()


class StopAt(StopRequest):
    """A Ctrl-C that arrives during the n-th step."""

    def __init__(self, trainer, step):
        self.trainer, self.step = trainer, step

    @property
    def signal_number(self):
        return 2 if self.trainer.step >= self.step else 0


def script_validations(trainer, curves):
    """Lets the slots' validations after each step be those of `curves`; returns the weights that were validated."""
    measure, seen = trainer.measure_validation, {slot: {} for slot in curves}

    def scripted(slot):
        if slot not in curves:
            return measure(slot)
        seen[slot][trainer.step] = trainer.bank.read(slot)
        return curves[slot][trainer.step - 1]

    trainer.measure_validation = scripted
    return seen


def are_equal(one, other):
    return all(
        torch.equal(one.updates[site].a, update.a) and torch.equal(one.updates[site].b, update.b)
        for site, update in other.updates.items()
    )


EVERY_STEP = {"validate_every": 1, "learning_rate": 0.05, "schedule": "constant", "warmup_fraction": 0.0}


@pytest.mark.parametrize(
    ("stop_at", "dtype"),
    [(1, torch.float32), (3, torch.float32), (5, torch.float32), (3, torch.bfloat16), (3, torch.float16)],
)
def test_resumed_equals_uninterrupted_bitwise(base_folder, text_file, other_text, reporter, tmp_path, stop_at, dtype):
    recipes = [
        make_recipe(base_folder, text_file, validate_every=2, lora={"dropout": 0.1}),
        make_recipe(base_folder, other_text, "two", steps=4),
    ]

    def begin(run=None):
        trainer = make_trainer(recipes, reporter, run, dtype)
        if trainer.runner.grad_scaler is not None:
            # the first overflows and is halved; under the second small gradients lose digits, which shows in the result
            trainer.runner.grad_scaler.values.copy_(torch.tensor([2.0**23, 1.0]))
        return trainer

    unbroken = begin().train(StopRequest())
    assert (dtype == torch.float16) == bool(unbroken[0].slot.num_skipped)
    run = RunFolder(path=tmp_path / "run")
    run.begin({})
    broken = begin(run)
    with pytest.raises(Interrupted, match="SIGINT"):
        broken.train(StopAt(broken, stop_at))
    resumed = make_trainer(recipes, reporter, run, dtype)
    resumed.restore(*run.load(reporter))
    assert resumed.step == stop_at
    for one, other in zip(resumed.train(StopRequest()), unbroken, strict=True):
        assert one.validation_nll == other.validation_nll
        for site, update in other.adapter.updates.items():
            assert torch.equal(one.adapter.updates[site].a, update.a)
            assert torch.equal(one.adapter.updates[site].b, update.b)
        strip = [{k: v for k, v in r.items() if k not in ("seconds", "memory_bytes")} for r in one.slot.records]
        assert strip == [
            {k: v for k, v in r.items() if k not in ("seconds", "memory_bytes")} for r in other.slot.records
        ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep_best", [True, False])
def test_the_best_weights_are_published_unless_told_otherwise(base_folder, text_file, reporter, keep_best, dtype):
    recipe = make_recipe(base_folder, text_file, keep_best=keep_best, **EVERY_STEP)
    trainer = make_trainer([recipe], reporter, dtype=dtype)
    (seen,) = script_validations(trainer, {0: [4.0, 3.0, 2.0, 2.5, 2.0, 9.0]}).values()
    (trained,) = trainer.train(StopRequest())
    assert (trained.slot.best_step, trained.slot.best_nll) == (3, 2.0), "the first of two that are as good"
    assert [record["validation_loss"] for record in trained.slot.records] == [4.0, 3.0, 2.0, 2.5, 2.0, 9.0]
    assert [step for step, adapter in seen.items() if are_equal(trained.adapter, adapter)] == [3 if keep_best else 6]
    # the figures are those of what is published: measured on the adapter as a store would give it back
    fresh = make_trainer([recipe], reporter, dtype=dtype)
    measured = {}
    for step in (3, 6):
        fresh.bank.load(0, seen[step])
        data, adapters = fresh.slots[0].data, TrainingAdapters(fresh.bank, [0])
        documents = list_documents(data, "test", fresh.base.tokenizer)
        score = measure_perplexity(fresh.base, documents, recipe.evaluate, lambda _: TrainingAdapters(fresh.bank, [0]))
        measured[step] = [measure_blocks(fresh.base, data.validation, adapters), score.nll_nats_per_token]
    published, other = (3, 6) if keep_best else (6, 3)
    assert [trained.validation_nll, trained.test_nll[1]] == pytest.approx(measured[published], abs=1e-5)
    assert abs(trained.validation_nll - measured[other][0]) > 1e-3, "the comparison can fail"


def test_each_slot_of_a_run_keeps_its_own_best(base_folder, text_file, other_text, reporter, tmp_path):
    """One slot goes on improving after another's best; a third does not keep its best; also after a resumption."""
    curves = {0: [6.0, 5.0, 4.0, 3.0, 2.0, 1.0], 1: [4.0, 3.0, 5.0, 6.0, 7.0, 8.0], 2: [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}
    sources = (text_file, other_text, text_file)
    recipes = [
        make_recipe(base_folder, source, f"r{slot}", seed=slot, keep_best=slot != 2, **EVERY_STEP)
        for slot, source in enumerate(sources)
    ]
    run = RunFolder(path=tmp_path / "run")
    run.begin({})
    trainer = make_trainer(recipes, reporter, run)
    seen = script_validations(trainer, curves)
    with pytest.raises(Interrupted):
        trainer.train(StopAt(trainer, 4))
    resumed = make_trainer(recipes, reporter, run)
    resumed.restore(*run.load(reporter))
    later = script_validations(resumed, curves)
    trained = resumed.train(StopRequest())
    assert [one.slot.best_step for one in trained] == [6, 2, 1]
    for slot, (one, step) in enumerate(zip(trained, (6, 2, 6), strict=True)):
        weights = seen[slot] | later[slot]
        assert [at for at, adapter in weights.items() if are_equal(one.adapter, adapter)] == [step], slot


def test_the_end_of_a_run_counts_to_its_total_and_measures_the_base_once(base_folder, text_file, monkeypatch):
    done = {}

    class Counting(SilentReporter):
        @contextmanager
        def task(self, title, total, unit):
            done[title] = [total, 0]
            yield SimpleNamespace(advance=lambda amount, note="": done[title].__setitem__(1, done[title][1] + amount))

    recipes = [make_recipe(base_folder, text_file, name=name, steps=2) for name in ("one", "two")]
    trainer, plain = make_trainer(recipes, Counting()), []

    def note(base, blocks, adapters, **options):
        plain.append(adapters is None)
        return measure_blocks(base, blocks, adapters, **options)

    def note_test(base, documents, settings, select=None, on_tokens=None):
        plain.append(select is None)
        return measure_perplexity(base, documents, settings, select or select_base, on_tokens)

    monkeypatch.setattr(validation_module, "measure_blocks", note)
    monkeypatch.setattr(validation_module, "measure_perplexity", note_test)
    one, two = trainer.train(StopRequest())
    assert done["measuring"][0] == done["measuring"][1] > 0
    assert plain.count(True) == 2, "validation and test text, for both adapters"
    assert one.base_nll == two.base_nll
    assert one.test_nll is not None


def test_a_diverging_run_stops_within_a_step_and_publishes_nothing(base_folder, text_file, store, reporter):
    with pytest.raises(TrainingDiverged) as caught:
        train_recipes([make_recipe(base_folder, text_file, learning_rate=1e38, max_grad_norm=0.0)], store, reporter)
    assert caught.value.exit_code == 8
    assert "diverged at step 1" in caught.value.message
    assert "learning rate" in caught.value.message
    assert not store.list_names()


@pytest.mark.parametrize("keep_best", [True, False])
def test_a_last_step_that_diverges_publishes_nothing(base_folder, text_file, store, reporter, keep_best):
    hot = {"steps": 1, "learning_rate": 1e38, "max_grad_norm": 0.0, "warmup_fraction": 0.0, "keep_best": keep_best}
    with pytest.raises(TrainingDiverged, match="validation loss"):
        train_recipes([make_recipe(base_folder, text_file, **hot)], store, reporter)
    assert not store.list_names()


def test_a_store_that_cannot_be_written_is_found_before_training(
    base_folder, text_file, reporter, tmp_path, monkeypatch
):
    monkeypatch.setattr(Trainer, "_advance", lambda *a: pytest.fail("trained"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="write to the store"):
        train_recipes([make_recipe(base_folder, text_file)], Store(tmp_path / "file"), reporter)


def test_metrics_can_be_followed_while_the_run_goes_on(base_folder, text_file, reporter, tmp_path):
    run = RunFolder(path=tmp_path / "run")
    run.begin({})
    trainer = make_trainer([make_recipe(base_folder, text_file)], reporter, run)
    with pytest.raises(Interrupted):
        trainer.train(StopAt(trainer, 3))
    path = tmp_path / "run" / "one.metrics.jsonl"
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    resumed = make_trainer([make_recipe(base_folder, text_file)], reporter, run)
    resumed.restore(*run.load(reporter))
    resumed.train(StopRequest())
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def test_what_is_published_says_where_it_comes_from(base_folder, text_file, store, reporter):
    report = train_recipes([make_recipe(base_folder, text_file)], store, reporter)
    (item,) = report.adapters
    manifest, adapter = load_adapter(store, "one", load_base(str(base_folder), choose_runtime("float32", CPU)))
    assert manifest.data["sources"] == ["text.jsonl"]
    assert manifest.recipe["train"]["steps"] == 6
    assert manifest.figures["validation_perplexity"] == item.validation_perplexity > 1
    assert adapter.ranks["h.0.attn.c_attn"] == 2
    lines = (store.resolve("one") / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert json.loads(lines[-1])["tokens"] == item.train_tokens == 6 * 64
    card = (store.resolve("one") / "README.md").read_text()
    assert "library_name: peft" in card
    assert "text.jsonl" in card


def test_interrupting_and_resuming_through_the_run(base_folder, text_file, store, reporter, monkeypatch):
    recipe = make_recipe(base_folder, text_file)
    original = Trainer._advance

    def interrupt(self, started):
        original(self, started)
        if self.step == 3:
            os.kill(os.getpid(), 2)

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(Trainer, "_advance", interrupt)
        train_recipes([recipe], store, reporter)
    assert not store.list_names()
    resumed = train_recipes([recipe], store, reporter, resume=True)
    train_recipes([make_recipe(base_folder, text_file, "whole")], store, reporter)
    assert weights_of(store, "one") == weights_of(store, "whole")
    again = train_recipes([recipe], store, reporter, resume=True)
    assert again.already_complete
    assert again.adapters == resumed.adapters
    assert store.list_versions("one") == [1]


@pytest.mark.parametrize(
    "change", [{"learning_rate": 1e-3}, {"seed": 3}, {"steps": 7}, {"lora": {"rank": 3}}, {"data": True}]
)
def test_resuming_with_other_settings_is_refused_by_name(
    base_folder, text_file, other_text, store, reporter, monkeypatch, change
):
    recipe = make_recipe(base_folder, text_file)
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(run_module, "catch_signals", lambda: _stopped())
        train_recipes([recipe], store, reporter)
    source = other_text if change.pop("data", False) else text_file
    with pytest.raises(MismatchError) as caught:
        train_recipes([make_recipe(base_folder, source, **change)], store, reporter, resume=True)
    key = next(iter(change), "data")
    assert (next(iter(change["lora"])) if key == "lora" else key) in caught.value.message
    assert "then" in caught.value.message


def test_passes_of_another_size_may_go_on_and_it_is_said(base_folder, text_file, store, reporter, monkeypatch):
    said = []
    monkeypatch.setattr(type(reporter), "message", lambda self, text: said.append(text))
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(run_module, "catch_signals", lambda: _stopped())
        train_recipes([make_recipe(base_folder, text_file)], store, reporter)
    train_recipes([make_recipe(base_folder, text_file, micro_batch_tokens=16)], store, reporter, resume=True)
    assert any("rounding only" in text and "micro_batch_tokens: 64 then, 16 now" in text for text in said)
    train_recipes([make_recipe(base_folder, text_file, "whole")], store, reporter)
    one, other = (load(weights_of(store, name)) for name in ("one", "whole"))
    assert all(torch.allclose(one[key], tensor, atol=2e-5) for key, tensor in other.items())


class _stopped:
    def __enter__(self):
        request = StopRequest()
        request.signal_number = 15
        return request

    def __exit__(self, *error):
        return None


def test_a_damaged_checkpoint_is_skipped_aloud(tmp_path):
    run, said = RunFolder(path=tmp_path), []
    reporter = type("R", (), {"message": lambda s, t: said.append(t), "detail": lambda s, t: None})()
    for step in (1, 2, 3):
        run.save(step, {"x": torch.full((3,), float(step))}, {"step": step})
    assert [path.name for path in run.list_checkpoints()] == ["step-000000003.checkpoint", "step-000000002.checkpoint"]
    newest = run.list_checkpoints()[0]
    content = bytearray(newest.read_bytes())
    for position in (0, 40, len(content) - 1):
        damaged = bytearray(content)
        damaged[position] ^= 1
        newest.write_bytes(damaged)
        tensors, state = run.load(reporter)
        assert (state["step"], tensors["x"][0].item()) == (2, 2)
        assert said.pop() == "skipped step-000000003.checkpoint: it is damaged"
    newest.write_bytes(content)
    assert run.load(reporter)[1] == {"step": 3}


def test_a_full_disk_while_saving_keeps_the_last_checkpoint(tmp_path, monkeypatch, reporter):
    run = RunFolder(path=tmp_path)
    run.save(1, {"x": torch.zeros(1)}, {"step": 1})

    def full(fd):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patched, pytest.raises(ResourceError, match="no space"):
        patched.setattr(os, "fsync", full)
        run.save(2, {"x": torch.zeros(1)}, {"step": 2})
    assert run.load(reporter)[1] == {"step": 1}


def test_a_failed_publication_costs_no_training(base_folder, text_file, store, reporter, monkeypatch):
    recipe = make_recipe(base_folder, text_file)
    with monkeypatch.context() as patched, pytest.raises(ResourceError):
        patched.setattr(publish_module, "publish_adapter", _fail)
        train_recipes([recipe], store, reporter)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_advance", _fail)
        train_recipes([recipe], store, reporter, resume=True)
    train_recipes([make_recipe(base_folder, text_file, "whole")], store, reporter)
    assert weights_of(store, "one") == weights_of(store, "whole")


def _fail(*args, **kwargs):
    raise ResourceError("no space", "free some")


def test_two_runs_of_one_adapter_do_not_meet(base_folder, text_file, store, reporter):
    run = open_run_folder(store.root, ["one"])
    with hold_lock(run.lock, "it"), pytest.raises(ConflictError, match=str(os.getpid())):
        train_recipes([make_recipe(base_folder, text_file)], store, reporter)


def test_recipes_that_cannot_train_together_are_refused(base_folder, text_file, store, reporter):
    one = make_recipe(base_folder, text_file)
    with pytest.raises(UsageError, match="same name"):
        train_recipes([one, one], store, reporter)
    two = make_recipe(base_folder, text_file, "two")
    with pytest.raises(UsageError, match="one base"):
        train_recipes([one, two.model_copy(update={"base": "nano"})], store, reporter)
    wide = two.model_copy(update={"data": two.data.model_copy(update={"block_size": 32})})
    with pytest.raises(UsageError, match=r"one data\.block_size"):
        train_recipes([one, wide], store, reporter)
    long = two.model_copy(update={"data": two.data.model_copy(update={"block_size": 512})})
    with pytest.raises(UsageError, match=r"context of .* 48") as caught:
        train_recipes([long], store, reporter)
    assert "data.block_size=48" in caught.value.hint


def test_measured_blocks_are_weighted_by_tokens(base_folder, text_file, reporter):
    trainer = make_trainer([make_recipe(base_folder, text_file)], reporter)
    blocks = trainer.slots[0].data.validation
    assert blocks.num_tokens % 16, "the last block is partial, or this shows nothing"
    rows = blocks.read(range(blocks.num_blocks))
    logits = trainer.base.model.logits(trainer.base.model(torch.from_numpy(rows.inputs)), None).flatten(0, 1)
    targets = torch.from_numpy(rows.targets).flatten()
    wanted = torch.nn.functional.cross_entropy(logits, targets).item()
    assert measure_blocks(trainer.base, blocks, None) == pytest.approx(wanted, abs=1e-5)
    assert math.isfinite(wanted)


@pytest.mark.parametrize("layout", ["concat", "packed"])
def test_a_short_validation_reads_all_of_the_text_and_not_its_beginning(base, tmp_path, reporter, layout):
    """Sources lie one after another, packed documents by their lengths: a part at the front is no sample."""
    for name, count in (("a", 60), ("b", 6)):
        texts = [f"{name} {' '.join(['the cat' if name == 'a' else 'rain rain'] * count)} {n}" for n in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "t.jsonl").write_text('{"text": "the cat and the dog"}\n')
    settings = DataSettings(
        sources=(str(tmp_path / "t.jsonl"),),
        validation=(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")),
        block_size=32,
        layout=layout,
        near_duplicate_threshold=0.0,
        profile="raw",
        test_fraction=0.0,
    )
    blocks, read = prepare_data(settings, base.tokenizer, reporter).validation, []
    spied = replace(blocks)
    object.__setattr__(spied, "read", lambda indices: read.extend(indices) or blocks.read(indices))
    measure_blocks(base, spied, None, max_tokens=32 * 6)
    assert len(read) == len(set(read)) == 6
    assert (read[0], read[-1]) == (0, blocks.num_blocks - 1)
    assert measure_blocks(base, blocks, None, max_tokens=10**6) == pytest.approx(measure_blocks(base, blocks, None))
