"""The two questions that callers ask a language model: how likely are these tokens, and which may come next?

Both run the network and its head under the same adapters, so that nobody has to pass an adapter's contribution to the
logits around.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lora_gpt2.model.gpt2 import GPT2, ActiveAdapters
from lora_gpt2.model.kv_cache import KVCache
from lora_gpt2.model.loss import linear_nll


def token_nll(
    model: GPT2,
    tokens: Int[Tensor, "batch time"],
    targets: Int[Tensor, " targets"],
    adapters: ActiveAdapters | None,
    *,
    select: Int[Tensor, " targets"] | None = None,
    positions: Int[Tensor, "batch time"] | None = None,
) -> Float[Tensor, " targets"]:
    """Returns the negative log-likelihood of each target in nats, float32; 0 where the target is `IGNORE`.

    Args:
        model: the base.
        tokens: the inputs.
        targets: the token that follows each input, flattened; or, with `select`, those of the selected inputs.
        adapters: the adapters of the batch.
        select: indices into the flattened inputs whose targets are scored; the head runs on these alone.
        positions: see `GPT2.forward`.
    """
    hidden = model(tokens, adapters, positions=positions)
    flat, update = hidden.flatten(0, 1), None if adapters is None else adapters.low_rank_logits(hidden)
    if select is not None:
        flat, update = flat[select], None if update is None else update.select(select)
    return linear_nll(flat, model.padded_head, targets, update, model.config.vocab_size)


def next_logits(
    model: GPT2,
    tokens: Int[Tensor, "batch time"],
    adapters: ActiveAdapters | None,
    cache: KVCache,
    num_tokens: Sequence[int] | None = None,
) -> tuple[Float[Tensor, "batch vocab"], Float[Tensor, "batch time width"]]:
    """Returns the float32 logits of the token that follows each row, and all hidden states.

    The tokens continue the sequences in `cache`. `num_tokens` is the number of tokens of each row that count, where
    rows are padded on the right.
    """
    hidden = model(tokens, adapters, cache, num_tokens=num_tokens)
    if num_tokens is None:
        last = hidden[:, -1:]
    else:
        rows = torch.arange(len(hidden), device=hidden.device)
        last = hidden[rows, torch.tensor(num_tokens, device=hidden.device) - 1][:, None]
    return model.logits(last, adapters)[:, 0].float(), hidden
