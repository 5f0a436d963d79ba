"""How fast text is prepared, in how much memory, and whether planted near copies are found.

Preparation runs as a whole command in processes of its own, whose memory is read while they run: on Linux the sum of
their proportional set sizes, in which pages that processes share count once; elsewhere of what is
theirs alone (on macOS, without rights, of all that is resident).
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import ResourceError
from lora_gpt2.data.dedup import find_near_duplicates, sign
from lora_gpt2.data.read.formats import read_documents
from lora_gpt2.data.read.sources import find_sources
from lora_gpt2.data.tokenizer import Tokenizer
from lora_gpt2.model.checkpoint import Checkpoint
from lora_gpt2.recipe_files import load_recipe

SAMPLE_SECONDS = 0.2
TOKENISED_CHARACTERS = 20_000_000
ROUNDS = 3
CHANGED_WORDS = 100  # one of so many words is changed in a planted copy
PLANTED_WORDS = (50, 400)


@dataclass(frozen=True, kw_only=True)
class Preparing:
    """Figures of one preparation; `text_megabytes` is that of the decoded text."""

    seconds: float
    text_megabytes: float
    peak_memory_bytes: int
    processes: int
    tokens: int
    tokenisation_share: float
    planted: int
    found: int
    false_pairs: int

    @property
    def megabytes_per_second(self) -> float:
        """Text prepared per second, start-up included."""
        return self.text_megabytes / self.seconds


def measure_preparing(
    sources: Sequence[str], processes: int, planted: int, overrides: Sequence[str], reporter: Reporter
) -> Preparing:
    """Prepares sources with so many processes into a folder that is thrown away; raises as `prepare_data`.

    The tokenizer's share is its speed over that of `tokenizers` alone, on the first 20 MB, in turn, medians.
    """
    settings = load_recipe(None, overrides).data.model_copy(update={"sources": tuple(sources)})
    find_sources(sources, settings)
    size = sum(len(document.text.encode()) for document in read_documents(sources, settings)) / 1e6
    with tempfile.TemporaryDirectory() as work:
        options = ["--out", work, "--json", "--set", f"data.num_proc={processes}"]
        options += [part for each in overrides for part in ("--set", each)]
        command = [sys.executable, "-m", "lora_gpt2", "prepare", *sources, *options]
        started = time.monotonic()
        done, peak = _run_and_weigh(command, reporter)
        seconds = time.monotonic() - started
    tokens = sum(json.loads(done)["tokens"].values())
    documents = list(islice((d.text for d in read_documents(sources, settings)), 4 * planted + 1000))
    planted, found, false_pairs = _find_planted(documents, planted)
    return Preparing(
        seconds=seconds,
        text_megabytes=size,
        peak_memory_bytes=peak,
        processes=processes,
        tokens=tokens,
        tokenisation_share=_compare_tokenizers(documents),
        planted=planted,
        found=found,
        false_pairs=false_pairs,
    )


def _run_and_weigh(command: Sequence[str], reporter: Reporter) -> tuple[str, int]:
    """Returns what a command writes on stdout, and the most memory that it and its children held."""
    peak = 0
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=errors)  # noqa: S603
        while process.poll() is None:
            peak = max(peak, _weigh_tree(process.pid))
            time.sleep(SAMPLE_SECONDS)
        errors.seek(0)
        output.seek(0)
        lines = errors.read().strip().splitlines()
        if process.returncode:
            raise ResourceError(f"'prepare' failed: {' '.join(lines[-2:])}", "run it alone to see")
        for line in lines[-1:]:
            reporter.detail(line)
        return output.read(), peak


def _weigh_tree(pid: int) -> int:
    """Returns the bytes that a process and its children hold; 0 for those that have ended."""
    import psutil

    total = 0
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.Error:
        return 0
    for process in processes:
        try:
            found = process.memory_full_info()
            total += getattr(found, "pss", found.uss)
        except psutil.AccessDenied:  # macOS, without rights
            with suppress(psutil.Error):
                total += process.memory_info().rss
        except psutil.Error:
            continue
    return total


def _find_planted(documents: Sequence[str], count: int) -> tuple[int, int, int]:
    """Returns how many copies were planted and found, and how many other pairs are taken for copies.

    A copy has a hundredth of its words changed, and other case and spacing.
    """
    rng = random.Random(0)  # noqa: S311 - a fixed draw
    originals = []
    for text in documents:
        words = text.split()
        if len(words) >= PLANTED_WORDS[0]:
            originals.append(words[: PLANTED_WORDS[1]])
    chosen = rng.sample(range(len(originals)), min(count, len(originals)))
    copies = []
    for index in chosen:
        words = list(originals[index])
        for _ in range(max(1, len(words) // CHANGED_WORDS)):
            words[rng.randrange(len(words))] = f"changed{rng.randrange(1000)}"
        copies.append("  ".join(words).upper() if rng.random() < 0.5 else "\n".join(words))
    before = find_near_duplicates(sign([" ".join(words) for words in originals]), 0.8)
    after = find_near_duplicates(sign([*(" ".join(words) for words in originals), *copies]), 0.8)
    found = sum(len(originals) + index in after for index in range(len(copies)))
    wrong = 0
    for number, index in enumerate(chosen):
        first = after.get(len(originals) + number, (index, 0.0))[0]
        wrong += first not in (index, before.get(index, (index, 0.0))[0])
    return len(copies), found, wrong


def _compare_tokenizers(documents: Sequence[str]) -> float:
    tokenizer = Checkpoint.open("nano").load_tokenizer()
    batches, size = [list[str]()], 0
    for text in documents:
        if size > TOKENISED_CHARACTERS:
            break
        batches[-1].append(text)
        size += len(text)
        if sum(map(len, batches[-1])) > 1e6:
            batches.append([])
    ratios = [_time_backend(tokenizer, batches) / _time_ours(tokenizer, batches) for _ in range(ROUNDS)]
    return statistics.median(ratios)


def _time_ours(tokenizer: Tokenizer, batches: Sequence[list[str]]) -> float:
    started = time.monotonic()
    for batch in batches:
        tokenizer.encode_batch(batch)
    return time.monotonic() - started


def _time_backend(tokenizer: Tokenizer, batches: Sequence[list[str]]) -> float:
    started = time.monotonic()
    for batch in batches:
        for encoding in tokenizer.backend.encode_batch_fast(batch, add_special_tokens=False):
            _ = encoding.ids
    return time.monotonic() - started
