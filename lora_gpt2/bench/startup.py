"""How long commands take from the shell, as whole processes: the median of several runs."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lora_gpt2.store.catalog import Store, write_version
from lora_gpt2.store.manifest import BaseIdentity, Manifest
from lora_gpt2.store.version import utc_now

COMMANDS: dict[str, list[str]] = {
    "--help": ["--help"],
    "adapters list": ["adapters", "list"],
    "recipes list": ["recipes", "list"],
    "bases show nano": ["bases", "show", "nano"],
    "generate, 1 token": ["-q", "generate", "The", "--seed", "1", "--set", "generate.max_new_tokens=1"],
}
MANY = 1000


def measure_startup(runs: int = 5) -> dict[str, float]:
    """Returns the median wall-clock seconds of each command over `runs` runs, after one to warm the disk."""
    with tempfile.TemporaryDirectory() as folder:
        fill_store(Store(Path(folder)), MANY)
        many = {f"adapters list, {MANY:,} of them": ["adapters", "list", "--store", folder]}
        return {name: _median_seconds(arguments, runs) for name, arguments in {**COMMANDS, **many}.items()}


def fill_store(store: Store, count: int) -> None:
    """Writes adapters whose manifests are as long as a trained one's; their weights are only names."""
    from lora_gpt2.recipe import Recipe

    figures = {"train_tokens": 102_400, "base_perplexity": 101.5, "validation_perplexity": 52.25}
    identity = BaseIdentity("nano", "0" * 32, "0" * 32)
    recipe = Recipe().model_dump(mode="json")
    manifest = Manifest("a", 1, utc_now(), identity, {}, 595_752, 147_456, recipe=recipe, figures=figures)
    for number in range(count):
        folder = store.folder_of(f"a{number}")
        (folder / "1").mkdir(parents=True)
        write_version(folder / "1", replace(manifest, name=folder.name), {"adapter_model.safetensors": b"none"})
        (folder / "CURRENT").write_text("1\n", encoding="ascii")


def _median_seconds(arguments: Sequence[str], runs: int) -> float:
    seconds = []
    for _ in range(runs + 1):
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", "lora_gpt2", *arguments], check=True, capture_output=True)  # noqa: S603
        seconds.append(time.monotonic() - started)
    return statistics.median(seconds[1:])
