"""A folder of domains."""

import os
from pathlib import Path

import pytest

from lora_gpt2.core.errors import DataError, NotFoundError, UsageError
from lora_gpt2.data.domains import list_domains, list_left_out
from lora_gpt2.recipe import build_recipe
from lora_gpt2.recipe_files import name_recipe


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train.jsonl", "val.jsonl", "train-2.jsonl"], (["train-2.jsonl", "train.jsonl"], ["val.jsonl"], [])),
        (["training.txt", "eval.txt"], (["training.txt"], [], ["eval.txt"])),
        (["train.txt", "val.txt", "other.txt"], (["train.txt"], ["val.txt"], [])),
    ],
)
def test_a_folder_is_divided_as_it_is_where_it_is_trained_on_alone(tmp_path, names, expected):
    (tmp_path / "law").mkdir()
    for name in names:
        (tmp_path / "law" / name).write_text("x")
    (item,) = list_domains(tmp_path)
    found = [[Path(source).name for source in each] for each in (item.sources, item.validation, item.test)]
    assert tuple(found) == expected


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("café", "cafe"),
        ("Straße", "strasse"),
        ("Łódź", "lodz"),
        ("Ærø", "aero"),
        ("my_text", "my_text"),
        ("a b", "a-b"),
    ],
)
def test_a_file_names_its_adapter_the_same_way_everywhere(tmp_path, stem, name):
    path = tmp_path / f"{stem}.txt"
    path.write_text("text")
    assert [item.name for item in list_domains(tmp_path)] == [name]
    recipe = build_recipe({"data": {"sources": [str(path)]}}, "test")
    assert name_recipe(recipe).name == name


def test_folders_files_and_recipes_are_domains(tmp_path):
    for path in (
        "law/train.jsonl",
        "law/valid.jsonl",
        "law/test.txt.gz",
        "law/notes.bin",
        "My_Code/a.py",
        "My_Code/b/c.py",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("x")
    for name in (
        "poems.txt",
        ".hidden.txt",
        "picture.png",
        "README.md",
        "y.log",
        "Notes.TXT",
        "z.jsonl.gz",
        "t.tar.gz",
    ):
        (tmp_path / name).write_text("x")
    (tmp_path / "a.yaml").write_text("lora: {rank: 4}")
    (tmp_path / "b.yaml").write_text("name: own")
    found = {item.name: item for item in list_domains(tmp_path)}
    assert list(found) == ["a", "law", "my_code", "notes", "own", "poems", "t", "z"]
    odd = tmp_path / os.fsdecode(b"caf\xe9.txt")
    odd.write_text("text")
    assert {item.name for item in list_domains(tmp_path)} == set(found), (
        "a name that is no Unicode costs no other domain"
    )
    assert list_left_out(tmp_path) == ["README.md", odd.name, "picture.png", "y.log"]
    assert found["law"].flags == {
        "name": "law",
        "data.sources": (str(tmp_path / "law/train.jsonl"),),
        "data.validation": (str(tmp_path / "law/valid.jsonl"),),
        "data.test": (str(tmp_path / "law/test.txt.gz"),),
    }
    assert found["my_code"].sources == (str(tmp_path / "My_Code"),)
    assert found["poems"].sources == (str(tmp_path / "poems.txt"),)
    assert (found["a"].recipe, found["own"].recipe) == (tmp_path / "a.yaml", tmp_path / "b.yaml")


def test_a_folder_without_domains_or_with_one_twice_is_refused(tmp_path):
    with pytest.raises(NotFoundError, match="there is no folder"):
        list_domains(tmp_path / "none")
    with pytest.raises(DataError, match="holds no domain"):
        list_domains(tmp_path)
    (tmp_path / "law.txt").write_text("x")
    (tmp_path / "law").mkdir()
    with pytest.raises(UsageError, match="called 'law'"):
        list_domains(tmp_path)
