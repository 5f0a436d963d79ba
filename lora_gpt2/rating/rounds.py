"""Blind comparison by people: who wrote what is hidden and shuffled; answers are kept as they come.

A round is a folder: `round.json` has the prompts, the texts and the key; `answers.jsonl` gets a line per answer, so an
interruption loses none. A task is two texts of one prompt (pairwise) or one text (scale); tasks are numbered, and what
a rater sees, in a terminal or a form, names no adapter.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from lora_gpt2.core.errors import ConflictError, DataError, NotFoundError, UsageError
from lora_gpt2.core.files import wrap_os_errors, write_atomic
from lora_gpt2.core.printable import show_value
from lora_gpt2.core.user_files import check_output, read_user_text

ROUND, ANSWERS = "round.json", "answers.jsonl"
CRITERIA = ("coherence", "relevance", "fluency", "style")
SIDES = ("first", "second", "tie")
MAX_RATER = 60
Mode = Literal["pairwise", "scale"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is judged at once: the prompt, by its index in the round too, and texts, whose writers are `adapters`."""

    number: int
    prompt_index: int
    prompt: str
    texts: tuple[str, ...]
    adapters: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One judgement: `first`, `second` or `tie` of a pair, in the key's order, or 1 to 5."""

    rater: str
    task: int
    criterion: str
    value: str | int


@dataclass(frozen=True, kw_only=True)
class Round:
    """The texts of every adapter for every prompt, `texts[prompt][adapter]`, and how they are judged."""

    base: str
    adapters: tuple[str, ...]
    prompts: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    mode: Mode = "pairwise"
    criteria: tuple[str, ...] = CRITERIA

    @cached_property
    def tasks(self) -> list[Task]:
        """Every task, numbered; pairs of equal texts are none."""
        groups = list(combinations(range(len(self.adapters)), 2 if self.mode == "pairwise" else 1))
        tasks: list[Task] = []
        for index, (prompt, texts) in enumerate(zip(self.prompts, self.texts, strict=True)):
            for group in groups:
                shown = tuple(texts[a] for a in group)
                if len(shown) == 1 or shown[0] != shown[1]:
                    writers = tuple(self.adapters[a] for a in group)
                    task = Task(number=len(tasks), prompt_index=index, prompt=prompt, texts=shown, adapters=writers)
                    tasks.append(task)
        return tasks

    @cached_property
    def identity(self) -> str:
        """What tells the round from others: its tasks, mode and criteria."""
        shown = [[(task.prompt, task.texts) for task in self.tasks], self.mode, self.criteria]
        return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]


def check_free(folder: Path) -> None:
    """Raises `ConflictError` if the folder has a round."""
    if (folder / ROUND).exists():
        raise ConflictError(f"{folder} has a round already", "go on with it without --adapter, or choose --out DIR")


def write_round(folder: Path, round_: Round) -> None:
    """Writes a new round; raises `ConflictError` if the folder has one."""
    with wrap_os_errors(f"write {folder}"):
        check_free(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / ROUND, (json.dumps(asdict(round_), indent=1, ensure_ascii=False) + "\n").encode())


def read_round(folder: Path) -> Round:
    """Returns the round in a folder; raises `NotFoundError` without one, `DataError` if it cannot be read."""
    try:
        values = json.loads(read_user_text(folder / ROUND))
        round_ = Round(
            base=str(values["base"]),
            adapters=tuple(values["adapters"]),
            prompts=tuple(values["prompts"]),
            texts=tuple(tuple(texts) for texts in values["texts"]),
            mode=values["mode"],
            criteria=tuple(values["criteria"]),
        )
    except NotFoundError as error:
        raise NotFoundError(
            f"{folder} has no round", "begin one: rate --adapter A --adapter B --prompts FILE"
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{folder / ROUND} is damaged", "restore it, or begin anew with another --out") from error
    is_whole = len(round_.prompts) == len(round_.texts) and {len(texts) for texts in round_.texts} == {
        len(round_.adapters)
    }
    if not is_whole or round_.mode not in ("pairwise", "scale"):
        raise DataError(f"{folder / ROUND} is damaged", "restore it, or begin anew with another --out")
    return round_


def order_tasks(round_: Round, rater: str) -> list[tuple[Task, bool]]:
    """Returns the tasks in this rater's order, and whether the second text stands first."""
    generator = random.Random(f"{rater}/{len(round_.prompts)}")  # noqa: S311 - an order, no secret
    tasks = list(round_.tasks)
    generator.shuffle(tasks)
    return [(task, len(task.texts) == 2 and generator.random() < 0.5) for task in tasks]


def check_rater(rater: str) -> str:
    """Returns a rater's name; raises `UsageError` if it is none."""
    if not rater.strip() or len(rater) > MAX_RATER or not rater.isprintable():
        raise UsageError(f"a rater's name has 1 to {MAX_RATER} characters", "give --rater NAME")
    return rater.strip()


def check_answer(round_: Round, values: Any) -> Answer:
    """Returns an answer from JSON values; raises `DataError` if it does not belong to the round."""
    try:
        answer = Answer(
            rater=str(values["rater"]), task=values["task"], criterion=str(values["criterion"]), value=values["value"]
        )
    except (KeyError, TypeError) as error:
        raise DataError("an answer has rater, task, criterion and value", "use what the form saved") from error
    allowed: tuple[Any, ...] = SIDES if round_.mode == "pairwise" else (1, 2, 3, 4, 5)
    numbers = range(len(round_.tasks))
    is_right = isinstance(answer.task, int) and not isinstance(answer.task, bool) and answer.task in numbers
    if not (is_right and answer.criterion in round_.criteria and answer.value in allowed) or answer.value is True:
        raise DataError(
            f"an answer to task {show_value(answer.task, 20)} is not of this round", "use the form of this round"
        )
    check_rater(answer.rater)
    return answer


def add_answers(folder: Path, answers: Iterable[Answer]) -> None:
    """Appends answers, each a line; a half line that an interruption left goes."""
    check_output(folder / ANSWERS)
    lines = "".join(json.dumps(vars(answer)) + "\n" for answer in answers)
    with wrap_os_errors(f"write {folder / ANSWERS}"), (folder / ANSWERS).open("a+b") as file:
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        file.write(lines.encode())


def read_answers(folder: Path, round_: Round) -> list[Answer]:
    """Returns the answers, the newest of each rater to each question; a half line at the end is none."""
    try:
        content = read_user_text(folder / ANSWERS, errors="replace")
    except NotFoundError:
        return []
    found: dict[tuple[str, int, str], Answer] = {}
    for number, line in enumerate(content.split("\n")[:-1], start=1):
        try:
            answer = check_answer(round_, json.loads(line))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{folder / ANSWERS}:{number} is not JSON", "remove the line") from error
        found[answer.rater, answer.task, answer.criterion] = answer
    return list(found.values())


def import_answers(folder: Path, round_: Round, paths: Sequence[Path]) -> int:
    """Adds the answers of files that the form saved; returns how many were new or changed."""
    known = set(read_answers(folder, round_))
    fresh: list[Answer] = []
    for path in paths:
        values = check_saved(round_, read_user_text(path, errors="replace"), str(path))
        fresh += [answer for answer in (check_answer(round_, item) for item in values) if answer not in known]
    add_answers(folder, fresh)
    return len(fresh)


def check_saved(round_: Round, content: str | bytes, where: str) -> list[Any]:
    """Returns the answers in what a form saved or sent; raises `DataError` if it is none, or of another round."""
    try:
        saved = json.loads(content)
        identity, values = saved["round"], saved["answers"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{where} holds no answers", "give the file that the form saves") from error
    if identity != round_.identity or not isinstance(values, list):
        raise DataError(f"{where} is of another round", "give it with --out DIR of its own round")
    return values


def find_open(round_: Round, answers: Sequence[Answer], rater: str) -> list[tuple[Task, bool]]:
    """Returns the tasks that a rater has not fully answered, in order."""
    done = {(a.task, a.criterion) for a in answers if a.rater == rater}
    return [
        (task, swapped)
        for task, swapped in order_tasks(round_, rater)
        if any((task.number, criterion) not in done for criterion in round_.criteria)
    ]
