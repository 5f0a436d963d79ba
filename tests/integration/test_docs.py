"""Every command in the guide, run as it stands; the pages' files and a base called nano are small stand-ins."""

import contextlib
import json
import re
import shlex
from pathlib import Path

import pytest

from lora_gpt2 import cli
from lora_gpt2.model import checkpoint
from lora_gpt2.model.base import load_base
from lora_gpt2.model.runtime import choose_runtime
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.files import Origin, publish_adapter
from tests.builders import make_adapter, make_base_folder, make_text

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))
OUTSIDE = ("README.md", "CONTRIBUTING.md")
WAITING = ("serve", "chat")  # runs until it is stopped: its options are read, no more


def read_commands(page):
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    bases = tmp_path / "bases"
    make_base_folder(bases / "nano", context=512)
    monkeypatch.setattr(checkpoint, "BUNDLED", bases)
    monkeypatch.setenv("LORA_GPT2_STORE", str(tmp_path / "adapters"))
    base = load_base("nano", choose_runtime("float32"))
    for seed, name in enumerate(("shakespeare", "cooking")):
        publish_adapter(Store(tmp_path / "adapters"), name, make_adapter(base.config, seed), base, Origin())
    for seed, name in enumerate(("law.jsonl", "my_text.txt", "my_test.txt")):
        text = make_text(60, seed)
        rows = [json.loads(line)["text"] for line in text.splitlines()]
        (tmp_path / name).write_text(text if name.endswith("l") else "\n<|endoftext|>\n".join(row * 3 for row in rows))
    person = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    (tmp_path / "person.json").write_text(json.dumps(person | {"additionalProperties": False}))
    pairs = [{"prompt": f"Take {n}", "chosen": f" the cat {n}", "rejected": f" rain {n}"} for n in range(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    asked = [json.loads(line)["text"] for line in make_text(60, 7).splitlines()]
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": text}] for text in asked]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    (tmp_path / "prompts.txt").write_text("The first\nThe second\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page, folder, capsys):
    for line in read_commands(page):
        command, _, redirected = line.partition(" > ")
        words = shlex.split(command)
        assert words[0] == "lora-gpt2", line
        if words[1] in WAITING:
            module = cli.cli.get_command(None, words[1])
            assert module.make_context(words[1], words[2:]).params
            continue
        code = cli.run(words[1:])
        captured = capsys.readouterr()
        assert code == 0, f"{line}\n{captured.err}"
        if redirected:
            (folder / redirected).write_text(captured.out)


def test_every_page_is_in_the_table_and_every_link_leads_somewhere():
    index = (DOCS / "index.md").read_text()
    for page in [*DOCS.rglob("*.md"), DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(([\w./-]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
        assert page.name in ("index.md", *OUTSIDE) or f"({page.relative_to(DOCS)})" in index
    assert sum(len(read_commands(page)) for page in PAGES) > 30


def test_a_command_that_does_not_work_would_be_found(folder, capsys, tmp_path):
    bad = tmp_path / "bad.md"
    bad.write_text("```sh\nlora-gpt2 generate x --adapter nobody\n```\n")
    with contextlib.suppress(SystemExit), pytest.raises(AssertionError, match="nobody"):
        test_the_commands_of_a_page_run(bad, folder, capsys)
