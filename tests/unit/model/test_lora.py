import math

import pytest
import torch

from lora_gpt2.model.config import HEAD, parse_config
from lora_gpt2.model.lora import build_adapter, count_parameters, plan_targets
from lora_gpt2.recipe import BLOCKS, LoraSettings

SIZES = {"small": (768, 12, 12), "medium": (1024, 24, 16), "large": (1280, 36, 20), "xl": (1600, 48, 25)}
# FACTS, STACK section 1: exact counts by experiment with PEFT
ALL_LINEAR_R8 = {"small": 1_179_648, "medium": 3_145_728, "large": 5_898_240, "xl": 9_830_400}
C_ATTN_R16 = {"small": 589_824, "medium": 1_572_864, "large": 2_949_120, "xl": 4_915_200}
PAPER_QV_R4 = {"medium": 393_216, "large": 737_280}


def config_of(size):
    width, layers, heads = SIZES[size]
    values = {"model_type": "gpt2", "n_embd": width, "n_layer": layers, "n_head": heads, "eos_token_id": 50256}
    return parse_config(values, size)


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_are_those_of_peft(size):
    config = config_of(size)
    assert count_parameters(config, LoraSettings(rank=8, targets=BLOCKS)) == ALL_LINEAR_R8[size]
    assert LoraSettings().targets == BLOCKS
    with_head = LoraSettings(rank=8, targets=(*BLOCKS, HEAD))
    assert count_parameters(config, with_head) == ALL_LINEAR_R8[size] + 16 * (50257 + config.n_embd)
    upper = LoraSettings(rank=8, targets=(*BLOCKS, HEAD), first_layer=config.n_layer - 1)
    assert count_parameters(config, upper) == ALL_LINEAR_R8[size] // config.n_layer + 16 * (50257 + config.n_embd)
    assert count_parameters(config, LoraSettings(rank=16, targets=("c_attn",))) == C_ATTN_R16[size]


@pytest.mark.parametrize("size", PAPER_QV_R4)
def test_the_papers_setting_has_the_published_codes_count(size):
    settings = LoraSettings(rank=4, alpha=32, targets=("c_attn.q", "c_attn.v"))
    assert count_parameters(config_of(size), settings) == PAPER_QV_R4[size]


@pytest.mark.parametrize(
    ("given", "scale", "scale_at_4"),
    [({}, 2, 2), ({"rank": 64}, 2, 2), ({"use_rslora": True}, 2, 4), ({"alpha": 4.0}, 0.25, 1)],
)
def test_an_unset_alpha_is_twice_the_rank_of_each_target(given, scale, scale_at_4):
    updates = build_adapter(config_of("small"), LoraSettings(**given, rank_pattern={"mlp.c_fc": 4}), 0).updates
    assert (updates["h.0.attn.c_attn"].scaling, updates["h.0.mlp.c_fc"].scaling) == (scale, scale_at_4)


def test_q_and_v_become_a_rank_8_adapter_with_alpha_64():
    (plan,) = plan_targets(config_of("medium"), LoraSettings(rank=4, alpha=32, targets=("c_attn.q", "c_attn.v")))
    assert (plan.target, plan.rank, plan.alpha) == ("attn.c_attn", 8, 64)
    assert plan.blocks == ((slice(0, 1024), slice(0, 4)), (slice(2048, 3072), slice(4, 8)))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_slices_keep_the_scale_of_one_slice(use_rslora):
    settings = LoraSettings(rank=4, alpha=12, targets=("c_attn.q", "c_attn.k", "c_attn.v"), use_rslora=use_rslora)
    update = build_adapter(config_of("small"), settings, 0).updates["h.0.attn.c_attn"]
    assert update.scaling == pytest.approx(12 / (2 if use_rslora else 4), rel=1e-12)
    assert update.rank == 12


def test_a_fresh_adapter_starts_as_pefts_do():
    config = config_of("small")
    adapter = build_adapter(config, LoraSettings(rank=8, targets=(*BLOCKS, HEAD)), 3)
    assert len(adapter.updates) == 49
    for update in adapter.updates.values():
        bound = 1 / math.sqrt(update.a.shape[1])
        assert not update.b.any()
        assert bound * 0.9 < update.a.abs().max() <= bound
    assert torch.equal(
        build_adapter(config, LoraSettings(rank=8), 3).updates["h.5.mlp.c_fc"].a, adapter.updates["h.5.mlp.c_fc"].a
    )
    assert not torch.equal(
        build_adapter(config, LoraSettings(rank=8), 4).updates["h.5.mlp.c_fc"].a, adapter.updates["h.5.mlp.c_fc"].a
    )
