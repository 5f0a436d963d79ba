"""Perplexity side by side: ours, the loop of transformers' documentation, and lm-evaluation-harness where it is there.

The same weights, text, window and stride; each side runs in processes of its own, in turn, and says what it measured,
so that the figures can be compared with the speed. Loading is not timed.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lora_gpt2.bench.child import run_in_turn
from lora_gpt2.bench.training import SIZES, build_random_base
from lora_gpt2.core.console import Reporter
from lora_gpt2.evaluation.general import read_general
from lora_gpt2.evaluation.perplexity import ScoringWindows, measure_perplexity
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.session import Session
from lora_gpt2.model.base import load_base
from lora_gpt2.model.checkpoint import find_base
from lora_gpt2.model.lora import build_adapter
from lora_gpt2.model.runtime import choose_runtime, measure_peak_memory
from lora_gpt2.recipe import EvaluateSettings, LoraSettings

STREAM, DOCUMENT = "ours, stream", "ours, document"
LOOP, HARNESS = "documentation's loop", "lm-evaluation-harness"
PARTNERS = {STREAM: LOOP, DOCUMENT: HARNESS}
LINEUP = 16
LENGTHS = (30, 60, 120, 600)  # characters of one text under all of them
WARM_UP = 2000  # characters, measured before the clock starts


@dataclass(frozen=True, kw_only=True)
class EvaluationSpec:
    """What all sides do: the base's folder, tokens of text, and the stride of the protocol `stream`."""

    folder: str
    tokens: int
    stride: int


@dataclass(frozen=True, kw_only=True)
class MeasuredPass:
    """One side's outcome: tokens scored, seconds, their mean NLL in nats, and the process's peak memory."""

    name: str
    tokens: int
    seconds: float
    nll_nats_per_token: float
    peak_memory_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """The rate."""
        return self.tokens / self.seconds


@dataclass(frozen=True, kw_only=True)
class LineupTime:
    """Seconds for adapters on a text of so many tokens: all in one pass over the base, and one after the other."""

    tokens: int
    together_seconds: float
    one_by_one_seconds: float


@dataclass(frozen=True, kw_only=True)
class EvaluationBenchmark:
    """Every side of a comparison, and what it gains to measure several adapters in one pass."""

    base: str
    stride: int
    sides: list[MeasuredPass]
    adapters: int
    lineup: list[LineupTime]

    def to_json(self) -> dict[str, Any]:
        """Returns the comparison with the keys of `bench evaluate --json`."""
        sides = [asdict(side) | {"tokens_per_second": side.tokens_per_second} for side in self.sides]
        return asdict(self) | {"sides": sides}


def measure_evaluation(base: str, tokens: int, stride: int, rounds: int, reporter: Reporter) -> EvaluationBenchmark:
    """Returns the medians of every side over its processes, and how much faster ours is; `base`: see `bench train`."""
    names = [STREAM, LOOP, DOCUMENT]
    if importlib.util.find_spec("lm_eval") is not None:
        names.append(HARNESS)
    else:
        reporter.message("lm-evaluation-harness is not installed: measured without it (pip install lm-eval)")
    with tempfile.TemporaryDirectory() as work:
        folder = build_random_base(base, Path(work), reporter) if base in SIZES else find_base(base)
        spec = EvaluationSpec(folder=str(folder), tokens=tokens, stride=stride)
        found = run_in_turn(__name__, names, asdict(spec), rounds, reporter, lambda run: f"{run['seconds']:.1f} s")
        lineup = _measure_lineup(str(folder))
    sides = [_summarise([MeasuredPass(**run) for run in runs]) for runs in found.values()]
    return EvaluationBenchmark(base=base, stride=stride, sides=sides, adapters=LINEUP, lineup=lineup)


def _summarise(runs: list[MeasuredPass]) -> MeasuredPass:
    seconds = statistics.median(run.seconds for run in runs)
    memory = round(statistics.median(run.peak_memory_bytes for run in runs))
    return replace(runs[0], seconds=seconds, peak_memory_bytes=memory)


def _read_text(folder: str, tokens: int) -> str:
    """Returns so many tokens of English, again from the beginning where it is short."""
    base = load_base(folder, choose_runtime("float32"))
    ids = base.tokenizer.encode("\n\n".join(read_general()))
    return base.tokenizer.decode((ids * (tokens // len(ids) + 1))[:tokens])


def run_side() -> None:
    """Runs one side in this process; reads the request on stdin, writes the outcome as JSON on stdout."""
    request = json.load(sys.stdin)
    spec = EvaluationSpec(**request["spec"])
    text = _read_text(spec.folder, spec.tokens)
    measure = SIDES[request["name"]](spec)
    measure(text[:WARM_UP])
    started = time.perf_counter()
    tokens, nll = measure(text)
    seconds = time.perf_counter() - started
    memory = measure_peak_memory(choose_runtime("float32").device)
    sys.stdout.write(
        json.dumps(
            asdict(
                MeasuredPass(
                    name=request["name"],
                    tokens=tokens,
                    seconds=seconds,
                    nll_nats_per_token=nll,
                    peak_memory_bytes=memory,
                )
            )
        )
        + "\n"
    )


Measure = Callable[[str], tuple[int, float]]


def _prepare_ours(settings: EvaluateSettings) -> Callable[[EvaluationSpec], Measure]:
    def prepare(spec: EvaluationSpec) -> Measure:
        base = load_base(spec.folder, choose_runtime("float32"))
        stride = spec.stride if settings.protocol == "stream" else base.config.n_positions
        own = settings.model_copy(update={"stride": stride})

        def measure(text: str) -> tuple[int, float]:
            score = measure_perplexity(base, [text], own)
            return score.tokens, score.nll_nats_per_token

        return measure

    return prepare


def _prepare_loop(spec: EvaluationSpec) -> Measure:
    """The loop of "Perplexity of fixed-length models", with its last line made exact: weighted by scored tokens."""
    from transformers import GPT2LMHeadModel

    runtime = choose_runtime("float32")
    model = GPT2LMHeadModel.from_pretrained(spec.folder, dtype=runtime.dtype).to(runtime.device).eval()
    tokenizer = load_base(spec.folder, runtime).tokenizer

    def measure(text: str) -> tuple[int, float]:
        ids = torch.tensor([tokenizer.encode(text)], device=runtime.device)
        total, count, previous = 0.0, 0, 0
        for begin in range(0, ids.shape[1], spec.stride):
            end = min(begin + model.config.n_positions, ids.shape[1])
            inputs = ids[:, begin:end]
            labels = inputs.clone()
            labels[:, : -(end - previous)] = -100
            with torch.no_grad():
                loss = model(inputs, labels=labels).loss
            scored = int((labels[:, 1:] != -100).sum())
            total, count, previous = total + float(loss) * scored, count + scored, end
            if end == ids.shape[1]:
                break
        return count, total / count

    return measure


def _prepare_harness(spec: EvaluationSpec) -> Measure:
    logging.disable(logging.WARNING)
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    device = str(choose_runtime("float32").device)
    tokenizer = load_base(spec.folder, choose_runtime("float32")).tokenizer
    model = HFLM(pretrained=spec.folder, device=device, dtype="float32", batch_size=1)

    def measure(text: str) -> tuple[int, float]:
        request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
        (total,) = model.loglikelihood_rolling([request], disable_tqdm=True)
        count = len(tokenizer.encode(text))
        return count, -float(total) / count

    return measure


SIDES: dict[str, Callable[[EvaluationSpec], Measure]] = {
    STREAM: _prepare_ours(EvaluateSettings(protocol="stream")),
    LOOP: _prepare_loop,
    DOCUMENT: _prepare_ours(EvaluateSettings()),
    HARNESS: _prepare_harness,
}


def _measure_lineup(folder: str) -> list[LineupTime]:
    """Returns the seconds for `LINEUP` adapters on one text of each length: in one pass, and one after another."""
    base = load_base(folder, choose_runtime("float32"))
    session = Session(base)
    names = [f"a{index}" for index in range(LINEUP)]
    session.load_in_memory(
        {name: build_adapter(base.config, LoraSettings(rank=8), index) for index, name in enumerate(names)}
    )
    mixes = [Mix.single(name) for name in names]
    found = []
    for length in LENGTHS:
        windows = ScoringWindows(base, [[" ".join(read_general())[:length]]], EvaluateSettings())
        together, apart = [], []
        for _ in range(5):
            started = time.perf_counter()
            windows.measure(session.select(*mixes), LINEUP, can_mix=True)
            together.append(time.perf_counter() - started)
            started = time.perf_counter()
            for mix in mixes:
                windows.measure(session.select(mix))
            apart.append(time.perf_counter() - started)
        found.append(
            LineupTime(
                tokens=windows.forward_tokens,
                together_seconds=statistics.median(together),
                one_by_one_seconds=statistics.median(apart),
            )
        )
    return found
