"""What people said on `serve`'s page while names were hidden: which text is best, or how good each is, 1 to 5."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lora_gpt2.core.errors import DataError
from lora_gpt2.rating.rounds import CRITERIA

MOST = 8
SCALE = range(1, 6)
MAX_NAME = 2_000
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Vote:
    """A prompt, the models that continued it, the one whose text was chosen, and, if recorded, their texts."""

    prompt: str
    models: tuple[str, ...]
    chosen: str
    seed: int = 0
    base: str = ""
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Marks:
    """A prompt, the models that continued it, and by criterion the mark from 1 to 5 of each; None where it has none."""

    prompt: str
    models: tuple[str, ...]
    marks: Mapping[str, tuple[int | None, ...]]
    seed: int = 0
    base: str = ""
    texts: tuple[str, ...] = ()


def check_vote(values: Mapping[str, Any]) -> Vote:
    """Returns a choice from JSON values; raises `DataError` if they are none."""
    names, chosen = _check_models(values.get("models")), values.get("chosen")
    if len(names) < 2 or chosen not in names:
        raise DataError(f"a choice is of 2 to {MOST} different models, one of them chosen", "send models and chosen")
    return Vote(models=names, chosen=str(chosen), **_check_texts(values, len(names)))


def check_marks(values: Mapping[str, Any]) -> Marks:
    """Returns marks from JSON values; raises `DataError` if they are none."""
    names, given = _check_models(values.get("models")), values.get("marks")
    found = {c: tuple(m) for c, m in given.items() if isinstance(m, list | tuple)} if isinstance(given, dict) else {}
    marks = [mark for each in found.values() for mark in each]
    is_sound = all(mark is None or (type(mark) is int and mark in SCALE) for mark in marks)
    lengths = {len(each) for each in found.values()}
    is_whole = isinstance(given, dict) and found.keys() == given.keys() <= set(CRITERIA)
    if not is_sound or not is_whole or lengths - {len(names)}:
        hint = f"send marks: for each of {', '.join(CRITERIA)} a list in the order of models"
        raise DataError("marks are whole numbers from 1 to 5, or null", hint)
    if not names or all(mark is None for mark in marks):
        raise DataError(f"marks are for 1 to {MOST} different models", "send models and marks")
    return Marks(models=names, marks=found, **_check_texts(values, len(names)))


def _check_models(models: Any) -> tuple[str, ...]:
    """Returns the names, none where they are not different names."""
    names = [m for m in models if isinstance(m, str) and 0 < len(m) <= MAX_NAME] if isinstance(models, list) else []
    return tuple(names) if names == models and len(set(names)) == len(names) <= MOST else ()


def _check_texts(values: Mapping[str, Any], num_models: int) -> dict[str, Any]:
    prompt, seed = values.get("prompt"), values.get("seed")
    if not isinstance(prompt, str) or not isinstance(seed, int) or isinstance(seed, bool):
        raise DataError("a choice has a prompt and a seed", "send prompt, a text, and seed, a whole number")
    texts = values.get("texts") or []
    if (
        not isinstance(texts, list | tuple)
        or len(texts) not in (0, num_models)
        or not all(isinstance(t, str) for t in texts)
    ):
        raise DataError("texts are those of the models, one of each", "send texts in the order of models, or none")
    return {"prompt": prompt, "seed": seed, "base": str(values.get("base", "")), "texts": tuple(texts)}


def list_votes(records: Iterable[Mapping[str, Any]]) -> list[Vote]:
    """Returns the choices among records."""
    return _list(records, check_vote)


def list_marks(records: Iterable[Mapping[str, Any]]) -> list[Marks]:
    """Returns the marks among records."""
    return _list(records, check_marks)


def read_votes(records: Iterable[Mapping[str, Any]]) -> list[Vote]:
    """Returns the choices among records; raises `DataError` where there is none."""
    if found := list_votes(records):
        return found
    raise DataError("no choice was recorded", "judge blind on the page of 'lora-gpt2 serve'; --mode scale shows marks")


def read_marks(records: Iterable[Mapping[str, Any]]) -> list[Marks]:
    """Returns the marks among records; raises `DataError` where there are none."""
    if found := list_marks(records):
        return found
    raise DataError("no marks were recorded", "judge blind, from 1 to 5, on the page of 'lora-gpt2 serve'")


def _list(records: Iterable[Mapping[str, Any]], check: Callable[[Mapping[str, Any]], T]) -> list[T]:
    found = []
    for record in records:
        try:
            found.append(check(record))
        except DataError:
            continue
    return found


def find_texts(
    records: Iterable[Mapping[str, Any]], adapters: Sequence[str]
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Returns the prompts that each of some adapters has continued, and their newest texts `[prompts][adapters]`.

    Of each adapter only its newest weights count, and of all only the newest base; what was cut short does not. Raises
    `DataError` where there is no such prompt.
    """
    found: dict[str, dict[str, str]] = {}
    base, weights = None, dict[str, Any]()
    for record in reversed(list(records)):  # the newest first
        prompt, adapter, text = (record.get(key) for key in ("prompt", "adapter", "text"))
        if not isinstance(prompt, str) or not isinstance(text, str) or adapter not in adapters:
            continue
        origin = record.get("provenance")
        origin = origin if isinstance(origin, dict) else {}
        base = base or origin.get("base_fingerprint")
        is_same = weights.setdefault(str(adapter), origin.get("adapters")) == origin.get("adapters")
        if is_same and origin.get("base_fingerprint") == base and record.get("finish_reason") != "interrupted":
            found.setdefault(prompt, {}).setdefault(str(adapter), text)
    whole = {prompt: texts for prompt, texts in found.items() if len(texts) == len(adapters)}
    if not whole:
        raise DataError(
            f"no recorded prompt was continued by each of {', '.join(adapters)}", "use /compare in 'lora-gpt2 repl'"
        )
    return tuple(whole), tuple(tuple(texts[name] for name in adapters) for texts in whole.values())
