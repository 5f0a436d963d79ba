"""Limits that a user sets on a matrix, for use in a pipeline: perplexities, and an earlier matrix as the baseline."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_gpt2.core.errors import DataError, UsageError
from lora_gpt2.core.user_files import read_user_file
from lora_gpt2.evaluation.general import GENERAL
from lora_gpt2.evaluation.matrix import Cell
from lora_gpt2.store.references import BASE

HOW = ("base", "protocol", "window", "stride", "dtype")


def parse_limits(specs: Sequence[str]) -> dict[str, float]:
    """Returns the largest perplexity by source from `N` (every source, under "") and `source=N` items."""
    limits = {}
    for spec in specs:
        label, _, text = spec.rpartition("=")
        try:
            limits[label] = float(text)
        except ValueError:
            limits[label] = -1.0
        if not limits[label] > 0:
            raise UsageError(f"--fail-above {spec}: expected a perplexity", "such as 40, or law=40 for one source")
    return limits


def check_limits(limits: Mapping[str, float], labels: Sequence[str]) -> None:
    """Raises `UsageError` for a limit on a source that is not measured; to be asked before measuring."""
    if unknown := sorted(set(limits) - {"", *labels}):
        raise UsageError(f"--fail-above names {unknown[0]}, which is not measured", "use the label of a source")


def find_above(cells: Sequence[Cell], limits: Mapping[str, float]) -> list[str]:
    """Returns a line for each adapter's cell above its limit; the base has none, unless it was measured alone.

    A limit without a name is not for general English.
    """
    is_alone = all(cell.adapter == BASE for cell in cells)
    found = []
    for cell in cells:
        limit = limits.get(cell.source, None if cell.source == GENERAL else limits.get(""))
        if limit is not None and (is_alone or cell.adapter != BASE) and not cell.score.perplexity <= limit:
            found.append(f"{cell.adapter} on {cell.source}: perplexity {cell.score.perplexity:.2f}, limit {limit:g}")
    return found


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """An earlier result: how it was measured, and tokens and perplexity by adapter and source."""

    how: Mapping[str, Any]
    cells: Mapping[tuple[str, str], tuple[int, float]]


def read_baseline(path: Path) -> Baseline:
    """Returns what `evaluate --json` wrote to a file; raises `DataError` if it is none."""
    content = read_user_file(path)
    try:
        result = json.loads(content)
        cells = {
            (str(c["adapter"]), str(c["source"])): (int(c["tokens"]), float(c["perplexity"] or math.inf))
            for c in [*result["cells"], *result.get("forgetting", [])]
        }
        how = {key: result[key] for key in HOW if key in result}
        next(iter(cells))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, StopIteration) as error:
        raise DataError(
            f"{path} is not a result of evaluate", "write one with: lora-gpt2 evaluate … --json > FILE"
        ) from error
    return Baseline(how=how, cells=cells)


def find_regressions(cells: Sequence[Cell], how: Mapping[str, Any], baseline: Baseline, tolerance: float) -> list[str]:
    """Returns a line for each cell of the baseline that is missing, has other text, or is worse by more than a share.

    Adapters and sources that the baseline does not have are new, and pass; general English counts where both have it.
    """
    changed = [
        f"{key} is {how[key]} now, {was} in the baseline" for key, was in baseline.how.items() if how[key] != was
    ]
    if changed:
        return changed
    measured = {(cell.adapter, cell.source): cell.score for cell in cells}
    has_general = any(cell.source == GENERAL for cell in cells)
    found = []
    for (adapter, source), (tokens, before) in baseline.cells.items():
        if source == GENERAL and not has_general:
            continue
        score, what = measured.get((adapter, source)), f"{adapter} on {source}"
        if score is None:
            found.append(f"{what}: not measured now")
        elif score.tokens != tokens:
            found.append(f"{what}: {score.tokens:,} tokens now, {tokens:,} in the baseline: not the same text or base")
        elif not score.perplexity <= before * (1 + tolerance):
            found.append(
                f"{what}: perplexity {score.perplexity:.2f}, was {before:.2f} ({score.perplexity / before - 1:+.1%})"
            )
    return found
