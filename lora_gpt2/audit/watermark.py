"""Whether a text carries the mark of `generate.watermark`: transformers' detector over our tokens.

It counts how often a token is in the quarter of the vocabulary that the token before it and the key choose; unmarked
text hits a quarter by chance (Kirchenbauer et al. 2023, arXiv:2301.10226, section 2). Repeated pairs of tokens count
once, because a text that repeats itself would else seem surer than it is. Editing and paraphrase remove the mark; its
absence proves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch

from lora_gpt2.core.errors import DataError
from lora_gpt2.data.tokenizer import Tokenizer

MIN_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class WatermarkReport:
    """Tokens scored, the share in the chosen quarter, its z-score, and how likely unmarked text does as well."""

    tokens: int
    green_fraction: float
    z_score: float
    p_value: float

    def is_marked(self, z_threshold: float) -> bool:
        """True if the z-score is above a threshold; 4 is passed by one unmarked text in 30,000."""
        return self.z_score > z_threshold


def detect_watermark(text: str, tokenizer: Tokenizer, key: int) -> WatermarkReport:
    """Returns how marked a text is; raises `DataError` if it is too short to tell."""
    from transformers.generation.watermarking import WatermarkDetector

    ids = tokenizer.encode(text)
    if len(ids) < MIN_TOKENS:
        raise DataError(f"the text has {len(ids)} tokens, at least {MIN_TOKENS} are needed", "give more of it")
    shape = SimpleNamespace(vocab_size=tokenizer.vocab_size, bos_token_id=tokenizer.eos_id, is_encoder_decoder=False)
    mark = {
        "greenlist_ratio": 0.25,
        "bias": 2.0,
        "hashing_key": key,
        "seeding_scheme": "lefthash",
        "context_width": 1,
    }
    found = WatermarkDetector(shape, "cpu", mark, ignore_repeated_ngrams=True)(torch.tensor([ids]), return_dict=True)
    return WatermarkReport(
        tokens=int(found.num_tokens_scored[0]),
        green_fraction=float(found.green_fraction[0]),
        z_score=float(found.z_score[0]),
        p_value=float(found.p_value[0]),
    )
