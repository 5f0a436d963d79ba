"""Writing side by side: ours, and transformers' `generate` over PEFT, on the same weights, adapters and prompts.

Each side runs in processes of its own, in turn. All write the same number of tokens greedily: one sequence under one
adapter, eight under the same one, and eight under eight different ones. Ours also with its weights packed, with what
that does to the loss on English text.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lora_gpt2.bench.child import run_in_turn
from lora_gpt2.bench.training import SIZES, build_random_base
from lora_gpt2.core.console import Reporter
from lora_gpt2.evaluation.general import read_general
from lora_gpt2.inference.engine import Engine
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.open import load_for_inference
from lora_gpt2.inference.sequence import SequenceState
from lora_gpt2.inference.session import Session
from lora_gpt2.model.base import Base
from lora_gpt2.model.checkpoint import Checkpoint, find_base
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.lora import Adapter, LoraUpdate, build_adapter
from lora_gpt2.model.runtime import choose_runtime, measure_peak_memory
from lora_gpt2.recipe import GenerateSettings, LoraSettings
from lora_gpt2.store.peft.tensors import from_peft, read_peft_files, to_peft

ROWS = 8
PROMPT_TOKENS = 32
REPEATS = 20
LOSS_TOKENS = 1024
COMPARED = 8
PACKED = "ours, float16 weights"


@dataclass(frozen=True, kw_only=True)
class DecodingSpec:
    """What all sides do; `folder` holds the base, `work` the adapters, in folders 0 to 7; each row has the prompt."""

    folder: str
    work: str
    prompt: list[int]
    tokens: int
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """One side's outcome: tokens per second of one row (also merged), of eight under one adapter, of eight under eight.

    `swap_seconds` chooses another adapter that is loaded, `load_seconds` brings a new one in from disk.
    `nll_nats` is the base's loss on English text, without adapter; `ids` are the first tokens of the eight rows under
    eight adapters.
    """

    name: str
    single: float
    merged: float
    batch_one: float
    batch_mixed: float
    swap_seconds: float
    load_seconds: float
    peak_memory_bytes: int
    nll_nats: float
    ids: list[list[int]]


@dataclass(frozen=True, kw_only=True)
class DecodingBenchmark:
    """Every side of a comparison, ours first; `tokens` of each row, adapters of this rank, weights of this dtype."""

    base: str
    tokens: int
    rank: int
    dtype: str
    sides: list[Decoding]

    def to_json(self) -> dict[str, Any]:
        """Returns the comparison with the keys of `bench decode --json`."""
        return asdict(self)


NUMBERS = [key for key in Decoding.__dataclass_fields__ if key not in ("name", "ids")]


def measure_decoding(base: str, tokens: int, rounds: int, rank: int, reporter: Reporter) -> DecodingBenchmark:
    """Returns the medians of every side over its processes; `base` as for `measure_training`."""
    runtime = choose_runtime("auto")
    names = ["ours", *[PACKED] * (runtime.device.type == "cpu"), "peft"]
    with tempfile.TemporaryDirectory() as work:
        folder = build_random_base(base, Path(work), reporter) if base in SIZES else find_base(base)
        config = Checkpoint.read(folder).config
        for index in range(ROWS):
            _write_adapter(config, str(folder), Path(work) / str(index), rank, index)
        prompt = _build_prompt(Checkpoint.open(str(folder)).load_tokenizer().vocab_size)
        spec = DecodingSpec(folder=str(folder), work=work, prompt=prompt, tokens=tokens, dtype=runtime.dtype_name)
        found = run_in_turn(
            __name__, names, asdict(spec), rounds, reporter, lambda run: f"{run['single']:,.1f} tokens/s"
        )
    sides = [_summarise([Decoding(**run) for run in runs]) for runs in found.values()]
    return DecodingBenchmark(base=base, tokens=tokens, rank=rank, dtype=spec.dtype, sides=sides)


def _summarise(runs: Sequence[Decoding]) -> Decoding:
    columns = {key: [getattr(run, key) for run in runs] for key in NUMBERS}
    medians = {key: statistics.median(values) for key, values in columns.items()}
    memory = int(medians.pop("peak_memory_bytes"))
    return Decoding(name=runs[0].name, ids=runs[0].ids, peak_memory_bytes=memory, **medians)


def _write_adapter(config: GPT2Config, base: str, folder: Path, rank: int, seed: int) -> None:
    """Saves a random adapter of the default targets that has an effect, in PEFT's format."""
    fresh, generator = build_adapter(config, LoraSettings(rank=rank), seed), torch.Generator()
    generator.manual_seed(seed)
    updates = {
        site: LoraUpdate(u.a, 0.02 * torch.randn(u.b.shape, generator=generator), u.alpha, u.use_rslora)
        for site, u in fresh.updates.items()
    }
    folder.mkdir()
    for name, content in to_peft(Adapter(updates=updates), base, config).items():
        (folder / name).write_bytes(content)


def run_side() -> None:
    """Runs one side in this process: reads a request on stdin, writes a `Decoding` on stdout."""
    request = json.loads(sys.stdin.read())
    spec, name = DecodingSpec(**request["spec"]), request["name"]
    figures = _run_peft(spec) if name == "peft" else _run_ours(spec, "float16" if name == PACKED else spec.dtype)
    device = choose_runtime("auto").device
    print(json.dumps({"name": name, "peak_memory_bytes": measure_peak_memory(device), **figures}))


def _build_prompt(vocab_size: int) -> list[int]:
    return torch.randint(vocab_size - 1, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()


def _time(action: Callable[[], object], repeats: int) -> float:
    """Returns the median seconds of an action, after one that is not timed."""
    action()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _run_ours(spec: DecodingSpec, dtype: str) -> dict[str, Any]:
    base = load_for_inference(spec.folder, dtype)
    session, config = Session(base), base.config
    adapters = {str(k): from_peft(*read_peft_files(Path(spec.work) / str(k)), config, str(k)) for k in range(ROWS)}
    session.load_in_memory(adapters)
    settings = GenerateSettings(temperature=0, max_new_tokens=spec.tokens, logit_bias={config.eos_id: -100.0})
    prompt = spec.prompt

    def write(engine: Engine, mixes: Sequence[Mix], budget: int) -> tuple[float, list[SequenceState]]:
        rows = [
            SequenceState(
                index=index,
                mix=mix,
                prompt_ids=prompt,
                max_new_tokens=budget,
                settings=settings,
                seed=0,
                tokenizer=base.tokenizer,
            )
            for index, mix in enumerate(mixes)
        ]
        started = time.perf_counter()
        for row in rows:
            engine.submit(row)
        while engine.is_busy:
            engine.step()
        return len(rows) * budget / (time.perf_counter() - started), rows

    def measure(used: Session, mixes: Sequence[Mix]) -> float:
        engine = Engine(used, len(mixes), PROMPT_TOKENS + spec.tokens)
        write(engine, mixes, 2)  # which captures a graph on a GPU
        return write(engine, mixes, spec.tokens)[0]

    every = [Mix.single(name) for name in adapters]
    figures: dict[str, Any] = {
        "single": measure(session, every[:1]),
        "batch_one": measure(session, every[:1] * ROWS),
        "batch_mixed": measure(session, every),
        "ids": [
            sequence.new_ids for sequence in write(Engine(session, ROWS, PROMPT_TOKENS + COMPARED), every, COMPARED)[1]
        ],
        "merged": measure(session.merge_into_base(every[0]), [Mix()]),
    }
    turns = iter(every * REPEATS)
    figures["swap_seconds"] = _time(lambda: session.adapters_for([next(turns)]), REPEATS)
    folder = Path(spec.work) / "3"
    figures["load_seconds"] = _time(
        lambda: session.load_in_memory({"3": from_peft(*read_peft_files(folder), config, "3")}), 5
    )
    figures["nll_nats"] = _measure_loss(base)
    return figures


@torch.inference_mode()
def _measure_loss(base: Base) -> float:
    """Returns the loss on English text through the very projections and head that write."""
    ids = base.tokenizer.encode("\n".join(read_general()))[: LOSS_TOKENS + 1]
    tokens = torch.tensor(ids, device=base.runtime.device)
    time_tokens = min(256, base.config.n_positions)
    rows = tokens[: (len(tokens) - 1) // time_tokens * time_tokens].view(-1, time_tokens)
    targets = tokens[1 : rows.numel() + 1].view_as(rows)
    logits = base.model.logits(base.model(rows), None).float()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))


def _run_peft(spec: DecodingSpec) -> dict[str, Any]:
    import warnings

    warnings.simplefilter("ignore")
    from peft import PeftModel
    from transformers import GPT2LMHeadModel

    runtime = choose_runtime("auto")
    base = GPT2LMHeadModel.from_pretrained(spec.folder, dtype=runtime.dtype).to(runtime.device).eval()
    model = PeftModel.from_pretrained(base, f"{spec.work}/0", adapter_name="a0")
    for index in range(1, ROWS):
        model.load_adapter(f"{spec.work}/{index}", adapter_name=f"a{index}")
    prompt = torch.tensor([spec.prompt], device=runtime.device)

    def write(rows: int, names: list[str] | None, budget: int) -> tuple[float, torch.Tensor]:
        more: dict[str, Any] = {"adapter_names": names} if names else {}
        ids = prompt.expand(rows, -1)
        eos = model.config.eos_token_id
        options = {"do_sample": False, "pad_token_id": eos, "attention_mask": torch.ones_like(ids), **more}
        started = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(input_ids=ids, max_new_tokens=budget, min_new_tokens=budget, **options)
        written = out[:, ids.shape[1] :]
        return written.numel() / (time.perf_counter() - started), written

    def measure(rows: int, names: list[str] | None) -> float:
        write(rows, names, 2)
        return write(rows, names, spec.tokens)[0]

    model.set_adapter("a0")
    each = [f"a{index}" for index in range(ROWS)]
    figures: dict[str, Any] = {
        "single": measure(1, None),
        "batch_one": measure(ROWS, None),
        "batch_mixed": measure(ROWS, each),
        "ids": write(ROWS, each, COMPARED)[1].tolist(),
        "merged": math.nan,
        "nll_nats": math.nan,
    }
    turns = iter(each * REPEATS)
    figures["swap_seconds"] = _time(lambda: model.set_adapter(next(turns)), REPEATS)
    fresh = iter(f"b{index}" for index in range(ROWS))
    figures["load_seconds"] = _time(lambda: model.load_adapter(f"{spec.work}/3", adapter_name=next(fresh)), 5)
    return figures
