import os
from pathlib import Path

import pytest

from lora_gpt2.core.errors import NotFoundError, RecipeError
from lora_gpt2.recipe import BLOCKS, LoraSettings, build_recipe, describe_key, list_keys
from lora_gpt2.recipe.unused import list_shared, list_unused, list_unused_by_merge
from lora_gpt2.recipe_files import load_recipe
from lora_gpt2.renamed_settings import RENAMED, upgrade_section

CONTRACT = [
    "train.steps",
    "train.epochs",
    "train.learning_rate",
    "train.batch_tokens",
    "train.checkpoint_every",
    "train.seed",
    "lora.rank",
    "lora.alpha",
    "lora.targets",
    "lora.dropout",
    "data.profile",
    "data.block_size",
    "evaluate.window",
    "evaluate.stride",
    "evaluate.protocol",
    "generate.max_new_tokens",
    "generate.temperature",
    "generate.top_k",
    "generate.top_p",
]


def test_the_contracts_keys_exist_and_every_key_has_help():
    assert set(CONTRACT) <= set(list_keys())
    for key in list_keys():
        assert describe_key(key).startswith(f"{key}: "), key


def test_sampling_defaults_are_the_contracts():
    settings = load_recipe(None).generate
    assert (settings.temperature, settings.top_k, settings.top_p, settings.max_new_tokens) == (0.7, 50, 0.95, 150)


def test_precedence_is_flag_then_set_then_file_then_default(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("name: file\nbase: nano\ntrain: {steps: 5, seed: 1}\n")
    recipe = load_recipe(path, ["train.steps=7"], {"name": "flag"})
    assert (recipe.name, recipe.train.steps, recipe.train.seed, recipe.train.epochs) == ("flag", 7, 1, 3.0)


def test_an_empty_section_is_the_defaults_and_a_bundled_recipe_has_a_short_name(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("data:\ntrain:\n")
    assert load_recipe(path, ["train.steps=3"], {"data.sources": ("a.txt",)}).train.steps == 3
    path.write_text("data: 3\n")
    with pytest.raises(RecipeError, match="data"):
        load_recipe(path, flags={"data.sources": ("a.txt",)})
    assert load_recipe(Path("smoke")) == load_recipe(Path("smoke.yaml"))


def test_sources_in_a_file_are_relative_to_it(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("data: {sources: [a.txt, /b.txt]}\n")
    assert load_recipe(path).data.sources == (str(tmp_path / "a.txt"), "/b.txt")


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("train.learnin_rate=1", "no setting 'train.learnin_rate'", "train.learning_rate"),
        ("rank=4", "no setting 'rank'", "lora.rank"),
        ("lora.rank=0", "lora.rank", "Rank of each update"),
        ("lora.rank=yes please", "lora.rank", "Rank"),
        ("train.steps", "expected section.key=value", "train.steps=300"),
        ("generate.temperature=.nan", "generate.temperature", "greedy"),
        ("generate.temperature=1e-40", "temperature is 0 (greedy) or at least", "generated"),
        ("generate.top_p=.nan", "generate.top_p", "probability"),
        ("generate.top_p=1.5", "generate.top_p", "probability"),
        ("generate.top_k=-1", "generate.top_k", "most likely"),
        ("generate.max_new_tokens=0", "generate.max_new_tokens", "Maximum number"),
        ("train.seed=18446744073709551616", "train.seed", "Random seed"),
        ("lora.targets=[c_attn,c_attn.q]", "c_attn and its slice", ""),
        ("lora.targets=[wte]", "lora.targets", "Modules"),
        ("lora.targets=[]", "lora.targets", "Modules"),
        ("train=[1", "not valid YAML", "quote"),
        ("train=3", "train", "training loop"),
        ("name.x=3", "'name'", ""),
        ("train.steps=true", "train.steps: expected a value that is not true or false, found True", "optimizer steps"),
        ("lora.rank=yes", "lora.rank: expected a value that is not true or false", "Rank"),
        ("lora.dropout=false", "lora.dropout: expected a value", "Dropout"),
        ("lora.rank_pattern={c_attn: true}", "lora.rank_pattern: expected a value", "Ranks"),
        ("generate.logit_bias={true: 1}", "generate.logit_bias: expected a value", "added to the logits"),
        ("data.languages=[2026-13-45]", "not valid YAML: not a value of its kind: month must be in 1..12", "quote"),
        ("train.steps=" + "9" * 5000, "not valid YAML: a number of 5,000 characters", "quote"),
        ("lora.targets=" + "[" * 3000, "not valid YAML: nested too deeply", "quote"),
        ("lora.targets=[&a c_attn, *a]", "aliases (*name) are not allowed", "quote"),
        ("train={steps: 1, steps: 2}", "'steps' is given twice", "quote"),
        ('data.languages=["\\ud800"]', "surrogate pair", "quote"),
        ("description=a\udcff", "not valid UTF-8", "UTF-8"),
        ("data.sources=['']", "data.sources", "Text of the domain"),
    ],
)
def test_bad_settings_name_the_key_and_the_next_step(override, message, hint):
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, [override] if "name" not in override else ["name=a", override])
    assert message in caught.value.message
    assert len(caught.value.message) < 400
    assert hint in caught.value.hint
    assert caught.value.exit_code == 2


def test_a_target_may_have_its_own_rank():
    settings = load_recipe(None, ["lora.rank_pattern={mlp.c_fc: 2}"]).lora
    assert (settings.rank_of("mlp.c_fc"), settings.rank_of("c_attn")) == (2, 16)
    assert (settings.rank_of("lm_head"), settings.alpha_of("lm_head")) == (32, 64)
    assert LoraSettings(targets=(*BLOCKS, "lm_head"), rank_pattern={"lm_head": 4}).rank_of("lm_head") == 4


@pytest.mark.parametrize("given", [{}, {"alpha": 16}, {"use_rslora": True}, {"alpha": 3, "use_rslora": True}])
def test_the_head_has_twice_the_rank_and_the_scale_of_the_others(given):
    settings = LoraSettings(rank=8, targets=(*BLOCKS, "lm_head"), **given)
    scales = {
        t: settings.alpha_of(t) / settings.rank_of(t) ** (0.5 if settings.use_rslora else 1) for t in settings.targets
    }
    assert settings.rank_of("lm_head") == 16
    assert all(scale == pytest.approx(scales["c_attn"]) for scale in scales.values())


def test_ranks_must_belong_to_targets_and_slices_share_theirs():
    with pytest.raises(ValueError, match="not among the targets"):
        LoraSettings(targets=("c_attn",), rank_pattern={"mlp.c_fc": 2})
    with pytest.raises(ValueError, match="share one rank"):
        LoraSettings(targets=("c_attn.q", "c_attn.v"), rank_pattern={"c_attn.q": 2})


def test_missing_and_broken_recipe_files(tmp_path):
    with pytest.raises(NotFoundError):
        load_recipe(tmp_path / "none.yaml")
    for name, content in {"a": "a: [", "b": "- 1", "c": "!!python/object:os.system {}"}.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(content)
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert str(path) in caught.value.message
    binary = tmp_path / "d.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError):
        load_recipe(binary)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: &a [1]\nname: *a\n", ":2: not valid YAML: aliases (*name) are not allowed"),
        ("train:\n  steps: 1\n  steps: 2\n", ":3: not valid YAML: the key 'steps' is given twice"),
        ("description: 2026-13-45\n", "not valid YAML: not a value of its kind: month must be in 1..12"),
        ("train: {steps: " + "9" * 5000 + "}", ":1: not valid YAML: a number of 5,000 characters"),
        ("name: " + "[" * 3000 + "]" * 3000, ":1: not valid YAML: nested too deeply"),
        ("train: {steps: true}", "train.steps: expected a value that is not true or false, found True"),
        ("name: [" + "lol," * 9000 + "]", "name: Input should be a valid string, found ['lol'"),
        ("x" * 900 + ": 1", "there is no setting 'xxx"),
        ("2026-01-01: 1", "Keys should be strings"),
        ("data: {sources: ['']}", "data.sources"),
        ("data: {sources: [{a: b}]}", "data.sources: Input should be a valid string"),
        ("#" + "x" * 2**20, "is larger than 1,048,576 bytes"),
        ("description: 2026-01-01\n", "description: Input should be a valid string"),
    ],
)
def test_a_hostile_recipe_is_refused_in_a_short_line(tmp_path, content, message):
    path = tmp_path / "r.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert message in caught.value.message
    assert str(path) in caught.value.message
    assert len(caught.value.message) < len(str(path)) + 300
    assert caught.value.hint
    assert caught.value.exit_code == 2


def test_shared_hostile_recipes_are_refused(shared):
    for path in sorted((shared / "cases" / "hostile").glob("*.yaml")):
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert "not valid YAML" in caught.value.message, path


def test_a_recipe_is_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path):
        with pytest.raises(RecipeError, match="is not a regular file") as caught:
            load_recipe(path)
        assert "a recipe is a YAML file" in caught.value.hint


def test_numbers_that_yaml_takes_for_texts_stay_numbers(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("train: {learning_rate: 3e-4, steps: '3'}\n")
    assert (load_recipe(path).train.learning_rate, load_recipe(path).train.steps) == (3e-4, 3)


def test_a_text_is_taken_as_it_is_typed():
    data = load_recipe(None, [r"data.prompt=Q: {question}\nA:", "data.separator=||", 'data.template="{a}: {b}"']).data
    assert (data.prompt, data.separator, data.template) == ("Q: {question}\nA:", "||", "{a}: {b}")
    assert load_recipe(None, ["name=007"]).name == "007"
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(None, ["data.rules={a: "])


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_setting_that_was_renamed_is_refused_with_its_new_name(old, new):
    section, _, name = old.partition(".")
    with pytest.raises(RecipeError, match=rf"there is no setting '{old}'") as caught:
        build_recipe({section: {name: 1}}, "settings")
    assert caught.value.hint == f"it is called {new} now"
    assert new in list_keys()
    assert old not in list_keys()


def test_settings_of_a_stored_manifest_are_read_under_their_present_names():
    stored = {"validation_share": 0.1, "processes": 2, "rules": {"personal": "mask", "urls": True}, "unit": "line"}
    upgraded = upgrade_section("data", stored)
    settings = build_recipe({"data": upgraded}, "stored").data
    assert (settings.validation_fraction, settings.num_proc, settings.unit) == (0.1, 2, "line")
    assert settings.rules == {"pii": "mask", "urls": True}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, []),
        ({"train": {"replay_fraction": 0.5, "decay_fraction": 0.5}}, ["replay_fraction", "decay_fraction"]),
        ({"train": {"replay_fraction": 0.5, "forget": 0.1, "schedule": "wsd", "decay_fraction": 0.5}}, []),
        ({"preferences": {"beta": 0.2}}, ["beta"]),
        ({"preferences": {"beta": 0.2, "sources": ["a"]}}, []),
        ({"merge": {"density": 0.1, "seed": 1}}, ["density", "seed"]),
        ({"merge": {"density": 0.1, "seed": 1, "method": "ties"}}, ["seed"]),
        ({"merge": {"density": 0.1, "seed": 1, "method": "dare_ties"}}, []),
        ({"merge": {"rank": 4, "gguf": True, "search_steps": 5}}, ["search_steps", "gguf"]),
    ],
    ids=str,
)
def test_settings_that_change_nothing_beside_the_others_are_listed(given, expected):
    recipe = build_recipe(given, "test")
    merged = list_unused_by_merge(recipe, is_search=False, is_base=False, is_adapter=True)
    lines = [*list_unused([recipe, recipe]), *merged]
    assert [line.partition(" ")[0].partition(".")[2] for line in lines] == expected


def test_what_cuts_off_an_update_changes_nothing_where_it_goes_into_the_base_whole():
    recipe = build_recipe({"merge": {"rank": 4, "gguf": True, "density": 0.5, "method": "svd"}}, "test")
    rank, method = list_unused_by_merge(recipe, is_search=True, is_base=True, is_adapter=False), []
    assert [line.partition(" ")[0] for line in rank] == ["merge.rank"]
    rank, method = list_unused_by_merge(recipe, is_search=False, is_base=True, is_adapter=False)[1:]
    assert rank.startswith("merge.rank changes nothing")
    assert method.startswith("method svd cuts nothing off")


def test_held_out_text_that_different_adapters_share_is_said():
    def make(name, sources, test):
        return build_recipe({"name": name, "data": {"sources": [sources], "test": [test] if test else []}}, "test")

    shared = [make("a", "a.txt", "t.txt"), make("b", "b.txt", "t.txt"), make("c", "c.txt", "")]
    assert list_shared(shared) == ["a, b are all tested on t.txt; to give each its own, use recipes"]
    assert not list_shared([make("a", "a.txt", "t.txt"), make("b", "a.txt", "t.txt"), make("c", "c.txt", "u.txt")])
