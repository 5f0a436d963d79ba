"""A text as one vector: the mean of the hidden states after the last norm, over its tokens.

Mean and spread of these vectors over an adapter's training text are kept in its manifest, so that a prompt finds the
adapters whose text it resembles without loading them.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.session import Session

BATCH_TOKENS = 4096
PIECES, PIECE_TOKENS, FEWEST_PIECES = 128, 32, 4
"""How many pieces of a text its moments are measured on, and how long each is: about as long as a prompt."""


def batch_by_length(texts: Sequence[Sequence[int]], max_tokens: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """Yields the indices of texts in batches of at most `max_tokens` with padding, shorter texts first."""
    batch: list[int] = []
    for index in sorted(range(len(texts)), key=lambda index: len(texts[index])):
        if batch and (len(batch) + 1) * len(texts[index]) > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.inference_mode()
def embed_batch(session: Session, mix: Mix, texts: Sequence[Sequence[int]]) -> Float[Tensor, "texts width"]:
    """Returns the embedding of each text, given as token ids (at least one), under a mix; float32, on the CPU.

    A text's embedding does not depend on the others, except for rounding.
    """
    base = session.base
    lengths = torch.tensor([len(ids) for ids in texts])
    padded = [[*ids, *[base.tokenizer.eos_id] * (int(lengths.max()) - len(ids))] for ids in texts]
    tokens = torch.tensor(padded, device=base.runtime.device)
    hidden = base.model(tokens, session.adapters_for([mix] * len(texts))).float()
    is_text = torch.arange(tokens.shape[1])[None] < lengths[:, None]  # padding on the right changes nothing before it
    sums: Tensor = (hidden * is_text[..., None].to(hidden.device)).sum(1).cpu()
    return sums / lengths[:, None]


def embed_texts(session: Session, mix: Mix, texts: Sequence[Sequence[int]]) -> Float[Tensor, "texts width"]:
    """Returns the embedding of each text, in their order, in batches of similar lengths; see `embed_batch`."""
    vectors = torch.empty(len(texts), session.base.config.n_embd)
    for batch in batch_by_length(texts):
        vectors[batch] = embed_batch(session, mix, [texts[index] for index in batch])
    return vectors


@dataclass(frozen=True)
class EmbeddingMoments:
    """Mean and standard deviation, `[width]`, of the embeddings of pieces of a text."""

    mean: Tensor
    std: Tensor

    @classmethod
    def measure(cls, session: Session, stream: Integer[np.ndarray, " tokens"]) -> EmbeddingMoments | None:
        """Returns the moments of a token stream under the plain base, from pieces of it; None if it is too short."""
        count = min(PIECES, len(stream) // PIECE_TOKENS)
        if count < FEWEST_PIECES:
            return None
        starts = torch.linspace(0, len(stream) - PIECE_TOKENS, count).long().tolist()
        pieces = [stream[start : start + PIECE_TOKENS].tolist() for start in starts]
        return cls(*reversed(torch.std_mean(embed_texts(session, Mix(), pieces), dim=0)))

    @classmethod
    def parse(cls, values: Any, width: int) -> EmbeddingMoments | None:
        """Returns the moments in a manifest, None if there are none for this width."""
        if not isinstance(values, Mapping):
            return None
        try:
            parts = [np.frombuffer(base64.b64decode(values[key], validate=True), "<f2") for key in ("mean", "std")]
        except (KeyError, TypeError, ValueError):
            return None
        if any(part.shape != (width,) or not np.isfinite(part).all() for part in parts):
            return None
        return cls(*(torch.from_numpy(part.astype(np.float32)) for part in parts))

    def to_json(self) -> dict[str, str]:
        """Returns the moments for a manifest: float16 in base64, 2.7 kB for a width of 768."""
        pairs = (("mean", self.mean), ("std", self.std))
        return {key: base64.b64encode(part.numpy().astype("<f2").tobytes()).decode() for key, part in pairs}


def rank_by_distance(vector: Float[Tensor, " width"], moments: Sequence[EmbeddingMoments]) -> list[int]:
    """Returns the indices of texts, the nearest first: by the distance to their means in units of their mean variance.

    That is linear discriminant analysis with a diagonal covariance, which the hidden states of GPT-2 need: a few of
    their dimensions are a hundred times as large as the others.
    """
    means, spreads = (torch.stack([getattr(own, name) for own in moments]) for name in ("mean", "std"))
    scale = spreads.square().mean(0).clamp(min=1e-6)
    distances: Tensor = ((vector - means).square() / scale).sum(1)
    order: list[int] = distances.argsort(stable=True).tolist()
    return order
