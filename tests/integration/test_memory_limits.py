"""Processes that may have little memory, as in a small container: exit code 7, and what was done is kept."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.builders import make_text


def run_limited(num_bytes, tmp_path, *arguments):
    """Runs a command in so many bytes of addresses; returns exit code and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "lora_gpt2", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (num_bytes,) * 2),
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("megabytes", [100, 300, 600])
def test_too_little_to_load_the_libraries(tmp_path, megabytes):
    code, err = run_limited(megabytes * 10**6, tmp_path, "generate", "the", "-n", "64")
    assert code == 7, err
    assert "error: there is not enough memory" in err
    assert "ulimit -v" in err
    assert run_limited(megabytes * 10**6, tmp_path, "adapters", "list")[0] == 0


TINY = ["--set", "data.block_size=64", "--set", "train.batch_tokens=64", "--set", "train.steps=1"]


@pytest.fixture
def big(tmp_path):
    """A command that trains an adapter of 100 MB."""
    (tmp_path / "a.jsonl").write_text(make_text(80))
    return ["train", "--data", tmp_path / "a.jsonl", "--name", "big", "--set", "lora.rank=512", *TINY]


def list_checkpoints():
    return list(Path(os.environ["LORA_GPT2_CACHE"]).glob("runs/*/step-*.checkpoint"))


def test_a_large_adapter_in_little_memory(tmp_path, big):
    """Where memory ends depends on the machine; the old code was aborted while it serialised, without a checkpoint."""
    code, err = run_limited(1_572_864_000, tmp_path, *big)
    assert code in (0, 7), err
    if code == 7:
        assert "error: out of memory: this run needs about" in err
        assert "--resume" in err
    if "measuring" in err:
        assert code == 0 or len(list_checkpoints()) == 1


def test_memory_that_ends_while_the_adapter_is_published_leaves_a_checkpoint(run, big, base_folder, monkeypatch):
    big += ["--set", "lora.rank=2", "--set", "data.block_size=16", "--base", base_folder]
    with monkeypatch.context() as patch:
        patch.setattr("lora_gpt2.store.peft.tensors.pack_safetensors", fail)
        code, _, err = run(*big)
    assert code == 7
    assert "error: out of memory: this run needs about" in err
    assert "--resume" in err
    assert len(list_checkpoints()) == 1
    code, _, err = run(*big, "--resume")
    assert (code, "resuming at step 1" in err) == (0, True)


def fail(*_):
    raise MemoryError
