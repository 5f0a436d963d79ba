"""Blind comparison by people: who wrote what is hidden and shuffled; answers are kept as they come.

A round is a folder: `round.json` has the prompts, the texts and the key; `answers.jsonl` gets a line per answer, so an
interruption loses none. A task is two texts of one prompt (pairwise) or one text (scale); tasks are numbered, and what
a rater sees, in a terminal or a form, names no adapter.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lora_gpt2.core.errors import ConflictError, DataError, NotFoundError, UsageError
from lora_gpt2.core.paths import os_errors_as_ours, write_atomic
from lora_gpt2.evaluation.agreement import (
    count_missing,
    count_wins,
    fit_bradley_terry,
    list_pairs,
    measure_alpha,
)
from lora_gpt2.evaluation.bootstrap import MIN_DOCUMENTS, draw_counts, find_interval

ROUND, ANSWERS = "round.json", "answers.jsonl"
CRITERIA = ("coherence", "relevance", "fluency", "style")
SIDES = {"first": 1.0, "second": 0.0, "tie": 0.5}
ROUNDS = 300
MAX_RATER = 60
Mode = Literal["pairwise", "scale"]


@dataclass(frozen=True)
class Task:
    """What is judged at once: the prompt and the texts, whose writers are `adapters`."""

    number: int
    prompt: str
    texts: tuple[str, ...]
    adapters: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """One judgement: `first`, `second` or `tie` of a pair, in the key's order, or 1 to 5."""

    rater: str
    task: int
    criterion: str
    value: str | int


@dataclass(frozen=True)
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
        singles = [(place,) for place in range(len(self.adapters))]
        groups: Sequence[tuple[int, ...]] = list_pairs(self.adapters) if self.mode == "pairwise" else singles
        tasks: list[Task] = []
        for prompt, texts in zip(self.prompts, self.texts, strict=True):
            for group in groups:
                shown = tuple(texts[a] for a in group)
                if len(shown) == 1 or shown[0] != shown[1]:
                    tasks.append(Task(len(tasks), prompt, shown, tuple(self.adapters[a] for a in group)))
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


def write_round(folder: Path, made: Round) -> None:
    """Writes a new round; raises `ConflictError` if the folder has one."""
    with os_errors_as_ours(f"write {folder}"):
        check_free(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / ROUND, (json.dumps(asdict(made), indent=1, ensure_ascii=False) + "\n").encode())


def read_round(folder: Path) -> Round:
    """Returns the round in a folder; raises `NotFoundError` without one, `DataError` if it cannot be read."""
    try:
        with os_errors_as_ours(f"read {folder}"):
            values = json.loads((folder / ROUND).read_text(encoding="utf-8"))
        made = Round(
            str(values["base"]), tuple(values["adapters"]), tuple(values["prompts"]),
            tuple(tuple(texts) for texts in values["texts"]), values["mode"], tuple(values["criteria"]),
        )  # fmt: skip
    except NotFoundError as error:
        raise NotFoundError(
            f"{folder} has no round", "begin one: rate --adapter A --adapter B --prompts FILE"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / ROUND} is damaged", "restore it, or begin anew with another --out") from error
    is_whole = len(made.prompts) == len(made.texts) and {len(texts) for texts in made.texts} == {len(made.adapters)}
    if not is_whole or made.mode not in ("pairwise", "scale"):
        raise DataError(f"{folder / ROUND} is damaged", "restore it, or begin anew with another --out")
    return made


def order_tasks(made: Round, rater: str) -> list[tuple[Task, bool]]:
    """Returns the tasks in this rater's order, and whether the second text stands first."""
    generator = random.Random(f"{rater}/{len(made.prompts)}")  # noqa: S311 - an order, no secret
    tasks = list(made.tasks)
    generator.shuffle(tasks)
    return [(task, len(task.texts) == 2 and generator.random() < 0.5) for task in tasks]


def check_rater(rater: str) -> str:
    """Returns a rater's name; raises `UsageError` if it is none."""
    if not rater.strip() or len(rater) > MAX_RATER or not rater.isprintable():
        raise UsageError(f"a rater's name has 1 to {MAX_RATER} characters", "give --rater NAME")
    return rater.strip()


def check_answer(made: Round, values: Any) -> Answer:
    """Returns an answer from JSON values; raises `DataError` if it does not belong to the round."""
    try:
        answer = Answer(str(values["rater"]), values["task"], str(values["criterion"]), values["value"])
    except (KeyError, TypeError) as error:
        raise DataError("an answer has rater, task, criterion and value", "use what the form saved") from error
    allowed: tuple[Any, ...] = tuple(SIDES) if made.mode == "pairwise" else (1, 2, 3, 4, 5)
    numbers = range(len(made.tasks))
    is_right = isinstance(answer.task, int) and not isinstance(answer.task, bool) and answer.task in numbers
    if not (is_right and answer.criterion in made.criteria and answer.value in allowed) or answer.value is True:
        raise DataError(f"an answer to task {str(answer.task)[:20]} is not of this round", "use the form of this round")
    check_rater(answer.rater)
    return answer


def add_answers(folder: Path, answers: Iterable[Answer]) -> None:
    """Appends answers, each a line; a half line that an interruption left goes."""
    lines = "".join(json.dumps(vars(answer)) + "\n" for answer in answers)
    with os_errors_as_ours(f"write {folder / ANSWERS}"), (folder / ANSWERS).open("a+b") as file:
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        file.write(lines.encode())


def read_answers(folder: Path, made: Round) -> list[Answer]:
    """Returns the answers, the newest of each rater to each question; a half line at the end is none."""
    try:
        with os_errors_as_ours(f"read {folder / ANSWERS}"):
            content = (folder / ANSWERS).read_text(encoding="utf-8", errors="replace")
    except NotFoundError:
        return []
    found: dict[tuple[str, int, str], Answer] = {}
    for number, line in enumerate(content.split("\n")[:-1], start=1):
        try:
            answer = check_answer(made, json.loads(line))
        except ValueError as error:
            raise DataError(f"{folder / ANSWERS}:{number} is not JSON", "remove the line") from error
        found[answer.rater, answer.task, answer.criterion] = answer
    return list(found.values())


def import_answers(folder: Path, made: Round, paths: Sequence[Path]) -> int:
    """Adds the answers of files that the form saved; returns how many were new or changed."""
    known = set(read_answers(folder, made))
    fresh: list[Answer] = []
    for path in paths:
        with os_errors_as_ours(f"read {path}"):
            content = path.read_text(encoding="utf-8-sig", errors="replace")
        values = check_saved(made, content, str(path))
        fresh += [answer for answer in (check_answer(made, item) for item in values) if answer not in known]
    add_answers(folder, fresh)
    return len(fresh)


def check_saved(made: Round, content: str | bytes, where: str) -> list[Any]:
    """Returns the answers in what a form saved or sent; raises `DataError` if it is none, or of another round."""
    try:
        saved = json.loads(content)
        identity, values = saved["round"], saved["answers"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{where} holds no answers", "give the file that the form saves") from error
    if identity != made.identity or not isinstance(values, list):
        raise DataError(f"{where} is of another round", "give it with --out DIR of its own round")
    return values


def find_open(made: Round, answers: Sequence[Answer], rater: str) -> list[tuple[Task, bool]]:
    """Returns the tasks that a rater has not fully answered, in order."""
    done = {(a.task, a.criterion) for a in answers if a.rater == rater}
    return [
        (task, swapped) for task, swapped in order_tasks(made, rater)
        if any((task.number, criterion) not in done for criterion in made.criteria)
    ]  # fmt: skip


def measure_round(made: Round, answers: Sequence[Answer]) -> dict[str, Any]:
    """Returns ranking, agreement and what is missing; the keys are those of `rate --json`."""
    report: dict[str, Any] = {
        "mode": made.mode, "criteria": list(made.criteria), "raters": sorted({a.rater for a in answers}),
        "tasks": len(made.tasks), "answers": len(answers),
        "agreement": measure_agreement(made, answers),
    }  # fmt: skip
    rank = _rank_pairs if made.mode == "pairwise" else _rank_scales
    report["ranking"] = rank(made, answers)
    report["by_criterion"] = {c: rank(made, [a for a in answers if a.criterion == c]) for c in made.criteria}
    report["missing"] = find_missing(made, answers)
    return report


def measure_agreement(made: Round, answers: Sequence[Answer]) -> dict[str, float | None]:
    """Returns Krippendorff's alpha for each criterion and over all: nominal for pairs, ordinal for 1 to 5.

    Of every other task the sides are turned round: if one adapter were always named first, and were the better, chance
    alone would seem to agree.
    """
    units: dict[tuple[int, str], list[float]] = {}
    for answer in answers:
        value = _to_number(answer)
        value = 1 - value if made.mode == "pairwise" and answer.task % 2 else value
        units.setdefault((answer.task, answer.criterion), []).append(value)
    metric: Literal["nominal", "ordinal"] = "nominal" if made.mode == "pairwise" else "ordinal"
    found = {c: measure_alpha([v for (_, name), v in units.items() if name == c], metric) for c in made.criteria}
    return {**found, "overall": measure_alpha(list(units.values()), metric)}


def _to_number(answer: Answer) -> float:
    """Returns 1 for the first of a pair, 0 for the second, or the mark."""
    return SIDES[answer.value] if isinstance(answer.value, str) else float(answer.value)


def _collect(made: Round, answers: Sequence[Answer]) -> dict[int, list[float]]:
    """Returns for each task its judgements, the mean over the criteria of each rater: 1 is the first adapter."""
    judged: dict[tuple[int, str], list[float]] = {}
    for answer in answers:
        judged.setdefault((answer.task, answer.rater), []).append(_to_number(answer))
    found: dict[int, list[float]] = {}
    for (task, _), values in judged.items():
        found.setdefault(task, []).append(float(np.mean(values)))
    return found


def _rank_pairs(made: Round, answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Returns the adapters by Bradley-Terry strength, with intervals from a bootstrap over tasks."""
    tasks, judged = {task.number: task for task in made.tasks}, _collect(made, answers)
    place = {name: index for index, name in enumerate(made.adapters)}
    number = len(made.adapters)
    table = np.array(
        [count_wins({(place[tasks[t].adapters[0]], place[tasks[t].adapters[1]]): v}, number) for t, v in judged.items()]
    ).reshape(-1, number, number)
    wins = table.sum(axis=0)
    strengths = fit_bradley_terry(wins)
    draws = draw_counts(len(table), ROUNDS) if is_varied(table) else np.zeros((0, len(table)))
    resampled = [fit_bradley_terry(np.tensordot(counts, table, axes=1)) for counts in draws]
    rows = []
    for index, name in enumerate(made.adapters):
        games = wins[index].sum() + wins[:, index].sum()
        rows.append({
            "adapter": name, "strength": float(strengths[index]),
            "interval": find_interval([s[index] for s in resampled]) if resampled else None,
            "preferred": float(wins[index].sum() / games) if games else None, "judgements": round(float(games)),
        })  # fmt: skip
    return sorted(rows, key=lambda row: -row["strength"])


def is_varied(values: np.ndarray) -> bool:
    """True if a bootstrap over tasks says something: there are some, and not all the same."""
    return len(values) >= MIN_DOCUMENTS and bool((values != values[:1]).any())


def _rank_scales(made: Round, answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Returns the adapters by their mean, with intervals from a bootstrap over tasks."""
    tasks, judged = {task.number: task for task in made.tasks}, _collect(made, answers)
    rows: list[dict[str, Any]] = []
    for name in made.adapters:
        means = np.array([np.mean(v) for t, v in judged.items() if tasks[t].adapters[0] == name])
        draws = draw_counts(len(means), ROUNDS) @ means / len(means) if is_varied(means) else None
        rows.append({
            "adapter": name, "mean": float(means.mean()) if len(means) else None,
            "interval": find_interval(draws) if draws is not None else None,
            "judgements": sum(len(v) for t, v in judged.items() if tasks[t].adapters[0] == name),
        })  # fmt: skip
    return sorted(rows, key=lambda row: -(row["mean"] or 0.0))


def find_missing(made: Round, answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Returns for each two adapters how often the first is preferred, and about how many more ratings would settle it.

    A rating is the mean of all raters on one task: raters of one text are not independent of each other. On a scale,
    two texts of one prompt are compared that the same rater has judged.
    """
    rows = []
    for first, second in list_pairs(made.adapters):
        a, b = made.adapters[first], made.adapters[second]
        outcomes = _compare(made, answers, a, b)
        share = float(np.mean(outcomes)) if outcomes else None
        rows.append({"a": a, "b": b, "ratings": len(outcomes), "a_preferred": share, "more": count_missing(outcomes)})
    return rows


def _compare(made: Round, answers: Sequence[Answer], a: str, b: str) -> list[float]:
    tasks = {task.number: task for task in made.tasks}
    if made.mode == "pairwise":
        judged = _collect(made, answers)
        return [float(np.mean(values)) for t, values in judged.items() if tasks[t].adapters == (a, b)]
    given: dict[tuple[str, str], Mapping[str, list[float]]] = {}
    for answer in answers:
        task = tasks[answer.task]
        marks = given.setdefault((answer.rater, task.prompt), {a: [], b: []})
        if task.adapters[0] in marks:
            marks[task.adapters[0]].append(float(answer.value))
    found: dict[str, list[float]] = {}
    for (_, prompt), marks in given.items():
        if marks[a] and marks[b]:
            outcome = 0.5 + 0.5 * float(np.sign(np.mean(marks[a]) - np.mean(marks[b])))
            found.setdefault(prompt, []).append(outcome)
    return [float(np.mean(outcomes)) for outcomes in found.values()]
