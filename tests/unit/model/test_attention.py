"""Attention by blocks is PyTorch's attention: forward, backward, with documents apart, and blind to later tokens."""

import math

import pytest
import torch
import torch.nn.functional as F

from lora_gpt2.model.attention import BLOCK, attend_by_blocks
from lora_gpt2.model.gpt2 import mask_documents

LENGTHS = (1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 44)


def draw(batch, time, heads=3, width=8, dtype=torch.float32):
    torch.manual_seed(time)
    return torch.randn(batch, time, 3, heads, width).to(dtype), torch.randn(batch, time, heads, width).to(dtype)


def theirs(qkv, scale, mask):
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return attended.transpose(1, 2)


def run(attend, qkv, upstream, scale, mask):
    given = qkv.clone().requires_grad_()
    out = attend(given, scale, mask)
    gradient = torch.autograd.grad(out, given, upstream)[0]
    assert torch.equal(given, qkv), "the input is not written to"
    return out.detach(), gradient


def mask_every(length, batch, time):
    positions = (torch.arange(time) % length)[None].expand(batch, -1)
    return mask_documents(positions, torch.float32)


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize(
    "document", [0, 1, 50, 200], ids=lambda length: f"documents of {length}" if length else "plain"
)
def test_it_is_pytorchs_attention_and_gradient(time, document):
    qkv, upstream = draw(2, time)
    mask = mask_every(document, 2, time) if document else None
    for scale in (1 / math.sqrt(8), 0.3):
        ours, expected = (run(attend, qkv, upstream, scale, mask) for attend in (attend_by_blocks, theirs))
        for mine, yours in zip(ours, expected, strict=True):
            torch.testing.assert_close(mine, yours, atol=2e-6, rtol=1e-5)


def test_rows_and_later_tokens_change_nothing():
    qkv, upstream = draw(3, BLOCK + 30)
    before, gradient = run(attend_by_blocks, qkv, upstream, 0.3, None)
    alone = run(attend_by_blocks, qkv[1:2], upstream[1:2], 0.3, None)
    assert torch.equal(alone[0], before[1:2])
    assert torch.equal(alone[1], gradient[1:2])
    changed = qkv.clone()
    changed[:, BLOCK + 3 :] = 1e4
    torch.testing.assert_close(
        attend_by_blocks(changed, 0.3, None)[:, : BLOCK + 3], before[:, : BLOCK + 3], atol=2e-6, rtol=1e-5
    )


def test_in_bfloat16_it_is_as_exact_as_scores_in_bfloat16_are():
    qkv, upstream = draw(2, 2 * BLOCK + 44, dtype=torch.bfloat16)
    exact = run(theirs, qkv.float(), upstream.float(), 0.3, None)
    for mine, expected in zip(run(attend_by_blocks, qkv, upstream, 0.3, None), exact, strict=True):
        assert (mine.float() - expected).norm() / expected.norm() < 0.01
