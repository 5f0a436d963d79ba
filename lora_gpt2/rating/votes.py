"""What people chose while names were hidden: which of some models continued a prompt best, as `serve`'s page asks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_gpt2.core.errors import DataError

MOST = 8
MAX_NAME = 2_000


@dataclass(frozen=True, kw_only=True)
class Vote:
    """A prompt, the models that continued it, the one whose text was chosen, and, if recorded, their texts."""

    prompt: str
    models: tuple[str, ...]
    chosen: str
    seed: int = 0
    base: str = ""
    texts: tuple[str, ...] = ()


def check_vote(values: Mapping[str, Any]) -> Vote:
    """Returns a choice from JSON values; raises `DataError` if they are none."""
    prompt, models, chosen, seed = (values.get(key) for key in ("prompt", "models", "chosen", "seed"))
    names = [m for m in models if isinstance(m, str) and 0 < len(m) <= MAX_NAME] if isinstance(models, list) else []
    if names != models or not 2 <= len(set(names)) == len(names) <= MOST or chosen not in names:
        raise DataError(f"a choice is of 2 to {MOST} different models, one of them chosen", "send models and chosen")
    if not isinstance(prompt, str) or not isinstance(seed, int) or isinstance(seed, bool):
        raise DataError("a choice has a prompt and a seed", "send prompt, a text, and seed, a whole number")
    texts = values.get("texts") or []
    if (
        not isinstance(texts, list | tuple)
        or len(texts) not in (0, len(names))
        or not all(isinstance(t, str) for t in texts)
    ):
        raise DataError("texts are those of the models, one of each", "send texts in the order of models, or none")
    base = str(values.get("base", ""))
    return Vote(prompt=prompt, models=tuple(names), chosen=str(chosen), seed=seed, base=base, texts=tuple(texts))


def read_votes(records: Iterable[Mapping[str, Any]]) -> list[Vote]:
    """Returns the choices among records; raises `DataError` where there is none."""
    found = []
    for record in records:
        try:
            found.append(check_vote(record))
        except DataError:
            continue
    if not found:
        raise DataError("no choice was recorded", "tick 'Blind' on the page of 'lora-gpt2 serve' and choose")
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
