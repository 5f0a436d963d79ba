"""How long commands take from the shell, as whole processes: the median of several runs."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lora_gpt2.bench.training import SIZES, build_random_base
from lora_gpt2.core.console import Reporter
from lora_gpt2.model.base import load_base
from lora_gpt2.model.checkpoint import find_base
from lora_gpt2.model.lora import build_adapter
from lora_gpt2.model.runtime import choose_runtime
from lora_gpt2.recipe import LoraSettings
from lora_gpt2.store.catalog import Store, write_version
from lora_gpt2.store.files import Origin, publish_adapter
from lora_gpt2.store.manifest import BaseIdentity, Manifest
from lora_gpt2.store.version import utc_now

COMMANDS: dict[str, list[str]] = {
    "--help": ["--help"],
    "adapters list": ["adapters", "list"],
    "recipes list": ["recipes", "list"],
    "bases show nano": ["bases", "show", "nano"],
}
MANY = 1000
PEER = """
import sys
from peft import PeftModel
from transformers import AutoTokenizer, GPT2LMHeadModel
base, adapter = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(base, dtype="float32"), adapter).eval()
ids = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=1, do_sample=False, pad_token_id=0)[0]))
"""


def measure_startup(base: str, runs: int, reporter: Reporter) -> dict[str, float]:
    """Returns the median wall-clock seconds of each command, after one run to warm the disk.

    The first token under an adapter is also timed in a transformers + PEFT script, in turn. `base` as for
    `measure_training`.
    """
    with tempfile.TemporaryDirectory() as work:
        fill_store(Store(Path(work) / "many"), MANY)
        commands = {**COMMANDS, f"adapters list, {MANY:,} of them": ["adapters", "list", "--store", f"{work}/many"]}
        ours = [sys.executable, "-m", "lora_gpt2"]
        seconds = {name: _time_in_turn({name: [*ours, *c]}, runs)[name] for name, c in commands.items()}
        folder = build_random_base(base, Path(work), reporter) if base in SIZES else find_base(base)
        loaded, store = load_base(str(folder), choose_runtime("float32")), Store(Path(work) / "store")
        publish_adapter(store, "law", build_adapter(loaded.config, LoraSettings(), 0), loaded, Origin())
        options = ["--adapter", "law", "--store", str(store.root), "--seed", "1", "--set", "generate.max_new_tokens=1"]
        first = {
            "first token under an adapter": [*ours, "-q", "generate", "The", *options],
            "the same by transformers + PEFT": [sys.executable, "-c", PEER, str(folder), str(store.resolve("law"))],
        }
        return seconds | _time_in_turn(first, runs)


def fill_store(store: Store, count: int) -> None:
    """Writes adapters whose manifests are as long as a trained one's; their weights are only names."""
    from lora_gpt2.recipe import Recipe

    figures = {"train_tokens": 102_400, "base_perplexity": 101.5, "validation_perplexity": 52.25}
    identity = BaseIdentity(name="nano", fingerprint="0" * 32, tokenizer_fingerprint="0" * 32)
    recipe = Recipe().model_dump(mode="json")
    manifest = Manifest(
        name="a",
        version=1,
        created=utc_now(),
        base=identity,
        files={},
        size_bytes=595_752,
        num_parameters=147_456,
        recipe=recipe,
        figures=figures,
    )
    for number in range(count):
        folder = store.folder_of(f"a{number}")
        (folder / "1").mkdir(parents=True)
        write_version(folder / "1", replace(manifest, name=folder.name), {"adapter_model.safetensors": b"none"})
        (folder / "CURRENT").write_text("1\n", encoding="ascii")


def _time_in_turn(commands: Mapping[str, Sequence[str]], runs: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(runs + 1):
        for name, command in commands.items():
            started = time.monotonic()
            subprocess.run(command, check=True, capture_output=True)  # noqa: S603
            seconds[name].append(time.monotonic() - started)
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}
