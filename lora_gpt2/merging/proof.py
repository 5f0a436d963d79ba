"""How a merge shows that it is one: logits beside the unmerged computation's, and perplexity before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import CheckFailed
from lora_gpt2.evaluation.general import read_general
from lora_gpt2.evaluation.matrix import Cell, Source, measure_matrix
from lora_gpt2.evaluation.perplexity import AdaptersForRows
from lora_gpt2.model.base import Base
from lora_gpt2.recipe import EvaluateSettings

PROBE_ROWS, PROBE_TOKENS = 4, 128
GENERAL = "general"


def build_probe(base: Base) -> Int[Tensor, "rows time"]:
    """Returns the tokens that logits are compared on: general English, repeated where a vocabulary makes it short."""
    ids = [token for text in read_general() for token in (base.tokenizer.eos_id, *base.tokenizer.encode(text))]
    time = min(PROBE_TOKENS, base.config.context)
    repeated = ids * (1 + PROBE_ROWS * time // len(ids))
    return torch.tensor(repeated[: PROBE_ROWS * time], device=base.runtime.device).view(PROBE_ROWS, time)


@torch.inference_mode()
def compute_logits(base: Base, adapters_for: AdaptersForRows = lambda rows: None) -> Tensor:
    """Returns the logits `[rows, time, vocab]` on the probe, in float32."""
    probe = build_probe(base)
    return base.model.logits(base.model(probe, adapters_for(len(probe)))).float()


def measure_difference(one: Tensor, other: Tensor) -> float:
    """Returns the largest difference of two sets of logits."""
    return float((one - other).abs().max())


def allow_rounding(logits: Tensor) -> float:
    """Returns how far float32 logits may be apart by rounding alone: 1e-5 of the largest, plus 1e-4."""
    return 1e-4 + 1e-5 * float(logits.abs().max())


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
