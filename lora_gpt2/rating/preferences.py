"""Pairs of texts of which people preferred one: from files of pairs, from rounds of `rate`, from choices of the page.

Files have `prompt`, `chosen` and `rejected`, as TRL's data sets do, in any format that training reads. A pair is
decided by the majority of the answers to it; ties are counted and left out.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import fmean

from lora_gpt2.core.errors import DataError
from lora_gpt2.data.read.formats import read_documents
from lora_gpt2.data.read.records import FIELD_HINT
from lora_gpt2.data.tokenizer import EOS
from lora_gpt2.inference.history import read_log
from lora_gpt2.rating.rounds import ROUND, Round, read_answers, read_round
from lora_gpt2.rating.votes import list_marks, list_votes
from lora_gpt2.recipe import DataSettings

BETWEEN = "\x1e"  # stands between the two texts of a record while it is read
END = re.compile(rf"(\s*{re.escape(EOS)}\s*)+\Z")  # pairs for other tools end with it; here every text does
PAIRS = DataSettings(template=f"{{chosen}}{BETWEEN}{{rejected}}", prompt="{prompt}")


@dataclass(frozen=True, kw_only=True)
class Preference:
    """Two continuations of a prompt, of which the first was preferred; `is_whole` if they end where the text does."""

    prompt: str
    chosen: str
    rejected: str
    is_whole: bool = False


@dataclass(kw_only=True)
class Preferences:
    """What was preferred, and how many pairs were left out as ties."""

    pairs: list[Preference] = field(default_factory=list)
    num_ties: int = 0

    def add(self, prompt: str, first: str, second: str, lead: float, is_whole: bool = False) -> None:
        """Adds a pair; `lead` is positive where the first text was preferred, 0 for a tie."""
        if not lead or first == second:
            self.num_ties += 1
            return
        chosen, rejected = (first, second) if lead > 0 else (second, first)
        self.pairs.append(Preference(prompt=prompt, chosen=chosen, rejected=rejected, is_whole=is_whole))


def read_preferences(sources: Sequence[str]) -> Preferences:
    """Returns the pairs of files, rounds and recorded choices, in order.

    Raises:
        NotFoundError: there is no such file.
        DataError: a record has no such fields, or choices were recorded without their texts.
    """
    found = Preferences()
    for source in sources:
        path = Path(source)
        if (path / ROUND).is_file():
            _add_round(found, path)
        elif _holds_choices(path):
            _add_choices(found, path)
        else:
            _add_pairs(found, source)
    return found


def _add_pairs(found: Preferences, source: str) -> None:
    try:
        for document in read_documents([source], PAIRS, splits_marks=False):
            first, _, second = (END.sub("", text) for text in document.text.partition(BETWEEN))
            found.add(document.prompt, first, second, 1, is_whole=True)
    except DataError as error:
        hint = error.hint if error.hint != FIELD_HINT else "pairs have the fields prompt, chosen and rejected"
        raise DataError(error.message, hint) from error


def _holds_choices(path: Path) -> bool:
    """True if the first line of a file is a choice that `serve`'s page recorded."""
    try:
        with path.open("rb") as file:
            record = json.loads(file.readline(1_000_000))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and "models" in record and ("chosen" in record or "marks" in record)


def _add_choices(found: Preferences, path: Path) -> None:
    """Adds, of each choice among several texts, the chosen one before each of the others; of marks, the higher mean."""
    records = read_log(path)
    votes, marks = list_votes(records), [each for each in list_marks(records) if each.texts]
    with_texts = [vote for vote in votes if vote.texts]
    if not with_texts and not marks:
        raise DataError(
            f"the choices of {path} were recorded without their texts", "choose anew on the page of 'serve'"
        )
    for vote in with_texts:
        texts = dict(zip(vote.models, vote.texts, strict=True))
        for model in vote.models:
            if model != vote.chosen:
                found.add(vote.prompt, texts[vote.chosen], texts[model], 1)
    for each in marks:
        columns = zip(*each.marks.values(), strict=True)
        means = [fmean(known) if (known := [m for m in column if m is not None]) else None for column in columns]
        for (first, one), (second, other) in combinations(zip(each.texts, means, strict=True), 2):
            if one is not None and other is not None:
                found.add(each.prompt, first, second, one - other)


def _add_round(found: Preferences, folder: Path) -> None:
    round_ = read_round(folder)
    leads: dict[int, list[float]] = defaultdict(list)
    for answer in read_answers(folder, round_):
        leads[answer.task].append({"first": 1, "second": -1, "tie": 0}.get(str(answer.value), answer.value))  # type: ignore[arg-type]
    means = {task: fmean(values) for task, values in leads.items()}
    for prompt, first, second, lead in _iter_judged(round_, means):
        found.add(prompt, first, second, lead)


def _iter_judged(round_: Round, means: dict[int, float]) -> Iterable[tuple[str, str, str, float]]:
    """Yields prompt, two texts, and by how much the first was preferred, for each pair that somebody has judged."""
    if round_.mode == "pairwise":
        for task in round_.tasks:
            if task.number in means:
                yield task.prompt, *task.texts, means[task.number]  # type: ignore[misc]
        return
    by_prompt: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for task in round_.tasks:
        if task.number in means:
            by_prompt[task.prompt].append((task.texts[0], means[task.number]))
    for prompt, judged in by_prompt.items():
        for (first, one), (second, other) in combinations(judged, 2):
            yield prompt, first, second, one - other
