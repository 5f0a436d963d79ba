"""The usual layouts of training records, told by their fields: chats, instructions, questions, tables by column.

A recipe that names `data.text_field`, `data.template` or `data.prompt` decides itself; this is for records that do
neither hold the field `text` nor a prompt and its completion. What was recognised is said once, with the settings that
would say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CHATS = ("messages", "conversations", "conversation", "dialogue")
ROLE_KEYS, CONTENT_KEYS = ("role", "from", "speaker"), ("content", "value", "text")
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
ANSWERS = frozenset({"assistant"})
PAIRS = (
    ("prompt", "response"),
    ("question", "answer"),
    ("instruction", "response"),
    ("input", "output"),
    ("source", "target"),
    ("query", "response"),
)
SYSTEM = "system"
CONTEXTS, QUESTIONS = (SYSTEM, "context", "passage", "input"), ("question", "query")
"""Fields that belong to a prompt: before a question and after an instruction, a system prompt before either."""
CHATS_NOTE = "chats in"
TEXTS = ("content", "body", "document", "article", "story", "sentence", "raw_text")
Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Recognised:
    """A record as a prompt, which carries no loss, and the text that follows it."""

    prompt: str
    text: str


def recognise_record(record: Mapping[str, Any], item_template: str, where: str, note: Note) -> Recognised | None:
    """Returns what a record of a usual layout says, or None for any other; `note` hears which layout it is."""
    for key in CHATS:
        if (turns := _read_turns(record.get(key))) is not None:
            if (system := _read_text(record, "system")) and turns[0][0] != "system":
                turns = [("system", system), *turns]
            note(f"{where}: {CHATS_NOTE} '{key}', loss from the first answer on (data.item_template='{item_template}')")
            return _join_turns(turns, item_template)
    if isinstance(record.get("instruction"), str) and isinstance(record.get("output"), str):
        note(f"{where}: instructions, loss on the output alone (data.prompt, with data.text_field=output)")
        note_unread(record, {"instruction", "input", "output", "system"}, where, note)
        return Recognised(prompt=_build_instruction(record), text=str(record["output"]))
    for first, second in PAIRS:
        if isinstance(record.get(first), str) and isinstance(record.get(second), str):
            given = [key for key in CONTEXTS if key not in (first, second) and _read_text(record, key)]
            before = given if first in QUESTIONS else [key for key in given if key == SYSTEM]
            order = [*before, first, *(key for key in given if key not in before)]
            template = "".join(f"{{{key}}}\n" for key in order).replace("\n", "\\n")
            note(f"{where}: loss on '{second}' alone (data.prompt='{template}' data.text_field={second})")
            note_unread(record, {*order, second}, where, note)
            return Recognised(prompt="".join(f"{record[key]}\n" for key in order), text=str(record[second]))
    named = [key for key in TEXTS if isinstance(record.get(key), str)]
    if len(named) == 1:
        note(f"{where}: the text is in '{named[0]}' (data.text_field={named[0]})")
        return Recognised(prompt="", text=str(record[named[0]]))
    return None


def _read_text(record: Mapping[str, Any], key: str) -> str:
    """Returns the text of a field, "" if it has none."""
    value = record.get(key)
    return value if isinstance(value, str) and value.strip() else ""


def note_unread(record: Mapping[str, Any], read: set[str], where: str, note: Note) -> None:
    """Says which fields with longer texts, or with lists such as a history, are not read."""
    unread = [key for key, value in record.items() if key not in read and _is_content(value)]
    if unread:
        note(f"{where}: not read: {', '.join(unread)} (data.template and data.prompt say what is)")


def _is_content(value: Any) -> bool:
    return (isinstance(value, str) and " " in value.strip()) or (isinstance(value, list) and bool(value))


def has_chats(notes: Sequence[str]) -> bool:
    """True if chats were recognised, by what was said about the reading."""
    return any(f": {CHATS_NOTE} '" in str(note) for note in notes)


def is_usual(columns: Mapping[str, Any] | list[str]) -> bool:
    """True if a table with these columns has a layout that is recognised, as far as names can tell."""
    names = set(columns)
    pairs = (*PAIRS, ("instruction", "output"))
    return any({*pair} <= names for pair in pairs) or len(names & set(TEXTS)) == 1 or bool(names & set(CHATS))


def _read_turns(value: Any) -> list[tuple[str, str]] | None:
    """Returns role and content of each turn of a chat, or None if it is not one."""
    if not isinstance(value, list) or not value:
        return None
    turns = []
    for item in value:
        if not isinstance(item, Mapping):
            return None
        roles = [item[key] for key in ROLE_KEYS if isinstance(item.get(key), str)]
        contents = [item[key] for key in CONTENT_KEYS if isinstance(item.get(key), str)]
        if not roles or not contents:
            return None
        turns.append((ROLES.get(roles[0].lower(), roles[0].lower()), contents[0]))
    return turns


def _join_turns(turns: list[tuple[str, str]], item_template: str) -> Recognised:
    """Returns a chat, a line per turn; the prompt ends where the first answer begins."""
    prompt, text, has_answer = "", "", False
    for role, content in turns:
        line = item_template.replace("{role}", role).replace("{content}", content)
        if not has_answer and role in ANSWERS:
            has_answer = True
            head = line[: line.rfind(content)].rstrip(" ") if content else line
            prompt, text = text + head, line[len(head) :] + "\n"
        else:
            text += line + "\n"
    return Recognised(prompt=prompt, text=text.removesuffix("\n"))


def _build_instruction(record: Mapping[str, Any]) -> str:
    system = _read_text(record, "system")
    given = record.get("input")
    middle = f"### Input:\n{given}\n\n" if isinstance(given, str) and given.strip() else ""
    before = f"{system}\n\n" if system else ""
    return f"{before}### Instruction:\n{record['instruction']}\n\n{middle}### Response:\n"


def read_columns(value: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Returns the rows of a table that pandas wrote as JSON by column, by index or split; None if it is not one."""
    if set(value) >= {"columns", "data"} and isinstance(value["columns"], list) and isinstance(value["data"], list):
        names = [str(name) for name in value["columns"]]
        rows = [row for row in value["data"] if isinstance(row, list) and len(row) == len(names)]
        return [dict(zip(names, row, strict=True)) for row in rows] if len(rows) == len(value["data"]) else None
    inner = list(value.values())
    if not inner or not all(isinstance(column, dict) and column for column in inner):
        return None
    keys = list(inner[0])
    if any(list(column) != keys for column in inner[1:]):
        return None
    if all(key.isdecimal() for key in keys):
        return [{name: column[key] for name, column in value.items()} for key in keys]
    return inner if all(name.isdecimal() for name in value) else None
