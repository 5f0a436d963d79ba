"""How a merge shows that it is one: logits beside the unmerged computation's, and perplexity before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import CheckFailed
from lora_gpt2.evaluation.general import read_general
from lora_gpt2.evaluation.matrix import Cell, Source, measure_matrix
from lora_gpt2.model.base import Base
from lora_gpt2.model.probe import AdaptersForRows, allow_rounding
from lora_gpt2.recipe import EvaluateSettings

GENERAL = "general"


def check_exact(difference: float, reference: Tensor, what: str) -> None:
    """Raises `CheckFailed` if logits that should agree to rounding do not."""
    if not difference <= (limit := allow_rounding(reference)):
        raise CheckFailed(
            f"{what} differs from the unmerged computation by {difference:.2e} in the logits, allowed are {limit:.1e}",
            "nothing was written; please report it, with the adapters if you can",
        )


def measure_cells(
    base: Base,
    rows: Mapping[str, AdaptersForRows],
    sources: Sequence[Source],
    settings: EvaluateSettings,
    reporter: Reporter,
) -> list[Cell]:
    """Returns the perplexity of each of `rows` on general English and on each source."""  # fmt: skip
    return measure_matrix(base, rows, [Source(GENERAL, read_general()), *sources], settings, reporter)
