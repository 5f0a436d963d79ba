"""YAML from strangers, read in bounded time: no aliases, no key twice, limits on nesting, items and numbers.

An alias lets a few hundred bytes stand for gigabytes ("billion laughs"), and a key given twice hides a setting; neither
has a use in a recipe.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.error import MarkedYAMLError
from yaml.nodes import MappingNode, Node, ScalarNode

MAX_DEPTH, MAX_NODES, MAX_NUMBER_LENGTH = 16, 20_000, 40
_RAISED_BY_PYYAML = (ValueError, OverflowError, LookupError, AttributeError, TypeError, RecursionError)
MERGE = "tag:yaml.org,2002:merge"
ODD_NUMBER = re.compile(r"[-+]?(?:0[0_]*[1-7][0-7_]*|[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?)")
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")


def parse_yaml(text: str) -> Any:
    """Returns the value in a YAML document; raises `yaml.YAMLError`, and nothing else, where it cannot be used."""
    loader = _StrictLoader(text)
    try:
        return loader.get_single_data()
    except _RAISED_BY_PYYAML as error:  # a month 13, a character beyond Unicode, !!bool of another word
        reason = "nested too deeply" if isinstance(error, RecursionError) else f"not a value of its kind: {error}"
        raise MarkedYAMLError(problem=reason, problem_mark=loader.get_mark()) from error
    finally:
        loader.dispose()


def describe_problem(error: yaml.YAMLError) -> tuple[str, int]:
    """Returns what is wrong with a document, in a line, and the line's number; "" and 0 where it is not said."""
    mark = getattr(error, "problem_mark", None)
    problem = str(getattr(error, "problem", None) or getattr(error, "reason", None) or "")
    return problem, mark.line + 1 if mark else 0


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, without what it does not bound."""

    def __init__(self, text: str) -> None:
        self._depth = self._num_nodes = 0
        super().__init__(text)

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """Returns the next node; the event stream behind it is never read further than the limits."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _refuse("aliases (*name) are not allowed", event.start_mark)
        self._depth, self._num_nodes = self._depth + 1, self._num_nodes + 1
        if self._depth > MAX_DEPTH:
            raise _refuse("nested too deeply", event.start_mark)
        if self._num_nodes > MAX_NODES:
            raise _refuse(f"more than {MAX_NODES:,} items", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Returns a mapping, whose keys are all different."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == MERGE:
                raise _refuse("merge keys (<<) are not allowed", key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            try:
                is_twice = key in seen
            except TypeError:  # a list; the parent class says so
                break
            if is_twice:
                raise _refuse(f"the key '{str(key)[:60]}' is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: ScalarNode | MappingNode) -> Any:
        """Returns a scalar's text; a number in it has a length that can be computed with."""
        value = super().construct_scalar(node)
        if node.tag in NUMBERS and len(value) > MAX_NUMBER_LENGTH:
            raise _refuse(f"a number of {len(value):,} characters", node.start_mark)
        if node.tag in NUMBERS and ODD_NUMBER.fullmatch(value):
            raise _refuse(f"'{value}' is an octal or a sexagesimal number to YAML: write it in tens", node.start_mark)
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise _refuse("half of a surrogate pair is no character", node.start_mark)
        return value


def _refuse(problem: str, mark: Any) -> MarkedYAMLError:
    return MarkedYAMLError(problem=problem, problem_mark=mark)
