"""One prepared visit to a machine with a GPU: everything worth knowing, in order of value, under a deadline.

Each step is a process of its own with a limit, so that none can take the others along; after each, everything known so
far is written to $OUT/results.json (build/gpu without $OUT). Bases have random weights of the published sizes, drawn
on the GPU into memory. `--only "train S,decode S"` picks steps, `--dry` runs tiny shapes on whatever device is here.

    python3 tools/gpu_visit.py --deadline 420 | tee $OUT/log.txt
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
OUT = Path(os.environ.get("OUT", "build/gpu"))
WORK = Path("/dev/shm/lora-gpt2-gpu")  # GPT-2 XL in bfloat16 is 3.1 GB
VOCABULARY = 50257
SIZES = {"S": (768, 12, 12), "M": (1024, 24, 16), "L": (1280, 36, 20), "XL": (1600, 48, 25), "T": (64, 2, 2)}
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "numpy")
PROJECTIONS = ((16, 512, 4), (8, 512, 4), (16, 256, 4), (16, 1024, 4), (16, 512, 2), (16, 512, 8), (32, 512, 4))
Figures = dict[str, Any]


def measure_environment() -> Figures:
    """Versions, the context's memory, the ceilings of products and copies, and the kernels of attention."""
    import torch

    found: Figures = {}
    for name in PACKAGES:
        found[name] = next((each.version for each in importlib.metadata.distributions(name=name)), None)
    if not torch.cuda.is_available():
        return found
    gpu = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    found |= {"gpu": gpu.name, "total_bytes": total, "context_bytes": total - free}
    found["cudnn"] = torch.backends.cudnn.version()
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    found["gemm_tflops"] = 2 * 8192**3 / time_events(lambda: x @ x) / 1e12
    y = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    z = torch.empty_like(y)
    found["copy_gb_per_second"] = 2 * 2**30 / time_events(lambda: z.copy_(y)) / 1e9
    for name, vocabulary in {"aligned": 50304, "odd": VOCABULARY}.items():
        hidden, head = (torch.randn(n, 768, device="cuda", dtype=torch.bfloat16) for n in (1024, vocabulary))
        logits = torch.empty(1024, vocabulary, device="cuda", dtype=torch.bfloat16)
        found[f"head_{name}_us"] = [
            1e6 * time_events(lambda h=hidden, w=head, s=logits: torch.mm(h, w.T, out=s)),  # type: ignore[misc]
            1e6 * time_events(lambda w=head, s=logits: s @ w),  # type: ignore[misc]
        ]
    del x, y, z, hidden, head, logits
    found["products"] = measure_products()
    found["attention"] = measure_attention()
    return found


def time_events(action: Callable[[], object], repeats: int = 20) -> float:
    """Returns the median seconds by device events, after one that is not timed."""
    import torch

    action()
    taken = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        action()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(taken)


def measure_products() -> Figures:
    """The rank-wide products of a projection of S at 8,192 tokens, each way in which they can be computed."""
    import torch

    def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    found: Figures = {}
    x, dy, z, a, b_t = make(1, 8192, 768), make(1, 8192, 2304), make(1, 8192, 16), make(1, 16, 768), make(1, 16, 2304)
    w = make(2304, 768)
    wide = torch.cat([w, a[0]])
    flat = make(1, 10**6, dtype=torch.float32)
    total = flat.as_strided((1, 16, 2304), (10**6, 2304, 1), 64)
    expected = total + (z.mT.double() @ dy.double()).float()
    try:
        torch.baddbmm(total, z.mT, dy, out_dtype=torch.float32, out=total)
        found["out_dtype_error"] = float((total - expected).norm() / expected.norm())
        found["grad_out_dtype_us"] = 1e6 * time_events(
            lambda: torch.baddbmm(total, z.mT, dy, out_dtype=torch.float32, out=total)
        )
    except (RuntimeError, TypeError) as error:
        found["out_dtype_refused"] = str(error)[:300]

    def add_product() -> None:
        nonlocal total
        total += torch.bmm(z.mT, dy)

    found["grad_cast_us"] = 1e6 * time_events(add_product)
    y = torch.nn.functional.linear(x, w)
    found["base_us"] = 1e6 * time_events(lambda: torch.nn.functional.linear(x, w))
    found["base_with_a_us"] = 1e6 * time_events(lambda: torch.nn.functional.linear(x, wide))
    found["shrink_us"] = 1e6 * time_events(lambda: torch.bmm(x, a.mT))
    found["expand_us"] = 1e6 * time_events(lambda: y.baddbmm_(z, b_t))
    return found


def measure_attention() -> Figures:
    """Which kernel each of our four kinds of attention gets, its first call and its time in microseconds."""
    import torch
    import torch.nn.functional as F
    from torch.profiler import ProfilerActivity, profile

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)

    long = [make(8, 12, 1024, 64) for _ in range(3)]
    one, mask = make(8, 12, 1, 64), torch.zeros(8, 1, 1, 1024, device="cuda", dtype=torch.bfloat16)
    square = mask.expand(8, 1, 1024, 1024).contiguous()
    odd = [part[:, :, :1001] for part in long[1:]]
    kinds: dict[str, Callable[[], torch.Tensor]] = {
        "training, causal": lambda: attend(*long),
        "packed, mask": lambda: attend(*long, square),
        "decoding, mask": lambda: attend(one, *long[1:], mask),
        "decoding, odd length": lambda: attend(one, *odd, mask[..., :1001].contiguous()),
    }
    found: Figures = {}
    for name, action in kinds.items():
        started = time.perf_counter()
        action()
        torch.cuda.synchronize()
        first = time.perf_counter() - started
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as record:
            action()
        kernels = [e.key[:60] for e in record.key_averages() if getattr(e, "self_device_time_total", 0) > 0]
        found[name] = {"first_s": first, "us": 1e6 * time_events(action), "kernels": kernels[:6]}
    return found


def run_tests() -> Figures:
    """The tests of tests/gpu, whose `device` is really there."""
    options = ["-n", "0", "-W", "default", "-p", "no:cacheprovider", "--tb=short", "-rA", "--durations=12"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/gpu", *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    (OUT / "tests.log").write_text(done.stdout[-400_000:] + done.stderr[-50_000:])
    lines = done.stdout.splitlines()
    failed = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"returncode": done.returncode, "summary": lines[-1:], "failed": failed[:20]}


def build_base(size: str) -> Path:
    """Returns the folder of a GPT-2 with random weights in bfloat16; without transformers or gigabytes of float32."""
    import torch
    from safetensors.torch import save_file

    from lora_gpt2.model.checkpoint import BUNDLED, Checkpoint

    folder = WORK / f"base-{size}"
    if (folder / "done").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    width, layers, heads = SIZES[size]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (VOCABULARY, width), "wpe.weight": (1024, width)}
    shapes |= {"ln_f.weight": (width,), "ln_f.bias": (width,)}
    for k in range(layers):
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h.{k}.{norm}.weight": (width,), f"h.{k}.{norm}.bias": (width,)}
        for name, a, b in (("attn.c_attn", 1, 3), ("attn.c_proj", 1, 1), ("mlp.c_fc", 1, 4), ("mlp.c_proj", 4, 1)):
            shapes |= {f"h.{k}.{name}.weight": (a * width, b * width), f"h.{k}.{name}.bias": (b * width,)}
    state = {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02
        state[f"transformer.{name}"] = (drawn + (".ln_" in f".{name}" and name.endswith("weight"))).cpu()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    eos = Checkpoint.open(str(BUNDLED / "nano")).load_tokenizer().eos_id
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": VOCABULARY, "n_embd": width}
    config |= {"n_positions": 1024, "n_layer": layers, "n_head": heads, "activation_function": "gelu_new"}
    config |= {"eos_token_id": eos, "bos_token_id": eos, "tie_word_embeddings": True}
    config |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    words = json.loads((BUNDLED / "nano" / "vocab.json").read_text(encoding="utf-8"))
    words |= {f"<{index}>": index for index in range(len(words), VOCABULARY)}
    (folder / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    (folder / "merges.txt").write_bytes((BUNDLED / "nano" / "merges.txt").read_bytes())
    (folder / "done").write_text("")
    return folder


def compare_replayed_training(size: str = "S") -> Figures:
    """How far replayed training steps are from those that are computed."""
    import torch

    from lora_gpt2.model.bank import AdapterBank
    from lora_gpt2.model.base import load_base
    from lora_gpt2.model.lora import build_adapter
    from lora_gpt2.model.runtime import choose_runtime
    from lora_gpt2.recipe import LoraSettings
    from lora_gpt2.training.process_group import ProcessGroup
    from lora_gpt2.training.step import MicroBatch, SlotHyperparams, StepRunner

    base, length = load_base(str(build_base(size)), choose_runtime("auto")), 128
    banks = []
    for recorded in (True, False):
        adapter = build_adapter(base.config, LoraSettings(), 0)
        bank = AdapterBank(base.config, adapter.ranks, 2, "training", base.model.wte.weight)
        for slot in range(2):
            bank.load(slot, adapter)
        runner = StepRunner(base.model, bank, None, None, ProcessGroup())
        for step in range(8):
            tokens = torch.randint(50000, (8, length + 1), generator=torch.Generator().manual_seed(step))
            batch = MicroBatch(
                slots=[0, 1],
                slot_ids=torch.arange(2),
                inputs=tokens[:, :-1],
                targets=tokens[:, 1:],
                loss_weights=torch.full((8 * length,), 1 / (4 * length)),
                dropout=0.0,
                label_smoothing=0.0,
                seeds=torch.arange(8),
                noise_alpha=0.0,
                gradient_checkpointing=False,
            )
            hyperparams = SlotHyperparams(
                learning_rates=torch.full((2,), 1e-3 / (step + 1)),
                weight_decays=torch.zeros(2),
                max_grad_norms=torch.ones(2),
                is_active=torch.ones(2, dtype=torch.bool),
            )
            if recorded:
                runner.run([batch], hyperparams)
            else:
                runner.compute(*runner.copy_to_device([batch], hyperparams))
        banks.append(bank.flat.clone())
    return {
        "training_difference": float((banks[0] - banks[1]).abs().max()),
        "training_change": float((banks[1] - bank_of(base, banks[1])).abs().max()),
    }


def compare_replayed_decoding(size: str = "S") -> Figures:
    """The share of tokens that replayed decode steps have in common with computed ones, and with plain products."""
    from lora_gpt2.inference.cuda_graphs import CudaGraphDecoder
    from lora_gpt2.inference.decoder import Decoder
    from lora_gpt2.inference.engine import Engine
    from lora_gpt2.inference.mix import Mix
    from lora_gpt2.inference.sequence import SequenceState
    from lora_gpt2.recipe import GenerateSettings

    class Eager(CudaGraphDecoder):
        """Computes each step anew, with the same kernels."""

        def _capture(self, step: Any) -> None:
            pass

    session = open_session(size)

    def write(decoder: type[Decoder], settings: GenerateSettings) -> list[int]:
        engine = Engine(session, 8, 96)
        engine.decoder = decoder(session, engine.cache)
        rows = [
            SequenceState(
                index=k,
                mix=Mix.single(str(k)),
                prompt_ids=list(range(10, 42)),
                max_new_tokens=32,
                settings=settings,
                seed=k,
                tokenizer=session.base.tokenizer,
            )
            for k in range(8)
        ]
        for row in rows:
            engine.submit(row)
        while engine.is_busy:
            engine.step()
        return [token for row in rows for token in row.new_ids]

    found: Figures = {}
    for kind, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        settings = GenerateSettings(temperature=temperature, max_new_tokens=32)
        replayed, computed, plain = (write(decoder, settings) for decoder in (CudaGraphDecoder, Eager, Decoder))
        for name, other in (("computed", computed), ("by plain products", plain)):
            same = [one == another for one, another in zip(replayed, other, strict=False)]
            found[f"{kind}: tokens equal to those {name}"] = sum(same) / len(same)
    return found


def bank_of(base: Any, flat: Any) -> Any:
    """Returns the bank's first parameters in the layout of `flat`."""
    from lora_gpt2.model.bank import AdapterBank
    from lora_gpt2.model.lora import build_adapter
    from lora_gpt2.recipe import LoraSettings

    adapter = build_adapter(base.config, LoraSettings(), 0)
    bank = AdapterBank(base.config, adapter.ranks, len(flat), "training", base.model.wte.weight)
    for slot in range(len(flat)):
        bank.load(slot, adapter)
    return bank.flat


def build_trainer(size: str, tokens: int, length: int, **settings: Any) -> tuple[Any, Any]:
    """Returns a trainer over random tokens with one slot, and its recipe; `budget` in bytes makes it fit first."""
    from lora_gpt2.core.console import SilentReporter
    from lora_gpt2.model.base import load_base
    from lora_gpt2.model.runtime import choose_runtime
    from lora_gpt2.recipe import build_recipe
    from lora_gpt2.store.catalog import Store
    from lora_gpt2.training.plan import build_random_data, fit_to_memory
    from lora_gpt2.training.slot import TrainingSlot
    from lora_gpt2.training.trainer import Trainer

    budget = settings.pop("budget", 0)
    train = {"steps": 12, "batch_tokens": tokens, "micro_batch_tokens": tokens, **settings}
    raw = {"name": "a", "base": str(build_base(size)), "data": {"block_size": length}, "train": train}
    recipe = build_recipe(raw, "gpu")
    if budget:
        (recipe,), _ = fit_to_memory([recipe], Store.find(), int(budget), SilentReporter())
    base = load_base(recipe.base, choose_runtime("auto"), recipe.train.quantize)
    slot = TrainingSlot(recipe=recipe, data=build_random_data(recipe, base.config.vocab_size))
    return Trainer(base, [slot], SilentReporter()), recipe


def measure_memory(
    size: str = "S", tokens: int = 8192, checkpointing: bool = False, quantize: str = "none", budget: float = 0
) -> Figures:
    """The plan beside what the allocator says: in the first step, with a graph, and after a validation."""
    import torch

    from lora_gpt2.training.memory import estimate_memory
    from lora_gpt2.training.samples import generate_sample

    trainer, recipe = build_trainer(
        size, tokens, min(1024, tokens), gradient_checkpointing=checkpointing, quantize=quantize, budget=budget
    )
    planned = estimate_memory(trainer.base.config, [recipe], trainer.base.runtime)
    chosen = recipe.train.model_dump(include={"micro_batch_tokens", "gradient_checkpointing", "quantize"})
    found: Figures = {"settings": chosen, "planned": planned.peak, "planned_tensors": planned.peak - planned.reserve}

    def note(moment: str) -> None:
        if trainer.device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            found[moment] = {
                "allocated": torch.cuda.max_memory_allocated(),
                "reserved": torch.cuda.max_memory_reserved(),
                "device_used": total - free,
            }

    for step in range(6):
        started = time.perf_counter()
        trainer.run_step([0])
        if step in (0, 3, 5):
            note(f"step {step + 1}")
    found["last_step_seconds"] = time.perf_counter() - started
    trainer.measure_validation(0)
    note("validation")
    generate_sample(trainer.base, trainer.slots[0], trainer.bank.read(0))
    note("sample")
    if "step 1" in found:
        found["of_plan"] = found["step 1"]["allocated"] / found["planned_tensors"]
        found["used_of_plan"] = found["sample"]["device_used"] / planned.peak
    return found


def run_sides(module: str, sides: str, spec: Figures) -> Figures:
    """Returns each side's figures, run by the code of `bench` in a process of its own."""
    from lora_gpt2.bench.child import run_child
    from lora_gpt2.core.errors import LoraGpt2Error

    found: Figures = {}
    for name in sides.split(","):
        try:
            found[name] = run_child(module, name, spec)
            found[name].pop("ids", None)
        except LoraGpt2Error as error:
            found[name] = {"error": error.message}
    return found


def compare_training(
    size: str = "S",
    rows: int = 8,
    length: int = 1024,
    steps: int = 20,
    sides: str = "ours,peft",
    quantize: str = "none",
    slots: int = 1,
) -> Figures:
    """Tokens per second, peak memory and losses of each side, by the code of `bench train`."""
    from lora_gpt2.bench import training
    from lora_gpt2.model.checkpoint import Checkpoint
    from lora_gpt2.model.runtime import choose_runtime

    folder, runtime = build_base(size), choose_runtime("auto")
    config = Checkpoint.read(folder).config
    with tempfile.TemporaryDirectory(dir=WORK) as work:
        spec = training.TrainingSpec(
            folder=str(folder),
            work=work,
            rows=rows,
            time=length,
            steps=steps,
            rank=16,
            dtype=runtime.dtype_name,
            device=runtime.device.type,
            checkpointing=False,
            quantize=quantize,
            slots=slots,
        )
        training._write_inputs(spec, config)
        found = run_sides("lora_gpt2.bench.training", sides, asdict(spec))
    flops = training.count_flops_per_token(config, length, spec.lora)
    for side in found.values():
        if "losses" in side:
            side["of_limit"] = side["tokens_per_second"] * flops / side["gemm_flops_per_second"]
            side["losses"] = side["losses"][-1:]
    if all("tokens_per_second" in found.get(name, {}) for name in ("ours", "peft")):
        found["ratio"] = found["ours"]["tokens_per_second"] / found["peft"]["tokens_per_second"]
    return found


def compare_decoding(size: str = "S", tokens: int = 64, sides: str = "ours,peft") -> Figures:
    """Tokens per second of each side, by the code of `bench decode`."""
    from lora_gpt2.bench import decoding
    from lora_gpt2.model.checkpoint import Checkpoint
    from lora_gpt2.model.runtime import choose_runtime

    folder = build_base(size)
    config = Checkpoint.read(folder).config
    with tempfile.TemporaryDirectory(dir=WORK) as work:
        for index in range(decoding.ROWS):
            decoding._write_adapter(config, str(folder), Path(work) / str(index), 16, index)
        spec = decoding.DecodingSpec(
            folder=str(folder),
            work=work,
            prompt=decoding._build_prompt(config.vocab_size),
            tokens=tokens,
            dtype=choose_runtime("auto").dtype_name,
        )
        return run_sides("lora_gpt2.bench.decoding", sides, asdict(spec))


def time_captured(action: Callable[[], object], calls: int = 20) -> float:
    """Returns the median microseconds of a call, captured so many times in a row and replayed."""
    from lora_gpt2.model.graphs import capture, on_capture_stream

    with on_capture_stream():
        action()
    graph, _ = capture(lambda: [action() for _ in range(calls)])
    return round(1e6 * time_events(graph.replay, 10) / calls, 2)


def measure_layers(size: str = "S") -> Figures:
    """Microseconds of a decode step without its head by the kernels and by plain products; see `measure_variants`."""
    import torch

    from lora_gpt2.model import decode_step
    from lora_gpt2.model.bank import AdapterBank
    from lora_gpt2.model.base import load_base
    from lora_gpt2.model.batch_adapters import BatchAdapters
    from lora_gpt2.model.kv_cache import KVCache
    from lora_gpt2.model.lora import build_adapter
    from lora_gpt2.model.runtime import choose_runtime
    from lora_gpt2.recipe import LoraSettings

    base = load_base(str(build_base(size)), choose_runtime("auto"))
    model, like = base.model, base.model.wte.weight
    ranks = {site: rank for site, rank in build_adapter(base.config, LoraSettings(), 0).ranks.items() if "." in site}
    bank = AdapterBank(base.config, ranks, 8, "inference", like)
    bank.flat.normal_(std=0.01)
    bank.scalings.fill_(1.0)
    found: Figures = {"kernels": decode_step.can_use_kernels(model, 8)}
    if not found["kernels"]:
        return found

    def build(compute: Any, rows: int, used: int, length: int) -> Callable[[], Any]:
        num_keys, draw = (64 if length <= 64 else 1024), torch.Generator(like.device).manual_seed(0)
        cache = KVCache(base.config, rows, 1024, like).view(0, rows, fixed_keys=num_keys)
        cache.buffer[:, :, :, :, : length - 1].normal_(generator=draw)
        tokens = torch.randint(50000, (rows, 1), generator=draw, device=like.device)
        weights = make_weights(rows, used)

        def step() -> Any:
            cache.lengths.fill_(length - 1)
            return compute(tokens, BatchAdapters(bank, weights, slice(0, 8)), cache)

        return step

    with torch.inference_mode():
        for shape in ((1, 1, 64), (1, 1, 900), (8, 8, 64), (8, 1, 64), (32, 8, 64), (32, 8, 900)):
            kernels, plain = build(partial(decode_step.compute_hidden, model), *shape), build(model, *shape)
            expected = plain().float()
            found["{} rows of {}, {} keys".format(*shape)] = {
                "by kernels": time_captured(kernels, 2),
                "plain": time_captured(plain, 2),
                "difference": float((kernels().float() - expected).norm() / expected.norm()),
            }
        for rows in (1, 32):
            found[f"variants, {rows} rows"] = measure_variants(
                model, BatchAdapters(bank, make_weights(rows, 8), slice(0, 8))
            )
    return found


def open_session(size: str) -> Any:
    """Returns a session with eight adapters, "0" to "7", of rank 16 on the blocks."""
    from lora_gpt2.bench import decoding
    from lora_gpt2.inference.open import load_for_inference
    from lora_gpt2.inference.session import Session
    from lora_gpt2.store.peft.tensors import from_peft, read_peft_files

    session = Session(load_for_inference(str(build_base(size)), "auto"))
    config = session.base.config
    with tempfile.TemporaryDirectory(dir=WORK) as work:
        for index in range(8):
            decoding._write_adapter(config, "base", Path(work) / str(index), 16, index)
            files = read_peft_files(Path(work) / str(index))
            session.load_in_memory({str(index): from_peft(*files, config, str(index))})
    return session


def make_weights(rows: int, used: int) -> Any:
    """Returns the weights of eight slots, of which each row uses one of the first."""
    import torch

    return torch.eye(8, device="cuda")[[row % used for row in range(rows)]]


def measure_variants(model: Any, adapters: Any) -> Figures:
    """Microseconds of the kernels of two projections with other blocks, of plain products, and of frozen weights.

    Each goes through all layers, whose weights do not fit into the device's cache.
    """
    found: Figures = {}
    for kind in ("attn.c_attn", "mlp.c_proj"):
        actions = list_projections(model, adapters, kind)
        times: Figures = {name: time_all(actions[name]) for name in ("plain", "frozen weight")}
        blocks = ("BLOCK_RANK", "MOST_LANES"), ((2, 4096), (4, 1024), (8, 1024))
        times |= measure_blocks("prepare", actions["prepare"], *blocks)
        times |= measure_blocks("project", actions["project"], ("BLOCK_OUT", "BLOCK_BYTES", "NUM_WARPS"), PROJECTIONS)
        found[kind] = times
    return found


def list_projections(model: Any, adapters: Any, kind: str) -> dict[str, list[Callable[[], object]]]:
    """Returns one call for each layer, of each way to compute a part of its projection."""
    import torch

    from lora_gpt2.model import layer_kernels

    calls: dict[str, list[Callable[[], object]]] = {"prepare": [], "project": [], "plain": [], "frozen weight": []}
    for layer, block in enumerate(model.h):
        site, is_first = f"h.{layer}.{kind}", kind == "attn.c_attn"
        linear, prologue = (block.attn.c_attn, block.ln_1) if is_first else (block.mlp.c_proj, block.mlp.act)
        x = torch.randn(len(adapters.weights), linear.in_features, device="cuda", dtype=linear.weight.dtype)
        factors = adapters.find_factors(site)
        h, z = layer_kernels.prepare(x, prologue, factors)
        calls["prepare"].append(partial(layer_kernels.prepare, x, prologue, factors))
        calls["project"].append(partial(layer_kernels.project, h, linear, factors, z))
        calls["plain"].append(partial(adapters.project, site, linear, prologue, x[:, None]))
        calls["frozen weight"].append(partial(linear, h))
    return calls


def measure_blocks(
    name: str, actions: list[Callable[[], object]], settings: tuple[str, ...], variants: tuple[tuple[int, ...], ...]
) -> Figures:
    """Microseconds of a call with other values of some constants of `layer_kernels`, which are put back."""
    from lora_gpt2.model import layer_kernels

    chosen, found = {setting: getattr(layer_kernels, setting) for setting in settings}, dict[str, Any]()
    for variant in variants:
        for setting, value in zip(settings, variant, strict=True):
            setattr(layer_kernels, setting, value)
        found[f"{name} {variant}"] = time_all(actions)
    for setting, value in chosen.items():
        setattr(layer_kernels, setting, value)
    return found


def time_all(actions: list[Callable[[], object]]) -> float:
    """Returns the microseconds of one of some calls, which are captured one after another."""
    return round(time_captured(lambda: [action() for action in actions], 1) / len(actions), 2)


def serve_rows(size: str = "S", tokens: int = 64, plain: bool = False) -> Figures:
    """Tokens per second of 1, 8 and 32 rows of one and of eight adapters, greedy and with default sampling.

    `plain` does without the kernels of the decode step.
    """
    from lora_gpt2.bench import decoding
    from lora_gpt2.inference.engine import Engine
    from lora_gpt2.inference.mix import Mix
    from lora_gpt2.inference.sequence import SequenceState
    from lora_gpt2.model import decode_step
    from lora_gpt2.recipe import GenerateSettings

    if plain:
        decode_step.MAX_ROWS = 0
    session = open_session(size)
    base, prompt = session.base, decoding._build_prompt(session.base.config.vocab_size)
    found: Figures = {"kernels": decode_step.can_use_kernels(base.model, 8)}
    for kind, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        settings = GenerateSettings(
            temperature=temperature,
            max_new_tokens=tokens,
            logit_bias={base.config.eos_id: -100.0} if temperature == 0 else {},
        )
        for num_rows, num_adapters in ((1, 1), (8, 1), (8, 8), (32, 8)):
            engine = Engine(session, num_rows, len(prompt) + tokens)
            rates = []
            for _ in range(3):  # the first captures
                rows = [
                    SequenceState(
                        index=k,
                        mix=Mix.single(str(k % num_adapters)),
                        prompt_ids=prompt,
                        max_new_tokens=tokens,
                        settings=settings,
                        seed=k,
                        tokenizer=base.tokenizer,
                    )
                    for k in range(num_rows)
                ]
                for row in rows:
                    engine.submit(row)
                started = time.perf_counter()
                while engine.is_busy:
                    engine.step()
                rates.append(sum(len(row.new_ids) for row in rows) / (time.perf_counter() - started))
            found[f"{kind}, {num_rows} rows of {num_adapters}"] = [round(rate, 1) for rate in rates]
    return found


def profile_training(size: str = "S", rows: int = 8, length: int = 1024) -> Figures:
    """Where a replayed training step's time goes: device microseconds by kernel, and the gaps."""
    from torch.profiler import ProfilerActivity, profile

    trainer, _ = build_trainer(size, rows * length, length)
    for _ in range(6):
        trainer.run_step([0])
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        started = time.perf_counter()
        trainer.run_step([0])
        wall = time.perf_counter() - started
    return summarise_profile(record, wall)


def profile_decoding(size: str = "S", num_rows: int = 8) -> Figures:
    """Where a decode step's time goes, host and device: eight rows of eight adapters, default sampling."""
    from torch.profiler import ProfilerActivity, profile

    from lora_gpt2.bench import decoding
    from lora_gpt2.inference.engine import Engine
    from lora_gpt2.inference.mix import Mix
    from lora_gpt2.inference.sequence import SequenceState
    from lora_gpt2.recipe import GenerateSettings

    session = open_session(size)
    base = session.base
    engine = Engine(session, num_rows, 128)
    for k in range(num_rows):
        engine.submit(
            SequenceState(
                index=k,
                mix=Mix.single(str(k % 8)),
                prompt_ids=decoding._build_prompt(base.config.vocab_size),
                max_new_tokens=90,
                settings=GenerateSettings(max_new_tokens=90),
                seed=k,
                tokenizer=base.tokenizer,
            )
        )
    for _ in range(8):
        engine.step()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        started = time.perf_counter()
        for _ in range(4):
            engine.step()
        wall = (time.perf_counter() - started) / 4
    return summarise_profile(record, wall)


def summarise_profile(record: Any, wall: float) -> Figures:
    """Returns the largest rows of a profile by device time and by host time, in microseconds."""
    rows = record.key_averages()
    device = sorted(((getattr(e, "self_device_time_total", 0), e.count, e.key[:70]) for e in rows), reverse=True)
    host = sorted(((e.self_cpu_time_total, e.count, e.key[:50]) for e in rows), reverse=True)
    kernels = [row for row in device if row[0] > 0]
    return {
        "wall_us": 1e6 * wall,
        "device_us": sum(row[0] for row in kernels),
        "kernels": sum(row[1] for row in kernels),
        "by_device": kernels[:24],
        "by_host": host[:10],
    }


def compare_searches(size: str = "S", steps: int = 400) -> Figures:
    """Seconds of one run, of one with a budget of forgetting, and of a search among 8, by the command line."""
    work = WORK / "searches"
    work.mkdir(parents=True, exist_ok=True)
    pages = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("lora_gpt2/**/*.py")])
    (work / "text.txt").write_text("\n\n".join(page.read_text(encoding="utf-8") for page in pages), encoding="utf-8")
    shared = [str(work / "text.txt"), "--base", str(build_base(size)), "--store", str(work / "store")]
    shared += ["--steps", str(steps), "--set", "train.sample_tokens=0"]
    found: Figures = {}
    runs = {
        "warm-up": ["train", "--name", "warm", "--steps", "20"],
        "one": ["train", "--name", "one"],
        "one, forget 0.1": [
            "train",
            "--name",
            "kept",
            "--set",
            "train.forget=0.1",
            "--set",
            "train.replay_tokens=8192",
        ],
        "tune 8": ["tune", "--name", "best", "--candidates", "8"],
    }
    for name, (command, *options) in runs.items():
        started = time.perf_counter()
        call = [sys.executable, "-m", "lora_gpt2", command, *shared, *options]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        found[name] = round(time.perf_counter() - started, 2)
        if done.returncode:
            found[f"{name}: error"] = done.stderr[-1500:]
    metrics = {path.parent.parent.name: path for path in work.glob("store/**/metrics.jsonl")}
    for name, path in metrics.items():
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found[f"{name}: last line"] = lines[-1]
    return found


@dataclass(frozen=True)
class Step:
    """A step of the visit: its function, arguments, and limit in seconds."""

    name: str
    function: Callable[..., Figures]
    limit: float
    arguments: dict[str, Any] = field(default_factory=dict)


STEPS = [  # the most valuable first
    Step("environment", measure_environment, 40),
    Step("tests", run_tests, 130),
    Step("replayed S", compare_replayed_training, 45),
    Step("replayed decode S", compare_replayed_decoding, 60),
    Step("train S", compare_training, 80),
    Step("profile train S", profile_training, 45),
    Step("layers S", measure_layers, 90),
    Step("rows S", serve_rows, 60),
    Step("rows S plain", serve_rows, 60, {"plain": True}),
    Step("profile decode S", profile_decoding, 45),
    Step("decode S", compare_decoding, 80),
    Step("memory XL 6 GB", measure_memory, 60, {"size": "XL", "tokens": 1024, "budget": 6e9}),
    Step("train XL", compare_training, 110, {"size": "XL", "steps": 8}),
    Step("memory S", measure_memory, 40),
    Step("memory XL", measure_memory, 50, {"size": "XL", "tokens": 4096}),
    Step("train S together", compare_training, 60, {"rows": 1, "slots": 8, "sides": "ours,ours together"}),
    Step("decode S ours", compare_decoding, 80, {"sides": "ours"}),
    Step("decode XL", compare_decoding, 110, {"size": "XL", "sides": "ours"}),
    Step("layers XL", measure_layers, 90, {"size": "XL"}),
    Step("rows XL", serve_rows, 60, {"size": "XL"}),
    Step("rows XL plain", serve_rows, 60, {"size": "XL", "plain": True}),
    Step("profile train XL", profile_training, 60, {"size": "XL"}),
    Step("train S int8", compare_training, 60, {"quantize": "int8", "sides": "ours"}),
    Step("train S nf4", compare_training, 60, {"quantize": "nf4", "sides": "ours"}),
    Step(
        "memory XL int8",
        measure_memory,
        50,
        {"size": "XL", "tokens": 1024, "quantize": "int8", "checkpointing": True, "budget": 4e9},
    ),
    Step("searches S", compare_searches, 150),
    Step("memory XL nf4", measure_memory, 50, {"size": "XL", "tokens": 1024, "quantize": "nf4", "checkpointing": True}),
]
DRY = {"size": "T", "tokens": 256, "rows": 2, "length": 128, "steps": 3, "budget": 2e9, "num_rows": 2}


def run_step(name: str, dry: bool) -> None:
    """Runs one step in this process and prints its figures as the last line."""
    step = next(each for each in STEPS if each.name == name)
    arguments = dict(step.arguments)
    if dry:
        known = inspect.signature(step.function).parameters
        arguments |= {
            key: value for key, value in DRY.items() if key in known and (key != "budget" or key in arguments)
        }
        if step.function in (compare_decoding, serve_rows):
            arguments["tokens"] = 8
    print(json.dumps(step.function(**arguments)))


def run_process(command: list[str], limit: float, environment: dict[str, str]) -> Figures:
    """Returns the figures that a process prints last, or its error."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, check=False, env=environment, cwd=ROOT
        )
    except subprocess.TimeoutExpired:
        return {"error": f"over its {limit:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"error": done.stderr[-3000:]}
    try:
        found: Figures = json.loads(lines[-1])
    except json.JSONDecodeError as error:
        return {"error": f"{error}: {lines[-1][:500]}"}
    return found


def main() -> None:
    """Runs the steps, each in a process of its own, until the deadline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deadline", type=float, default=540, help="seconds for everything")
    parser.add_argument("--only", default="", help="names of steps, separated by commas")
    parser.add_argument("--dry", action="store_true", help="tiny shapes")
    parser.add_argument("--step", default="", help="run this one in this process")
    given = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    WORK.mkdir(parents=True, exist_ok=True)
    if given.step:
        run_step(given.step, given.dry)
        return
    began, results = time.monotonic(), dict[str, Figures]()
    wanted = given.only.split(",") if given.only else [step.name for step in STEPS]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    for step in sorted((each for each in STEPS if each.name in wanted), key=lambda each: wanted.index(each.name)):
        left = given.deadline - (time.monotonic() - began)
        if left < 15:
            break
        started, limit = time.monotonic(), min(step.limit, left)
        command = [sys.executable, __file__, "--step", step.name, *["--dry"] * given.dry]
        found = run_process(command, limit, environment)
        if "error" in found and "LORA_GPT2_TRITON" not in environment:
            again = run_process(command, limit, environment | {"LORA_GPT2_TRITON": "0"})
            found = again | {"error with Triton": found["error"]}
        results[step.name] = found | {"seconds": round(time.monotonic() - started, 1)}
        (OUT / "results.json").write_text(json.dumps(results, indent=1))
        print(f"{step.name:16s} {results[step.name]['seconds']:6.1f} s  {json.dumps(found)[:600]}", flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
