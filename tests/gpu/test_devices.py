"""The same laws on every device: the CPU, CUDA where it is there, and where it is not a pretended one."""

import pytest
import torch

from lora_gpt2.core.interrupt import StopRequest
from lora_gpt2.data.prepared import prepare_data
from lora_gpt2.inference.cuda_graphs import CudaGraphDecoder
from lora_gpt2.inference.decoder import Decoder
from lora_gpt2.inference.engine import Engine
from lora_gpt2.inference.generate import Request, generate
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.sequence import SequenceState
from lora_gpt2.inference.session import Session
from lora_gpt2.model.bank import AdapterBank
from lora_gpt2.model.base import load_base
from lora_gpt2.model.lora import build_adapter
from lora_gpt2.model.runtime import Runtime, choose_runtime, measure_peak_memory
from lora_gpt2.recipe import GenerateSettings, LoraSettings, build_recipe
from lora_gpt2.training.memory import estimate_memory
from lora_gpt2.training.plan import build_random_data
from lora_gpt2.training.process_group import ProcessGroup
from lora_gpt2.training.slot import TrainingSlot
from lora_gpt2.training.step import MicroBatch, SlotHyperparams, StepRunner
from lora_gpt2.training.trainer import Trainer
from tests.builders import make_adapter, make_base_folder
from tests.pretended_device import CUDA, pretend_cuda
from tests.unit.training.test_memory import make_recipe as make_memory_recipe
from tests.unit.training.test_memory import measure_peak

HAS_CUDA = torch.cuda.is_available()


@pytest.fixture(params=["cpu", "cuda" if HAS_CUDA else "pretended cuda"])
def device(request):
    if request.param != "pretended cuda":
        yield torch.device(request.param)
        return
    with pretend_cuda():
        yield CUDA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_and_generating_on_the_device(base_folder, text_file, reporter, device, dtype):
    base = load_base(str(base_folder), Runtime(device, dtype))
    recipes = [
        build_recipe(
            {
                "name": name,
                "data": {"sources": [str(text_file)], "block_size": 16},
                "lora": {"rank": 2, "targets": ["c_attn.q", "mlp.c_fc"]},
                "train": {"steps": 40, "batch_tokens": 64, "learning_rate": 1e-2, "seed": seed},
            },
            name,
        )
        for seed, name in enumerate(("one", "two"))
    ]
    data = prepare_data(recipes[0].data, base.tokenizer, reporter)
    trainer = Trainer(base, [TrainingSlot(recipe=recipe, data=data) for recipe in recipes], reporter)
    assert trainer.bank.flat.device.type == device.type
    trained = trainer.train(StopRequest())
    for outcome in trained:
        assert outcome.validation_nll < outcome.base_nll - 0.3
        assert all(update.a.dtype == torch.float32 for update in outcome.adapter.updates.values())
    session = Session(base)
    session.load_in_memory({outcome.slot.name: outcome.adapter for outcome in trained})
    requests = [Request("the", Mix.single("one")), Request("the cat", Mix.single("two")), Request("the")]
    outputs = generate(session, requests, GenerateSettings(max_new_tokens=5))
    assert [output.adapter for output in outputs] == ["one", "two", "base"]


def test_the_choice_of_numbers_and_the_peak_are_real(device):
    if device.type == "cuda" and not HAS_CUDA:
        pytest.skip("a pretended device has no allocator")
    runtime = choose_runtime("auto", device)
    assert runtime.dtype != torch.float16 or device.type == "cuda"
    before = measure_peak_memory(device)
    block = torch.ones(2**26, dtype=torch.float32, device=device)
    assert measure_peak_memory(device) >= max(before, block.numel() * 4)


def make_runner(folder, device, dtype=torch.float32, quantize="none"):
    base = load_base(str(folder), Runtime(device, dtype), quantize)
    adapters = [build_adapter(base.config, LoraSettings(rank=2), seed) for seed in range(2)]
    bank = AdapterBank(base.config, adapters[0].ranks, 2, "training", base.model.wte.weight)
    for slot, adapter in enumerate(adapters):
        bank.load(slot, adapter)
    return StepRunner(base.model, bank, None, None, ProcessGroup())


def make_step(step, dropout=0.0, noise_alpha=0.0):
    """Returns the micro-batches and hyperparameters of a step: fixed shapes, other tokens and rates each time."""
    tokens = torch.randint(0, 200, (4, 17), generator=torch.Generator().manual_seed(step))
    weights = torch.full((4 * 16,), 1 / 32)
    slots = torch.arange(2)
    batch = MicroBatch(
        slots=[0, 1],
        slot_ids=slots,
        inputs=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_weights=weights,
        dropout=dropout,
        label_smoothing=0.0,
        seeds=4 * step + torch.arange(4),
        noise_alpha=noise_alpha,
        gradient_checkpointing=False,
    )
    hyperparams = SlotHyperparams(
        learning_rates=torch.full((2,), 1e-2 / (step + 1)),
        weight_decays=torch.zeros(2),
        max_grad_norms=torch.ones(2),
        is_active=torch.ones(2, dtype=torch.bool),
    )
    return [batch], hyperparams


@pytest.mark.parametrize(
    ("dtype", "randomness"),
    [(torch.float32, {}), (torch.float16, {}), (torch.float32, {"dropout": 0.3, "noise_alpha": 5})],
)
def test_steps_that_may_be_recorded_equal_those_that_are_not(base_folder, device, dtype, randomness):
    recorded, plain = make_runner(base_folder, device, dtype), make_runner(base_folder, device, dtype)
    for step in range(8):
        stats = recorded.run(*make_step(step, **randomness)).clone()
        plain.compute(*plain.copy_to_device(*make_step(step, **randomness)))
        # float16's gradients in another order: three digits of a norm
        assert torch.allclose(stats, plain.stats, rtol=1e-3, atol=1e-4), step
    assert (recorded.graphs is not None) == (device.type == "cuda")
    assert torch.allclose(recorded.bank.flat, plain.bank.flat, atol=1e-4)
    assert (recorded.optimizer.steps > 0).all()


def test_a_step_on_the_device_equals_one_on_the_cpu(base_folder, device):
    there, here = make_runner(base_folder, device), make_runner(base_folder, torch.device("cpu"))
    for runner in (there, here):
        runner.compute_gradients(runner.copy_to_device(*make_step(0))[0])
    wanted = here.gradient
    assert (there.gradient.cpu() - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert wanted.any()


@pytest.mark.parametrize(("kind", "least"), [("int8", 0.99), ("nf4", 0.6)])
def test_quantised_bases_train_on_the_device(base_folder, device, kind, least):
    exact, near = make_runner(base_folder, device), make_runner(base_folder, device, torch.float32, kind)
    for runner in (exact, near):
        runner.compute_gradients(runner.copy_to_device(*make_step(0))[0])
    assert torch.nn.functional.cosine_similarity(near.gradient, exact.gradient).min() > least


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_planned_memory_is_the_devices(tmp_path, device, checkpointing):
    folder = make_base_folder(tmp_path / "wide", layers=4, width=128, heads=4, context=256)
    recipe = make_memory_recipe(folder, gradient_checkpointing=checkpointing, micro_batch_tokens=4096)
    base = load_base(str(folder), Runtime(device, torch.float32))
    estimated = estimate_memory(base.config, [recipe], base.runtime)
    if device.type == "cuda" and HAS_CUDA:
        slot = TrainingSlot(recipe=recipe, data=build_random_data(recipe, base.config.vocab_size))
        torch._C._cuda_clearCublasWorkspaces()  # of other tests
        trainer, before = Trainer(base, [slot], None), torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        trainer.run_step([0])
        kept = torch.cuda.memory_allocated() - before  # workspaces of cuBLAS, which are in the reserve
        found = torch.cuda.max_memory_allocated() - kept
    else:
        found = measure_peak(base, [recipe])
    assert estimated.peak - estimated.reserve == pytest.approx(found, rel=0.1)


def test_a_replayed_step_writes_what_one_that_is_computed_writes(base_folder, device):
    base = load_base(str(base_folder), Runtime(device, torch.float32))
    session, names = Session(base), ("one", "two", "three")
    session.load_in_memory({name: make_adapter(base.config, seed) for seed, name in enumerate(names)})
    requests = [Request("the cat", Mix.single(name), seed) for seed, name in enumerate((*names, *names))]
    requests += [Request("a", Mix(), 9), Request("a", Mix([("one", 0.5), ("two", 0.5)]), 9)]
    texts = []
    for static in (True, False):
        engine, settings = Engine(session, 8, 48), GenerateSettings(max_new_tokens=12, temperature=1.0)
        engine.decoder = (CudaGraphDecoder if static else Decoder)(session, engine.cache)
        rows = [
            SequenceState(
                index=k,
                mix=r.mix,
                prompt_ids=base.tokenizer.encode(r.prompt),
                max_new_tokens=5 + k,
                settings=settings,
                seed=r.seed,
                tokenizer=base.tokenizer,
            )
            for k, r in enumerate(requests)
        ]
        for row in rows:
            engine.submit(row)
        while engine.is_busy:
            engine.step()
        texts.append([row.new_ids for row in rows])
    assert texts[0] == texts[1]
