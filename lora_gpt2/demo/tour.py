"""The main job in a minute, from text that every machine has: Python's own sources, its reference, licence texts.

Nothing is fetched: the code comes from the standard library's folder, the prose from `pydoc_data`, the licences from
the installed packages. Sizes are cut so that two CPU cores finish in about a minute.
"""

from __future__ import annotations

import importlib.metadata
import math
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import DataError
from lora_gpt2.data.read.formats import MAX_FILE_BYTES
from lora_gpt2.data.tokenizer import EOS
from lora_gpt2.evaluation.matrix import Cell, EvaluationText, measure_matrix
from lora_gpt2.inference.generate import Output, Request, generate
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.session import Session
from lora_gpt2.model.base import load_base
from lora_gpt2.model.runtime import choose_runtime
from lora_gpt2.recipe import Recipe, build_recipe
from lora_gpt2.store.catalog import Store
from lora_gpt2.training.publish import AdapterReport
from lora_gpt2.training.run import train_recipes

STEPS = 50
BATCH_TOKENS = 768
LEARNING_RATE = 6e-3
MAX_CHARACTERS = 1_200_000
TEST_DOCUMENTS, TEST_CHARACTERS = 16, 1_500
PROMPT = "The function returns"
NEW_TOKENS = 48
SEED = 7
MAX_DOCUMENT_BYTES = 60_000
DOMAINS = {
    "demo-code": ("Python's standard library as code", "code"),
    "demo-reference": ("Python's language reference as technical prose", "prose"),
    "demo-licences": ("licence texts of the installed packages", "prose"),
}


@dataclass(frozen=True, kw_only=True)
class DemoReport:
    """What `demo` shows: the adapters, their continuations of one prompt, the matrix, and the time it took."""

    adapters: list[AdapterReport]
    samples: list[Output]
    matrix: list[Cell]
    seconds: float


def run_demo(store: Store, reporter: Reporter) -> DemoReport:
    """Trains three adapters together, swaps them on one prompt, and measures each on held-out text of each domain.

    Raises `DataError` where this Python comes without its sources.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        sources, recipes = [], []
        for name, texts in _collect().items():
            train, test = _hold_out(texts)
            path = Path(folder) / f"{name}.txt"
            path.write_text("".join(f"{text}\n{EOS}\n" for text in train), encoding="utf-8")
            sources.append(EvaluationText(label=name.removeprefix("demo-"), documents=test))
            recipes.append(_build_recipe(name, path))
        report = train_recipes(recipes, store, reporter, fresh=True)
    session = Session(load_base("nano", choose_runtime("float32")), store)
    mixes = [Mix(), *(Mix.single(recipe.name) for recipe in recipes)]
    settings = recipes[0].generate
    samples = [generate(session, [Request(PROMPT, mix, SEED)], settings)[0] for mix in mixes]
    selectors = {str(mix): session.select(mix) for mix in mixes}
    cells = measure_matrix(session.base, selectors, sources, recipes[0].evaluate, reporter)
    return DemoReport(adapters=report.adapters, samples=samples, matrix=cells, seconds=time.monotonic() - started)


def _build_recipe(name: str, path: Path) -> Recipe:
    description, profile = DOMAINS[name]
    return build_recipe(
        {
            "name": name,
            "description": description,
            "base": "nano",
            "data": {"sources": [str(path)], "profile": profile, "block_size": 256, "test_fraction": 0.0},
            "train": {
                "steps": STEPS,
                "learning_rate": LEARNING_RATE,
                "batch_tokens": BATCH_TOKENS,
                "micro_batch_tokens": 3 * BATCH_TOKENS,
                "validate_every": STEPS // 3,
                "validation_tokens": 4096,
                "sample_tokens": 0,
            },
            "generate": {"max_new_tokens": NEW_TOKENS, "repetition_penalty": 1.2},
        },
        "demo",
    )


def _collect() -> dict[str, list[str]]:
    collected = {
        "demo-code": list(_limit(_read_code())),
        "demo-reference": list(_limit(_read_reference())),
        "demo-licences": list(_limit(_read_licences())),
    }
    for name, texts in collected.items():
        if len(texts) < 20:
            raise DataError(
                f"this Python has too little text for '{name}' ({len(texts)} documents)",
                "train on your own: lora-gpt2 train --data FILE --name NAME",
            )
    return collected


def _limit(texts: Iterator[str]) -> Iterator[str]:
    total = 0
    for text in texts:
        if text.strip():
            yield text
            total += len(text)
        if total > MAX_CHARACTERS:
            return


def _read_code() -> Iterator[str]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(folder.glob("*.py")):
        if path.stat().st_size < MAX_DOCUMENT_BYTES:
            yield path.read_text(encoding="utf-8", errors="replace")


def _read_reference() -> Iterator[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return
    yield from (topics[key] for key in sorted(topics))


def _read_licences() -> Iterator[str]:
    """Yields runs of paragraphs, each paragraph once: packages share their licences, and the test must not."""
    seen: set[str] = set()
    for distribution in sorted(importlib.metadata.distributions(), key=lambda d: d.metadata["Name"] or ""):
        for file in distribution.files or []:
            if file.name.upper().startswith(("LICENSE", "LICENCE", "COPYING", "NOTICE")) and file.suffix not in (
                ".py",
                ".pyc",
            ):
                path = Path(str(file.locate()))
                if path.is_file() and path.stat().st_size < MAX_FILE_BYTES:
                    yield from _paragraph_runs(path.read_text(encoding="utf-8", errors="replace"), seen)


def _paragraph_runs(text: str, seen: set[str], size: int = 1_000) -> Iterator[str]:
    run = ""
    for paragraph in text.replace("\r", "").split("\n\n"):
        key = "".join(filter(str.isalpha, paragraph)).lower()
        if key in seen:
            continue
        seen.add(key)
        run += paragraph + "\n\n"
        if len(run) >= size:
            yield run
            run = ""
    if run:
        yield run


def _hold_out(texts: list[str]) -> tuple[list[str], list[str]]:
    """Returns training texts, and the beginnings of every n-th text, which is kept out of them."""
    unique = list(dict.fromkeys(texts))
    every = max(2, math.ceil(len(unique) / TEST_DOCUMENTS))
    test = [text[:TEST_CHARACTERS] for text in unique[::every]]
    return [text for index, text in enumerate(unique) if index % every], test
