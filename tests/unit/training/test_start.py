"""Laws of continuing from another adapter."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load

from lora_gpt2.core.errors import Interrupted, MismatchError, NotFoundError, RecipeError, UsageError
from lora_gpt2.core.interrupt import StopRequest
from lora_gpt2.data.prepared import prepare_data
from lora_gpt2.evaluation.held_out import read_sketch
from lora_gpt2.model.lora import Adapter, build_adapter, list_sites
from lora_gpt2.model.reshape import build_pissa
from lora_gpt2.recipe import LoraSettings
from lora_gpt2.recipe_files import name_recipe
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.exchange import export_adapter
from lora_gpt2.store.files import Origin, load_adapter, publish_adapter
from lora_gpt2.store.lineage import describe_lineage
from lora_gpt2.store.manifest import MANIFEST
from lora_gpt2.store.peft.convert import weight_of
from lora_gpt2.training.remote import publish_delivered, read_version_files
from lora_gpt2.training.run import train_recipes
from lora_gpt2.training.slot import TrainingSlot
from lora_gpt2.training.start import build_start, inherit_shape
from lora_gpt2.training.trainer import Trainer
from tests.builders import make_adapter, make_text
from tests.unit.training.test_queue import kill_at
from tests.unit.training.test_trainer import make_recipe, other_text, weights_of  # noqa: F401 - a fixture


@pytest.fixture
def said(monkeypatch, reporter):
    lines = []
    monkeypatch.setattr(type(reporter), "message", lambda self, text: lines.append(text))
    return lines


@pytest.fixture
def law(base_folder, text_file, store, reporter):
    """A version of `law` that has learnt something, of rank 3 and with the head."""
    lora = {"rank": 3, "alpha": 3.0, "targets": ["mlp.c_fc", "lm_head"]}
    train_recipes([make_recipe(base_folder, text_file, "law", steps=30, lora=lora)], store, reporter)
    return "law@1"


def continued(base_folder, source, parent, name="more", **train):
    lora = {"rank": None, **train.pop("lora", {}), "init_from": parent}
    recipe = make_recipe(base_folder, source, name, **train)
    values = recipe.model_dump(exclude_unset=True)
    values["lora"] = {key: value for key, value in lora.items() if value is not None}
    return type(recipe).model_validate(values)


def test_the_next_version_continues_where_the_last_one_stopped(base_folder, other_text, store, reporter, law, said):  # noqa: F811
    recipe = name_recipe(continued(base_folder, other_text, "law").model_copy(update={"name": ""}))
    assert recipe.name == "law"
    (report,) = train_recipes([recipe], store, reporter).adapters
    assert (str(report), report.parents) == ("law@2", ("law@1",))
    assert "law: continues from law@1" in said
    manifest, parent = store.read_manifest("law@2"), store.read_manifest(law)
    (lineage,) = describe_lineage(store, manifest)["parents"]
    assert (lineage["reference"], lineage["found"], manifest.parents[0].digest) == (law, law, parent.digest)
    assert {key: manifest.recipe["lora"][key] for key in ("rank", "alpha", "targets")} == {
        "rank": 3,
        "alpha": 3.0,
        "targets": ["mlp.c_fc", "lm_head"],
    }
    records = [json.loads(line) for line in (store.resolve("law@2") / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["step"] == 0
    assert records[0]["validation_loss"] > records[-1]["validation_loss"]
    assert report.validation_perplexity < report.parent_perplexity
    assert "Made from law@1" in (store.resolve("law@2") / "README.md").read_text()


def test_training_that_makes_it_worse_publishes_the_parent(base_folder, text_file, store, reporter, law):
    (report,) = train_recipes(
        [continued(base_folder, text_file, law, learning_rate=3.0, validate_every=1, max_grad_norm=0.0)],
        store,
        reporter,
    ).adapters
    assert report.best_step == 0
    assert report.validation_perplexity == report.parent_perplexity
    assert weights_of(store, "more") == weights_of(store, law)


def test_a_resumed_run_whose_best_is_its_parent_publishes_it_too(
    base_folder, text_file, store, reporter, law, monkeypatch
):
    """The newest version has these weights already, but is not what this run published."""
    recipe = continued(base_folder, text_file, law, "law", learning_rate=3.0, validate_every=1, max_grad_norm=0.0)
    before = store.list_versions("law")
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        kill_at(patched, 2)
        train_recipes([recipe], store, reporter)
    (report,) = train_recipes([recipe], store, reporter, resume=True).adapters
    assert store.list_versions("law") == [*before, before[-1] + 1]
    assert (report.version, report.best_step) == (before[-1] + 1, 0)
    delivered = store.read_manifest("law")
    files = {name: (store.resolve("law") / name).read_bytes() for name in [*delivered.files, MANIFEST]}
    other = Store(store.root.parent / "other")
    publish_delivered(other, read_version_files(store, law)[1])
    assert publish_delivered(other, files, once=True) == "law@2", "the driver's newest is the parent"
    assert publish_delivered(other, files, once=True) == "law@2"


def test_each_recipe_has_its_own_parent_and_together_equals_alone(base_folder, text_file, other_text, store, reporter):  # noqa: F811
    for name, source in (("one", text_file), ("two", other_text)):
        train_recipes([make_recipe(base_folder, source, name, lora={"rank": 1 + len(name)})], store, reporter)
    recipes = [
        continued(base_folder, other_text, "one", "a"),
        continued(base_folder, text_file, "two@1", "b", lora={"rank": 6}),
        make_recipe(base_folder, text_file, "c"),
    ]
    together = train_recipes(recipes, store, reporter).adapters
    assert [report.parents for report in together] == [("one@1",), ("two@1",), ()]
    for recipe in recipes:
        train_recipes([recipe.model_copy(update={"name": f"{recipe.name}-alone"})], store, reporter)
        one, other = (load(weights_of(store, name)) for name in (recipe.name, f"{recipe.name}-alone"))
        assert all(torch.allclose(one[key], tensor, atol=2e-5) for key, tensor in other.items())


def test_resumed_equals_uninterrupted_whatever_became_of_the_parent(
    base_folder,
    other_text,  # noqa: F811
    store,
    reporter,
    law,
    monkeypatch,
):
    recipe = continued(base_folder, other_text, "law", "law")
    advance = Trainer._advance

    def interrupt(self, active):
        advance(self, active)
        if self.step == 3:
            os.kill(os.getpid(), 2)

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(Trainer, "_advance", interrupt)
        train_recipes([recipe], store, reporter)
    other = continued(base_folder, other_text, law, "other")
    with pytest.raises(MismatchError, match="init_from"):
        train_recipes([continued(base_folder, other_text, "", "law", lora={"rank": 3})], store, reporter, resume=True)
    (resumed,) = train_recipes([recipe], store, reporter, resume=True).adapters
    (whole,) = train_recipes([other], store, reporter).adapters
    assert weights_of(store, "law@2") == weights_of(store, "other")
    assert (resumed.parents, resumed.parent_perplexity) == (whole.parents, whole.parent_perplexity)
    again = train_recipes([recipe], store, reporter, resume=True)
    assert again.already_complete, "although 'law' is law@2 by now"
    assert again.adapters == [resumed]


def test_the_shape_is_the_parents_unless_it_is_set(base_folder, text_file, store, law):
    def shape(**lora):
        recipe = inherit_shape(continued(base_folder, text_file, "law", lora=lora), store)
        assert inherit_shape(recipe, store) == recipe
        assert recipe.lora.init_from == law
        return {key: recipe.lora.rank_of(key) for key in recipe.lora.targets}, recipe.lora.alpha

    assert shape() == ({"mlp.c_fc": 3, "lm_head": 6}, 3.0)
    assert shape(rank=5) == ({"mlp.c_fc": 5, "lm_head": 10}, None)
    assert shape(targets=("mlp.c_fc", "c_attn")) == ({"mlp.c_fc": 3, "c_attn": 3}, 3.0)
    assert shape(alpha=9.0)[1] == 9.0


def test_slices_are_inherited_as_slices(base_folder, text_file, store, reporter):
    lora = {"rank": 2, "targets": ["c_attn.q", "c_attn.v"]}
    train_recipes([make_recipe(base_folder, text_file, "qv", lora=lora)], store, reporter)
    recipe = inherit_shape(continued(base_folder, text_file, "qv"), store)
    assert recipe.lora.targets == ("c_attn.q", "c_attn.v")
    train_recipes([recipe], store, reporter)
    b = load(weights_of(store, "more"))["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"]
    d = len(b) // 3
    assert b[:d, :2].any()
    assert not b[d : 2 * d].any()


def test_a_folder_that_peft_saved_is_continued_and_named(base, base_folder, text_file, store, reporter, tmp_path):
    elsewhere = Store(tmp_path / "elsewhere")
    publish_adapter(elsewhere, "theirs", make_adapter(base.config, 3, LoraSettings(rank=2)), base, Origin())
    export_adapter(elsewhere, "theirs", tmp_path / "peft")
    for name in ("manifest.json", "README.md"):
        (tmp_path / "peft" / name).unlink()
    recipe = continued(base_folder, text_file, str(tmp_path / "peft"))
    (report,) = train_recipes([recipe], store, reporter).adapters
    manifest = store.read_manifest("more")
    assert report.parents == (str(tmp_path / "peft"),)
    assert (manifest.parents, dict(manifest.provenance)) == ((), {"by": "train", "from": "peft"})
    assert manifest.recipe["lora"]["rank"] == 2
    assert report.parent_perplexity != report.base_perplexity
    sketch = read_sketch(store, "more")
    assert sketch.count_seen(["nobody knows whether they were trained on this"]) is None


def test_what_the_parent_was_trained_on_is_known_of_the_child(base_folder, text_file, other_text, store, reporter, law):  # noqa: F811
    train_recipes([continued(base_folder, other_text, law)], store, reporter)
    sketch = read_sketch(store, "more")
    own, parents = (json.loads(path.read_text().splitlines()[3])["text"] for path in (other_text, text_file))
    assert sketch.has_seen(own)
    assert sketch.has_seen(parents)
    assert sketch.count_seen(["something that neither of them has ever seen"]) == 0


def test_held_out_text_that_the_parent_was_trained_on_is_reported(base_folder, tmp_path, store, reporter, said):
    rows = make_text(40, seed=3).splitlines(keepends=True)
    (tmp_path / "all.jsonl").write_text("".join(rows))
    (tmp_path / "held.jsonl").write_text("".join(rows[:8]))
    (tmp_path / "rest.jsonl").write_text("".join(rows[8:]))
    train_recipes([make_recipe(base_folder, tmp_path / "all.jsonl", "old")], store, reporter)
    recipe = continued(base_folder, tmp_path / "rest.jsonl", "old")
    data = recipe.data.model_copy(update={"validation": (str(tmp_path / "held.jsonl"),)})
    train_recipes([recipe.model_copy(update={"data": data})], store, reporter)
    (line,) = [line for line in said if "was trained on" in line]
    assert line.startswith("more: old@1 was trained on ")


def test_auto_starts_from_the_adapters_under_which_the_text_is_likely(
    base, base_folder, text_file, store, reporter, law
):
    for seed in range(6):
        publish_adapter(store, f"noise{seed}", make_adapter(base.config, seed), base, Origin())
    recipe = continued(base_folder, text_file, "auto", lora={"rank": 12, "targets": ["mlp.c_fc", "lm_head"]})
    (report,) = train_recipes([recipe], store, reporter).adapters
    parents = store.read_manifest("more").parents
    assert max(parents, key=lambda parent: parent.weight).reference == law
    assert report.parent_perplexity < report.base_perplexity
    assert report.parents[0] == law


def test_auto_starts_afresh_where_no_adapter_helps(base, base_folder, text_file, store, reporter, law, said):
    _, adapter = load_adapter(store, law, base)
    opposite = {site: replace(update, b=-update.b) for site, update in adapter.updates.items()}
    store = Store(store.root.parent / "empty")
    train_recipes([continued(base_folder, text_file, "auto", "first")], store, reporter)
    assert any(line.startswith("first: the store has no adapter of") for line in said)
    store = Store(store.root.parent / "opposite")
    publish_adapter(store, "opposite", Adapter(updates=opposite), base, Origin())
    (report,) = train_recipes([continued(base_folder, text_file, "auto")], store, reporter).adapters
    assert any("no adapter of the store makes the text more likely" in line for line in said)
    assert (report.parents, report.parent_perplexity) == ((), None)


def test_patterns_are_added_to_the_parents_and_what_is_left_out_is_empty(base_folder, text_file, store, reporter):
    lora = {"rank": 4, "targets": ["c_attn.q", "c_attn.v", "mlp.c_fc"], "rank_pattern": {"mlp.c_fc": 6}}
    train_recipes([make_recipe(base_folder, text_file, "law", lora=lora)], store, reporter)
    found = inherit_shape(continued(base_folder, text_file, "law", lora={"rank_pattern": {"mlp.c_fc": 8}}), store).lora
    assert (found.rank, found.rank_pattern) == (4, {"mlp.c_fc": 8})
    lora = {"rank_pattern": {"c_attn.q": 6, "c_attn.v": 6}}  # which are no targets by default
    found = inherit_shape(continued(base_folder, text_file, "law", lora=lora), store).lora
    assert found.rank_pattern == {"c_attn.q": 6, "c_attn.v": 6, "mlp.c_fc": 6}
    other = continued(base_folder, text_file, "law", lora={"targets": ["c_attn.q", "c_attn.k"]}, steps=1)
    train_recipes([other], store, reporter)
    assert store.read_manifest("more").recipe["lora"]["targets"] == ["c_attn.q", "c_attn.k"]
    with pytest.raises(RecipeError, match="these settings do not fit law@1"):
        inherit_shape(continued(base_folder, text_file, "law", lora={"rank_pattern": {"c_attn": 2}}), store)


def test_what_cannot_be_continued_is_refused(base, base_folder, text_file, store, reporter, law, monkeypatch):
    with pytest.raises(NotFoundError, match="no adapter 'lex'"):
        train_recipes([continued(base_folder, text_file, "lex")], store, reporter)
    (base_folder.parent / "peft").mkdir(exist_ok=True)
    monkeypatch.chdir(base_folder.parent)
    with pytest.raises(NotFoundError) as caught:
        train_recipes([continued(base_folder, text_file, "peft")], store, reporter)
    assert caught.value.hint == "a folder is named with its path: --from ./peft"
    with pytest.raises(UsageError, match="changes none of the targets c_attn"):
        train_recipes([continued(base_folder, text_file, law, lora={"targets": ["c_attn"]})], store, reporter)
    with pytest.raises(NotFoundError, match=r"there is no \./nowhere"):
        train_recipes([continued(base_folder, text_file, "./nowhere")], store, reporter)


def test_pissa_trains_its_part_and_leaves_the_frozen_one(base, base_folder, text_file, reporter):
    recipe = make_recipe(base_folder, text_file, lora={"rank": 2, "init": "pissa"}, weight_decay=0.5, steps=4)
    slot = TrainingSlot(recipe=recipe, data=prepare_data(recipe.data, base.tokenizer, reporter))
    start = build_start(slot, Store(base_folder / "none"), base, reporter)
    trainer = Trainer(base, [slot], reporter, open_start=lambda slot: start.adapter)
    (trained,) = trainer.train(StopRequest())
    for site, update in trained.adapter.updates.items():
        before, half = start.adapter.updates[site], update.rank // 2
        assert torch.equal(update.a[half:], before.a[half:])
        assert torch.equal(update.b[:, half:], before.b[:, half:])
        assert not torch.equal(update.a[:half], before.a[:half])
        assert not torch.equal(update.b[:, :half], before.b[:, :half])
    assert trained.validation_nll < trained.base_nll
    assert build_adapter(base.config, recipe.lora, 0).ranks == trained.adapter.ranks


def test_pissa_divides_the_singular_values_as_peft_does(base):
    settings = LoraSettings(rank=2, alpha=8, init="pissa", targets=("c_attn",))
    weights = {site: weight_of(base, site) for site in list_sites(base.config, ("attn.c_attn",))}
    found = build_pissa(base.config, settings, weights.__getitem__)
    for site, update in found.updates.items():
        u, s, v = torch.linalg.svd(weights[site].double())
        half, scaling = update.rank // 2, update.scaling
        wanted = (s[:half, None] / scaling).sqrt() * v[:half]
        assert torch.allclose(update.a[:half].double().abs(), wanted.abs(), atol=1e-5)
        assert torch.allclose(
            update.b[:, :half].double().abs(), (u[:, :half] * (s[:half] / scaling).sqrt()).abs(), atol=1e-5
        )
        assert torch.allclose(update.b @ update.a, torch.zeros(()), atol=1e-6)
