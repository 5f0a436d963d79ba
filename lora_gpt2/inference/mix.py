"""Mixes of adapters, in one notation everywhere: `law`, `law@3`, `law:0.6+code:0.4`, and `base` for none.

Without weights the adapters of a mix have equal shares, which add up to 1: `law+code` is `law:0.5+code:0.5`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from lora_gpt2.core.errors import UsageError
from lora_gpt2.core.names import ALL
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.manifest import Manifest
from lora_gpt2.store.references import BASE, label_of

MAX_WEIGHT = 16.0
ITEM = re.compile(r"([^:+]*(?::[+-]?(?:[\d.]+[eE][+-]?\d+|[^+]*))?)(\+|$)")


class Mix(tuple[tuple[str, float], ...]):
    """A weighted mix of adapters: pairs of a reference and its weight. The empty mix is the plain base."""

    __slots__ = ()

    def __new__(cls, parts: Iterable[tuple[str, float | int]] = ()) -> Mix:
        """Returns the mix of these pairs."""
        return super().__new__(cls, ((name, float(w) if isinstance(w, int) else w) for name, w in parts))

    @classmethod
    def parse(cls, specs: str | Sequence[str] | Mapping[str, float | int], each: float | None = None) -> Mix:
        """Returns the mix that a text spells, or several that are mixed, or the weights by name.

        `each` is the weight of those without one; by default they have equal shares.

        Raises `UsageError` for a weight that is not a number within ±16, a name given twice, or weights that only some
        of the adapters have.
        """
        if isinstance(specs, Mapping):
            specs = [f"{name}:{weight}" for name, weight in specs.items()]
        items = [item for spec in ([specs] if isinstance(specs, str) else specs) for item in _split(spec)]
        weights: dict[str, float | None] = {}
        for item in items:
            name, weight = _parse_item(item)
            if name in weights:
                raise UsageError(f"adapter {name} is given twice", "give each once, with its weight")
            if name == BASE and (":" in item or len(items) > 1):
                raise UsageError("'base' is the model without adapters and cannot be mixed", "leave it out")
            weights[name] = weight
        weights.pop(BASE, None)
        if len({weight is None for weight in weights.values()}) > 1:
            bare = next(name for name, weight in weights.items() if weight is None)
            raise UsageError(f"adapter {bare} has no weight, others have", f"such as {bare}:0.5, or give none a weight")
        share = 1 / max(1, len(weights)) if each is None else each
        return cls((name, share if weight is None else weight) for name, weight in weights.items())

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


def _split(spec: str) -> list[str]:
    """Returns the items of a mix; the `+` of a weight, as in `law:+1` or `law:1e+0`, is none between items."""
    items, begin = [], 0
    while found := ITEM.match(spec, begin):
        items.append(found[1])
        begin = found.end()
        if not found[2]:
            break
    return items


def read_manifests(store: Store, specs: Iterable[str]) -> list[Manifest]:
    """Returns the manifests of the adapters in some mixes, `all` left out; raises where one is not there."""
    named = [reference for spec in specs if spec != ALL for reference in Mix.parse(spec).references]
    return [store.read_manifest(reference) for reference in named]


def _parse_item(item: str) -> tuple[str, float | None]:
    name, separator, text = item.partition(":")
    try:
        weight = float(text) if separator else None
    except ValueError:
        weight = math.nan
    if weight is not None and not abs(weight) <= MAX_WEIGHT:
        raise UsageError(f"adapter {item}: expected name:weight, weight within ±{MAX_WEIGHT:g}", "such as law:0.6")
    if "#" in name:
        raise UsageError(f"'{name}' is not an adapter", "write name or name@version")
    return name, weight
