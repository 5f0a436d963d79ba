"""From a parsed record (a JSON value, a row of a table) to documents: which field, which template, which prompt."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lora_gpt2.core.errors import DataError
from lora_gpt2.data.read.layouts import Note, is_usual, note_unread, recognise_record
from lora_gpt2.recipe import DataSettings

USUAL_FIELD = "text"
PLACEHOLDER = re.compile(r"\{([\w.-]+)\}")
FIELD_HINT = "name it with --set data.text_field=NAME, or build it with --set data.template='{a} {b}'"
FIX_HINT = "fix or remove it, or set it aside with --skip-bad"


@dataclass(frozen=True)
class Document:
    """One piece of text and where it stood, such as `a.jsonl:12`; its prompt comes before it and carries no loss."""

    text: str
    origin: str
    prompt: str = ""
    continues: bool = False
    """True if it is a later piece of a long document."""
    is_code: bool = False
    """True for a file of source code."""


Reading = Iterator[Document | DataError]


def parse_json(text: str, where: str) -> Any:
    """Returns a JSON value; raises `DataError` with file:line for anything else, deep nesting included.

    NaN and infinities, which pandas writes for what is missing, are numbers: only a field that is read is refused.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        location = f"{where}:{error.lineno}" if error.lineno > 1 else where
        raise DataError(f"{location}: not JSON: {error.msg}, column {error.colno}", FIX_HINT) from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DataError(f"{where}: not JSON: {reason}", FIX_HINT) from error


def build_documents(record: Any, where: str, settings: DataSettings, note: Note = lambda text: None) -> Reading:
    """Yields the documents of one record: one, or one for each item of a list that `text_field` leads through.

    `note` hears of a layout that was recognised without being named.
    """
    try:
        if not isinstance(record, dict):
            yield Document(_check(record, where), where)
        elif settings.template:
            prompt = _fill(settings.prompt, record, where, settings)
            yield Document(_fill(settings.template, record, where, settings), where, prompt)
        elif settings.prompt or (is_pair(record) and settings.text_field not in record):
            prompt = _fill(settings.prompt or "{prompt}", record, where, settings)
            field = settings.text_field if settings.prompt else "completion"
            if not settings.prompt:
                note_unread(record, {"prompt", "completion"}, where.rpartition(":")[0] or where, note)
            yield Document(_check(_walk_one(record, field, where), f"{where}:{field}"), where, prompt)
        elif (
            is_free(settings)
            and settings.text_field not in record
            and (usual := recognise_record(record, settings.item_template, where.rpartition(":")[0] or where, note))
        ):
            yield Document(_check(usual.text, where), where, _check(usual.prompt, where))
        else:
            found = list(_walk(record, settings.text_field.split("."), where))
            for number, (value, location) in enumerate(found, start=1):
                shown = f"{where}[{number}]" if len(found) > 1 else where
                yield Document(_check(value, location), shown)
    except DataError as error:
        yield error


def is_free(settings: DataSettings) -> bool:
    """True if the settings do not say how a record becomes a document: they name no field but the usual one.

    This is a question of values, not of what was typed, so that stored settings read text as they did in training.
    """
    return not settings.template and not settings.prompt and settings.text_field == USUAL_FIELD


def is_pair(record: dict[str, Any]) -> bool:
    """True for the usual form of a prompt and its completion."""
    return "prompt" in record and "completion" in record


def is_record(value: dict[str, Any], settings: DataSettings) -> bool:
    """True for an object that is a document itself; else it holds the list of them."""
    if all(name in value for name in list_fields(settings)) or (is_pair(value) and not settings.template):
        return True
    return is_free(settings) and is_usual(value)


def list_fields(settings: DataSettings) -> list[str]:
    """Returns the top-level fields that the settings take a document from."""
    templates = [settings.template] if settings.template else [f"{{{settings.text_field}}}"]
    names = [name for text in [settings.prompt, *templates] for name in PLACEHOLDER.findall(text)]
    return list(dict.fromkeys(name.partition(".")[0] for name in names))


def _walk(value: Any, path: list[str], where: str) -> Iterator[tuple[Any, str]]:
    """Yields what a dotted path leads to, and its place; a list on the way gives each of its items."""
    if isinstance(value, list) and path:
        for number, item in enumerate(value, start=1):
            yield from _walk(item, path, f"{where}[{number}]")
    elif not path:
        yield value, where
    elif isinstance(value, dict) and ".".join(path) in value:  # a key may hold dots itself
        yield value[".".join(path)], f"{where}:{'.'.join(path)}"
    elif isinstance(value, dict) and path[0] in value:
        yield from _walk(value[path[0]], path[1:], f"{where}:{path[0]}")
    else:
        known = ", ".join(sorted(map(str, value))[:8]) if isinstance(value, dict) else type(value).__name__
        raise DataError(f"{where}: no field '{path[0]}' (found: {known or 'none'})", FIELD_HINT)


def _walk_one(record: Any, field: str, where: str) -> Any:
    found = list(_walk(record, field.split("."), where))
    return found[0][0] if len(found) == 1 else [value for value, _ in found]


def _check(value: Any, where: str) -> str:
    if not isinstance(value, str):
        found = "NaN" if isinstance(value, float) and math.isnan(value) else type(value).__name__
        raise DataError(f"{where}: expected text, found {found}", FIELD_HINT)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: character {error.start} is half of a surrogate pair", FIX_HINT) from error
    return value


def _fill(template: str, record: Any, where: str, settings: DataSettings) -> str:
    """Returns a template with each `{field}` replaced; numbers and booleans as JSON, lists by the item template."""

    def show(match: re.Match[str]) -> str:
        value = _walk_one(record, match[1], where)
        if isinstance(value, list):
            lines = [item if isinstance(item, str) else _fill_item(item, where, settings) for item in value]
            return "\n".join(_check(line, where) for line in lines)
        if isinstance(value, int | float) and math.isfinite(value):
            return str(value).lower() if isinstance(value, bool) else str(value)
        return _check(value, f"{where}:{match[1]}")

    return PLACEHOLDER.sub(show, template)


def _fill_item(item: Any, where: str, settings: DataSettings) -> str:
    def show(match: re.Match[str]) -> str:
        return str(_check(_walk_one(item, match[1], where), f"{where}:{match[1]}"))

    return PLACEHOLDER.sub(show, settings.item_template)
