"""A remembered list is the list: whatever changes is seen, and a broken memory costs nothing but time."""

import json
import os

import pytest

from lora_gpt2.store.changes import remove_adapter, roll_back
from lora_gpt2.store.files import Origin, publish_adapter
from lora_gpt2.store.listing import list_current, summarise
from lora_gpt2.store.manifest import MANIFEST
from tests.builders import make_adapter


@pytest.fixture
def two(base, store):
    for seed, name in enumerate(("law", "code")):
        publish_adapter(store, name, make_adapter(base.config, seed), base, Origin(figures={"train_tokens": seed}))
    return store


def versions(store):
    return {row["name"]: row["version"] for row in list_current(store)[0]}


def test_every_change_is_seen(base, two):
    assert versions(two) == versions(two) == {"code": 1, "law": 1}
    publish_adapter(two, "law", make_adapter(base.config, 5), base, Origin())
    assert versions(two) == {"code": 1, "law": 2}
    roll_back(two, "law")
    assert versions(two) == {"code": 1, "law": 1}
    remove_adapter(two, "code")
    assert versions(two) == {"law": 1}
    (two.resolve("law") / MANIFEST).write_bytes(b"{}")
    rows, errors = list_current(two)
    assert (rows, [error.exit_code for error in errors]) == ([], [5])


def test_the_rows_are_those_of_the_manifests_and_are_not_read_again(two, monkeypatch):
    expected = [summarise(two.read_manifest(name)) for name in ("code", "law")]
    assert list_current(two)[0] == expected
    monkeypatch.setattr(type(two), "read_manifest", lambda *rest: pytest.fail("it is remembered"))
    assert list_current(two)[0] == expected


@pytest.mark.parametrize("content", [b"", b"[]", b'{"law": 7}', b'{"law": [1, 2]}', b'{"law": [[], {}]}', b"\xff"])
def test_a_broken_memory_is_made_anew(two, content):
    list_current(two)
    (path,) = (
        os.environ["LORA_GPT2_CACHE"] + "/lists/" + name
        for name in os.listdir(os.environ["LORA_GPT2_CACHE"] + "/lists")
    )
    with open(path, "wb") as file:
        file.write(content)
    assert versions(two) == {"code": 1, "law": 1}
    with open(path, "rb") as file:
        assert set(json.load(file)) == {"code", "law"}
