"""The training function against plain autograd: same values, same gradients, less kept."""

import pytest
import torch
import torch.nn.functional as F

from lora_gpt2.model.bank import AdapterBank
from lora_gpt2.model.fused import TrainingAdapters
from lora_gpt2.model.loss import fused_linear_cross_entropy
from lora_gpt2.recipe import BLOCKS, LoraSettings
from tests.builders import make_adapter

SETTINGS = LoraSettings(rank=3, alpha=5)


def open_bank(base, settings=SETTINGS, num_slots=1):
    adapters = [make_adapter(base.config, seed, settings) for seed in range(num_slots)]
    bank = AdapterBank(base.config, adapters[0].ranks, num_slots, "training", base.model.wte.weight)
    for slot, adapter in enumerate(adapters):
        bank.load(slot, adapter)
    return bank, bank.enable_gradients()


class PlainRows:
    """The same maths, left to autograd, with the same masks."""

    def __init__(self, rows, updates):
        self.rows, self.updates = rows, updates

    def project(self, site, linear, before, x):
        h = x if before is None else before(x)
        return linear(h) + self.update(site, h)

    def low_rank_logits(self, hidden):
        raise AssertionError("loss_of adds it")

    def update(self, site, h):
        if site not in self.updates:
            return 0.0
        a, b, scale = self.updates[site]
        mask = self.rows.draw_mask(site, h.detach())
        return scale * (h if mask is None else h * mask) @ a.T @ b.T


def loss_of(base, rows, tokens, **options):
    hidden, targets = base.model(tokens[:, :-1], rows, **options), tokens[:, 1:].flatten()
    weights, head = torch.full(targets.shape, 0.01), base.model.head
    if isinstance(rows, PlainRows):
        logits = F.linear(hidden, head) + rows.update("lm_head", hidden)
        return 0.01 * F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
    return fused_linear_cross_entropy(hidden.flatten(0, 1), head, targets, weights, 0.0, rows.low_rank_logits(hidden))[
        0
    ]


@pytest.fixture
def tokens(base):
    return torch.randint(0, base.config.vocab_size, (3, 11), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("targets", [LoraSettings().targets, ("mlp.c_proj",), ("lm_head",)])
def test_gradients_equal_autograds(base, tokens, targets, dropout, checkpointing):
    bank, gradient = open_bank(base, LoraSettings(rank=3, alpha=5, targets=targets))
    rows = TrainingAdapters(bank, [0], None, dropout, torch.tensor([7, 8, 9]))
    ours = loss_of(base, rows, tokens, checkpoint_blocks=checkpointing)
    ours.backward()
    adapter = bank.read(0)
    updates = {
        site: (u.a.clone().requires_grad_(), u.b.clone().requires_grad_(), u.scaling)
        for site, u in adapter.updates.items()
    }
    theirs = loss_of(base, PlainRows(rows, updates), tokens)
    theirs.backward()
    assert torch.allclose(ours, theirs, atol=1e-6)
    found = bank.read(0, gradient)
    for site, (a, b, _) in updates.items():
        for mine, wanted in ((found.updates[site].a, a.grad), (found.updates[site].b, b.grad)):
            assert (mine - wanted).abs().max() <= 1e-5 * wanted.abs().max() + 1e-8, site


def test_a_mask_depends_on_the_row_and_the_site_alone(base):
    bank, _ = open_bank(base)
    like = torch.ones(2, 5, 16)
    first = TrainingAdapters(bank, [0], None, 0.5, torch.tensor([3, 4])).draw_mask("h.0.mlp.c_fc", like)
    turned = TrainingAdapters(bank, [0], None, 0.5, torch.tensor([4, 3])).draw_mask("h.0.mlp.c_fc", like)
    assert torch.equal(first[0], turned[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(
        first, TrainingAdapters(bank, [0], None, 0.5, torch.tensor([3, 4])).draw_mask("h.1.mlp.c_fc", like)
    )
    assert set(first.unique().tolist()) == {0.0, 2.0}


def kept_widths(base, tokens, rows):
    """Returns what autograd keeps for the backward pass, in numbers per token and width, each storage once."""
    kept = {}
    weights = {p.untyped_storage().data_ptr() for p in base.model.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.numel() >= 2 * tokens.numel():
            kept[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = base.model(tokens, rows)
    assert hidden.requires_grad
    return sum(kept.values()) / tokens.numel() / base.config.n_embd


def test_ten_widths_are_kept_per_token_and_block(base, tokens):
    bank, _ = open_bank(base)
    layers, products = base.config.n_layer, sum(bank.ranks.values()) / base.config.n_embd
    ours = kept_widths(base, tokens, TrainingAdapters(bank, [0]))
    assert ours - products <= 10 * layers + 2.2
    updates = {
        site: (u.a.clone().requires_grad_(), u.b.clone().requires_grad_(), u.scaling)
        for site, u in bank.read(0).updates.items()
    }
    plain = kept_widths(base, tokens, PlainRows(TrainingAdapters(bank, [0]), updates))
    assert plain > 1.5 * ours, "plain autograd, for comparison"


def test_nothing_is_kept_below_the_first_adapted_block(base, tokens):
    bank, gradient = open_bank(base, LoraSettings(rank=3, first_layer=1))
    assert all(site.startswith("h.1.") or site == "lm_head" for site in bank.sites)
    upper = kept_widths(base, tokens, TrainingAdapters(bank, [0]))
    whole, _ = open_bank(base)
    assert upper < 0.6 * kept_widths(base, tokens, TrainingAdapters(whole, [0]))
    loss_of(base, TrainingAdapters(bank, [0]), tokens).backward()
    assert gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slots", [[0, 1, 2], [2, 0]])
def test_a_slots_scale_is_applied_before_rounding_to_the_bases_dtype(base, dtype, slots):
    config = base.config
    settings = [LoraSettings(rank=3, alpha=alpha, targets=(*BLOCKS, "lm_head")) for alpha in (1, 7, 0.1)]
    adapters = [make_adapter(config, 1, each) for each in settings]
    bank = AdapterBank(config, adapters[0].ranks, 3, "training", base.model.wte.weight.to(dtype))
    for slot, adapter in enumerate(adapters):
        bank.load(slot, adapter)
    z = torch.randn(len(slots), 50, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    scales = torch.tensor([1 / 3, 7 / 3, 0.1 / 3])[slots]
    for site in ("h.0.mlp.c_fc", "lm_head"):
        found = TrainingAdapters(bank, slots).scale_(z.clone(), bank.sites[site])
        assert found.dtype == dtype
        assert torch.equal(found, (z.float() * scales[:, None, None]).to(dtype)), site


def test_noise_is_added_to_the_embeddings(base, tokens):
    bank, gradient = open_bank(base)
    rows, noise = TrainingAdapters(bank, [0]), torch.randn(3, 10, 16, generator=torch.Generator().manual_seed(0))
    found = loss_of(base, rows, tokens, noise=noise)
    found.backward()
    with_noise, kept = gradient.clone(), base.model.wte.register_forward_hook(lambda m, i, embedded: embedded + noise)
    gradient.zero_()
    wanted = loss_of(base, rows, tokens)
    wanted.backward()
    kept.remove()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert (with_noise - gradient).norm() <= 1e-5 * gradient.norm()  # float32 sums in another order
    assert abs(found.item() / loss_of(base, rows, tokens).item() - 1) > 1e-3, "the comparison can fail"


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_label_smoothing_equals_torchs(smoothing):
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(6, 4, generator=generator), torch.randn(9, 4, generator=generator)
    targets = torch.randint(0, 9, (6,), generator=generator)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss, nll = fused_linear_cross_entropy(ours, head, targets, torch.full((6,), 1 / 6), smoothing, None)
    wanted = F.cross_entropy(theirs @ head.T, targets, label_smoothing=smoothing)
    loss.backward()
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-6)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)
    assert torch.allclose(nll, F.cross_entropy(hidden @ head.T, targets, reduction="none"), atol=1e-5)
