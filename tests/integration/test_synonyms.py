"""Words of other tools lead to what exists here."""

import click
import pytest

from lora_gpt2 import cli
from lora_gpt2.core.errors import RecipeError
from lora_gpt2.core.synonyms import COMMANDS, OPTIONS, UNSUPPORTED, find_option
from lora_gpt2.recipe import list_keys
from lora_gpt2.recipe_files import build_from_values, set_values

TYPED = {
    "transformers": ["train", "--num_train_epochs", "--learning_rate", "--per_device_train_batch_size", "--fp16"],
    "unsloth": ["train", "--r", "--lora_alpha", "--max_seq_length", "--load_in_4bit", "--max_steps"],
    "axolotl": ["train", "--num_epochs", "--micro_batch_size", "--sequence_len", "--lora_r"],
    "ollama": ["generate", "--num_predict", "--temp", "--topk", "--repeat_penalty", "--model"],
    "llm": ["generate", "--model", "--max_length", "--top_p", "--system"],
}


def find_command(path):
    command = cli.cli
    for word in path.split():
        command = command.get_command(click.Context(command), word)
        assert command is not None, path
    return command


def list_options():
    return {
        name: {option for param in find_command(name).params for option in param.opts}
        for name in cli.COMMANDS
        if not isinstance(find_command(name), click.Group)
    }


def test_every_word_for_a_command_leads_to_one_and_is_none_itself():
    for word, command in COMMANDS.items():
        assert word not in cli.COMMANDS
        assert find_command(command)


def test_every_word_for_an_option_leads_to_one_that_some_command_has():
    options = set().union(*list_options().values())
    for word, meant in OPTIONS.items():
        assert word == word.lower().replace("_", "-")
        if meant.startswith("--"):
            assert meant.split()[0] in options, word
        if meant.startswith("--set "):
            assert meant.split()[1].partition("=")[0] in list_keys(), word


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("train.lr", "it is train.learning_rate here"),
        ("train.per_device_train_batch_size", "it is train.batch_size here"),
        ("train.warmup_steps", "it is train.warmup_fraction here"),
        ("lora.lora_alpha", "it is lora.alpha here"),
        ("lora.use_dora", "DoRA is imported, and not trained here"),
        ("lora.modules_to_save", "an adapter changes the projections and the head alone (lora.targets)"),
        ("train.adam_beta2", "AdamW's betas are 0.9 and 0.999"),
        ("train.stepz", "did you mean 'train.steps'?"),
    ],
)
def test_settings_of_other_tools_are_explained(key, hint):
    with pytest.raises(RecipeError) as caught:
        build_from_values(set_values({}, {key: 1}), "settings")
    assert caught.value.hint == hint


def test_a_setting_that_is_said_to_be_none_is_none():
    assert not {key.rpartition(".")[2] for key in list_keys()} & set(UNSUPPORTED)


@pytest.mark.parametrize("tool", TYPED)
def test_what_users_of_other_tools_type_is_answered(tool, run):
    command, *options = TYPED[tool]
    for option in options:
        known = list_options()[command]
        if option.replace("_", "-") in known:
            continue  # it is the same here, with - or _
        code, out, err = run(command, "x", option, "1")
        assert (code, out) == (2, "")
        assert err.startswith(f"error: there is no option {option.replace('_', '-')}\n  ")
        if find_option(option):
            assert find_option(option) in err
    assert find_option("--Num_Train-Epochs") == "--epochs"
    assert find_option("--no-such-thing") == ""


def test_what_is_not_near_is_not_suggested(run):
    assert run("fizzbuzz")[2] == "error: there is no command 'fizzbuzz'\n  'lora-gpt2 --help' lists them\n"
    assert "did you mean 'train'" in run("trian")[2]
    assert "it is: lora-gpt2 adapters list" in run("models")[2]
    assert "did you mean --epochs?" in run("train", "x", "--epoch")[2] or "--epochs" in run("train", "x", "--epoch")[2]
    assert "see 'lora-gpt2 serve --help'" in run("serve", "--zzz")[2]
