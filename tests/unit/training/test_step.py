"""One step: noise of the right size, and in 16 bits the gradients of each slot as in float32."""

import math
from dataclasses import replace

import pytest
import torch

from lora_gpt2.model.bank import AdapterBank
from lora_gpt2.model.base import load_base
from lora_gpt2.model.lora import build_ranks
from lora_gpt2.model.merge import DeltaAdapters, to_delta
from lora_gpt2.model.runtime import Runtime
from lora_gpt2.recipe import LoraSettings
from lora_gpt2.training.process_group import ProcessGroup
from lora_gpt2.training.step import MicroBatch, StepRunner, draw_noise
from tests.builders import make_adapter

CPU = torch.device("cpu")
SETTINGS = LoraSettings(rank=3, alpha=5)
SCALES = (2.0**6, 2.0**13, 2.0**10)


def make_pass(slots, rows=2, time=9, vocab=260, **options):
    """Returns a pass of random tokens; a slot's rows are the same in whatever company."""
    sides = []
    for slot in slots:
        generator = torch.Generator().manual_seed(slot)
        sides.append(torch.randint(0, vocab, (2, rows, time), generator=generator))
    inputs, targets = torch.stack(sides, 1).flatten(1, 2)
    weights = torch.cat([torch.full((rows * time,), (1 + slot) / (rows * time)) for slot in slots])
    settings = {"dropout": 0.0, "label_smoothing": 0.0, "noise_alpha": 0.0, "gradient_checkpointing": False, **options}
    seeds = torch.tensor([100 * slot + row for slot in slots for row in range(rows)])
    return MicroBatch(
        slots=slots,
        slot_ids=torch.tensor(slots),
        inputs=inputs,
        targets=targets,
        loss_weights=weights,
        seeds=seeds,
        **settings,
    )


def make_runner(base_folder, dtype, num_slots=3):
    base = load_base(str(base_folder), Runtime(CPU, dtype))
    bank = AdapterBank(base.config, build_ranks(base.config, SETTINGS), num_slots, "training", base.model.wte.weight)
    for slot in range(num_slots):
        bank.load(slot, make_adapter(base.config, slot, SETTINGS))
    return StepRunner(base.model, bank, None, None, ProcessGroup())


@pytest.mark.parametrize(
    "groups", [[[0, 1, 2]], [[0, 2]], [[2]], [[0], [1, 2]], [[0, 1, 2], [1]]], ids=lambda groups: str(groups)
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_slots_gradient_in_16_bits_is_float32s_whatever_its_loss_scale(base_folder, dtype, groups):
    passes = [make_pass(slots) for slots in groups]
    exact, rounded = make_runner(base_folder, torch.float32), make_runner(base_folder, dtype)
    assert (rounded.grad_scaler is not None) == (dtype == torch.float16), "bfloat16 has float32's range"
    if rounded.grad_scaler is not None:
        rounded.grad_scaler.values.copy_(torch.tensor(SCALES))
    for runner in (exact, rounded):
        runner.compute_gradients(passes)
    epsilon = torch.finfo(dtype).eps
    for slot in range(3):
        found, wanted = rounded.gradient[slot], exact.gradient[slot]
        assert wanted.any() == any(slot in slots for slots in groups)
        # roundings on the way through two blocks; a wrong scale would be a factor of 8 at least
        assert (found - wanted).norm() <= 4 * epsilon * wanted.norm(), slot
        assert float(((found - wanted) * wanted).sum().abs()) <= 2 * epsilon * float(wanted.square().sum()), slot
    assert torch.allclose(rounded.losses, exact.losses, rtol=epsilon), "the loss is not scaled"


def test_a_slots_loss_is_its_rows_weighted_and_its_gradient_does_not_depend_on_the_others(base_folder):
    together = make_runner(base_folder, torch.float32)
    together.compute_gradients([make_pass([0, 1, 2])])
    for slot in range(3):
        alone = make_runner(base_folder, torch.float32)
        alone.compute_gradients([one := make_pass([slot])])
        rows_loss = torch.nn.functional.cross_entropy(
            _logits(alone, slot, one.inputs).flatten(0, 1), one.targets.flatten(), reduction="none"
        )
        assert alone.losses[slot].item() == pytest.approx((rows_loss * one.loss_weights).sum().item(), rel=1e-5)
        assert together.losses[slot].item() == pytest.approx(alone.losses[slot].item(), rel=1e-5)
        difference = (together.gradient[slot] - alone.gradient[slot]).norm()
        assert difference <= 1e-5 * alone.gradient[slot].norm()


def _logits(runner, slot, tokens, noise=None):
    """Returns the logits under a slot's adapter, with its updates added to the weights."""
    updates = runner.bank.read(slot).updates
    rows = DeltaAdapters(lambda site: to_delta(updates[site]) if site in updates else None)
    hidden = runner.model(tokens, rows, noise=noise)
    return runner.model.logits(hidden, rows)


@pytest.mark.parametrize("change", [{"label_smoothing": 0.3}, {"noise_alpha": 20.0}])
def test_smoothing_and_noise_give_the_loss_and_gradient_that_they_say(base_folder, change):
    """The loss in `stats` is the plain NLL, under smoothing too; the gradient is checked along its own direction."""
    runner = make_runner(base_folder, torch.float32, num_slots=1)
    each = make_pass([0], **change)
    noise = draw_noise(each, runner.model.config.n_embd)
    runner.compute_gradients([each])
    gradient, flat = runner.gradient[0].clone().double(), runner.bank.flat[0]

    def measure(smoothing):
        logits, targets = _logits(runner, 0, each.inputs, noise).flatten(0, 1), each.targets.flatten()
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
        return float((losses.double() * each.loss_weights).sum())

    assert runner.losses[0].item() == pytest.approx(measure(0.0), rel=1e-5)
    direction = gradient / gradient.norm()
    before, step, values = flat.clone(), 1e-2, []
    for sign in (1, -1):
        flat.copy_(before + sign * step * direction)
        values.append(measure(each.label_smoothing))
    # the central difference errs by the third derivative times step squared
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(gradient.norm()), rel=5e-3)


@pytest.mark.parametrize(("rows", "time", "width"), [(3, 32, 64), (2, 128, 16), (1, 7, 768)])
def test_noise_is_uniform_within_alpha_over_the_root_of_time_times_width(rows, time, width):
    """NEFTune (Jain et al. 2023, arXiv:2310.05914), algorithm 1."""
    alpha, inputs = 5.0, torch.zeros(rows, time, dtype=torch.long)
    each = make_pass([0], rows, time, noise_alpha=alpha)
    noise, bound = draw_noise(each, width), alpha / math.sqrt(time * width)
    assert noise.shape == (*inputs.shape, width)
    assert 0.995 * bound < noise.abs().max() <= bound
    deviations = 5 / math.sqrt(noise.numel())
    assert float(noise.mean()) == pytest.approx(0, abs=deviations * bound / math.sqrt(3))
    assert float(noise.square().mean()) == pytest.approx(bound**2 / 3, abs=deviations * bound**2 * math.sqrt(4 / 45))
    doubled = draw_noise(make_pass([0], rows, time, noise_alpha=2 * alpha), width)
    assert torch.allclose(doubled, 2 * noise)
    assert draw_noise(make_pass([0], rows, time), width) is None


def test_a_rows_noise_is_a_function_of_its_seed_alone():
    each = make_pass([0, 1], rows=2, time=6, noise_alpha=3.0)
    noise = draw_noise(each, 8)
    assert len(set(each.seeds.tolist())) == 4
    for row in range(4):
        alone = replace(make_pass([0], rows=1, time=6, noise_alpha=3.0), seeds=each.seeds[row : row + 1])
        assert torch.equal(draw_noise(alone, 8)[0], noise[row])
    correlations = torch.corrcoef(draw_noise(make_pass([0], 4, 100, noise_alpha=3.0), 100).flatten(1))
    assert torch.allclose(correlations, torch.eye(4), atol=0.05), "five deviations of 10,000 draws"
