"""Whether kernels written in Triton can be used here; what they compute, plain PyTorch computes too, more slowly."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from functools import lru_cache

import torch

SWITCH = "LORA_GPT2_TRITON"


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """True if Triton's kernels run here, and compute what they should: it takes a GPU, Triton, and a C compiler.

    `$LORA_GPT2_TRITON=0` does without them.
    """
    is_there = torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
    return is_there and os.environ.get(SWITCH) != "0" and check_kernels(_are_right, "kernels in Triton")


def check_kernels(are_right: Callable[[torch.device], bool], name: str) -> bool:
    """Returns what a comparison on the GPU says of some kernels; logs why they are not used, if they are not."""
    try:
        if are_right(torch.device("cuda")):
            return True
        reason = "they compute other numbers"
    except Exception as error:  # noqa: BLE001
        reason = str(error)
    logging.getLogger(__name__).warning("%s cannot be used, which costs time: %s", name, reason)
    return False


def _are_right(device: torch.device) -> bool:
    """Runs every kernel once on a few numbers, and compares."""
    from lora_gpt2.model.counter_random import draw_bits, offset_of, threshold_of
    from lora_gpt2.model.decode_kernel import add_updates
    from lora_gpt2.model.dropout_kernel import fill_dropout_mask
    from lora_gpt2.model.loss_kernel import score_rows
    from lora_gpt2.model.sampling_kernel import draw_from_logits

    draw = torch.Generator().manual_seed(0)
    logits, a, b_t = (torch.randn(shape, generator=draw).to(device) for shape in ((2, 64), (1, 4, 64), (1, 4, 64)))
    targets, factors = torch.tensor([3, 40]).to(device), torch.ones(2).to(device)
    updated, logprobs = torch.zeros_like(logits), logits[:, :60].log_softmax(1)
    add_updates(logits, a, b_t, torch.ones(2, 1).to(device), updated)
    is_right = [torch.allclose(updated, logits @ a[0].T @ b_t[0], rtol=1e-2, atol=1e-2)]  # TF32 may be allowed
    nll, _ = score_rows(logits, 60, targets, factors, 0.0)
    is_right.append(torch.allclose(nll, -logprobs.gather(1, targets[:, None])[:, 0], rtol=1e-4))
    slopes = logprobs.exp().scatter_add(1, targets[:, None], -torch.ones(2, 1).to(device))
    is_right.append(torch.allclose(logits[:, :60], slopes, atol=1e-4))
    seeds, rate = torch.tensor([5]).to(device), 0.25
    mask = fill_dropout_mask(torch.empty(1, 1, 100, device=device), offset_of(seeds, 7), rate)
    is_right.append(torch.equal(mask[0, 0] > 0, draw_bits(seeds, 7, 100)[0] >= threshold_of(rate)))
    columns = torch.tensor([[0.0, 1, 1, 0, 0], [1.0, 2, 1, 0, 1 - 2.0**-53]], dtype=torch.float64).to(device)
    drawn = draw_from_logits(slopes, columns, 8, not_finite=-1, undecided=-2)
    is_right.append(torch.equal(drawn, torch.stack([slopes[0].argmax(), slopes[1].topk(2).indices[1]])))
    return all(is_right)
