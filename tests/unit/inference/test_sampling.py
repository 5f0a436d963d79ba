import math

import pytest
import torch
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lora_gpt2.inference.sampling import choose_token, penalise_repetition, shape_logits
from lora_gpt2.recipe import GenerateSettings


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.9), (50, 0.95), (1, 0.5), (500, 0.01)])
def test_shaping_equals_transformers(temperature, top_k, top_p):
    logits = torch.randn(200, generator=torch.Generator().manual_seed(1)) * 3
    settings = GenerateSettings(temperature=temperature, top_k=top_k, top_p=top_p)
    wanted = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        wanted = TopKLogitsWarper(top_k)(None, wanted)
    if top_p < 1:
        wanted = TopPLogitsWarper(top_p)(None, wanted)
    assert torch.equal(shape_logits(logits, settings), wanted[0])


def test_the_repetition_penalty_equals_transformers():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    seen = torch.tensor([3, 7, 7, 49])
    wanted = RepetitionPenaltyLogitsProcessor(1.7)(seen[None], logits[None])[0]
    assert torch.equal(penalise_repetition(logits, seen, 1.7), wanted)
    assert not torch.equal(wanted, logits)


def test_draws_follow_the_distribution_and_the_seed():
    logits = torch.tensor([0.0, math.log(3), -torch.inf])
    settings = GenerateSettings(temperature=1.0, top_k=0, top_p=1.0)
    none = torch.tensor([], dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(
        torch.tensor([choose_token(logits, none, settings, generator) for _ in range(4000)]), minlength=3
    )
    assert counts[2] == 0
    assert counts[1] / 4000 == pytest.approx(0.75, abs=0.03)
    assert choose_token(logits, none, GenerateSettings(temperature=0), generator) == 1
    draws = [[choose_token(logits, none, settings, torch.Generator().manual_seed(s)) for _ in range(5)] for s in (1, 1)]
    assert draws[0] == draws[1]
