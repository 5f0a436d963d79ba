"""How far two adapters of one base are apart, projection by projection, from their factors alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.lora import Adapter, list_sites
from lora_gpt2.model.merge import measure_inner


@dataclass(frozen=True, kw_only=True)
class Distance:
    """Two changes of a projection (or of all): their Frobenius norms, that of their difference, and their cosine.

    The cosine is 0 where one of them changes nothing.
    """

    site: str
    norm: float
    other_norm: float
    difference: float
    cosine: float


def compare_adapters(one: Adapter, other: Adapter, config: GPT2Config) -> list[Distance]:
    """Returns the distance at each projection that either changes, in the network's order, and last that of `all`."""
    rows, total = [], [0.0, 0.0, 0.0]
    for site in list_sites(config):
        left, right = one.updates.get(site), other.updates.get(site)
        if left is None and right is None:
            continue
        products = [
            measure_inner(a, b) if a is not None and b is not None else 0.0
            for a, b in ((left, left), (right, right), (left, right))
        ]
        rows.append(_build(site, *products))
        total = [x + y for x, y in zip(total, products, strict=True)]
    return [*rows, _build("all", *total)]


def _build(site: str, square: float, other_square: float, inner: float) -> Distance:
    norm, other_norm = math.sqrt(max(square, 0.0)), math.sqrt(max(other_square, 0.0))
    cosine = inner / (norm * other_norm) if norm and other_norm else 0.0
    difference = math.sqrt(max(square + other_square - 2 * inner, 0.0))
    return Distance(
        site=site, norm=norm, other_norm=other_norm, difference=difference, cosine=min(1.0, max(-1.0, cosine))
    )
