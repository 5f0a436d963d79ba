"""A text as one vector: the mean of the hidden states after the last norm, over its tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.session import Session

BATCH_TOKENS = 4096


def batch_by_length(texts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Yields the indices of texts in batches of at most `BATCH_TOKENS` with padding, shorter texts first."""
    batch: list[int] = []
    for index in sorted(range(len(texts)), key=lambda index: len(texts[index])):
        if batch and (len(batch) + 1) * len(texts[index]) > BATCH_TOKENS:
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
