"""Laws of the adapter that training starts from."""

import math

import pytest
import torch

from lora_gpt2.model.lora import Adapter, LoraUpdate, build_adapter, build_ranks
from lora_gpt2.model.merge import measure_norm, to_delta
from lora_gpt2.model.reshape import build_pissa, describe_shape, reshape_adapter
from lora_gpt2.recipe import BLOCKS, LoraSettings
from lora_gpt2.store.peft.convert import weight_of
from tests.builders import make_adapter

FOUR = LoraSettings(rank=4, alpha=8.0)


def deltas(adapter):
    return {site: to_delta(update) for site, update in adapter.updates.items() if update.b.any()}


@pytest.mark.parametrize(
    "shape",
    [
        FOUR,
        LoraSettings(rank=9, alpha=18.0),
        LoraSettings(rank=4, alpha=1.0),
        LoraSettings(rank=6, use_rslora=True),
        LoraSettings(rank=4, alpha=8.0, targets=(*BLOCKS, "lm_head")),
        LoraSettings(rank=12, targets=("c_attn.q", "c_attn.k", "c_attn.v", *BLOCKS[1:])),
    ],
    ids=["same", "wider", "other alpha", "rslora", "with head", "slices"],
)
def test_a_shape_with_room_for_the_parent_does_what_it_does_and_can_learn(base, shape):
    parent = make_adapter(base.config, 1, FOUR)
    child, error = reshape_adapter(parent, base.config, shape, 7)
    assert error == 0
    assert child.ranks == build_ranks(base.config, shape)
    whole = deltas(parent)
    assert deltas(child).keys() == whole.keys()
    assert all(torch.allclose(delta, whole[site], atol=1e-6) for site, delta in deltas(child).items())
    assert all((update.a.abs().sum(1) > 0).all() for update in child.updates.values()), "a row of zeros cannot learn"


def test_the_same_shape_is_the_parent_bitwise(base):
    parent = make_adapter(base.config, 1, FOUR)
    child, _ = reshape_adapter(parent, base.config, FOUR, 7)
    for site, update in child.updates.items():
        assert torch.equal(update.a, parent.updates[site].a)
        assert torch.equal(update.b, parent.updates[site].b)


def test_slices_of_the_parent_stay_slices(base):
    qv = LoraSettings(rank=3, targets=("c_attn.q", "c_attn.v"))
    fresh = build_adapter(base.config, qv, 0).updates["h.0.attn.c_attn"]
    b = torch.zeros_like(fresh.b)
    d = base.config.n_embd
    b[:d, :3], b[2 * d :, 3:] = torch.randn(d, 3), torch.randn(d, 3)
    parent = Adapter(updates={"h.0.attn.c_attn": LoraUpdate(fresh.a, b, fresh.alpha)})
    child, error = reshape_adapter(parent, base.config, qv, 5)
    assert error == 0
    assert torch.equal(child.updates["h.0.attn.c_attn"].b, b)
    only_q, error = reshape_adapter(parent, base.config, LoraSettings(rank=3, targets=("c_attn.q",)), 5)
    delta = to_delta(parent.updates["h.0.attn.c_attn"])
    assert error == pytest.approx(float(delta[d:].norm() / delta.norm()), rel=1e-5)
    assert torch.allclose(to_delta(only_q.updates["h.0.attn.c_attn"])[:d], delta[:d], atol=1e-6)


@pytest.mark.parametrize("targets", [BLOCKS, ("c_attn", "mlp.c_fc")])
def test_the_error_is_what_dense_matrices_say_and_no_rank_does_better(base, targets):
    parent = make_adapter(base.config, 1, FOUR)
    child, error = reshape_adapter(parent, base.config, LoraSettings(rank=2, targets=targets), 7)
    lost = whole = best = 0.0
    for site, update in parent.updates.items():
        delta = to_delta(update).double()
        kept = to_delta(child.updates[site]).double() if site in child.updates else torch.zeros_like(delta)
        lost += float((delta - kept).square().sum())
        whole += float(delta.square().sum())
        best += float(torch.linalg.svdvals(delta)[2 if site in child.updates else 0 :].square().sum())
    assert error == pytest.approx(math.sqrt(lost / whole), rel=1e-4)
    assert lost == pytest.approx(best, rel=1e-4)


def test_a_shape_is_described_by_the_settings_that_build_it(base):
    for settings in (FOUR, LoraSettings(rank=2, alpha=6.0, targets=("mlp.c_fc", "lm_head"), first_layer=1)):
        ranks = build_ranks(base.config, settings)
        found = LoraSettings.model_validate(describe_shape(ranks, settings.alpha, False))
        assert build_ranks(base.config, found) == ranks
        assert found.alpha == settings.alpha
    uneven = {"h.0.mlp.c_fc": 2, "h.1.mlp.c_fc": 5, "h.0.attn.c_attn": 3, "lm_head": 3}
    found = LoraSettings.model_validate(describe_shape(uneven, 4.0, True))
    assert found.rank_of("mlp.c_fc") == 5
    assert found.rank_of("c_attn") == found.rank_of("lm_head") == found.rank == 3


def test_pissa_changes_nothing_and_trains_the_leading_part(base):
    settings = LoraSettings(rank=3, targets=("c_attn", "lm_head"), init="pissa")
    adapter = build_pissa(base.config, settings, lambda site: weight_of(base, site))
    assert adapter.ranks == build_ranks(base.config, settings)
    for site, update in adapter.updates.items():
        half = update.rank // 2
        trained = LoraUpdate(update.a[:half], update.b[:, :half], update.alpha / 2)
        values = torch.linalg.svdvals(weight_of(base, site))
        assert measure_norm(trained) == pytest.approx(float(values[:half].norm()), rel=1e-4)
        assert float(to_delta(update).abs().max()) < 1e-6
