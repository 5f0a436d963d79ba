import pytest
import torch
import torch.nn.functional as F

from lora_gpt2.model import loss
from lora_gpt2.model.gpt2 import HeadUpdate
from lora_gpt2.model.loss import IGNORE, chunked_cross_entropy, measure_nll


@pytest.fixture(params=[3, 1000])
def rows(request, monkeypatch):
    monkeypatch.setattr(loss, "CPU_ROWS", request.param)


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
    found, nll = chunked_cross_entropy(ours, head, targets, weights, 0.0, None)
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
    loss_value, nll = chunked_cross_entropy(ours, head, targets, weights, 0.0, HeadUpdate(thin, outer, found.append))
    (3 * loss_value).backward()
    assert torch.allclose(nll, wanted.detach(), atol=1e-5)
    for mine, theirs in zip((ours.grad, thin.grad, found[0]), leaves, strict=True):
        assert torch.allclose(mine, theirs.grad, atol=1e-5)
    assert torch.allclose(measure_nll(hidden, head, targets, HeadUpdate(inner, outer)), nll, atol=1e-6)


@pytest.mark.usefixtures("rows")
def test_scoring_equals_the_training_loss_per_token():
    hidden, head, targets, weights = draw()
    _, nll = chunked_cross_entropy(hidden, head, targets, weights, 0.0, None)
    assert torch.allclose(measure_nll(hidden, head, targets, None), nll, atol=1e-6)


def test_uniform_logits_cost_the_log_of_the_vocabulary():
    nll = measure_nll(torch.randn(5, 4), torch.zeros(50257, 4), torch.arange(5), None)
    assert torch.allclose(nll.exp(), torch.full((5,), 50257.0), rtol=1e-5)


def test_the_largest_logits_do_not_overflow():
    hidden = torch.tensor([[1e4]], requires_grad=True)
    loss_value, _ = chunked_cross_entropy(
        hidden, torch.tensor([[1.0], [-1.0]]), torch.tensor([1]), torch.ones(1), 0.0, None
    )
    loss_value.backward()
    assert loss_value.item() == 20000
    assert torch.isfinite(hidden.grad).all()
