"""Mixes of adapters, in one notation everywhere: `law`, `law@3`, `law:0.6+code:0.4`, and `base` for none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from lora_gpt2.core.errors import UsageError
from lora_gpt2.store.references import BASE, label_of

MAX_WEIGHT = 16.0


class Mix(tuple[tuple[str, float], ...]):
    """A weighted mix of adapters: pairs of a reference and its weight. The empty mix is the plain base."""

    __slots__ = ()

    def __new__(cls, parts: Iterable[tuple[str, float]] = ()) -> Mix:
        """Returns the mix of these pairs."""
        return super().__new__(cls, parts)

    @classmethod
    def parse(cls, specs: str | Sequence[str]) -> Mix:
        """Returns the mix that a text spells, or a list of `name`, `name@version` or `name:weight` items.

        Raises `UsageError` for a weight that is not a number within ±16, or a name given twice.
        """
        items = specs.split("+") if isinstance(specs, str) else specs
        parts: list[tuple[str, float]] = []
        for item in items:
            name, weight = _parse_item(item)
            if name in (other for other, _ in parts):
                raise UsageError(f"adapter {name} is given twice", "give each once, with its weight")
            if name == BASE and (":" in item or len(items) > 1):
                raise UsageError("'base' is the model without adapters and cannot be mixed", "leave it out")
            if name != BASE:
                parts.append((name, weight))
        return cls(parts)

    @classmethod
    def single(cls, reference: str, weight: float = 1.0) -> Mix:
        """Returns the mix of one adapter."""
        return cls([(reference, weight)])

    @property
    def references(self) -> list[str]:
        """The references of the adapters."""
        return [reference for reference, _ in self]

    def __str__(self) -> str:
        """Returns the mix as people write it: `base`, `law`, or `law:0.6+code:0.4`; without digests."""
        if not self:
            return BASE
        if len(self) == 1 and self[0][1] == 1:
            return label_of(self[0][0])
        return "+".join(f"{label_of(reference)}:{weight:g}" for reference, weight in self)


def _parse_item(item: str) -> tuple[str, float]:
    name, separator, text = item.partition(":")
    try:
        weight = float(text) if separator else 1.0
    except ValueError:
        weight = math.nan
    if not abs(weight) <= MAX_WEIGHT:
        raise UsageError(f"adapter {item}: expected name:weight, weight within ±{MAX_WEIGHT:g}", "such as law:0.6")
    if "#" in name:
        raise UsageError(f"'{name}' is not an adapter", "write name or name@version")
    return name, weight
