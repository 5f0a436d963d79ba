import pytest
import yaml

from lora_gpt2.core.strict_yaml import MAX_DEPTH, MAX_NODES, describe_problem, parse_yaml


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: &x [1]\nb: *x", "aliases"),
        ("a: &x [*x]", "aliases"),
        ("{<<: {a: 1}}", "merge keys"),
        ("a: 1\na: 2", "'a' is given twice"),
        ("t: {a: 1, 'a': 2}", "'a' is given twice"),
        ("- 1: x\n  0x1: y", "'1' is given twice"),
        ("a: " + "[" * (MAX_DEPTH + 1), "nested too deeply"),
        ("[" + "1," * MAX_NODES + "]", "items"),
        ("a: " + "9" * 41, "a number of 41 characters"),
        ("a: " + "1:" * 50_000 + "1", "a number of"),
        ("a: 2026-13-45", "month must be in 1..12"),
        ("steps: 010", "'010' is an octal"),
        ("steps: 1:30", "'1:30' is an octal or a sexagesimal number"),
        ("!!bool maybe", "not a value of its kind"),
        ("!!timestamp soon", "not a value of its kind"),
        ("!!int x", "not a value of its kind"),
        ('a: "\\ud800"', "surrogate"),
        ('a: "\\U00110000"', "arg not in range"),
        ("{[a]: 1}", "unhashable"),
        ("!!python/object:os.system {}", "could not determine a constructor"),
        ("a: [", ""),
        ("a\x1bb", "special characters"),
        ("--- 1\n--- 2", "another document"),
    ],
)
def test_what_cannot_be_used_is_a_yaml_error(text, problem):
    with pytest.raises(yaml.YAMLError) as caught:
        parse_yaml(text)
    assert problem in describe_problem(caught.value)[0]


def test_what_recipes_are_made_of_is_read_as_ever():
    text = "name: a\ntrain: {steps: 3, learning_rate: 3e-4, seed: 0x10}\ndata:\n  sources: [a, &unused b]\n  x: on\n"
    assert parse_yaml(text) == yaml.safe_load(text)
    assert parse_yaml("") is None
    assert parse_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH) == yaml.safe_load("[" * MAX_DEPTH + "]" * MAX_DEPTH)
