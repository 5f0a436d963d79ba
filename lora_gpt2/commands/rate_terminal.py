"""A round of ratings in the terminal: a task at a time, each answer saved as it is given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from lora_gpt2.core.printable import printable
from lora_gpt2.rating.rounds import Answer, Round, Task, add_answers, find_open, read_answers

KEYS: dict[str, dict[str, str | int]] = {
    "pairwise": {"1": "first", "2": "second", "0": "tie"},
    "scale": {str(n): n for n in range(1, 6)},
}
QUESTION = {"pairwise": "better is 1, 2, or 0 for equally good", "scale": "1 is bad, 5 is very good"}


def ask_in_terminal(folder: Path, round_: Round, rater: str) -> None:
    """Asks in the terminal until all is answered or the rater stops."""
    tasks = find_open(round_, read_answers(folder, round_), rater)
    click.echo(f"{len(tasks)} tasks for {rater}. {QUESTION[round_.mode]}; s skips, q stops.", err=True)
    for number, (task, swapped) in enumerate(tasks, start=1):
        _show(task, swapped, f"{number} of {len(tasks)}")
        values = _read_marks(round_)
        if values is None:
            return
        if values:
            add_answers(folder, _to_answers(round_, task, swapped, rater, values))


def _show(task: Task, swapped: bool, where: str) -> None:
    texts = task.texts[::-1] if swapped else task.texts
    lines = [f"\n===== {where} ====="]
    for number, text in enumerate(texts, start=1):
        lines += [f"--- text {number}" if len(texts) > 1 else "---", task.prompt + text]
    click.echo(printable("\n".join(lines), keep_lines=True), err=True)


def _read_marks(round_: Round) -> list[str] | None:
    """Returns a mark for each criterion, none to skip; None to stop. One mark alone is for all criteria."""
    keys, number = KEYS[round_.mode], len(round_.criteria)
    asked = printable(f"{' '.join(round_.criteria)} ({'/'.join(keys)}, s, q)")
    while True:
        try:
            typed = click.prompt(asked, err=True, prompt_suffix=": ")
        except click.Abort:
            return None
        marks = typed.split()
        if marks in (["q"], ["s"]):
            return None if marks == ["q"] else []
        if all(mark in keys for mark in marks) and len(marks) in (1, number):
            return marks * number if len(marks) == 1 else marks
        click.echo(f"type {number} marks, or one for all: {QUESTION[round_.mode]}", err=True)


def _to_answers(round_: Round, task: Task, swapped: bool, rater: str, marks: Sequence[str]) -> list[Answer]:
    other = {"first": "second", "second": "first"}
    values = [KEYS[round_.mode][mark] for mark in marks]
    values = [other.get(str(value), value) if swapped else value for value in values]
    return [
        Answer(rater=rater, task=task.number, criterion=c, value=value)
        for c, value in zip(round_.criteria, values, strict=True)
    ]
