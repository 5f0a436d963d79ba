import math

import pytest
import torch

from lora_gpt2.recipe import TrainSettings
from lora_gpt2.training.optimizer import SlotAdamW, clip_slots
from lora_gpt2.training.schedule import rate_share


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


def shares(num_steps, **settings):
    return [rate_share(step, num_steps, TrainSettings(**settings)) for step in range(num_steps)]


def test_schedules_rise_and_fall_as_they_say():
    cosine = shares(100, warmup_share=0.1)
    assert cosine[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert cosine[10] == 1
    assert cosine[55] == pytest.approx(0.55)
    assert cosine[99] == pytest.approx(0.1, abs=1e-3)
    assert shares(4, schedule="linear", warmup_share=0.0) == [1, 0.75, 0.5, 0.25]
    assert shares(3, schedule="constant", warmup_share=0.0) == [1, 1, 1]
    assert all(0 < share <= 1 for share in shares(1) + shares(2) + shares(37))
