"""Limits that a user sets on a matrix, for use in a pipeline: perplexities, and an earlier matrix as the baseline."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_gpt2.core.errors import DataError, UsageError
from lora_gpt2.core.paths import os_errors_as_ours
from lora_gpt2.evaluation.matrix import BASE, Cell


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


def find_above(cells: Sequence[Cell], limits: Mapping[str, float]) -> list[str]:
    """Returns a line for each adapter's cell above its limit; the base has none, unless it was measured alone.

    Raises `UsageError` for a limit on a source that was not measured.
    """
    if unknown := sorted(set(limits) - {"", *(cell.source for cell in cells)}):
        raise UsageError(f"--fail-above names {unknown[0]}, which is not measured", "use the label of a source")
    is_alone = all(cell.adapter == BASE for cell in cells)
    found = []
    for cell in cells:
        limit = limits.get(cell.source, limits.get(""))
        if limit is not None and (is_alone or cell.adapter != BASE) and not cell.score.perplexity <= limit:
            found.append(f"{cell.adapter} on {cell.source}: perplexity {cell.score.perplexity:.2f}, limit {limit:g}")
    return found


def read_baseline(path: Path) -> dict[tuple[str, str], tuple[int, float]]:
    """Returns tokens and perplexity by adapter and source from a file that `evaluate --json` wrote."""
    with os_errors_as_ours(f"read {path}"):
        content = path.read_bytes()
    try:
        cells = json.loads(content)["cells"]
        return {
            (str(c["adapter"]), str(c["source"])): (int(c["tokens"]), float(c["perplexity"] or float("inf")))
            for c in cells
        }
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a result of evaluate", "write one with: lora-gpt2 evaluate … --json > FILE"
        ) from error


def find_regressions(
    cells: Sequence[Cell], baseline: Mapping[tuple[str, str], tuple[int, float]], tolerance: float
) -> list[str]:
    """Returns a line for each cell of the baseline that is missing, has other text, or is worse by more than a share.

    Adapters and sources that the baseline does not have are new, and pass.
    """
    measured = {(cell.adapter, cell.source): cell.score for cell in cells}
    found = []
    for (adapter, source), (tokens, before) in baseline.items():
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
