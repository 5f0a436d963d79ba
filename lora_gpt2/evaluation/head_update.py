"""What an adapter's change of the head is worth: perplexity with and without it, before it is left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import LoraGpt2Error
from lora_gpt2.evaluation.general import measure_general
from lora_gpt2.evaluation.held_out import read_own_text
from lora_gpt2.evaluation.perplexity import measure_perplexity
from lora_gpt2.model.base import Base, load_base
from lora_gpt2.model.probe import select_adapter
from lora_gpt2.model.runtime import choose_runtime
from lora_gpt2.recipe import EvaluateSettings
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.exchange import drop_head
from lora_gpt2.store.files import load_adapter


@dataclass(frozen=True, kw_only=True)
class HeadPrice:
    """Perplexity with and without the head's change, by text: general English, and what training held out."""

    base: Base
    perplexities: dict[str, tuple[float, float]]

    def to_json(self) -> dict[str, Any]:
        """Returns the figures by text."""
        return {text: {"with_head": a, "without_head": b} for text, (a, b) in self.perplexities.items()}

    def describe(self) -> str:
        """Returns the figures in words."""
        return "; ".join(f"perplexity {a:.2f} -> {b:.2f} on {text}" for text, (a, b) in self.perplexities.items())


def measure_head(store: Store, reference: str, reporter: Reporter) -> HeadPrice:
    """Returns what leaving an adapter's change of the head out costs, on general English and on its held-out text.

    Where that text is no longer there, on general English alone. Raises as `load_adapter` and `drop_head`.
    """
    base = load_base(store.read_manifest(reference).base.name, choose_runtime("float32"))
    _, adapter = load_adapter(store, reference, base)
    sides = [select_adapter(base, adapter), select_adapter(base, drop_head(adapter))]
    general = [measure_general(base, side).perplexity for side in sides]
    found = {"general English": (general[0], general[1])}
    try:
        documents = read_own_text(store, reference, reporter).held_out
    except LoraGpt2Error as error:
        reporter.message(f"its own text is not measured: {error.message}")
        documents = []
    if documents:
        own = [measure_perplexity(base, documents, EvaluateSettings(), side).perplexity for side in sides]
        found["its held-out text"] = (own[0], own[1])
    return HeadPrice(base=base, perplexities=found)
