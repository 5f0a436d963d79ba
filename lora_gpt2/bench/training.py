"""Training side by side: ours, and transformers' Trainer over PEFT, on the same weights, tokens, adapter and settings.

Each side runs in processes of its own, in turn (A B A B), so that neither warms nor crowds the other. The base is a
GPT-2 of an exact published size with random weights, or a folder; tokens are random with the frequencies of words, so
that there is something to learn. Equalised: dropout off, the adapter's first weights, AdamW, constant learning rate,
clipping, and the loss per target (transformers divides GPT-2's by labels unless told otherwise).
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_gpt2.bench.child import run_in_turn
from lora_gpt2.core.console import Reporter
from lora_gpt2.data.blocks import IGNORE
from lora_gpt2.model.bank import AdapterBank
from lora_gpt2.model.base import load_base
from lora_gpt2.model.checkpoint import BUNDLED, Checkpoint, find_base
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.lora import build_adapter, build_ranks, target_of
from lora_gpt2.model.runtime import DTYPES, Runtime, choose_runtime, measure_peak_memory
from lora_gpt2.recipe import BLOCKS, LoraSettings
from lora_gpt2.store.peft.tensors import to_peft
from lora_gpt2.training.process_group import ProcessGroup
from lora_gpt2.training.step import WARM_UP, MicroBatch, SlotHyperparams, StepRunner

SIZES = {"S": (768, 12, 12), "M": (1024, 24, 16), "L": (1280, 36, 20), "XL": (1600, 48, 25)}
LEARNING_RATE = 1e-3
PEERS = {"float32": ("peft",), "bfloat16": ("peft", "peft-autocast"), "float16": ("peft",)}


@dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """What all sides do; `folder` holds the base, `work` the tokens and the adapter to start from.

    `slots` is the number of adapters of the side that trains several together, each on `rows`.
    """

    folder: str
    work: str
    rows: int
    time: int
    steps: int
    rank: int
    dtype: str
    device: str
    checkpointing: bool
    quantize: str
    slots: int

    @property
    def warm_up(self) -> int:
        """Steps before the clock starts: one, or as many as it takes until a GPU replays them."""
        return WARM_UP + 1 if self.device == "cuda" else 1

    @property
    def lora(self) -> LoraSettings:
        """Rank on all projections of the blocks, which is where both sides can put it."""
        return LoraSettings(rank=self.rank, targets=BLOCKS)


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side's outcome: medians over its processes; losses in nats per token at each step.

    The matrix product's speed is measured in the same process before and after the steps: machines change their mind.
    """

    name: str
    tokens_per_second: float
    peak_memory_bytes: int
    start_seconds: float
    gemm_flops_per_second: float
    losses: list[float]


@dataclass(frozen=True, kw_only=True)
class TrainingBenchmark:
    """Every side of a comparison, ours first, and the arithmetic of a token in a training step."""

    base: str
    spec: TrainingSpec
    flops_per_token: float
    sides: list[Side]

    def share_of_limit(self, side: Side) -> float:
        """Returns how much of the machine's matrix products a side gets."""
        return side.tokens_per_second * self.flops_per_token / side.gemm_flops_per_second

    def speed_of_ours(self, side: Side) -> float:
        """Returns how many times a side's speed ours has."""
        return self.sides[0].tokens_per_second / side.tokens_per_second

    def memory_of_ours(self, side: Side) -> float:
        """Returns how many times a side's memory ours takes."""
        return self.sides[0].peak_memory_bytes / side.peak_memory_bytes

    def to_json(self) -> dict[str, Any]:
        """Returns the comparison with the keys of `bench train --json`."""
        sides = [
            asdict(side)
            | {
                "share_of_limit": self.share_of_limit(side),
                "speed_of_ours": self.speed_of_ours(side),
                "memory_of_ours": self.memory_of_ours(side),
                "loss_difference": abs(side.losses[-1] - self.sides[0].losses[-1]),
            }
            for side in self.sides
        ]
        spec = asdict(self.spec) | {"folder": self.base, "work": None}
        return {"spec": spec, "flops_per_token": self.flops_per_token, "sides": sides}


def count_flops_per_token(config: GPT2Config, time_tokens: int, lora: LoraSettings) -> float:
    """Returns the arithmetic of one training step per token: no gradients of frozen weights."""
    d, blocks = config.n_embd, config.n_layer
    ranks = build_ranks(config, lora)
    adapters = sum(rank * sum(config.shape_of(target_of(site))) for site, rank in ranks.items())
    return 4 * (12 * blocks * d * d + config.vocab_size * d) + 7 * blocks * time_tokens * d + 6 * adapters


def measure_gemm(device: torch.device, dtype: torch.dtype, width: int, rows: int) -> float:
    """Returns FLOP/s of the MLP's product at this size: the best of several tries, which is the limit here."""
    x = torch.randn(rows, width, device=device).to(dtype)
    weight = torch.randn(4 * width, width, device=device).to(dtype)
    best = 0.0
    for _ in range(7):
        started = time.perf_counter()
        for _ in range(10):
            torch.nn.functional.linear(x, weight)
        if device.type == "cuda":
            torch.cuda.synchronize()
        elif device.type == "mps":
            torch.mps.synchronize()
        best = max(best, 10 * 2 * rows * width * 4 * width / (time.perf_counter() - started))
    return best


def measure_training(
    base: str,
    rows: int,
    time_tokens: int,
    steps: int,
    rounds: int,
    *,
    reporter: Reporter,
    rank: int = 16,
    dtype: str = "auto",
    checkpointing: bool = False,
    quantize: str = "none",
    slots: int = 1,
    lines: Path | None = None,
) -> TrainingBenchmark:
    """Returns the figures of every side.

    `base` is S, M, L or XL (random weights), or a name or folder. `slots` above 1 adds a side that trains so many
    adapters together; `lines` adds the usual notebook, with each line of a text file padded to a row.
    """
    runtime = choose_runtime(dtype)
    with tempfile.TemporaryDirectory() as work:
        folder = build_random_base(base, Path(work), reporter) if base in SIZES else find_base(base)
        config = Checkpoint.read(folder).config
        spec = TrainingSpec(
            folder=str(folder),
            work=work,
            rows=rows,
            time=time_tokens,
            steps=steps,
            rank=rank,
            dtype=runtime.dtype_name,
            device=runtime.device.type,
            checkpointing=checkpointing,
            quantize=quantize,
            slots=slots,
        )
        _write_inputs(spec, config)
        if lines is not None:
            _write_lengths(spec, lines)
        joint, notebook = ["ours together"] * (slots > 1), ["notebook"] * (lines is not None)
        names = ["ours", *joint, *PEERS[runtime.dtype_name], *notebook]
        found = run_in_turn(
            __name__, names, asdict(spec), rounds, reporter, lambda run: f"{run['tokens_per_second']:,.0f} tokens/s"
        )
    sides = [_summarise(name, [Side(**run) for run in runs]) for name, runs in found.items()]
    flops = count_flops_per_token(config, time_tokens, spec.lora)
    return TrainingBenchmark(base=base, spec=spec, flops_per_token=flops, sides=sides)


def _summarise(name: str, runs: Sequence[Side]) -> Side:
    return Side(
        name=name,
        tokens_per_second=statistics.median(r.tokens_per_second for r in runs),
        peak_memory_bytes=int(statistics.median(r.peak_memory_bytes for r in runs)),
        start_seconds=statistics.median(r.start_seconds for r in runs),
        gemm_flops_per_second=statistics.median(r.gemm_flops_per_second for r in runs),
        losses=runs[0].losses,
    )


def build_random_base(size: str, work: Path, reporter: Reporter) -> Path:
    """Saves a GPT-2 with random weights, and nano's tokenizer, filled up so that every row of the head is a token."""
    from transformers import GPT2Config as TheirConfig
    from transformers import GPT2LMHeadModel

    reporter.message(f"writing random weights of GPT-2 {size}")
    width, layers, heads = SIZES[size]
    torch.manual_seed(0)
    folder = work / "base"
    eos = Checkpoint.open(str(BUNDLED / "nano")).load_tokenizer().eos_id
    shape = TheirConfig(n_embd=width, n_layer=layers, n_head=heads, eos_token_id=eos, bos_token_id=eos)
    GPT2LMHeadModel(shape).save_pretrained(folder)
    vocabulary = json.loads((BUNDLED / "nano" / "vocab.json").read_text(encoding="utf-8"))
    vocabulary |= {f"<{index}>": index for index in range(len(vocabulary), shape.vocab_size)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_bytes((BUNDLED / "nano" / "merges.txt").read_bytes())
    return folder


def _write_inputs(spec: TrainingSpec, config: GPT2Config) -> None:
    """Saves tokens `[warm-up and steps, rows, time]`, drawn by Zipf's law, and the adapter that all start from."""
    generator = np.random.default_rng(0)
    shares = 1 / np.arange(1, config.vocab_size + 1)
    shape = (spec.warm_up + spec.steps, spec.rows, spec.time)
    tokens = generator.choice(config.vocab_size, size=shape, p=shares / shares.sum())
    np.save(Path(spec.work) / "tokens.npy", tokens.astype(np.int64))
    adapter = Path(spec.work) / "adapter"
    adapter.mkdir(exist_ok=True)
    for name, content in to_peft(build_adapter(config, spec.lora, 0), spec.folder, config).items():
        (adapter / name).write_bytes(content)


def _write_lengths(spec: TrainingSpec, lines: Path) -> None:
    """Saves how many tokens the lines of a file have, for as many rows as will be trained on."""
    tokenizer = Checkpoint.open(spec.folder).load_tokenizer()
    texts = [line for line in lines.read_text(encoding="utf-8").splitlines() if line.strip()]
    num_rows = (spec.warm_up + spec.steps) * spec.rows
    lengths = [min(spec.time, max(2, len(ids))) for ids in tokenizer.encode_batch(texts[:num_rows])]
    np.save(Path(spec.work) / "lengths.npy", np.resize(lengths, num_rows))


def run_side() -> None:
    """Runs one side in this process: reads a request on stdin, writes a `Side` on stdout."""
    request = json.loads(sys.stdin.read())
    spec, name = TrainingSpec(**request["spec"]), request["name"]
    tokens = torch.from_numpy(np.load(Path(spec.work) / "tokens.npy"))
    config = Checkpoint.read(Path(spec.folder)).config
    shape = (torch.device(spec.device), DTYPES[spec.dtype], config.n_embd, spec.rows * spec.time)
    before = measure_gemm(*shape)
    if name.startswith("ours"):
        measured = _run_ours(spec, tokens, spec.slots if name == "ours together" else 1)
    else:
        measured = _run_peft(spec, tokens, name)
    measured["gemm_flops_per_second"] = (before + measure_gemm(*shape)) / 2
    print(json.dumps({"name": name, **measured}))


def _run_ours(spec: TrainingSpec, tokens: torch.Tensor, slots: int) -> dict[str, Any]:
    started = time.monotonic()
    device = torch.device(spec.device)
    base = load_base(spec.folder, Runtime(device, DTYPES[spec.dtype]), spec.quantize)
    adapter = build_adapter(base.config, spec.lora, 0)
    bank = AdapterBank(base.config, adapter.ranks, slots, "training", base.model.wte.weight)
    for slot in range(slots):
        bank.load(slot, adapter)
    runner = StepRunner(base.model, bank, None, None, ProcessGroup())
    hyperparams = SlotHyperparams(
        learning_rates=torch.full((slots,), LEARNING_RATE),
        weight_decays=torch.zeros(slots),
        max_grad_norms=torch.ones(slots),
        is_active=torch.ones(slots, dtype=torch.bool),
    )
    weights = torch.full((slots * spec.rows * spec.time,), 1 / (spec.rows * (spec.time - 1)))
    losses: list[torch.Tensor] = []
    first = 0.0
    for step, rows in enumerate(tokens):
        inputs = rows.repeat(slots, 1)
        if step == 1:
            losses[0].item()
            first = time.monotonic() - started
        if step == spec.warm_up:
            losses[-1].item()  # waits for the device
            began = time.monotonic()
        targets = torch.full_like(inputs, IGNORE)
        targets[:, :-1] = inputs[:, 1:]
        batch = MicroBatch(
            slots=list(range(slots)),
            slot_ids=torch.arange(slots),
            inputs=inputs,
            targets=targets,
            loss_weights=weights,
            dropout=0.0,
            label_smoothing=0.0,
            seeds=torch.zeros(len(inputs), dtype=torch.long),
            noise_alpha=0.0,
            gradient_checkpointing=spec.checkpointing,
        )
        losses.append(runner.run([batch], hyperparams)[0, 0].clone())
    values = [loss.item() for loss in losses]
    return _figures(spec, slots * spec.steps * spec.rows * spec.time, time.monotonic() - began, first, values)


def _run_peft(spec: TrainingSpec, tokens: torch.Tensor, name: str) -> dict[str, Any]:
    import warnings

    warnings.simplefilter("ignore")
    from peft import PeftModel
    from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

    started = time.monotonic()
    autocast = name == "peft-autocast"
    narrow = DTYPES["float32" if autocast or name == "notebook" else spec.dtype]
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    base = GPT2LMHeadModel.from_pretrained(spec.folder, dtype=narrow, **off)
    base.loss_type = "ForCausalLM"
    model = PeftModel.from_pretrained(base, str(Path(spec.work) / "adapter"), is_trainable=True)
    rows = [{"input_ids": row, "labels": row} for row in tokens.flatten(0, 1)]
    counted = spec.steps * spec.rows * spec.time
    if name == "notebook":
        lengths = np.load(Path(spec.work) / "lengths.npy").tolist()
        rows = [_pad(row, length) for row, length in zip(tokens.flatten(0, 1), lengths, strict=True)]
        counted = sum(lengths[spec.warm_up * spec.rows :])
    arguments = TrainingArguments(
        output_dir=str(Path(spec.work) / "out"),
        per_device_train_batch_size=spec.rows,
        max_steps=len(tokens),
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        bf16=autocast,
        use_cpu=spec.device == "cpu",
        gradient_checkpointing=spec.checkpointing,
        disable_tqdm=True,
        dataloader_pin_memory=spec.device == "cuda",
        train_sampling_strategy="sequential",
    )
    watch = _build_callback(spec.warm_up)
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[watch]).train()
    return _figures(spec, counted, watch.ended - watch.began, watch.first - started, watch.losses)


def _build_callback(warm_up: int) -> Any:
    """Returns a callback that records the losses and when the first, the warm-up's and the last step ended."""
    from transformers import TrainerCallback

    class Callback(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.losses: list[float] = []
            self.first = self.began = self.ended = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            self.ended = time.monotonic()
            self.first = self.first or self.ended
            if state.global_step == warm_up:
                self.began = self.ended

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append(logs["loss"])

    return Callback()


def _pad(row: torch.Tensor, length: int) -> dict[str, torch.Tensor]:
    mask = torch.arange(len(row)) < length
    return {"input_ids": row * mask, "attention_mask": mask.long(), "labels": torch.where(mask, row, IGNORE)}


def _figures(spec: TrainingSpec, tokens: int, seconds: float, first: float, losses: list[float]) -> dict[str, Any]:
    return {
        "tokens_per_second": tokens / seconds,
        "peak_memory_bytes": measure_peak_memory(torch.device(spec.device)),
        "start_seconds": first,
        "losses": losses,
    }
