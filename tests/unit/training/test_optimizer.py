import math

import pytest
import torch

from lora_gpt2.training.optimizer import SlotAdamW, clip_slots


def test_each_slot_follows_torchs_adamw_with_its_own_rate_and_decay():
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(3, 20, generator=generator)
    rates, decays = [1e-2, 3e-3, 0.0], [0.0, 0.1, 0.5]
    twins = [torch.nn.Parameter(row.clone()) for row in flat]
    reference = [torch.optim.AdamW([p], lr=r, weight_decay=d) for p, r, d in zip(twins, rates, decays, strict=True)]
    optimizer = SlotAdamW(flat)
    for _ in range(25):
        gradient = torch.randn(3, 20, generator=generator)
        for twin, other, row in zip(twins, reference, gradient, strict=True):
            twin.grad = row.clone()
            other.step()
        optimizer.step(gradient, torch.tensor(rates), torch.tensor(decays), torch.tensor([True] * 3))
    assert torch.allclose(flat, torch.stack([t.detach() for t in twins]), atol=1e-6)
    assert not torch.allclose(flat[0], twins[1].detach(), atol=1e-2)


def test_clipping_equals_torchs_per_slot():
    gradient = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    rows = [torch.nn.Parameter(torch.zeros(50)) for _ in range(3)]
    limits = [1.0, 1e9, math.inf]
    for row, values in zip(rows, gradient, strict=True):
        row.grad = values.clone()
    wanted = [torch.nn.utils.clip_grad_norm_([row], limit) for row, limit in zip(rows, limits, strict=True)]
    norms = clip_slots(gradient, torch.tensor(limits))
    assert torch.allclose(norms, torch.stack(wanted))
    assert torch.allclose(gradient, torch.stack([row.grad for row in rows]), atol=1e-7)
    assert gradient[0].norm() == pytest.approx(1.0, abs=1e-4)
