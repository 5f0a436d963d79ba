"""What a manifest is, byte by byte: sealed, whole, and of the right kinds; else it is refused."""

import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from lora_gpt2.store.manifest import (
    KINDS,
    NO_DIGEST,
    OPTIONAL,
    PROVENANCE,
    WEIGHTS,
    BaseIdentity,
    Manifest,
    Parent,
    parse_manifest,
)

DIGEST = hashlib.sha256(b"weights").hexdigest()
FULL = Manifest(
    name="law",
    version=3,
    created=datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC),
    base=BaseIdentity(name="gpt2", fingerprint="f" * 64, tokenizer_fingerprint="e" * 64),
    files={WEIGHTS: DIGEST, "README.md": "0" * 64},
    size_bytes=100,
    num_parameters=25,
    data={"sources": ["a.txt"]},
    recipe={"lora": {"rank": 4}},
    figures={"test_perplexity": 12.5},
    parents=(Parent(reference="code@2", digest=DIGEST, weight=-0.5), Parent(reference="law@1", digest="0" * 64)),
    provenance={"by": "merge"},
    libraries={"torch": "2"},
)


def seal(values):
    """Returns a manifest's bytes with a right checksum, whatever they say."""
    content = (json.dumps({**values, "checksum": NO_DIGEST}, indent=1) + "\n").encode()
    head, _, tail = content.rpartition(NO_DIGEST.encode())
    return head + hashlib.sha256(content).hexdigest().encode() + tail


def changed(**changes):
    return seal({**FULL.to_json(), **changes})


def test_a_manifest_says_the_same_after_being_written_and_read():
    assert parse_manifest(FULL.to_bytes()) == FULL
    assert seal(FULL.to_json()) == FULL.to_bytes(), "sealed as this file seals"
    bare = replace(FULL, data={}, recipe={}, figures={}, parents=(), provenance={}, libraries={})
    assert parse_manifest(bare.to_bytes()) == bare
    assert parse_manifest(changed(of_a_later_format=[1])) == FULL


def test_every_flipped_bit_and_every_cut_is_found():
    content = FULL.to_bytes()
    end = len(content.rstrip())
    for place in range(end):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 7
        with pytest.raises(ValueError):  # noqa: PT011 - which of the errors it is depends on the bit
            parse_manifest(bytes(damaged))
        with pytest.raises(ValueError):  # noqa: PT011
            parse_manifest(content[:place])


def without(values, key):
    return {name: value for name, value in values.items() if name != key}


@pytest.mark.parametrize("kind", ["none", "null", "empty", "zeros", "another", "number", "before the end", "twice"])
def test_a_manifest_without_its_own_checksum_at_its_end_is_refused(kind):
    values = {**FULL.to_json(), "checksum": json.loads(FULL.to_bytes())["checksum"]}
    other = json.loads(replace(FULL, version=4).to_bytes())["checksum"]
    content = {
        "none": without(values, "checksum"),
        "null": {**values, "checksum": None},
        "empty": {**values, "checksum": ""},
        "zeros": {**values, "checksum": NO_DIGEST},
        "another": {**values, "checksum": other},
        "number": {**values, "checksum": 7},
        "before the end": {"checksum": values["checksum"], **FULL.to_json()},
        "twice": {"checksum": other, **values},
    }[kind]
    written = (json.dumps(content, indent=1) + "\n").encode()
    if kind == "twice":  # a checksum is a key of the whole, not of a part of it
        written = FULL.to_bytes().rstrip()[:-1].rstrip() + b',\n "checksum": "' + other.encode() + b'"\n}\n'
    with pytest.raises(ValueError, match="checksum"):
        parse_manifest(written)
    assert parse_manifest((json.dumps(values, indent=1) + "\n").encode()) == FULL, "the control"


def test_a_manifest_of_schema_1_has_no_checksum_and_later_schemas_are_not_known():
    first = json.dumps({**FULL.to_json(), "schema": 1}).encode()
    assert parse_manifest(first) == FULL
    for schema in (0, 3, -1, "2", None, [2], 2.5):
        with pytest.raises(ValueError, match="schema"):
            parse_manifest(changed(schema=schema))
    for content in (b"[]", b"7", b'"x"', b"null", seal(without(FULL.to_json(), "schema"))):
        with pytest.raises(ValueError, match="schema"):
            parse_manifest(content)


@pytest.mark.parametrize("key", KINDS)
def test_a_key_that_is_missing_is_only_missed_where_it_must_be_there(key):
    content = seal(without(FULL.to_json(), key))
    if key in OPTIONAL:
        found, name = parse_manifest(content), "provenance" if key == PROVENANCE else key
        assert not getattr(found, name)
        assert replace(found, **{name: getattr(FULL, name)}) == FULL
    else:
        with pytest.raises(ValueError, match=f"{key} is missing"):
            parse_manifest(content)


@pytest.mark.parametrize("value", [None, 1.5, True, "x", 7, [], {}, [1]], ids=repr)
@pytest.mark.parametrize("key", KINDS)
def test_a_value_of_another_kind_is_refused(key, value):
    if type(value) is KINDS[key] and value != [1] and key not in ("created", "base", "files"):
        parse_manifest(changed(**{key: value}))
        return
    if (key, value) == ("files", {}):
        return  # a version whose manifest guards nothing has no weights: whoever reads them misses their hash
    with pytest.raises(ValueError, match=r"what it should be|Invalid isoformat"):
        parse_manifest(changed(**{key: value}))


NO_DIGESTS = [
    "x",
    "",
    DIGEST[:-1],
    DIGEST + "0",
    DIGEST.upper(),
    " " + DIGEST[1:],
    DIGEST + "\n",
    "g" * 64,
    "sha256:" + DIGEST,
    None,
    7,
    True,
    [DIGEST],
    {"a": DIGEST},
    "\u0660" * 64,
]


@pytest.mark.parametrize("digest", NO_DIGESTS, ids=repr)
def test_a_digest_is_64_small_hexadecimal_digits_wherever_it_stands(digest):
    good = {"reference": "code@2", "digest": DIGEST, "weight": 1.0}
    assert parse_manifest(changed(parents=[good, good])).parents == (Parent(reference="code@2", digest=DIGEST),) * 2
    for parents in ([{**good, "digest": digest}], [good, {**good, "digest": digest}]):
        with pytest.raises(ValueError, match="a parent is not"):
            parse_manifest(changed(parents=parents))
    with pytest.raises(ValueError, match=r"the hash of README\.md"):
        parse_manifest(changed(files={WEIGHTS: DIGEST, "README.md": digest}))


@pytest.mark.parametrize(
    "parent",
    [
        7,
        "code@2",
        None,
        [],
        {},
        {"digest": DIGEST},
        {"reference": "code@2"},
        {"reference": "code", "digest": DIGEST},
        *(
            {"reference": name, "digest": DIGEST}
            for name in (
                "",
                "@",
                "@1",
                "code@",
                "code@x",
                "code@-1",
                "code@1.5",
                "code@1@2",
                "Code@1",
                "../code@1",
                "/etc@1",
                "base@1",
                "code@1#x",
                "a" * 65 + "@1",
                7,
                None,
                ["code@2"],
            )
        ),
        {"reference": "code@2", "digest": DIGEST, "weight": "much"},
        {"reference": "code@2", "digest": DIGEST, "weight": None},
    ],
    ids=repr,
)
def test_a_parent_is_a_version_with_a_digest_and_a_weight(parent):
    with pytest.raises(ValueError, match=r"parent|could not convert"):
        parse_manifest(changed(parents=[parent]))


@pytest.mark.parametrize(
    "name",
    ["", "../x", "/etc/passwd", "a/b", ".hidden", "a b", "a\n", "-x", "a" * 101, "\u00e4", "a\\b", "c:x", "..", "."],
)
def test_a_guarded_file_has_a_plain_name(name):
    with pytest.raises(ValueError, match="files"):
        parse_manifest(changed(files={WEIGHTS: DIGEST, name: DIGEST}))
    for good in ("a", "metrics.jsonl", "A_b-c.1", "_x", "a" * 100):
        assert good in parse_manifest(changed(files={good: DIGEST})).files


@pytest.mark.parametrize("version", [0, -1, -(2**40)])
def test_versions_begin_at_one(version):
    with pytest.raises(ValueError, match="version"):
        parse_manifest(changed(version=version))
    assert parse_manifest(changed(version=1)).version == 1


def test_figures_that_are_reckoned_with_are_numbers_or_nothing():
    for key in ("train_tokens", "test_perplexity", "base_perplexity", "trained_parameters"):
        for value in (1, 1.5, None):
            assert parse_manifest(changed(figures={key: value})).figures == {key: value}
        for value in ("1", True, [1], {}):
            with pytest.raises(ValueError, match=key):
                parse_manifest(changed(figures={key: value}))
    for values in ({"reading": 5}, {"rules": []}, {"rules": {"a": 1}}, {"set_aside": {"a": "x"}}):
        with pytest.raises(ValueError, match=f"data.{next(iter(values))}"):
            parse_manifest(changed(data=values))
    for values in ({"perplexity": 5}, {"trained_parameters": -5}):
        with pytest.raises(ValueError, match=f"figures.{next(iter(values))}"):
            parse_manifest(changed(figures=values))
    for sources in ("a.txt", [1], [None], {"a": 1}):
        with pytest.raises(ValueError, match="sources"):
            parse_manifest(changed(data={"sources": sources}))
