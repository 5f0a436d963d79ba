"""How much memory a training run takes, part by part, computed from the shapes of GPT-2.

What autograd keeps is known exactly (`model/fused.py`): per token and block the input of each norm, q, k and v, the
attention's output and the MLP's inner values, ten widths in all, and the rank-wide products. The peak is the larger of
two moments: the loss (one chunk of logits beside everything kept) and the backward pass through the last MLP (the
residual's gradient, and the inner one before and after GELU). Checked against the allocator's own count in the tests.
Figures in bytes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_gpt2.core.errors import ResourceError
from lora_gpt2.core.memory import is_out_of_memory, return_large_blocks
from lora_gpt2.model.base import Base
from lora_gpt2.model.config import HEAD, GPT2Config
from lora_gpt2.model.gelu import BUFFER_BYTES, PIECE
from lora_gpt2.model.lora import build_ranks, layer_of, merge_ranks, plan_targets, target_of
from lora_gpt2.model.loss import measure_chunk, tokens_per_chunk
from lora_gpt2.model.quantize import bytes_per_weight
from lora_gpt2.model.runtime import Runtime
from lora_gpt2.recipe import Recipe
from lora_gpt2.training.slot import group_recipes

KEPT_WIDTHS = 6  # x 1, q k v 3, attention 1, x' 1, per token and block, besides the MLP's inner values
END_WIDTHS = 4  # the embeddings, the last block's output, the normed output and its gradient ...
FORWARD_WIDTHS = 6  # of a block that keeps nothing: the residual stream, the norm's output, q k v and the attention's
FREED_WIDTHS = 3  # ... of which three are gone when the backward pass reaches the last MLP
COMPARED = 3  # the base's log-probabilities, their ratio to the adapter's, and what is summed or exponentiated
BUFFERS = 5  # an adapter, its gradient, AdamW's two moments and the best so far, in float32
CGROUP = Path("/sys/fs/cgroup")
CUDA_CONTEXT = 900_000_000  # what CUDA and the code of its libraries take besides the allocator: 0.89 GB on an H100
CUBLAS_WORKSPACES = 4 * 2**25  # 32 MiB for each of two streams (see `graphs.py`), forward and backward
CPU_RESERVE, FRAGMENTATION = 420_000_000, 0.05
TURNS_FRAGMENTATION = 0.4
"""Of what a CPU run has besides the weights, once adapters have taken turns: publishing leaves gaps in the C heap."""
MOST_SLOTS = 8
"""Slots of a queue where memory has room for more: beyond it a step takes longer, but no token gets cheaper."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The parts of a run's peak, in bytes; `reserve` is the runtime's own and what allocators waste."""

    weights: int
    adapters: int
    activations: int
    loss: int
    reserve: int

    @property
    def peak(self) -> int:
        """All of it."""
        return self.weights + self.adapters + self.activations + self.loss + self.reserve


def estimate_memory(
    config: GPT2Config,
    recipes: Sequence[Recipe],
    runtime: Runtime,
    waiting: Sequence[Recipe] = (),
    *,
    averages: bool = False,
    take_turns: bool = False,
) -> Memory:
    """Returns the memory of training these recipes together on a base of this shape.

    Their rows of the bank are as large as those which `waiting` for them need. `averages`: of weights are kept too.
    `take_turns`: some of `waiting` get their slots while the run goes on.
    """
    settings, item, known = recipes[0].train, runtime.dtype.itemsize, [*recipes, *waiting]
    shapes = {recipe.lora.model_dump_json(): recipe.lora for recipe in known}
    ranks = merge_ranks(build_ranks(config, lora) for lora in shapes.values())
    parameters = len(recipes) * sum(r * sum(config.shape_of(target_of(site))) for site, r in ranks.items())
    copies = item if item != 4 else 0
    buffers = BUFFERS + averages + any(r.train.loraplus_lr_ratio > 1 for r in known)
    buffers += any(plan.blocks or plan.frozen_rank for r in known for plan in plan_targets(config, r.lora))
    largest = (0, 0)
    for group in _iter_groups(recipes):
        tokens = count_micro_batch_tokens(group)
        kept, backward = _measure_token(config, group[0], ranks, runtime)
        noise = 4 * config.n_embd * tokens if group[0].train.neftune_noise_alpha else 0
        if group[0].data.layout == "packed":
            noise += tokens * group[0].data.block_size * item  # what hides other documents from each
        chunk = _measure_chunk(config, tokens, runtime)
        passing = _measure_passing(config, group[0], ranks, tokens, runtime)
        chunk += ranks.get(HEAD, 0) * config.vocab_size * (4 * len(group) + item)  # the gradient of its update
        largest = max(largest, (tokens * kept + noise, max(chunk, tokens * backward + passing)), key=sum)
        if rows := max(recipe.replayed_per_step for recipe in group):
            replayed = count_micro_batch_tokens(group, rows)
            chunk += _measure_comparison(config, replayed, runtime)
            reference = replayed * config.n_embd * item
            passing = _measure_passing(config, group[0], ranks, replayed, runtime)
            largest = max(largest, (replayed * kept + reference, max(chunk, replayed * backward + passing)), key=sum)
    kept_text = max(r.train.replay_tokens if r.replayed_per_step else 0 for r in recipes)
    is_shared = runtime.device.type != "cuda"  # a GPU leaves it to the host
    parts = {
        "weights": _count_weights(config, settings.quantize, item) + is_shared * kept_text * config.n_embd * item,
        "adapters": parameters * (4 * buffers + copies),
        "activations": largest[0],
        "loss": largest[1],
    }
    reserve = CPU_RESERVE
    if take_turns:
        reserve += int(TURNS_FRAGMENTATION * (sum(parts.values()) - parts["weights"]))
    if runtime.device.type == "cuda":
        reserve = CUDA_CONTEXT + CUBLAS_WORKSPACES + int(FRAGMENTATION * sum(parts.values()))
        reserve += _measure_validation(config, recipes, runtime)
    return Memory(**parts, reserve=reserve)


def _measure_validation(config: GPT2Config, recipes: Sequence[Recipe], runtime: Runtime) -> int:
    """Returns the bytes of a forward pass: it has memory of its own beside what a CUDA graph of the step keeps."""
    tokens, item = max(recipe.train.micro_batch_tokens for recipe in recipes), runtime.dtype.itemsize
    inner = tokens * (2 * config.n_inner + FORWARD_WIDTHS * config.n_embd) * item
    return inner + _measure_chunk(config, tokens, runtime)


def _measure_chunk(config: GPT2Config, tokens: int, runtime: Runtime) -> int:
    """Returns the bytes of the logits that exist at the same time."""
    return measure_chunk(tokens, config.vocab_size, runtime.device, runtime.dtype.itemsize)


def _measure_comparison(config: GPT2Config, tokens: int, runtime: Runtime) -> int:
    """Returns the bytes that the divergence of a chunk takes beside its logits: those of the base, and in float32."""
    size, item = min(tokens_per_chunk(runtime.device), tokens), runtime.dtype.itemsize
    return size * config.vocab_size * (COMPARED * 4 + (item + 4 if item != 4 else 0))


def _iter_groups(recipes: Sequence[Recipe]) -> Iterator[list[Recipe]]:
    for indices in group_recipes(recipes):
        yield [recipes[index] for index in indices]


def _measure_token(config: GPT2Config, recipe: Recipe, ranks: dict[str, int], runtime: Runtime) -> tuple[int, int]:
    """Returns the bytes kept per token when the loss is computed, and what the backward pass adds at its peak."""
    item = runtime.dtype.itemsize
    width, inner = config.n_embd * item, config.n_inner * item
    live = config.n_layer - min(
        (layer for site in ranks if (layer := layer_of(site)) is not None), default=config.n_layer
    )
    products = sum(ranks.values()) * item
    normaliser = 0 if runtime.device.type == "cpu" else 4 * config.n_head  # the attention's, in float32
    block = KEPT_WIDTHS * width + inner + normaliser
    backward = width + 2 * inner - FREED_WIDTHS * width
    if recipe.train.gradient_checkpointing:
        return (live + END_WIDTHS) * width, backward + block - width + products // config.n_layer
    return live * block + products + END_WIDTHS * width, backward


def _measure_passing(config: GPT2Config, recipe: Recipe, ranks: dict[str, int], tokens: int, runtime: Runtime) -> int:
    """Returns what the backward pass through the last MLP takes besides, at the larger of two moments.

    While GELU is computed again, its buffers (on a CPU); after it, a quantized weight in full, and with dropout the
    mask and a product with it.
    """
    gelu = 0
    if runtime.device.type == "cpu" and any(target_of(site) == "mlp.c_proj" for site in ranks):
        gelu = BUFFER_BYTES * min(PIECE, tokens * config.n_inner)
    item = runtime.dtype.itemsize
    dense = config.n_embd * config.n_inner * (item + 2) if recipe.train.quantize != "none" else 0
    return max(gelu, dense + (2 * tokens * config.n_inner * item if recipe.lora.dropout else 0))


def count_micro_batch_tokens(recipes: Sequence[Recipe], rows: int = 0) -> int:
    """Returns the most tokens of a micro-batch of recipes that train together, also when some of them have stopped.

    `rows` is the number of blocks of each in a step; 0 for those that they train on.
    """
    size = recipes[0].data.block_size
    limit = min(recipe.train.micro_batch_tokens for recipe in recipes)
    rows = rows or max(recipe.blocks_per_step for recipe in recipes)
    return max(k * min(rows, max(1, limit // size // k)) * size for k in range(1, len(recipes) + 1))


def _count_weights(config: GPT2Config, quantize: str, item: int) -> int:
    d, inner = config.n_embd, config.n_inner
    projections = config.n_layer * (4 * d * d + 2 * d * inner)
    others = config.n_layer * (9 * d + inner) + 2 * d  # norms and biases
    embeddings = (config.vocab_size * (1 if config.tie_word_embeddings else 2) + config.n_positions) * d
    return int(projections * bytes_per_weight(quantize, item) + (others + embeddings) * item)


def measure_budget(device: torch.device) -> int:
    """Returns the memory that a run may take on this device: what is free, within the limit of a container.

    On `mps` that is the computer's memory, which the GPU shares.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    import psutil

    available = int(psutil.virtual_memory().available)
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no such file, or "max"
        return available
    return min(available, limit - used)


def list_concurrent(
    config: GPT2Config, recipes: Sequence[Recipe], runtime: Runtime, budget: int, num_slots: int | None
) -> list[Recipe]:
    """Returns, of recipes that take turns in `num_slots` slots, those whose training at the same time takes the most.

    With 0 slots: as many as fit into `budget` bytes, at least one. None: all train at the same time.
    """
    if num_slots is None:
        return list(recipes)
    peaks = [estimate_memory(config, [recipe], runtime).peak for recipe in recipes]
    order = sorted(range(len(recipes)), key=lambda index: peaks[index], reverse=True)
    groups = [order, *([index for index in order if index in group] for group in map(set, group_recipes(recipes)))]

    def measure(running: Sequence[Recipe], count: int) -> int:
        return estimate_memory(config, running, runtime, recipes, take_turns=count < len(recipes)).peak

    def choose(count: int) -> list[Recipe]:
        chosen = ([recipes[index] for index in group[:count]] for group in groups)
        return max(chosen, key=lambda running: measure(running, count))

    if num_slots:
        return choose(num_slots)
    fitting = [
        count for count in range(2, min(MOST_SLOTS, len(recipes)) + 1) if measure(choose(count), count) <= budget
    ]
    return choose(max(fitting, default=1))


def count_fitting(config: GPT2Config, recipes: Sequence[Recipe], runtime: Runtime, budget: int) -> int:
    """Returns how many of the candidates of a search can train at the same time within `budget` bytes, at least one."""
    for count in range(len(recipes), 1, -1):
        running = list_concurrent(config, recipes, runtime, budget, count)
        if estimate_memory(config, running, runtime, recipes, averages=True).peak <= budget:
            return count
    return 1


def fit_recipes(
    config: GPT2Config, recipes: Sequence[Recipe], runtime: Runtime, budget: int, num_slots: int | None = None
) -> list[Recipe] | None:
    """Returns the recipes with the fastest settings whose peak is within `budget` bytes, or None if none is.

    They train together, or take turns in `num_slots` slots; see `list_concurrent`. As they are, if that fits; else,
    the dearest last: smaller passes down to 2,048 tokens, gradient checkpointing, smaller passes still, an int8 base,
    an nf4 base. None of it changes a result by more than rounding, but the bases.
    """
    for changed in _iter_changes(recipes):
        running = list_concurrent(config, changed, runtime, budget, num_slots)
        turns = num_slots is not None and len(running) < len(changed)
        if estimate_memory(config, running, runtime, changed, take_turns=turns).peak <= budget:
            return changed
    return None


def _iter_changes(recipes: Sequence[Recipe]) -> Iterator[list[Recipe]]:
    yield list(recipes)
    asked, size = recipes[0].train.quantize, recipes[0].data.block_size
    sizes = [max(map(count_micro_batch_tokens, _iter_groups(recipes)))]
    while sizes[-1] > size:
        sizes.append(max(size, sizes[-1] // 2 // size * size))
    large = [s for s in sizes if s >= 2048] or sizes[:1]
    kinds = ["none", "int8", "nf4"] if importlib.util.find_spec("bitsandbytes") else [asked]
    for quantize in kinds[kinds.index(asked) :]:
        for checkpointing, some in ((False, large), (True, large), (False, sizes), (True, sizes)):
            for tokens in some:
                yield [_change(recipe, tokens, checkpointing, quantize) for recipe in recipes]


def _change(recipe: Recipe, tokens: int, checkpointing: bool, quantize: str) -> Recipe:
    train = recipe.train
    update = {
        "micro_batch_tokens": tokens if tokens < train.micro_batch_tokens else train.micro_batch_tokens,
        "gradient_checkpointing": train.gradient_checkpointing or checkpointing,
        "quantize": quantize,
    }
    return recipe.model_copy(update={"train": train.model_copy(update=update)})


def list_changes(before: Sequence[Recipe], after: Sequence[Recipe]) -> dict[str, object]:
    """Returns the settings that differ, by dotted key; where recipes had different ones, the last that changed."""
    changes: dict[str, object] = {}
    for old, new in zip(before, after, strict=True):
        found = new.train.model_dump()
        changes |= {f"train.{key}": found[key] for key, value in old.train.model_dump().items() if found[key] != value}
    return changes


def format_changes(changes: dict[str, object]) -> str:
    """Returns settings as they are typed."""
    return " ".join(f"--set {key}={str(value).lower()}" for key, value in changes.items())


@contextmanager
def wrap_oom_errors(base: Base, recipes: Sequence[Recipe]) -> Iterator[None]:
    """Turns running out of memory into a `ResourceError` that names settings which need clearly less."""
    if any(recipe.train.gradient_checkpointing for recipe in recipes):
        return_large_blocks()
    try:
        yield
    except BaseException as error:  # a panic of Rust is no Exception
        if not is_out_of_memory(error):
            raise
        needed = estimate_memory(base.config, recipes, base.runtime)
        within = needed.reserve + int(0.7 * (needed.peak - needed.reserve))
        smaller = fit_recipes(base.config, recipes, base.runtime, within)
        hint = "go on with --resume where there is more memory, or use a smaller lora.rank or base"
        if smaller is not None:
            hint = f"go on with --resume {format_changes(list_changes(recipes, smaller))}; see 'lora-gpt2 plan'"
        raise ResourceError(
            f"out of memory: this run needs about {needed.peak / 1e9:.2f} GB on {base.runtime.device.type}", hint
        ) from error
