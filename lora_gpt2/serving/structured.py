"""How a request constrains its output: OpenAI's `response_format`, and what vLLM's clients send.

`guided_json`, `guided_regex`, `guided_choice` and `guided_grammar`, or the same inside `structured_outputs` without the
prefix, become the settings `generate.*` of the same meaning. At most one of them may be there.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from lora_gpt2.core.strict_json import load_json
from lora_gpt2.recipe import CONSTRAINTS

KINDS = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}
"""From vLLM's names to those of `generate.*`."""
ANY_OBJECT = {"type": "object"}
MOST_CHOICES = 1000


class StructuredFields(BaseModel):
    """The parameters of a request that constrain its output; numbers are numbers, not texts or truth values."""

    model_config = ConfigDict(extra="forbid", strict=True)

    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


def read_constraint(body: StructuredFields) -> dict[str, Any]:
    """Returns the settings `generate.*` that a request's constraint comes to; empty if it has none.

    Raises `ValueError` that names a parameter, and says what it may be.
    """
    found = {kind: getattr(body, f"guided_{kind}") for kind in KINDS}
    found = {kind: value for kind, value in found.items() if value is not None}
    asked = [f"guided_{kind}" for kind in found]
    if structured := _read_structured(body.structured_outputs or {}):
        asked += [f"structured_outputs.{kind}" for kind in structured]
        found |= structured
    if body.response_format is not None:
        described = _read_format(body.response_format)
        if described or not asked:  # a text without a constraint goes with any
            found |= described
            asked.append("response_format")
    if len(asked) > 1:
        raise ValueError(f"{asked[0].partition('.')[0]}: only one constraint at a time, found {', '.join(asked)}")
    if not asked:
        return {}
    empty: dict[str, Any] = {"choice": (), "regex": "", "json_schema": None, "grammar": ""}
    name = asked[0].partition(".")[0]
    own = {KINDS[kind]: _parse(kind, value, name) for kind, value in found.items()}
    return {**{name: empty[name] for name in CONSTRAINTS}, **own, "constrained": bool(own)}


def _read_structured(values: dict[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in values.items() if value is not None and value is not False}
    if unknown := set(found) - {*KINDS, "json_object"}:
        known = ", ".join([*KINDS, "json_object"])
        raise ValueError(f"structured_outputs: there is no '{min(unknown)}'; it has {known}")
    if found.pop("json_object", None):
        found.setdefault("json", ANY_OBJECT)
    return found


def _read_format(values: dict[str, Any]) -> dict[str, Any]:
    kind = values.get("type")
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json": ANY_OBJECT}
    described = values.get("json_schema")
    if kind != "json_schema" or not isinstance(described, dict) or not isinstance(described.get("schema"), dict):
        raise ValueError(
            "response_format: its type is text, json_object, or json_schema with json_schema={'schema': {...}}"
        )
    if unknown := described.keys() - {"name", "description", "schema", "strict"}:
        raise ValueError(f"response_format: json_schema has no '{min(unknown)}'")
    return {"json": described["schema"]}


def _parse(kind: str, value: Any, name: str) -> Any:
    if kind == "json" and isinstance(value, str):
        try:
            value = load_json(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}: the schema is not JSON") from error
    if kind == "json" and not isinstance(value, dict):
        raise ValueError(f"{name}: a schema is a JSON object")
    if kind == "choice" and not (isinstance(value, list) and value and all(isinstance(v, str) and v for v in value)):
        raise ValueError(f"{name}: choices are texts")
    if kind == "choice" and len(value) > MOST_CHOICES:
        raise ValueError(f"{name}: {len(value)} choices, at most {MOST_CHOICES} are allowed")
    if kind in ("regex", "grammar") and not (isinstance(value, str) and value):
        raise ValueError(f"{name}: expected a text")
    return value
