"""The tool that pre-trains the bundled bases: recorded gradients, runs that go on, a base that loads."""

import gzip
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from lora_gpt2.model.base import load_base
from lora_gpt2.model.runtime import Runtime
from tests.pretended_device import CUDA, pretend_cuda

PATH = Path(__file__).parents[2] / "tools" / "pretrain.py"
SIZE = {"vocab_size": 300, "context": 32, "width": 32, "layers": 2, "heads": 2, "batch_sequences": 4}


@pytest.fixture
def tool(monkeypatch):
    spec = importlib.util.spec_from_file_location("pretrain", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pretrain", module)  # dataclasses look their module up
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec.loader.exec_module(module)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    return module


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    documents = [f"The {word} of number {i} is red.\n" * 6 for i in range(40) for word in ("hat", "cat")]
    with gzip.open(folder / "general.txt.gz", "wt", encoding="utf-8") as file:
        file.write("<|endoftext|>\n".join(documents))
    (folder / "general_valid.txt").write_text("The hat of number 3 is red.\n<|endoftext|>\nThe cat of number 41.\n")
    return folder


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real device is there")
def test_recorded_gradients_are_those_that_are_computed(tool):
    """Two lengths, the first of them again after the second; nothing of an earlier batch is left in the gradients."""
    settings = tool.Settings(**SIZE)
    batches = [torch.randint(300, (2, count, length)) for count, length in ((8, 16), (8, 16), (4, 32), (8, 16))]
    expected = []
    model = tool.build_model(settings)
    step = tool.GradientStep(model, bfloat16=False)
    for inputs, targets in batches:
        loss = step(inputs, targets)
        theirs = model(inputs, labels=inputs, shift_labels=targets).loss
        torch.testing.assert_close(loss, theirs.detach())
        expected.append((loss, [p.grad.clone() for p in model.parameters()]))
    with pretend_cuda() as log:
        model = tool.build_model(settings)
        for module in model.modules():  # `Module.to` cannot move to a device that is pretended
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(parameter.detach().to(CUDA)))
        model.tie_weights()
        step = tool.GradientStep(model, bfloat16=False)
        for (inputs, targets), (loss, gradients) in zip(batches, expected, strict=True):
            found = step(inputs.to(CUDA), targets.to(CUDA))
            torch.testing.assert_close(found.cpu(), loss)
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                torch.testing.assert_close(parameter.grad.cpu(), gradient, rtol=1e-4, atol=1e-6)
        assert log.operations["graph.replay"] == 4


def test_a_pass_shows_each_block_once_and_the_next_pass_in_another_order(tool):
    settings = tool.Settings(**SIZE)
    tokens = torch.arange(32 * 6 + 1, dtype=torch.int16)  # six blocks: the second batch goes over into the next pass
    batches = tool.Batches(tokens, settings, torch.device("cpu"))
    firsts = torch.cat([batches.draw(step)[:, 0] for step in range(3)]).tolist()
    assert sorted(firsts[:6]) == sorted(firsts[6:]) == [0, 32, 64, 96, 128, 160]
    assert firsts[:6] != firsts[6:]
    assert torch.equal(batches.draw(1), tool.Batches(tokens, settings, torch.device("cpu")).draw(1))


@pytest.mark.slow
def test_a_run_that_was_interrupted_ends_like_one_that_was_not(tool, corpus, tmp_path, monkeypatch):
    settings = tool.Settings(**SIZE | {"context": 128}, warmup_steps=5)
    monkeypatch.setattr(tool.Run, "uses_bfloat16", False)

    def run(work, max_tokens=40 * 512):
        found = tool.Run(settings, corpus, work, max_tokens)
        found.train()
        return found

    whole = run(tmp_path / "whole")
    interrupted = tool.Run(settings, corpus, tmp_path / "parts", 40 * 512)
    steps, update = [], interrupted.update_weights

    def stop(progress):
        steps.append(progress)
        if len(steps) == 17:
            interrupted.save()
            raise KeyboardInterrupt
        update(progress)

    interrupted.update_weights = stop
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    resumed = run(tmp_path / "parts")
    assert resumed.step == whole.step == 40
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value)
    tool.BASES["tiny"], tool.INTRODUCTIONS["tiny"] = settings, "A base for a test."
    tool.export(resumed, "tiny", tmp_path / "tiny")
    figures = json.loads((tmp_path / "tiny" / "training.json").read_text())["figures"]
    assert figures["tokens_seen"] == 40 * 512
    assert figures["validation"]["perplexity"] < 300 / 2
    base = load_base(str(tmp_path / "tiny"), Runtime(torch.device("cpu"), torch.float32))
    assert base.config.vocab_size == 300
    assert base.tokenizer.decode(base.tokenizer.encode("The hat")) == "The hat"
