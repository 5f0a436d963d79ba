"""Pairs of texts of which people preferred one: from files of pairs, from rounds of `rate`, from choices of the page.

Files have `prompt`, `chosen` and `rejected`, as TRL's data sets do, in any format that training reads; or `prompt`,
`completion` and `label`, true for a text that is desirable. A pair is decided by the majority of the answers to it;
ties are counted and left out.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import fmean

from lora_gpt2.core.errors import DataError
from lora_gpt2.data.read.formats import read_documents
from lora_gpt2.data.read.records import FIELD_HINT, Document
from lora_gpt2.data.tokenizer import EOS
from lora_gpt2.inference.history import read_log
from lora_gpt2.rating.rounds import ROUND, Round, read_answers, read_round
from lora_gpt2.rating.votes import list_marks, list_votes
from lora_gpt2.recipe import DataSettings

BETWEEN = "\x1e"  # stands between the two texts of a record while it is read
PAIRS = DataSettings(template=f"{{chosen}}{BETWEEN}{{rejected}}", prompt="{prompt}")
LABELLED = DataSettings(template=f"{{completion}}{BETWEEN}{{label}}", prompt="{prompt}")
LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
NO_FIELD = ": no field '"
FIELDS_HINT = "pairs have the fields prompt, chosen and rejected; labelled texts prompt, completion and label"


@dataclass(frozen=True, kw_only=True)
class Preference:
    """Two continuations of a prompt, of which the first was preferred; `is_whole` if they end where the text does.

    `rejected_prompt` and `is_rejected_whole` are those of the second text where they differ, as of labelled texts.
    """

    prompt: str
    chosen: str
    rejected: str
    is_whole: bool = False
    rejected_prompt: str | None = None
    is_rejected_whole: bool | None = None


@dataclass(frozen=True, kw_only=True)
class LabelledText:
    """A continuation of a prompt that is desirable or not; `is_whole` if it ends where the text does."""

    prompt: str
    text: str
    is_desirable: bool
    is_whole: bool = False


@dataclass(kw_only=True)
class Preferences:
    """What was preferred, and how many pairs were left out as ties; texts that are labelled one by one."""

    pairs: list[Preference] = field(default_factory=list)
    labelled: list[LabelledText] = field(default_factory=list)
    num_ties: int = 0

    @property
    def texts(self) -> list[str]:
        """Every text."""
        return [
            *(text for pair in self.pairs for text in (pair.chosen, pair.rejected)),
            *(t.text for t in self.labelled),
        ]

    def label_all(self) -> list[LabelledText]:
        """Returns all texts labelled one by one: the chosen ones of pairs are desirable, the rejected ones are not."""
        of_pairs = [
            LabelledText(prompt=pair.prompt, text=text, is_desirable=is_desirable, is_whole=pair.is_whole)
            for pair in self.pairs
            for text, is_desirable in ((pair.chosen, True), (pair.rejected, False))
        ]
        return of_pairs + self.labelled

    def add(self, prompt: str, first: str, second: str, lead: float, is_whole: bool = False) -> None:
        """Adds a pair; `lead` is positive where the first text was preferred, 0 for a tie."""
        if not lead or first == second:
            self.num_ties += 1
            return
        chosen, rejected = (first, second) if lead > 0 else (second, first)
        self.pairs.append(Preference(prompt=prompt, chosen=chosen, rejected=rejected, is_whole=is_whole))


def read_preferences(sources: Sequence[str]) -> Preferences:
    """Returns the pairs and the labelled texts of files, rounds and recorded choices, in order.

    Raises:
        NotFoundError: there is no such file.
        DataError: a record has no such fields or no such label, or choices were recorded without their texts.
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
    """Adds the pairs of a file; where its first record is none, its labelled texts."""
    before = len(found.pairs) + found.num_ties
    try:
        for document in read_documents([source], PAIRS, splits_marks=False):
            first, _, second = (_drop_end(text) for text in document.text.partition(BETWEEN))
            found.add(document.prompt, first, second, 1, is_whole=True)
    except DataError as error:
        is_first = len(found.pairs) + found.num_ties == before
        if not (is_first and NO_FIELD in error.message and _add_labelled(found, source)):
            raise DataError(error.message, FIELDS_HINT if error.hint == FIELD_HINT else error.hint) from error


def _add_labelled(found: Preferences, source: str) -> bool:
    """Adds the labelled texts of a file; False, and nothing is added, where its first record is none."""
    added: list[LabelledText] = []
    try:
        for document in read_documents([source], LABELLED, splits_marks=False):
            added.append(_read_labelled(document))
    except DataError as error:
        if not added and NO_FIELD in error.message:
            return False
        raise DataError(error.message, FIELDS_HINT if error.hint == FIELD_HINT else error.hint) from error
    found.labelled += added
    return True


def _drop_end(text: str) -> str:
    """Returns a text without EOS at its end, which pairs for other tools have; here every text ends with it."""
    kept = text
    while (bare := kept.rstrip()).endswith(EOS):
        kept = bare.removesuffix(EOS)
    return text if kept == text else kept.rstrip()


def _read_labelled(document: Document) -> LabelledText:
    text, _, label = document.text.rpartition(BETWEEN)
    if (is_desirable := LABELS.get(label.strip().lower())) is None:
        raise DataError(f"{document.origin}: the label is '{label[:40]}'", "labels are true or false, or 1 or 0")
    return LabelledText(prompt=document.prompt, text=_drop_end(text), is_desirable=is_desirable, is_whole=True)


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
