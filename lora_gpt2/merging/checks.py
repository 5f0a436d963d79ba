"""How a merge shows that it is one: logits beside the unmerged computation's, and perplexity before and after."""

from __future__ import annotations

import math

from torch import Tensor

from lora_gpt2.core.errors import CheckFailed
from lora_gpt2.model.probe import rounding_tolerance


def check_exact(difference: float, reference: Tensor, what: str) -> None:
    """Raises `CheckFailed` if logits that should agree to rounding do not."""
    if not difference <= (limit := rounding_tolerance(reference)):
        raise CheckFailed(
            f"{what} differs from the unmerged computation by {difference:.2e} in the logits, allowed are {limit:.1e}",
            "nothing was written; please report it, with the adapters if you can",
        )


def check_effect(difference: float, effect: float, plain: Tensor, what: str) -> None:
    """Raises `CheckFailed` unless a result is finite and differs from the base by more than rounding."""
    if not (math.isfinite(difference) and math.isfinite(effect)):
        raise CheckFailed(f"{what} gives logits that are not finite", "use smaller weights; nothing was written")
    if effect <= rounding_tolerance(plain):
        raise CheckFailed(f"{what} changes nothing that can be seen ({effect:.1e} in the logits)", "use larger weights")
