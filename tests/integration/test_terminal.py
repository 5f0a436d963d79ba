"""Nothing that comes from a file or a name reaches the terminal as a command to it, or as a line of our own."""

import gzip
import io
import json
import tarfile

import pytest
import torch
from safetensors.torch import save_file

from lora_gpt2 import cli
from lora_gpt2.commands.shared import emit
from lora_gpt2.core.console import LineTask, RichReporter
from lora_gpt2.core.errors import DataError
from lora_gpt2.core.tables import format_table
from lora_gpt2.store.files import Origin, publish_adapter
from lora_gpt2.store.manifest import PEFT_CONFIG, WEIGHTS
from lora_gpt2.store.peft.tensors import to_peft
from tests.builders import make_adapter

EVIL = "\x1b]0;owned\x07\x1b[2J\nerror: forged\r\x9b31m\u202e"
SHOWN = "\\x1b]0;owned\\x07\\x1b[2J"


def check(text, has_lines=False):
    """Fails where a character is left that a terminal obeys, or (but for `has_lines`) a line that is not ours."""
    bad = [c for c in text if (ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0 or c == "\u202e"]
    assert not bad, text
    assert has_lines or not any(line.startswith("error: forged") for line in text.splitlines()), text


def test_errors_messages_and_progress_are_printable(capsys):
    cli.report(DataError(EVIL, EVIL), as_json=False)
    RichReporter().message(EVIL)
    LineTask(EVIL, 1, "tokens").advance(1, EVIL)
    said = capsys.readouterr().err
    check(said)
    assert said.count(SHOWN) == 5
    assert said.count("\n") == 4
    cli.report(DataError(EVIL, EVIL), as_json=True)
    assert json.loads(capsys.readouterr().out)["error"]["message"] == EVIL


def test_tables_and_lines_are_printable_and_generated_text_is_as_it_is(capsys):
    emit({}, False, lambda: format_table(["a", EVIL], [[EVIL, "1"], ["b", "2"]]))
    emit({}, False, lambda: [EVIL, "two"])
    found = capsys.readouterr().out
    check(found)
    assert found.count("\n") == 3 + 2
    emit({}, False, lambda: f"one\n{EVIL}", is_own_text=True)
    assert capsys.readouterr().out == f"one\n{EVIL}\n"
    emit({"x": EVIL}, True, lambda: "")
    assert json.loads(capsys.readouterr().out) == {"x": EVIL}


@pytest.fixture
def named(tmp_path):
    """A folder whose name is hostile."""
    folder = tmp_path / EVIL.replace("/", "")
    folder.mkdir()
    return folder


def test_names_of_files_and_keys_of_recipes(run, named, tmp_path, base_folder):
    (named / "r.yaml").write_text("name: x\n")
    (tmp_path / "keys.yaml").write_text(json.dumps({EVIL: 1}))
    (tmp_path / "value.yaml").write_text(json.dumps({"train": {"steps": EVIL}}))
    for command, code in (
        (["recipes", "check", named / "r.yaml"], 0),
        (["recipes", "check", named / "none.yaml"], 4),
        (["recipes", "check", tmp_path / "keys.yaml"], 2),
        (["recipes", "check", tmp_path / "value.yaml"], 2),
        (["recipes", "copy", "prose", named / "copy.yaml"], 0),
        (["--debug", "recipes", "check", named / "none.yaml"], 4),
        (["train", "--set", f"{EVIL}=1"], 2),
        (["train", "--set", f"train.schedule={EVIL}"], 2),
        (["generate", "x", "--adapter", EVIL], 2),
        (["generate", "x", "--base", EVIL], 4),
        (["adapters", "list", "--store", named], 0),
        (["adapters", "show", "x", "--store", named], 4),
        ([EVIL], 2),
        (["adapters", "list", EVIL], 2),
        (["audit", "canaries", named / "c.jsonl"], 0),
    ):
        found, out, err = run(*command)
        assert found == code, (command, err)
        check(out)
        check(err, has_lines=command[0] == "--debug")
        assert SHOWN in out + err or "\\\\x1b" in out + err or command[-1] == named


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", '"\x1b[31mred",n\nx,1\n'),
        ("a.jsonl", json.dumps({EVIL: 1, "b": 2}) + "\n"),
        ("a.json", json.dumps({EVIL: 1, "b": 2})),
        (f"{EVIL}.txt".replace("/", ""), "\xff"),
    ],
)
def test_fields_and_columns_of_data(run, tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode("latin-1", "backslashreplace"))
    for command in (["prepare", tmp_path / name], ["train", "--data", tmp_path / name, "--name", "x"]):
        code, out, err = run(*command)
        assert code in (3, 4), err
        check(out)
        check(err)
        assert "\\x1b" in err


def test_what_preparing_says_of_documents(run, tmp_path):
    folder = tmp_path / EVIL.replace("/", "")
    folder.mkdir()
    words = [f"word{number}" for number in range(900)]
    for number in range(60):
        own = " ".join(words[number * 15 :][:15])
        (folder / f"{number}.txt").write_text(f"{own} {EVIL} someone@example.com is what {own} says")
        (folder / f"{number}-again.txt").write_text(f"{own} {EVIL} someone@example.com is what {own} says too")
    code, out, err = run("prepare", folder, "--preview", 1, "--out", folder / "out")
    assert code == 0, err
    check(out)
    check(err)
    code, out, err = run("audit", "data", folder)
    assert code == 0, err
    check(out)


def test_tensors_and_configurations_of_adapters_and_bases(run, base, base_folder, tmp_path, store):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name, content in to_peft(make_adapter(base.config), base.name, base.config).items():
        (folder / name).write_bytes(content)
    config = json.loads((folder / PEFT_CONFIG).read_text())
    command = ["adapters", "import", folder, "--as", "x", "--base", base_folder]
    command = [item if item != "--as" else "--name" for item in command]
    for change in ({EVIL: 1}, {"r": EVIL}, {"init_lora_weights": EVIL}, {"target_modules": f"({EVIL}"}):
        (folder / PEFT_CONFIG).write_text(json.dumps({**config, **change}))
        code, out, err = run(*command)
        assert code == 5, err
        check(out)
        check(err)
        assert "\\x1b" in err
    (folder / PEFT_CONFIG).write_text(json.dumps(config))
    save_file({EVIL: torch.zeros(1)}, folder / WEIGHTS)
    code, _, err = run(*command)
    assert (code, SHOWN in err) == (5, True)
    check(err)
    copy = tmp_path / "base"
    copy.mkdir()
    for path in base_folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**values, "activation_function": EVIL}))
    code, _, err = run("generate", "x", "--base", copy)
    assert code == 5
    check(err)


def test_members_of_archives(run, tmp_path, base_folder):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(EVIL.replace("\x9b", "").replace("\u202e", "")))
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(packed.getvalue()))
    code, _, err = run("adapters", "import", tmp_path / "a.tar.gz", "--name", "x", "--base", base_folder)
    assert code == 5
    check(err)


def test_fields_of_manifests(run, base, store):
    figures = {"train_tokens": 7, EVIL: EVIL}
    origin = Origin(
        data={"sources": [EVIL]},
        recipe={"description": EVIL, "license": EVIL},
        figures=figures,
        provenance={"by": EVIL},
    )
    publish_adapter(store, "law", make_adapter(base.config), base, origin)
    publish_adapter(store, "law", make_adapter(base.config, 2), base, Origin())
    for command in (
        ["list"],
        ["show", "law@1"],
        ["history", "law"],
        ["diff", "law@1", "law@2"],
        ["card", "law@1"],
    ):
        code, out, err = run("adapters", *command)
        assert code == 0, err
        if command[0] != "card":  # a document of several lines
            check(out)
        assert not set(out) & set("\x1b\x07\r\x9b\u202e")
        check(err)
