"""The Python API: the same numbers as the command line, from texts in memory."""

import inspect
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import GPT2LMHeadModel

import lora_gpt2 as lg
from lora_gpt2.api.arguments import make_recipe, to_source, to_sources
from lora_gpt2.core.console import LoggingReporter
from lora_gpt2.core.errors import (
    ConflictError,
    CorruptError,
    DataError,
    MismatchError,
    NotFoundError,
    RecipeError,
    UsageError,
)
from lora_gpt2.data.prepared import prepare_data
from lora_gpt2.data.read.texts import keep_texts
from lora_gpt2.data.tokenizer import load_tokenizer
from lora_gpt2.model.scoring import token_nll
from lora_gpt2.recipe import Recipe
from lora_gpt2.recipe_files import EVERYDAY, load_recipe, set_values
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.exchange import export_adapter
from tests.builders import make_text

EVALUATED = {"evaluate.window": 32}
TINY = {"train.dtype": "float32", "train.sample_tokens": 0, "train.batch_tokens": 64, "evaluate.window": 32}
FAST = {"steps": 4, "rank": 2, "block_size": 16, "learning_rate": 1e-2, "progress": False}


@pytest.fixture
def texts():
    return [json.loads(line)["text"] for line in make_text(80).splitlines()]


@pytest.fixture
def law(base_folder, texts):
    return lg.train(texts, name="law", base=str(base_folder), settings=TINY, **FAST)


@pytest.fixture
def model(law, base_folder):
    return lg.load(str(base_folder), adapters=["law"], dtype="float32", progress=False)


def test_texts_train_as_the_same_texts_in_a_file_do(law, base_folder, text_file, store):
    again = lg.train(str(text_file), name="file", base=str(base_folder), settings=TINY, **FAST)
    assert (law.name, law.version, str(law)) == ("law", 1, "law@1")
    assert again.validation_perplexity == law.validation_perplexity < law.base_perplexity
    assert store.read_manifest("law").digest == store.read_manifest("file").digest
    assert (Store(store.root).resolve("law") / "adapter_config.json").samefile(f"{law.path}/adapter_config.json")


def test_records_data_sets_and_frames_are_texts(texts, base_folder, tmp_path):
    import datasets
    import pandas

    same = keep_texts(texts)
    records = [{"text": text} for text in texts]
    for data in (iter(texts), records, datasets.Dataset.from_list(records), pandas.DataFrame(records)):
        assert keep_texts(data) == same, type(data)
    splits = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(records[:70]), "test": datasets.Dataset.from_list(records[70:])}
    )
    report = lg.train(splits, name="splits", base=str(base_folder), settings=TINY, **FAST)
    assert report.test_perplexity is not None
    recipe = Store.find().read_manifest("splits").recipe
    assert recipe["data"]["sources"] == [str(keep_texts(texts[:70]))]
    assert recipe["data"]["test"] == [str(keep_texts(texts[70:]))]
    with pytest.raises(DataError, match="text 2: expected a str or a dict, found int"):
        keep_texts(["a", 1])
    with pytest.raises(DataError, match="text 1: bytes is not a value that JSON has"):
        keep_texts([{"text": b"a"}])
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    plain = [{"messages": turns, "id": 4, "scores": [0.5, 1.5], "day": "2026-11-28T00:00:00"}]
    odd = {"messages": np.array(turns, dtype=object), "id": np.int64(4), "scores": torch.tensor([0.5, 1.5])}
    odd["day"] = pandas.Timestamp("2026-11-28")
    assert keep_texts([odd]) == keep_texts(plain)
    for kind in ("numpy", "torch", "pandas"):
        assert keep_texts(datasets.Dataset.from_list(records).with_format(kind)) == same, kind
    assert not list(keep_texts(["x"]).parent.glob("*.partial"))


def test_a_mix_is_measured_as_one_however_it_is_given(law, base_folder, texts, tmp_path):
    lg.train(texts[:40], name="code", base=str(base_folder), settings=TINY, **FAST)
    third = 1 / 3
    given = {"law": third, "code": 1 - third}
    measure = partial(lg.evaluate, texts[:10], base=str(base_folder), general=False, settings=EVALUATED, progress=False)
    model = lg.load(str(base_folder), dtype="float32", progress=False)
    wanted = model.perplexity(texts[:10], given, settings=EVALUATED).perplexity
    for spec in (given, [given], lg.Mix.parse(given), [lg.Mix.parse(given)]):
        found = measure(spec).to_pandas()
        assert found["perplexity"].tolist()[1:] == pytest.approx([wanted], rel=1e-7), spec
    assert len(measure(None).cells) == 1
    assert len(measure([None, "law"]).cells) == 2
    assert lg.load(str(base_folder), adapters=lg.Mix.parse(given), progress=False).adapters == ["law", "code"]


def test_numbers_of_numpy_are_numbers(law, base_folder, texts, model):
    fast = FAST | {"steps": np.int64(2), "learning_rate": np.logspace(-3, -2, 2)[1]}
    found = lg.train(texts, name="np", base=str(base_folder), settings={**TINY, "train.seed": np.uint8(3)}, **fast)
    assert Store.find().read_manifest("np").recipe["train"]["seed"] == 3
    assert found.steps == 2
    for seed in (np.int32(3), np.uint64(3)):
        assert str(model.generate("the", seed=seed, max_new_tokens=4)) == str(
            model.generate("the", seed=3, max_new_tokens=np.int64(4))
        )
    with pytest.raises(UsageError, match="a seed is a whole number, found float"):
        model.generate("the", seed=1.5)


def test_what_changes_nothing_for_a_loaded_model_is_refused(model, texts):
    for settings in ({"base": "distilgpt2"}, {"generate.dtype": "float16"}, {"name": "x"}):
        with pytest.raises(UsageError, match="changes nothing: the model is loaded"):
            model.generate("the", settings=settings)
        with pytest.raises(UsageError, match="changes nothing"):
            model.perplexity(texts, settings=settings)
    own = Recipe.model_validate({"name": "x", "base": model.base, "generate": {"max_new_tokens": 2}})
    assert model.generate("the", settings=own).tokens <= 2
    with pytest.raises(UsageError, match=r"generate\.temperature is given twice"):
        model.generate("the", temperature=0.9, settings={"generate": {"temperature": 0.1}})
    for empty in ({"choice": []}, {"choice": np.array([])}, {"settings": {"generate.choice": []}}):
        with pytest.raises(UsageError, match="choice is empty"):
            model.generate("the", **empty)
    for given in (np.array(["a", "b"]), (word for word in "ab"), {"a", "b"}):
        assert str(model.generate("the", choice=given, stop=np.array(["."]))) in ("a", "b")
    with pytest.raises(RecipeError, match=r"generate\.choice"):
        model.generate("the", choice=5)


def test_what_is_no_text_is_said_by_its_kind(model):
    calls = (
        lambda: model.generate(None),
        lambda: model.generate_batch(["a", None]),
        lambda: model.embed([("a", "b")]),
        lambda: model.embed([5]),
        lambda: model.choose(0),
        lambda: next(model.stream(0)),
    )
    for call in calls:
        with pytest.raises(UsageError, match=r"is a str, found (NoneType|int|tuple)"):
            call()
    with pytest.raises(UsageError, match="a callback is a function, found int"):
        lg.train(["a"], name="x", callbacks=[5])


def test_scores_say_which_text_they_are_of(model):
    found = model.token_logprobs(["the cat", "", "the dog"], settings=EVALUATED)
    assert [each.origin.rpartition(":")[2] for each in found] == ["1", "3"]


def test_what_is_probably_meant_otherwise_is_refused(texts, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for names in ([str(text_file)], ["missing.jsonl"], ["a.txt", "b.csv"]):
        with pytest.raises(UsageError, match="a name of a file instead of its text"):
            lg.train(names, name="a")
    with pytest.raises(UsageError, match="the adapter has no name"):
        lg.train(texts)
    with pytest.raises(UsageError, match="a mapping is not one text") as caught:
        lg.train({"law": texts}, name="a")
    assert "train_together" in caught.value.hint
    with pytest.raises(RecipeError, match=r"there is no setting .train\.stepz.") as caught:
        lg.train(texts, name="a", settings={"train.stepz": 1})
    assert "train.steps" in caught.value.hint
    with pytest.raises(RecipeError, match=r"lora\.rank"):
        lg.train(texts, name="a", rank=0)
    with pytest.raises(UsageError, match=r"train\.steps is given twice, as 4 and as 2"):
        lg.train(texts, name="a", steps=2, settings={"train.steps": 4})
    with pytest.raises(DataError, match="is both validation and test text"):
        lg.train(texts, name="a", validation=text_file, test=text_file)
    with pytest.raises(TypeError, match="unexpected keyword argument 'lr'"):
        lg.train_together({"a": texts}, lr=1)
    with pytest.raises(NotFoundError, match="no file, folder or match"):
        lg.train("nowhere.txt")
    assert to_sources([text_file, text_file]) == [str(text_file)] * 2
    assert to_source("src/") == "src/"


def test_an_adapter_is_continued_and_settings_are_searched_for(law, texts, base_folder):
    own = {"base": str(base_folder), "settings": TINY, "progress": False, "steps": 4, "block_size": 16}
    more = lg.train(texts[:60], init_from="law", **own)
    assert (str(more), more.parents) == ("law@2", ("law@1",))
    elsewhere = lg.train(texts[:60], init_from=Path(law.path), name="copy", **own)
    assert elsewhere.parents == ("law@1",), "a version of a store says what it is, wherever it lies"
    found = lg.tune(texts, name="best", candidates=3, **{**own, "settings": {**TINY, "tune.ranks": [1, 2]}})
    assert str(found.adapter) == "best@1"
    assert [candidate.is_best for candidate in found.candidates] == [True, False, False]
    with pytest.raises(TypeError, match="unexpected keyword argument 'lr'"):
        lg.tune(texts, name="best", lr=1)


def test_adapters_that_train_together_have_their_own_splits(texts, base_folder):
    splits = {"train": texts[:40], "validation": texts[40:50], "test": texts[50:60]}
    found = lg.train_together({"one": splits, "two": texts[20:]}, base=str(base_folder), settings=TINY, **FAST)
    assert found["one"].test_perplexity is not None
    alone = lg.train(
        splits["train"],
        name="alone",
        validation=splits["validation"],
        test=splits["test"],
        base=str(base_folder),
        settings=TINY,
        **FAST,
    )
    assert alone.base_perplexity == pytest.approx(found["one"].base_perplexity)
    with pytest.raises(UsageError, match="there is nothing to train on"):
        lg.train_together({})
    with pytest.raises(UsageError, match="there is no text to measure"):
        lg.evaluate({})


def test_adapters_train_together(texts, base_folder):
    both = lg.train_together(
        {"one": texts[:40], "two": texts[40:]}, base=str(base_folder), settings=TINY | {"data.unit": "line"}, **FAST
    )
    assert list(both) == ["one", "two"]
    assert Store.find().list_names() == ["one", "two"]


def test_callbacks_see_the_run_and_end_it(texts, base_folder, capsys):
    events = []

    def stop_early(event):
        events.append(event)
        if event.kind == "step" and event.step == 3:
            event.stop()

    report = lg.train(
        texts, name="short", base=str(base_folder), settings=TINY, callbacks=[stop_early, print], **FAST | {"steps": 20}
    )
    kinds = [event.kind for event in events]
    assert (report.steps, kinds.count("step"), kinds[-1]) == (3, 3, "end")
    last = [event for event in events if event.kind == "validation"][-1]
    assert last.step == 3, "it is measured where it ends"
    assert {"step", "validation", "checkpoint", "end"} == set(kinds)
    first = events[0]
    assert (first.adapter, first.step, first.num_steps) == ("short", 1, 20)
    assert first.loss > 0
    assert first.tokens > 0
    assert math.isclose(math.exp(events[-1].validation_loss), report.validation_perplexity)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("short: step 1 of 20, loss ")
    assert len(lines) == len(events)


def test_a_callback_that_stops_at_a_validation_ends_there(texts, base_folder):
    def stop(event):
        if event.kind == "validation":
            event.stop()

    settings = TINY | {"train.validate_every": 2}
    report = lg.train(texts, name="v", base=str(base_folder), settings=settings, callbacks=[stop], **FAST)
    assert report.steps == 2


def test_an_error_in_a_callback_ends_the_run_and_keeps_what_was_there(texts, base_folder):
    def fail(event):
        if event.step == 3:
            raise ZeroDivisionError

    settings = TINY | {"train.checkpoint_every": 1}
    arguments = {"name": "bad", "base": str(base_folder), "settings": settings, **FAST}
    with pytest.raises(ZeroDivisionError):
        lg.train(texts, callbacks=[fail], **arguments)
    assert not Store.find().has_adapter("bad")
    with pytest.raises(ConflictError, match="an interrupted run of bad is kept"):
        lg.train(texts, **arguments)
    assert lg.train(texts, resume=True, **arguments).steps == 4


def test_generation_is_that_of_the_command(model, law, base_folder, run_command):
    command = ["generate", "the cat", "--adapter", "law", "--seed", "3", "--max-new-tokens", "12", "--json"]
    expected = run_command(*command, "--set", "generate.dtype=float32")["outputs"][0]
    found = model.generate("the cat", adapter=law, seed=3, max_new_tokens=12)
    assert (str(found), found.text, found.tokens) == (expected["text"], expected["text"], expected["tokens"])
    assert found.finish_reason == expected["finish_reason"]
    assert found.provenance == expected["provenance"]
    assert "".join(model.stream("the cat", "law", seed=3, max_new_tokens=12)) == found.text
    drawn = model.generate("the cat", max_new_tokens=2)
    assert model.generate("the cat", seed=drawn.seed, max_new_tokens=2).text == drawn.text
    assert model.generate("the", "law", temperature=0, stop="e").text.find("e") == -1


def test_a_batch_has_an_adapter_for_each_prompt(model):
    outputs = model.generate_batch(["the cat", "a dog"], ["law", None], n=2, seed=5, max_new_tokens=6)
    assert [(o.prompt, o.adapter, o.seed) for o in outputs] == [
        ("the cat", "law", 5),
        ("the cat", "law", 6),
        ("a dog", "base", 7),
        ("a dog", "base", 8),
    ]
    drawn = model.generate_batch(["the cat"] * 3, "law", max_new_tokens=6, temperature=1.5)
    assert len({output.seed for output in drawn}) == len({output.text for output in drawn}) == 3
    with pytest.raises(UsageError, match="a list of str"):
        model.generate_batch("the cat", "law")
    for output in outputs:
        alone = model.generate(output.prompt, output.adapter, seed=output.seed, max_new_tokens=6)
        assert alone.text == output.text
    with pytest.raises(UsageError, match="3 prompts, 2 adapters"):
        model.generate_batch(["a", "b", "c"], ["law", "law"])
    with pytest.raises(UsageError, match="found int"):
        model.generate_batch([1])
    for call in (model.generate_batch, lambda *given, **more: next(model.stream(*given, **more))):
        with pytest.raises(TypeError, match="keyword argument 'max_tokens'; did you mean 'max_new_tokens'"):
            call(["a"], max_tokens=3)
    with pytest.raises(UsageError, match=r"train\.steps changes nothing in 'generate'"):
        model.generate("a", settings={"train.steps": 3})
    whole = lg.Recipe(train={"steps": 3}, generate={"max_new_tokens": 2})
    assert model.generate("a", settings=whole).tokens <= 2, "a recipe is for several functions"
    with pytest.raises(NotFoundError, match="no adapter 'none'"):
        model.generate("a", "none")
    assert model.generate("the cat", "auto", max_new_tokens=2).adapter in ("law", "base")
    assert model.choose("the cat").nll_nats_per_token.keys() == {"law", "base"}


def test_a_name_is_the_current_version_at_each_call(model, texts, base_folder):
    first = model.perplexity(texts, "law", window=32)
    said = model.generate("the cat", "law", seed=3, max_new_tokens=12)
    more = {"base": str(base_folder), "settings": TINY, **FAST, "learning_rate": 0.1, "steps": 12}
    assert str(lg.train(texts, name="law", **more)) == "law@2"
    now = model.perplexity(texts, "law", window=32)
    assert (first.versions, now.versions) == (("law@1",), ("law@2",))
    assert now.perplexity != first.perplexity == model.perplexity(texts, "law@1", window=32).perplexity
    later = model.generate("the cat", "law", seed=3, max_new_tokens=12)
    assert [output.provenance["adapters"][0]["adapter"] for output in (said, later)] == ["law@1", "law@2"]


def test_a_mix_may_be_given_as_weights_by_name(model, tmp_path):
    text = ["the cat and the dog"]
    by_name, written = (model.perplexity(text, mix).perplexity for mix in ({"law": 0.5}, "law:0.5"))
    assert by_name == written
    merged = lg.merge({"law": 0.5}, "half", store=model.session.store.root, base=model.base, progress=False)
    assert [p.weight for p in model.session.store.read_manifest(merged.name).parents] == [0.5]
    with pytest.raises(UsageError, match="within"):
        lg.merge({"law": 99}, "half", store=model.session.store.root, base=model.base, progress=False)


def test_an_adapter_that_is_refused_or_would_change_a_text_in_work_leaves_what_is_there(model, base_folder):
    good = model.session.fetch("law").adapter
    model.add_adapter("mine", good)
    wanted = model.generate("the cat", "mine", temperature=0, max_new_tokens=6).text
    before = model.perplexity("the cat and the dog", "mine").perplexity
    site, update = next(iter(good.updates.items()))
    bad = replace(good, updates={**good.updates, site: replace(update, a=update.a * float("nan"))})
    deeper = replace(good, updates={**good.updates, "h.9.attn.c_attn": update})
    for wrong, error in ((bad, CorruptError), (deeper, MismatchError)):
        with pytest.raises(error):
            model.add_adapter("mine", wrong)
        assert model.generate("the cat", "mine", temperature=0, max_new_tokens=6).text == wanted
        assert model.perplexity("the cat and the dog", "mine").perplexity == before
    half = replace(good, updates={site: update})
    stream = model.stream("the cat", "mine", temperature=0, max_new_tokens=6)
    first = next(stream)
    with pytest.raises(ConflictError, match="stream"):
        model.add_adapter("mine", half)
    assert first + "".join(stream) == wanted
    model.add_adapter("mine", half)
    assert model.generate("the cat", "mine", temperature=0, max_new_tokens=6).text != wanted


def test_the_tokens_of_texts_are_scored_as_perplexity_is(model, tmp_path):
    texts = ["the cat and the dog", "rain in the sun " * 9]
    found = model.token_logprobs(texts, [None, "law", "law:0.5"], window=32)
    assert [each.text for each in found] == [text.strip() for text in texts]
    for adapter in ("base", "law", "law:0.5"):
        mean = -np.concatenate([each.logprobs[adapter] for each in found]).mean()
        wanted = model.perplexity(texts, None if adapter == "base" else adapter, window=32).nll_nats_per_token
        assert mean == pytest.approx(wanted, rel=1e-5)
    assert list(found[0].to_pandas().columns) == ["token_id", "token", "text_offset", "base", "law", "law:0.5"]
    assert list(model.token_logprobs("the cat")[0].logprobs) == ["base"]
    with pytest.raises(UsageError, match="document by document"):
        model.token_logprobs(texts, settings={"evaluate.protocol": "stream"})


def test_embeddings_are_those_of_each_text_alone(model):
    texts = ["the cat", "rain in the sun " * 3, "dog"]
    together = model.embed(texts, "law")
    assert (together.shape, together.dtype) == ((3, model.session.base.config.n_embd), np.float32)
    np.testing.assert_allclose(together, np.concatenate([model.embed([text], "law") for text in texts]), atol=1e-5)
    assert not np.allclose(together, model.embed(texts), atol=1e-3)
    for bad in ([""], ["the cat " * 3000], "the cat"):
        with pytest.raises(UsageError, match=r"tokens|list of str"):
            model.embed(bad)


def test_perplexity_is_that_of_the_command(model, base_folder, text_file, run_command):
    command = ["evaluate", f"t={text_file}", "--adapter", "law", "--json", "--set", "evaluate.window=32"]
    cells = {cell["adapter"]: cell for cell in run_command(*command)["cells"]}
    texts = [json.loads(line)["text"] for line in text_file.read_text().splitlines()]
    for adapter, name in (("law", "law"), (None, "base"), (lg.Mix.parse("law"), "law")):
        found = model.perplexity(texts, adapter, window=32)
        assert found.perplexity == pytest.approx(cells[name]["perplexity"], rel=1e-6)
        assert (found.low, found.high) == pytest.approx(tuple(cells[name]["perplexity_interval"]), rel=1e-6)
        assert (found.tokens, found.documents, found.adapter) == (cells[name]["tokens"], len(texts), name)
        assert float(found) == found.perplexity
        shown, seen = f"{found.perplexity:,.2f} ({found.low:,.2f} to {found.high:,.2f})", found.documents_trained_on
        assert str(found) == shown + (f"; trained on {seen} of 80 documents" if seen else "")
        assert found.versions == (("law@1",) if adapter else ())
    assert model.perplexity(texts, "law", window=32).documents_trained_on == cells["law"]["documents_trained_on"] > 0
    assert model.perplexity(text_file, window=32).tokens == cells["base"]["tokens"]
    assert model.perplexity("one text", window=32).low is None
    once, twice = (model.perplexity(given, "law", window=32) for given in (texts[:8], texts[:8] * 2))
    assert (once.perplexity, once.low, once.high) == pytest.approx((twice.perplexity, twice.low, twice.high))
    assert (once.documents, twice.documents) == (8, 16), "copies count, but not as independent draws"
    wrongs = (
        ({"text": texts[0]}, "a mapping is not one text"),
        (None, "found NoneType"),
        ("missing.jsonl", "a name of a file"),
    )
    for wrong, message in wrongs:
        with pytest.raises(UsageError, match=message):
            model.perplexity(wrong, window=32)
    with pytest.raises(UsageError, match="needs a prompt"):
        model.perplexity(texts, "auto")


def test_evaluate_is_the_matrix_of_the_command(law, base_folder, text_file, run_command, tmp_path):
    texts = [json.loads(line)["text"] for line in text_file.read_text().splitlines()]
    settings = {"evaluate.window": 32}
    table = lg.evaluate({"t": texts, "law": "law"}, settings=settings, base=str(base_folder), progress=False)
    command = ["evaluate", f"t={text_file}", "law=law", "--adapter", "all", "--base", base_folder, "--json"]
    expected = run_command(*command, "--set", "evaluate.window=32")
    assert json.loads(json.dumps(table.to_json()["cells"])) == expected["cells"]
    assert table.versions == expected["versions"] == {"law": ["law@1"]}
    assert str(table).splitlines()[-1] == "versions: law@1"
    frame = table.to_pandas()
    assert list(frame.columns) == list(expected["cells"][0])
    assert len(frame) == len(expected["cells"]) + len(expected["forgetting"])
    assert str(table).splitlines()[0].split() == ["perplexity", "t", "law", "general"]
    assert repr(table) == str(table)
    assert table._repr_html_().startswith("<pre>perplexity")
    figure = table.plot(tmp_path / "m.png")
    assert figure.axes
    assert figure._repr_png_().startswith(b"\x89PNG"), "as a notebook shows it"
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    assert table.to_html().startswith("<!doctype html>")
    alone = lg.evaluate(texts, "law", window=32, general=False, progress=False)
    assert [cell.source for cell in alone.cells] == ["text"] * 2
    with pytest.raises(NotFoundError, match="no adapter 'none'"):
        lg.evaluate(texts, ["none"], progress=False)


def test_a_mix_is_a_row_of_the_matrix(law, texts):
    lg.merge("law", "half", settings={"evaluate.window": 32}, progress=False)
    table = lg.evaluate(texts, ["law:0.5+half:0.5"], window=32, general=False, progress=False)
    mixed, single = (
        lg.load(adapters=["law"], dtype="float32").perplexity(texts, name, window=32)
        for name in ("law:0.5+half:0.5", "law")
    )
    assert [cell.adapter for cell in table.cells] == ["base", "law:0.5+half:0.5"]
    assert table.cells[1].score.perplexity == pytest.approx(single.perplexity, rel=1e-5)
    assert mixed.documents_trained_on == single.documents_trained_on > 0


def test_adapters_from_elsewhere_are_used_without_the_store(model, law, base_folder, tmp_path):
    export_adapter(Store.find(), "law", tmp_path / "Peft-Law")
    export_adapter(Store.find(), "law", tmp_path / "packed.tar.gz")
    for adapters in ([tmp_path / "Peft-Law"], {"peft-law": str(tmp_path / "packed.tar.gz")}):
        foreign = lg.load(adapters=adapters, store=tmp_path / "empty", dtype="float32", progress=False)
        assert foreign.adapters == ["peft-law"]
        assert foreign.base == model.base
        expected = model.generate("the cat", "law", seed=1, max_new_tokens=8)
        assert foreign.generate("the cat", "peft-law", seed=1, max_new_tokens=8).text == expected.text
        assert foreign.perplexity("the cat", "peft-law").nll_nats_per_token == pytest.approx(
            model.perplexity("the cat", "law").nll_nats_per_token, abs=1e-6
        )
    assert not (tmp_path / "empty").exists()
    with pytest.raises(UsageError, match="keeps its name"):
        lg.load(adapters={"other": "law"})
    with pytest.raises(NotFoundError, match=r"there is no \./missing/folder"):
        lg.load(str(base_folder), adapters=["./missing/folder"])


def test_an_adapter_in_memory_keeps_its_slot(model, base_folder, texts, tmp_path):
    export_adapter(Store.find(), "law", tmp_path / "kept")
    small = lg.load(str(base_folder), adapters=[tmp_path / "kept"], max_slots=1, dtype="float32", progress=False)
    expected = small.generate("the cat", "kept", seed=1, max_new_tokens=4).text
    small.generate("the cat", "law", seed=1, max_new_tokens=4)
    assert small.generate("the cat", "kept", seed=1, max_new_tokens=4).text == expected


@pytest.mark.parametrize("targets", [None, ["c_attn", "lm_head"]])
def test_transformers_computes_the_same(base_folder, texts, targets):
    lg.train(texts, name="t", base=str(base_folder), targets=targets, settings=TINY, **FAST)
    lg.merge("t:0.5", "u", progress=False)
    model = lg.load(str(base_folder), adapters=["t", "u"], dtype="float32", progress=False)
    ids = torch.tensor([model.session.base.tokenizer.encode("the cat sat on the mat")])
    for adapter in (None, "t", "t:0.6+u:0.4"):
        mix = lg.Mix.parse(adapter) if adapter else lg.Mix()
        with torch.no_grad():
            nll = token_nll(model.session.base.model, ids[:, :-1], ids[0, 1:], model.session.adapters_for([mix]))
            for merged in (True, False):
                logits = model.to_transformers(adapter, merged=merged)(ids[:, :-1]).logits[0]
                theirs = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
                torch.testing.assert_close(nll.flatten(), theirs, atol=2e-5, rtol=1e-5)


def test_merge_publishes_a_mix(law):
    report = lg.merge("law:0.5", "half", progress=False)
    assert (report.name, report.version, report.method) == ("half", 1, "cat")
    assert Store.find().list_names() == ["half", "law"]
    with pytest.raises(UsageError, match="not a name"):
        lg.merge("law", "Half!")


def test_merge_measures_on_texts_and_searches_weights(law, texts, base_folder):
    lg.train(list(reversed(texts)), name="other", base=str(base_folder), settings=TINY, **FAST)
    few = {"merge.search_steps": 4, "merge.search_tokens": 64}
    report = lg.merge("other+law", "both", texts={"own": texts}, search=True, settings=few, progress=False)
    assert {cell.source for cell in report.cells} == {"own", "general"}
    assert Store.find().read_manifest("both").parents


def test_prepared_blocks_are_a_data_set(texts, base_folder):
    found = lg.prepare(texts, base=str(base_folder), block_size=16, progress=False)
    row = found["train"][0]
    assert len(row["input_ids"]) == len(row["labels"]) == 16
    assert (row["labels"][0], row["labels"][1:]) == (-100, row["input_ids"][1:])
    packed = lg.prepare(texts, base=str(base_folder), settings={"data.layout": "packed"}, block_size=64, progress=False)
    assert "position_ids" in packed["train"].column_names


@pytest.mark.parametrize("layout", ["concat", "packed"])
def test_prepared_blocks_have_the_loss_in_transformers_that_they_have_here(texts, base_folder, layout):
    """Its models shift labels themselves: labels that are shifted already would train to predict two tokens ahead."""
    records = [{"text": text[20:], "prompt": text[:20]} for text in texts]
    settings = {"data.layout": layout, "data.prompt": "{prompt}"}
    found = lg.prepare(records, base=str(base_folder), settings=settings, block_size=32, progress=False)["train"]
    model = GPT2LMHeadModel.from_pretrained(base_folder).eval()
    row = {name: torch.tensor([found[1][name]]) for name in found.column_names}
    loss = model(**row).loss.item()
    other = {"data.sources": [str(keep_texts(records))]}
    recipe = make_recipe(settings, "train", {"block_size": 32}, other)
    block = prepare_data(recipe.data, load_tokenizer(base_folder, 0), LoggingReporter()).train.read([1])
    targets = torch.from_numpy(block.targets.astype("int64"))
    targets[:, -1] = -100
    logits = model(**{name: row[name] for name in row if name != "labels"}).logits
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits[0], targets[0]).item(), rel=1e-6)


def test_keywords_are_the_everyday_settings_of_the_command_line():
    """One table decides; a keyword that is forgotten in a signature, or a flag, would fail here."""
    for function, group in ((lg.train, "train"), (lg.Model.generate, "generate"), (lg.evaluate, "evaluate")):
        names = {key.rpartition(".")[2] for key in EVERYDAY[group]}
        assert names <= set(inspect.signature(function).parameters), group
    assert make_recipe({"train.steps": 3, "name": "a"}, "train", {"rank": 4}).lora.rank == 4
    recipe = make_recipe(lg.Recipe(name="b"), "generate", {"temperature": 0.5})
    assert (recipe.name, recipe.generate.temperature, recipe.model_fields_set) == ("b", 0.5, {"name", "generate"})


@pytest.fixture
def run_command(base_folder):
    from lora_gpt2 import cli

    def run(*arguments):
        result = CliRunner().invoke(cli.cli, ["-q", *map(str, arguments)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return run


def test_settings_of_any_depth_are_those_of_the_command_line():
    deep = make_recipe({"data.rules.urls": "mask", "generate.logit_bias.5": -1.0}, "train", {})
    assert deep == load_recipe(None, ["data.rules.urls=mask", "generate.logit_bias.5=-1.0"])
    given = {"data": {"rules": {"urls": "off"}}}
    assert set_values(given, {"data.rules.spaces": "off"})["data"]["rules"] == {"urls": "off", "spaces": "off"}
    assert given == {"data": {"rules": {"urls": "off"}}}, "what was passed stays as it was"


def test_a_text_is_measured_in_the_dtype_that_was_asked_for(law, base_folder, texts):
    found = {}
    for dtype in ("auto", "bfloat16", "float16"):
        model = lg.load(str(base_folder), adapters=["law"], dtype=dtype, progress=False)
        for settings in (None, {"evaluate.dtype": "bfloat16"}):
            found[dtype, bool(settings)] = model.perplexity(texts, "law", window=32, settings=settings).dtype
    assert {key: value for key, value in found.items() if not key[1]} == {
        ("auto", False): "float32",
        ("bfloat16", False): "bfloat16",
        ("float16", False): "float32",  # whose weights only generate on a CPU
    }
    assert {value for key, value in found.items() if key[1]} == {"bfloat16"}
