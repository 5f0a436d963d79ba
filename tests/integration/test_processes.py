"""Two processes over gloo must train what one trains at the same global batch."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load

from lora_gpt2.store.catalog import Store
from lora_gpt2.store.manifest import WEIGHTS


@pytest.fixture
def launch(run, base_folder, text_file, monkeypatch):
    """Runs `train` here, or in several processes under torchrun (accelerate's launcher starts one without a GPU)."""

    def call(num_processes, folder, *arguments):
        command = build_command(base_folder, text_file, folder, *arguments)
        monkeypatch.setenv("LORA_GPT2_CACHE", str(folder / "cache"))
        if num_processes == 1:
            return run(*command)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        launcher += [str(num_processes), "-m", "lora_gpt2", *command]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(launcher, env=environment, capture_output=True, text=True, timeout=240, check=False)
        return done.returncode, done.stdout, done.stderr

    return call


def build_command(base_folder, text_file, folder, *arguments):
    settings = {
        "data.block_size": 16,
        "train.batch_tokens": 80,
        "train.steps": 8,
        "lora.rank": 2,
        "lora.dropout": 0.2,
        "train.learning_rate": 1e-2,
        "train.checkpoint_every": 3,
        "train.dtype": "float32",
        "train.sample_tokens": 0,
    }
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command = ["train", "--data", str(text_file), "--name", "mine", "--base", str(base_folder)]
    return [*command, "--store", str(folder / "store"), "--json", *sets, *arguments]


def test_two_processes_equal_one(launch, tmp_path):
    weights = []
    for count in (1, 2):
        code, out, err = launch(count, tmp_path / str(count))
        assert code == 0, err[-2000:]
        assert out.count('"adapters"') == 1, "one process speaks"
        store = Store(tmp_path / str(count) / "store")
        assert store.list_versions("mine") == [1]
        weights.append(load((store.resolve("mine") / WEIGHTS).read_bytes()))
    one, two = weights
    assert all(torch.allclose(one[key], two[key], atol=2e-5) for key in one)
    assert any(tensor.abs().max() > 1e-3 for key, tensor in one.items() if "lora_B" in key)
    code, out, err = launch(1, tmp_path / "2", "--resume")
    assert code != 0
    assert "processes: 2 then, 1 now" in out + err
