"""The arithmetic of merging, against PEFT's and against plain matrices."""

import pytest
import torch
from peft.utils import merge_utils

from lora_gpt2.core.errors import UsageError
from lora_gpt2.model.lora import Adapter, LoraUpdate
from lora_gpt2.model.merge import (
    METHODS,
    MergeRule,
    approximate,
    choose_rank,
    combine_adapters,
    concatenate_updates,
    drop_and_rescale,
    measure_inner,
    measure_norm,
    to_delta,
    truncate_rank,
)
from lora_gpt2.recipe import LoraSettings
from tests.builders import make_adapter

SITE = "h.0.mlp.c_fc"


def make_update(seed, rank=3, outputs=20, inputs=12, use_rslora=False):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator) for shape in ((rank, inputs), (outputs, rank)))
    return LoraUpdate(a, b, 6.0, use_rslora)


def parents(*seeds):
    return [Adapter(updates={SITE: make_update(seed, rank)}) for rank, seed in enumerate(seeds, start=2)]


def dense(adapters):
    return [to_delta(adapter.updates[SITE]) for adapter in adapters]


def test_concatenation_is_the_weighted_sum_across_ranks_scales_and_signs():
    updates = [make_update(1, 2), make_update(2, 5, use_rslora=True)]
    whole = concatenate_updates(updates, [0.7, -1.3])
    expected = 0.7 * to_delta(updates[0]) - 1.3 * to_delta(updates[1])
    assert whole.rank == 7
    torch.testing.assert_close(to_delta(whole), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (4, 30)])
def test_cutting_a_rank_is_the_best_approximation_and_says_its_error(shape):
    update = concatenate_updates([make_update(1, 3, *shape), make_update(2, 4, *shape)], [1.0, 0.5])
    values = torch.linalg.svdvals(to_delta(update).double())
    for rank in (1, 2, 4):
        for cut, error in (truncate_rank(update, rank, 0.0), approximate(to_delta(update), rank, 0.0)):
            assert cut.rank == rank
            # both come from float32 factors, of which a norm keeps four digits
            assert error == pytest.approx(float(values[rank:].norm()), rel=1e-4, abs=1e-4)
            assert float((to_delta(update) - to_delta(cut)).norm()) == pytest.approx(error, rel=1e-3, abs=1e-4)
    assert truncate_rank(update, 7, 0.0) == (update, 0.0)


def test_the_smallest_rank_within_an_error_is_found():
    values = torch.tensor([4.0, 2.0, 1.0, 0.0])
    whole = float(values.norm())
    assert choose_rank(values, 2, 0.0) == 2
    assert [choose_rank(values, 0, error) for error in (1e-9, 1.01 / whole, 2.3 / whole, 0.99)] == [3, 2, 1, 1]
    update = concatenate_updates([make_update(1, 3), make_update(2, 4)], [1.0, 1.0])
    for cut, error in (truncate_rank(update, 99, 0.2), approximate(to_delta(update), 99, 0.2)):
        assert error <= 0.2 * measure_norm(update)
        _, larger_error = truncate_rank(update, cut.rank - 1, 0.0)
        assert larger_error > 0.2 * measure_norm(update)


@pytest.mark.parametrize("weights", [[0.6, 0.4], [1.0, -0.5]])
@pytest.mark.parametrize("method", ["ties", "magnitude_prune", "task_arithmetic"])
def test_methods_are_those_of_peft(method, weights):
    adapters = parents(1, 2)
    rule = MergeRule(method=method, density=0.4)
    arguments = (dense(adapters), torch.tensor(weights)) + ((0.4,) if method != "task_arithmetic" else ())
    expected = getattr(merge_utils, method)(*arguments)
    torch.testing.assert_close(rule.combine_site(adapters, weights, SITE), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_is_pefts_for_the_same_draw(method, monkeypatch):
    adapters, weights, drawn = parents(1, 2), [0.6, 0.4], []

    def record(delta, density, generator):
        drawn.append(drop_and_rescale(delta, density, generator))
        return drawn[-1]

    monkeypatch.setattr("lora_gpt2.model.merge.drop_and_rescale", record)
    ours = MergeRule(method=method, density=0.5).combine_site(adapters, weights, SITE)
    monkeypatch.setattr(merge_utils, "prune", lambda tensor, *rest, **more: tensor)
    torch.testing.assert_close(ours, getattr(merge_utils, method)(drawn, torch.tensor(weights), 0.5))


def test_dare_keeps_the_density_and_the_mean_and_follows_its_seed():
    delta = torch.ones(400, 400)
    kept = drop_and_rescale(delta, 0.3, torch.Generator().manual_seed(0))
    # 160,000 draws: the share deviates by 0.0011 and the mean, of values 1 / 0.3, by 0.0038; some eight of them
    assert float((kept > 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert float(kept.mean()) == pytest.approx(1, abs=0.03)
    adapters = parents(1, 2)
    one, same, other = (
        MergeRule(method="dare_linear", seed=seed).combine_site(adapters, [1.0, 1.0], SITE) for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_draws_for_each_parent_projection_and_seed_independently(method):
    """Yu et al. 2024, section 3.2: each entry of each parent is dropped by chance, whatever happens to the others."""
    update = make_update(1, outputs=200, inputs=100)
    sites = (SITE, "h.1.mlp.c_fc")
    twins = [Adapter(updates=dict.fromkeys(sites, update)) for _ in range(2)]
    kept = []
    for seed in (0, 1):
        rule = MergeRule(method=method, density=0.3, seed=seed)
        for site in sites:
            for parent in range(2):
                factors = [float(parent == 0), float(parent == 1)]  # leaves what one parent keeps
                kept.append(rule.combine_site(twins, factors, site) != 0)
    masks = torch.stack(kept).flatten(1).float()
    # over 20,000 independent entries a share deviates by 0.0032, a correlation by 0.0071: five of them at most
    assert torch.allclose(masks.mean(1), torch.full((8,), 0.3), atol=0.016)
    assert torch.allclose(torch.corrcoef(masks), torch.eye(8), atol=0.036)


def test_dare_draws_the_same_for_a_parent_whatever_the_others_are():
    rule = MergeRule(method="dare_linear", density=0.5)
    one, other, third = (Adapter(updates={SITE: make_update(seed, outputs=40)}) for seed in (1, 2, 3))
    pair, with_third = (rule.combine_site(each, [1.0, 0.0], SITE) for each in ([one, other], [one, third]))
    assert torch.equal(pair, with_third)
    assert torch.equal(pair, rule.combine_site([one], [1.0], SITE))


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.pruning != "none"])
def test_pruning_nothing_and_agreeing_parents_change_nothing(method):
    one = parents(1)[0]
    combined = MergeRule(method=method, density=1.0).combine_site([one, one], [0.5, 0.5], SITE)
    scale = 0.5 if method.endswith("ties") else 1  # the mean of two, as PEFT has it
    torch.testing.assert_close(combined, scale * dense([one])[0], atol=1e-5, rtol=1e-5)


def test_ranks_and_targets_may_differ_and_the_default_ranks_are_kept(base):
    one = make_adapter(base.config, 1, LoraSettings(rank=2, targets=("c_attn.q", "mlp.c_fc")))
    other = make_adapter(base.config, 2, LoraSettings(rank=5, targets=("mlp.c_fc", "mlp.c_proj")))
    sites = {*one.updates, *other.updates}
    for method, rank in {"cat": 7, "task_arithmetic": 7, "svd": 5, "linear": 5, "ties": 7}.items():
        combined = combine_adapters([one, other], [0.5, 0.5], MergeRule(method=method))
        assert set(combined.adapter.updates) == sites
        assert combined.adapter.updates["h.1.mlp.c_fc"].rank == rank
        assert (combined.relative_error == 0) == (method in ("cat", "task_arithmetic"))
    assert (
        combine_adapters([one, other], [1.0, 1.0], MergeRule(method="svd"), rank=3).adapter.updates["h.0.mlp.c_fc"].rank
        == 3
    )


@pytest.mark.parametrize("weights", [[2.0, 2.0], [0.2, 0.6], [-1.0, -3.0], [1.0, -3.0], [3.0, -1.0]])
def test_linear_divides_by_the_sum_of_weights_with_its_sign(base, weights):
    one, other = (make_adapter(base.config, seed) for seed in (1, 2))
    rule = MergeRule(method="linear")
    total = weights[0] + weights[1]
    assert rule.scale_weights(weights) == pytest.approx([weights[0] / total, weights[1] / total])
    assert sum(rule.scale_weights(weights)) == pytest.approx(1)
    combined = combine_adapters([one, other], weights, rule, rank=99).adapter.updates
    for site in one.updates:
        expected = sum(w / total * to_delta(a.updates[site]) for w, a in zip(weights, (one, other), strict=True))
        torch.testing.assert_close(to_delta(combined[site]), expected, atol=1e-5, rtol=1e-4)


def test_only_linear_changes_the_weights_and_a_sum_of_zero_is_refused(base):
    assert all(MergeRule(method=m).scale_weights([2.0, -3.0]) == [2.0, -3.0] for m in ("cat", "svd", "ties"))
    one, other = (make_adapter(base.config, seed) for seed in (1, 2))
    with pytest.raises(UsageError, match="is zero") as caught:
        combine_adapters([one, other], [1.0, -1.0], MergeRule(method="linear"))
    assert "--method cat" in caught.value.hint


def test_inner_products_come_from_the_factors():
    one, other = make_update(1, 3), make_update(2, 5, use_rslora=True)
    left, right = to_delta(one), to_delta(other)
    assert measure_inner(one, other) == pytest.approx(float((left * right).sum()), rel=1e-5)
    assert measure_norm(one) == pytest.approx(float(left.norm()), rel=1e-5)
