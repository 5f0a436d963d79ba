"""How well a base or adapter still predicts general English: the figure that shows forgetting.

`general.txt`, beside this file, is a dozen short passages that neither an adapter nor `nano` was trained on: old
novels, presidents' addresses (public domain), agencies' pages and the World Factbook (U.S. government), abstracts
(arXiv, CC0), SQLite's documentation (public domain) and Python's (PSF). Four thousand tokens place a perplexity
within a few per cent, and differences between adapters, measured on the same text, far better.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_gpt2.evaluation.matrix import EvaluationText
from lora_gpt2.evaluation.perplexity import Score, measure_perplexity
from lora_gpt2.model.base import Base
from lora_gpt2.model.probe import AdapterSelector, select_base
from lora_gpt2.recipe import EvaluateSettings

TEXT = Path(__file__).parent / "general.txt"
GENERAL = "general"
SEPARATOR = "\n<|endoftext|>\n"


def read_general() -> list[str]:
    """Returns the passages."""
    return [text for text in TEXT.read_text(encoding="utf-8").split(SEPARATOR) if text]


def measure_general(base: Base, select: AdapterSelector = select_base) -> Score:
    """Returns the score on general English, each passage on its own."""
    window = min(512, base.config.n_positions)
    return measure_perplexity(base, read_general(), EvaluateSettings(window=window, stride=window), select)


def add_general(texts: Sequence[EvaluationText]) -> list[EvaluationText]:
    """Returns the texts with general English before them."""
    return [EvaluationText(label=GENERAL, documents=read_general()), *texts]
