"""The project's own promises: import directions, documents that do not rot, recipes that are valid."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

from lora_gpt2.cli import COMMANDS, cli, run
from lora_gpt2.recipe_files import list_recipes, load_recipe

ROOT = Path(__file__).parent.parent.parent
TREE = list((ROOT / "lora_gpt2").rglob("*.py"))


def test_imports_go_down_only():
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_the_readme_is_short_and_the_generated_pages_are_up_to_date():
    assert len((ROOT / "README.md").read_bytes()) <= 8192
    done = subprocess.run(
        [sys.executable, "tools/write_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", list_recipes(), ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_says_what_it_is_for(path):
    recipe = load_recipe(path)
    assert recipe.description
    shown = rf"{path.stem}(\.yaml)? --data|--recipe {path.stem}"
    assert re.search(shown, path.read_text(encoding="utf-8")), "the comment shows how to run it"


def iter_commands(command, path):
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from iter_commands(command.get_command(context, name), [*path, name])
    else:
        yield path, command


@pytest.mark.parametrize(
    ("path", "command"), list(iter_commands(cli, [])), ids=lambda v: " ".join(v) if isinstance(v, list) else ""
)
def test_every_command_shows_an_example_of_itself(path, command):
    assert "Example" in command.help
    assert f"lora-gpt2 {' '.join(path)}" in command.help
    assert path[0] in COMMANDS
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name != "runs":
            assert parameter.help, f"{path}: {parameter.name}"


def test_modules_and_functions_stay_readable():
    import ast

    for path in TREE:
        source = path.read_text(encoding="utf-8")
        assert source.count("\n") <= 400, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = node.end_lineno - body[0].lineno + 1 if body else 0
                assert lines <= 50, f"{path}: {node.name} has {lines} lines, without its signature and docstring"


def test_nothing_unpickles_or_runs_foreign_code():
    forbidden = re.compile(
        r"torch\.load\(|import pickle|trust_remote_code|(?<!\.)\beval\(|\bexec\(|extractall|os\.system|shell=True"
    )
    for path in TREE:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if forbidden.search(line.replace('torch.load(path, map_location="cpu", weights_only=True)', "")):
                pytest.fail(f"{path}:{number}: {line.strip()}")


def test_every_dependency_is_pinned_for_the_makefile():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    for requirement in wanted:
        name = re.split(r"[><=\[]", requirement)[0].lower().replace("_", "-")
        assert name in pinned, name
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().splitlines()


def test_functions_take_six_positional_arguments_at_most():
    """What follows is named where the function is called.

    Commands get their options by name, autograd has its own, and Triton's kernels know no names alone.
    """
    import ast

    for path in TREE:
        if "commands" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                if any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list):
                    continue
                names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
                count = len(names) - (names[:1] in (["self"], ["cls"]))
                assert count <= 6 or names[:1] == ["ctx"], f"{path}: {node.name} has {count}"


VOCABULARY = re.compile(r"^\| `(?P<term>[^|]+)` \| (?P<instead>[^|]+) \| (?P<meaning>[^|]+) \|$", re.MULTILINE)


def test_the_code_speaks_the_fields_language():
    """Words of our own, which CONTRIBUTING's vocabulary replaces, are not identifiers."""
    import ast

    rows = VOCABULARY.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    banned = {word: term for term, instead, _ in rows for word in re.findall(r"`(\w+)`", instead)}
    assert len(banned) > 40
    for path in TREE:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        names |= {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        }
        for word in sorted(banned.keys() & names):
            pytest.fail(f"{path}: {word}; write {banned[word]}")


def test_no_help_is_cut(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    for path in [[], *([name] for name in COMMANDS), *(path for path, _ in iter_commands(cli, []))]:
        assert run([*path, "--help"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("Usage:")
        cut = [line for line in lines if line.endswith("...") and "[" not in line and "Usage" not in line]
        assert not cut, path
