"""Constrained output by every way in: options, recipes, Python, HTTP; and a thousand texts under twenty schemas."""

import json
import re

import jsonschema
import pytest
from pydantic import BaseModel, Field

import lora_gpt2 as lg
from lora_gpt2.inference.generate import Request, generate
from lora_gpt2.inference.session import Session
from lora_gpt2.model.base import load_base
from lora_gpt2.model.runtime import choose_runtime
from lora_gpt2.recipe import GenerateSettings
from tests.builders import make_text

PERSON = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["n"],
    "additionalProperties": False,
}


def closed(**properties):
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMAS = [
    closed(name={"type": "string"}, age={"type": "integer", "minimum": 0, "maximum": 150}),
    closed(name={"type": "string", "maxLength": 12}, tags={"type": "array", "items": {"enum": ["a", "b"]}}),
    closed(code={"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"}),
    closed(when={"type": "string", "format": "date"}, at={"type": "string", "format": "ipv4"}),
    closed(id={"type": "string", "format": "uuid"}),
    closed(x={"type": "number"}, y={"type": "number", "minimum": -1.5, "maximum": 2.25}),
    closed(ok={"type": "boolean"}, why={"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 20}]}),
    closed(inner=closed(a={"type": "integer"}, b=closed(c={"type": "boolean"}))),
    closed(
        kind={"const": "point"}, position={"type": "array", "prefixItems": [{"type": "integer"}] * 2, "items": False}
    ),
    closed(items={"type": "array", "items": closed(k={"enum": ["x", "y"]}), "minItems": 1, "maxItems": 3}),
    {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 5},
    {"type": "array", "items": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}, "maxItems": 3},
    {"type": "string", "minLength": 3, "maxLength": 9},
    {"enum": ["red", "green", 7, None, True]},
    {"type": ["integer", "null"]},
    {"anyOf": [closed(a={"type": "integer"}), closed(b={"type": "string", "maxLength": 5})]},
    {"oneOf": [{"const": "on"}, {"const": "off"}]},
    {
        "$defs": {"node": closed(v={"type": "boolean"}, next={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]})},
        "$ref": "#/$defs/node",
    },
    {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "boolean"}},
    {"type": "object"},
]


@pytest.mark.slow
def test_a_thousand_texts_under_twenty_schemas_are_valid_or_say_that_they_were_cut():
    session = Session(load_base("nano", choose_runtime("float32")))
    valid = cut = 0
    for index, schema in enumerate(SCHEMAS):
        jsonschema.Draft202012Validator.check_schema(schema)
        validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker(["ipv4", "uuid"]))
        settings = GenerateSettings(json_schema=schema, max_new_tokens=80, temperature=1.0)
        requests = [Request("Here is the record: ", seed=1000 * index + seed) for seed in range(50)]
        for output in generate(session, requests, settings):
            if output.finish_reason == "length":
                cut += 1
                continue
            validator.validate(json.loads(output.text))
            valid += 1
    print(f"{valid} valid, {cut} cut")
    assert valid + cut == 1000
    assert valid > 700


@pytest.fixture
def schema_file(tmp_path):
    path = tmp_path / "person.json"
    path.write_text(json.dumps(PERSON), encoding="utf-8")
    return path


def test_options_constrain_what_is_written(run, base_folder, schema_file):
    def write(*options):
        code, out, err = run("generate", "the cat", "--base", base_folder, "--seed", 4, "-n", 3, "--json", *options)
        assert code == 0, err
        return [output["text"] for output in json.loads(out)["outputs"]], err

    assert set(write("--choice", " yes, no")[0]) <= {" yes", " no"}
    assert all(re.fullmatch(r"\d\d\\", text) for text in write("--regex", r"\d\d\\")[0])
    assert all(0 <= json.loads(text)["n"] <= 99 for text in write("--json-schema", schema_file)[0])
    assert set(write("--set", 'generate.grammar=start: "é" | "x"')[0]) <= {"é", "x"}
    texts, err = write("--json-schema", schema_file, "--max-new-tokens", 3)
    assert texts == ['{"n'] * 3
    assert "3 of 3 texts ended before the json_schema was complete" in err


def test_what_is_no_constraint_is_refused_with_the_reason(run, base_folder, tmp_path):
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "text.json").write_text("{")
    missing = ["--json-schema", tmp_path / "none.json"]
    for options, message in (
        (["--regex", "("], "unclosed group"),
        (missing, "there is no such file"),
        (["--json-schema", tmp_path / "list.json"], "holds no JSON schema"),
        (["--json-schema", tmp_path / "text.json"], "is not JSON"),
        (["--regex", "a", "--choice", "b"], "only one of choice, regex, json_schema, grammar"),
    ):
        code, _, err = run("generate", "a", "--base", base_folder, *options)
        assert code == (4 if options is missing else 2), err
        assert message in err


def test_an_adapter_carries_the_schema_of_its_recipe(run, base_folder, schema_file, tmp_path):
    (tmp_path / "text.jsonl").write_text(make_text(40), encoding="utf-8")
    recipe = tmp_path / "judge.yaml"
    recipe.write_text(
        f"base: {base_folder}\ndata: {{sources: [text.jsonl], block_size: 16}}\n"
        "train: {steps: 2, batch_size: 2}\ngenerate: {json_schema: person.json}\n",
        encoding="utf-8",
    )
    code, _, err = run("train", recipe, "--name", "judge")
    assert code == 0, err
    schema_file.unlink()
    code, out, err = run("generate", "the cat", "--adapter", "judge", "--seed", 1)
    assert code == 0, err
    jsonschema.validate(json.loads(out.removeprefix("the cat")), PERSON)
    model = lg.load(adapters="judge", progress=False)
    assert model.generate("the cat", "judge", seed=1).constraint == "json_schema"
    assert model.generate("the cat", "judge", seed=1, settings={"generate.constrained": False}).constraint == ""
    recipe.write_text(recipe.read_text().replace("json_schema: person.json", "regex: '('"), encoding="utf-8")
    code, _, err = run("train", recipe, "--name", "judge")
    assert code == 2
    assert "generate.regex cannot be used" in err


def test_python_takes_choices_expressions_files_mappings_and_classes(base_folder, schema_file):
    class Person(BaseModel):
        n: int = Field(ge=0, le=9)
        ok: bool

    model = lg.load(str(base_folder), progress=False)
    few = {"seed": 1, "max_new_tokens": 40}
    assert str(model.generate("a", choice=["x", "y"], **few)) in ("x", "y")
    assert re.fullmatch("[0-9]{4}", str(model.generate("a", regex="[0-9]{4}", **few)))
    for schema in (PERSON, schema_file, str(schema_file)):
        jsonschema.validate(json.loads(str(model.generate("a", json_schema=schema, **few))), PERSON)
    assert isinstance(Person.model_validate_json(str(model.generate("a", json_schema=Person, **few))).ok, bool)
