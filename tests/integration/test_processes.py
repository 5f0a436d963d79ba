"""Two processes over gloo must train what one trains at the same global batch."""

import os
import subprocess
import sys

import torch
from safetensors.torch import load

from lora_gpt2.store.catalog import Store
from lora_gpt2.store.manifest import WEIGHTS


def launch(num_processes, folder, base_folder, text_file, *arguments):
    """Runs `train` under torchrun (accelerate's launcher starts one process where there is no GPU)."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    settings = {
        "data.block_size": 16, "train.batch_tokens": 80, "train.steps": 8, "lora.rank": 2, "lora.dropout": 0.2,
        "train.learning_rate": 1e-2, "train.checkpoint_every": 3, "train.precision": "float32",
    }  # fmt: skip
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    environment = {**os.environ, "LORA_GPT2_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", "lora_gpt2", "train", "--data", str(text_file), "--name", "mine", "--base"]
    command += [str(base_folder), "--store", str(folder / "store"), "--json", *sets, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_two_processes_equal_one(base_folder, text_file, tmp_path):
    weights = []
    for count in (1, 2):
        done = launch(count, tmp_path / str(count), base_folder, text_file)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count('"adapters"') == 1, "one process speaks"
        store = Store(tmp_path / str(count) / "store")
        assert store.list_versions("mine") == [1]
        weights.append(load((store.resolve("mine") / WEIGHTS).read_bytes()))
    one, two = weights
    assert all(torch.allclose(one[key], two[key], atol=2e-5) for key in one)
    assert any(tensor.abs().max() > 1e-3 for key, tensor in one.items() if "lora_B" in key)
    again = launch(2, tmp_path / "2", base_folder, text_file, "--resume")
    assert again.returncode == 0, again.stderr[-2000:]
    assert "already complete" in again.stderr
    other = launch(1, tmp_path / "2", base_folder, text_file, "--resume")
    assert other.returncode != 0
    assert "processes: 2 then, 1 now" in other.stdout + other.stderr
