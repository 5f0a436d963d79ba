import pytest
import torch
import torch.nn.functional as F

from lora_gpt2.model import loss
from lora_gpt2.model.gpt2 import LowRankLogits
from lora_gpt2.model.loss import (
    IGNORE,
    fused_linear_cross_entropy,
    fused_linear_kl_divergence,
    linear_kl_divergence,
    linear_nll,
)


@pytest.fixture(params=[3, 1000])
def rows(request, monkeypatch):
    monkeypatch.setattr(loss, "CPU_TOKENS", request.param)


def draw():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 6, generator=generator)
    head = torch.randn(17, 6, generator=generator)
    targets = torch.randint(0, 17, (11,), generator=generator)
    targets[[2, 7]] = IGNORE
    return hidden, head, targets, torch.rand(11, generator=generator)


@pytest.mark.usefixtures("rows")
def test_loss_and_gradient_equal_autograds():
    hidden, head, targets, weights = draw()
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    found, nll = fused_linear_cross_entropy(ours, head, targets, weights, 0.0, None)
    wanted = F.cross_entropy(theirs @ head.T, targets, reduction="none", ignore_index=IGNORE)
    (3 * found).backward()
    (3 * (wanted * weights).sum()).backward()
    assert torch.allclose(nll, wanted.detach(), atol=1e-5)
    assert torch.allclose(found, (wanted * weights).sum(), atol=1e-5)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)
    assert not ours.grad[[2, 7]].any()


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("groups", [1, 2])
def test_what_adapters_add_to_the_head_gets_autograds_gradients(groups):
    _, head, targets, weights = draw()
    generator = torch.Generator().manual_seed(1)
    hidden, targets, weights = torch.randn(10, 6, generator=generator), targets[:10], weights[:10]
    inner, outer = torch.randn(10, 3, generator=generator), torch.randn(groups, 3, 17, generator=generator)
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, inner, outer)]
    logits = leaves[0] @ head.T + torch.bmm(leaves[1].view(groups, -1, 3), leaves[2]).view(10, 17)
    wanted = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE)
    (3 * (wanted * weights).sum()).backward()
    ours, thin, found = hidden.clone().requires_grad_(), inner.clone().requires_grad_(), []
    loss_value, nll = fused_linear_cross_entropy(
        ours, head, targets, weights, 0.0, LowRankLogits(thin, outer, found.append)
    )
    (3 * loss_value).backward()
    assert torch.allclose(nll, wanted.detach(), atol=1e-5)
    for mine, theirs in zip((ours.grad, thin.grad, found[0]), leaves, strict=True):
        assert torch.allclose(mine, theirs.grad, atol=1e-5)
    assert torch.allclose(linear_nll(hidden, head, targets, LowRankLogits(inner, outer)), nll, atol=1e-6)


@pytest.mark.usefixtures("rows")
def test_scoring_equals_the_training_loss_per_token():
    hidden, head, targets, weights = draw()
    _, nll = fused_linear_cross_entropy(hidden, head, targets, weights, 0.0, None)
    assert torch.allclose(linear_nll(hidden, head, targets, None), nll, atol=1e-6)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", [0, 3])
def test_the_divergence_and_its_gradients_equal_autograds(groups, padding):
    _, head, targets, weights = draw()
    generator = torch.Generator().manual_seed(1)
    hidden, reference = (torch.randn(10, 6, generator=generator) for _ in range(2))
    targets, weights = targets[:10], weights[:10]
    inner, outer = torch.randn(10, 3, generator=generator), torch.randn(groups, 3, 17, generator=generator)
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, inner, outer)]
    logits = leaves[0] @ head.T + torch.bmm(leaves[1].view(groups, -1, 3), leaves[2]).view(10, 17)
    wanted = F.kl_div(logits.log_softmax(1), (reference @ head.T).log_softmax(1), reduction="none", log_target=True)
    wanted = wanted.sum(1) * (targets != IGNORE)
    (3 * (wanted * weights).sum()).backward()
    ours, thin, found = hidden.clone().requires_grad_(), inner.clone().requires_grad_(), []
    padded = F.pad(head, (0, 0, 0, padding))
    update = LowRankLogits(thin, outer, found.append)
    loss_value, divergence = fused_linear_kl_divergence(
        ours, padded, targets, weights, update, reference, vocab_size=17
    )
    (3 * loss_value).backward()
    assert torch.allclose(divergence, wanted.detach(), atol=1e-5)
    assert torch.allclose(loss_value, (wanted * weights).sum(), atol=1e-5)
    for mine, theirs in zip((ours.grad, thin.grad, found[0]), leaves, strict=True):
        assert torch.allclose(mine, theirs.grad, atol=1e-5)
    plain = linear_kl_divergence(hidden, padded, targets, LowRankLogits(inner, outer), reference, 17)
    assert torch.allclose(plain, divergence, atol=1e-6)


@pytest.mark.usefixtures("rows")
def test_a_model_does_not_diverge_from_itself():
    hidden, head, targets, weights = draw()
    ours = hidden.clone().requires_grad_()
    loss_value, divergence = fused_linear_kl_divergence(ours, head, targets, weights, None, hidden)
    loss_value.backward()
    assert divergence.abs().max() < 1e-6
    assert ours.grad.abs().max() < 1e-6


def test_uniform_logits_cost_the_log_of_the_vocabulary():
    nll = linear_nll(torch.randn(5, 4), torch.zeros(50257, 4), torch.arange(5), None)
    assert torch.allclose(nll.exp(), torch.full((5,), 50257.0), rtol=1e-5)


def test_the_largest_logits_do_not_overflow():
    hidden = torch.tensor([[1e4]], requires_grad=True)
    loss_value, _ = fused_linear_cross_entropy(
        hidden, torch.tensor([[1.0], [-1.0]]), torch.tensor([1]), torch.ones(1), 0.0, None
    )
    loss_value.backward()
    assert loss_value.item() == 20000
    assert torch.isfinite(hidden.grad).all()


HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def draw_exact(dtype, tokens=48, width=16, vocab=700, rank=4, groups=2):
    """Returns hidden states, head, targets, weights and factors of an update whose logits 16 bits hold exactly.

    All are small multiples of powers of two, so that no kernel rounds their sums, in whatever order it takes them.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(largest, *shape):
        return torch.randint(-largest, largest + 1, shape, generator=generator).to(dtype)

    hidden, head = draw(1, tokens, width), draw(3, vocab, width) / 8
    inner, outer = draw(1, tokens, rank), draw(3, groups, rank, vocab) / 8
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[[2, 7]] = IGNORE
    return hidden, head, targets, torch.rand(tokens, generator=generator), inner, outer


def exact_logits(hidden, head, inner, outer):
    """Returns the logits in float32, which rounding to 16 bits leaves as they are."""
    groups, rank, vocab = outer.shape
    added = torch.bmm(inner.float().view(groups, -1, rank), outer.float()).view(-1, vocab)
    logits = hidden.float() @ head.float().T + added
    assert torch.equal(logits.to(head.dtype).float(), logits)
    return logits


@HALVES
@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("is_updated", [False, True])
def test_scoring_over_a_head_in_16_bits_takes_the_softmax_in_float32(dtype, is_updated):
    hidden, head, targets, _, inner, outer = draw_exact(dtype)
    if not is_updated:
        outer = torch.zeros_like(outer)
    wanted = F.cross_entropy(exact_logits(hidden, head, inner, outer), targets, reduction="none", ignore_index=IGNORE)
    found = linear_nll(hidden, head, targets, LowRankLogits(inner, outer) if is_updated else None)
    assert found.dtype == torch.float32
    assert torch.allclose(found, wanted, atol=1e-5)  # in bfloat16 a sum of 700 is off by 1e-3


@HALVES
@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_training_loss_over_a_head_in_16_bits_takes_the_softmax_in_float32(dtype, smoothing):
    hidden, head, targets, weights, inner, outer = draw_exact(dtype)
    logits = exact_logits(hidden, head, inner, outer)
    each = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE, label_smoothing=smoothing)
    loss_value, nll = fused_linear_cross_entropy(hidden, head, targets, weights, smoothing, LowRankLogits(inner, outer))
    assert loss_value.dtype == nll.dtype == torch.float32
    assert torch.allclose(nll, F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE), atol=1e-5)
    assert loss_value.item() == pytest.approx((each * weights).sum().item(), rel=1e-6)


@HALVES
@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_gradients_in_16_bits_are_float32s_but_for_rounding(dtype, smoothing):
    """Also over many chunks (`rows`): what is added up over them is added up in float32."""
    hidden, head, targets, weights, inner, outer = draw_exact(dtype, tokens=240, groups=2)
    leaves = [tensor.float().requires_grad_() for tensor in (hidden, inner, outer)]
    logits = leaves[0] @ head.float().T + torch.bmm(leaves[1].view(2, -1, 4), leaves[2]).view(240, -1)
    each = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE, label_smoothing=smoothing)
    (each * weights).sum().backward()
    ours, thin, found = hidden.clone().requires_grad_(), inner.clone().requires_grad_(), []
    update = LowRankLogits(thin, outer, found.append)
    fused_linear_cross_entropy(ours, head, targets, weights, smoothing, update)[0].backward()
    assert (ours.grad.dtype, thin.grad.dtype, found[0].dtype) == (dtype, dtype, torch.float32)
    epsilon = torch.finfo(dtype).eps  # a rounding errs by at most half of it, and by 0.29 of it in the mean square
    for mine, theirs in zip((ours.grad, thin.grad, found[0]), leaves, strict=True):
        error, wanted = mine.float() - theirs.grad, theirs.grad
        assert error.norm() <= 0.45 * epsilon * wanted.norm()
        assert (error * wanted).sum().abs() <= epsilon / 6 * wanted.square().sum(), "no factor"


@HALVES
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_gradient_of_the_logits_is_rounded_to_16_bits_once(dtype, smoothing):
    tokens = 12  # each a group of its own, with the factor 1: the gradient of its update is that of its logits
    hidden, head, targets, _, inner, outer = draw_exact(dtype, tokens, rank=1, groups=tokens)
    inner = torch.ones_like(inner)
    weights = 500 * (1 + torch.arange(tokens) / tokens)  # so large that float16 has all its digits
    logits, found = exact_logits(hidden, head, inner, outer).requires_grad_(), []
    each = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE, label_smoothing=smoothing)
    (each * weights).sum().backward()
    update = LowRankLogits(inner, outer, found.append)
    fused_linear_cross_entropy(hidden.requires_grad_(), head, targets, weights, smoothing, update)[0].backward()
    error, wanted = (found[0][:, 0] - logits.grad).abs(), logits.grad.abs()
    # 1e-3: float32's own; the smoothed slope is a difference, of which it is more
    assert (error <= (0.5 + 1e-3) * torch.finfo(dtype).eps * wanted + 1e-6 * wanted.max()).all()
    assert wanted[0].any()
    assert not wanted[2].any(), "an ignored target"
