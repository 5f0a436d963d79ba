"""The same laws on every device that is there: the CPU always, CUDA where it is."""

import pytest
import torch

from lora_gpt2.core.interrupt import StopRequest
from lora_gpt2.data.prepared import prepare_data
from lora_gpt2.inference.generate import Request, generate
from lora_gpt2.inference.session import Session
from lora_gpt2.model.base import load_base
from lora_gpt2.model.runtime import Runtime, choose_runtime, measure_peak_memory
from lora_gpt2.recipe import GenerateSettings, build_recipe
from lora_gpt2.training.domain import Domain
from lora_gpt2.training.trainer import Trainer

DEVICES = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES, ids=str)
def device(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_and_generating_on_the_device(base_folder, text_file, reporter, device, dtype):
    base = load_base(str(base_folder), Runtime(device, dtype))
    recipes = [
        build_recipe(
            {"name": name, "data": {"sources": [str(text_file)], "block_size": 16},
             "lora": {"rank": 2, "targets": ["c_attn.q", "mlp.c_fc"]},
             "train": {"steps": 40, "batch_tokens": 64, "learning_rate": 1e-2, "seed": seed}}, name,
        )
        for seed, name in enumerate(("one", "two"))
    ]  # fmt: skip
    data = prepare_data(recipes[0].data, base.tokenizer, reporter)
    trainer = Trainer(base, [Domain(recipe.name, recipe, data) for recipe in recipes], reporter)
    assert trainer.bank.flat.device.type == device.type
    trained = trainer.train(StopRequest())
    for outcome in trained:
        assert outcome.validation_nll < outcome.base_nll - 0.3
        assert all(update.a.dtype == torch.float32 for update in outcome.adapter.updates.values())
    session = Session(base)
    session.add({outcome.domain.name: outcome.adapter for outcome in trained})
    requests = [Request("the", (("one", 1.0),)), Request("the cat", (("two", 1.0),)), Request("the")]
    outputs = generate(session, requests, GenerateSettings(max_new_tokens=5))
    assert [output.adapter for output in outputs] == ["one", "two", "base"]


def test_the_choice_of_numbers_and_the_peak_are_real(device):
    runtime = choose_runtime("auto", device)
    assert runtime.dtype != torch.float16 or device.type == "cuda"
    before = measure_peak_memory(device)
    block = torch.ones(2**26, dtype=torch.float32, device=device)
    assert measure_peak_memory(device) >= max(before, block.numel() * 4)
