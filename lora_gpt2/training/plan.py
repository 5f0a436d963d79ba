"""Before a run: what it will take, how long, and the fastest settings that fit.

Memory is computed (`memory.py`); speed is measured, by a warm-up and two steps on random tokens with the very code
that trains.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import LoraGpt2Error, ResourceError
from lora_gpt2.data.blocks import TokenBlocks
from lora_gpt2.data.prepared import PreparedData, prepare_data
from lora_gpt2.model.base import Base, load_base
from lora_gpt2.model.checkpoint import Checkpoint
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.runtime import Runtime, choose_runtime
from lora_gpt2.recipe import Recipe
from lora_gpt2.store.catalog import Store
from lora_gpt2.training.memory import (
    CUDA_CONTEXT,
    Memory,
    estimate_memory,
    fit_recipes,
    format_changes,
    list_changes,
    list_concurrent,
    measure_budget,
)
from lora_gpt2.training.process_group import init_process_group
from lora_gpt2.training.slot import TrainingSlot, check_together
from lora_gpt2.training.start import inherit_shape
from lora_gpt2.training.step import WARM_UP
from lora_gpt2.training.trainer import Trainer

PROBE_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run that has not begun: `recipes` as they would be trained, `num_slots` at a time, after `changes` to fit.

    `tokens_per_second` and `seconds` are None without a probe, `tokens` also where the amount of text is unknown.
    `left_out` are adapters of a queue whose text cannot be read, and why.
    """

    fits: bool
    memory: Memory
    budget_bytes: int
    device: str
    dtype: str
    recipes: list[Recipe]
    num_slots: int
    changes: dict[str, object]
    tokens: int | None
    tokens_per_second: float | None
    left_out: dict[str, str]

    @property
    def seconds(self) -> float | None:
        """Time for the training steps alone."""
        return self.tokens / self.tokens_per_second if self.tokens and self.tokens_per_second else None


def plan_run(
    recipes: Sequence[Recipe],
    store: Store,
    reporter: Reporter,
    budget: int | None = None,
    probe: bool = True,
    *,
    num_slots: int | None = None,
) -> Plan:
    """Returns what training these recipes will take; `budget` in bytes, None for the device's memory.

    They train together, or take turns in `num_slots` slots; see `memory.list_concurrent`.
    """
    check_together(recipes)
    data, left_out = _prepare(recipes, reporter, leaves_out=num_slots is not None)
    recipes = [inherit_shape(recipe, store) for recipe in recipes if recipe.name not in left_out]
    config, runtime = read_shape(recipes[0])
    limit = measure_budget(runtime.device) if budget is None else budget
    fitting = fit_recipes(config, recipes, runtime, limit, num_slots)
    chosen = list(recipes) if fitting is None else fitting
    running = list_concurrent(config, chosen, runtime, limit, num_slots)
    speed = measure_speed(running, runtime, reporter) if probe and fitting is not None else None
    tokens = None
    if data or all(recipe.train.steps for recipe in chosen):
        blocks = data or [build_random_data(recipe, config.vocab_size) for recipe in chosen]
        slots = [TrainingSlot(recipe=recipe, data=each) for recipe, each in zip(chosen, blocks, strict=True)]
        tokens = sum(slot.num_steps * slot.tokens_per_step for slot in slots)
    return Plan(
        fits=fitting is not None,
        memory=estimate_memory(config, running, runtime, chosen, take_turns=len(running) < len(chosen)),
        budget_bytes=limit,
        device=runtime.device.type,
        dtype=runtime.dtype_name,
        recipes=chosen,
        num_slots=len(running),
        changes=list_changes(recipes, chosen),
        tokens=tokens,
        tokens_per_second=speed,
        left_out=left_out,
    )


def fit_to_memory(
    recipes: Sequence[Recipe], store: Store, budget: int | None, reporter: Reporter, num_slots: int | None = None
) -> tuple[list[Recipe], int | None]:
    """Returns the recipes with the fastest settings that fit, and the slots they take turns in (None: all together).

    On a GPU, `budget` also becomes a limit that holds. Raises `ResourceError` if nothing fits.
    """
    check_together(recipes)
    config, runtime = read_shape(recipes[0])
    limit = measure_budget(runtime.device) if budget is None else budget
    shaped = [inherit_shape(recipe, store) for recipe in recipes]
    fitting = fit_recipes(config, shaped, runtime, limit, num_slots)
    running = list_concurrent(config, fitting or shaped, runtime, limit, num_slots)
    if fitting is None:
        raise ResourceError(
            f"nothing fits into {limit / 1e9:.2f} GB: this run needs "
            f"{estimate_memory(config, running, runtime, shaped).peak / 1e9:.2f} GB",
            "use a smaller base or data.block_size",
        )
    if changes := list_changes(shaped, fitting):
        reporter.message(f"to fit into {limit / 1e9:.2f} GB: {format_changes(changes)}")
    if budget is not None and runtime.device.type == "cuda":
        index = torch.cuda.current_device() if runtime.device.index is None else runtime.device.index
        total = torch.cuda.mem_get_info(index)[1]
        share = min(1.0, max(0, budget - CUDA_CONTEXT) / total)  # the context is not the allocator's
        torch.cuda.set_per_process_memory_fraction(share, index)
    pairs = zip(recipes, fitting, strict=True)
    fitted = [recipe.model_copy(update={"train": changed.train}) for recipe, changed in pairs]
    return fitted, None if num_slots is None else len(running)


def read_shape(recipe: Recipe) -> tuple[GPT2Config, Runtime]:
    """Returns the shape of a recipe's base and where it would be trained, without reading its weights."""
    runtime = choose_runtime(recipe.train.dtype, init_process_group().device)
    return Checkpoint.open(recipe.base).config, runtime


def _prepare(
    recipes: Sequence[Recipe], reporter: Reporter, *, leaves_out: bool
) -> tuple[list[PreparedData], dict[str, str]]:
    """Returns the text of each recipe, none if some have no sources; and by name why a queue leaves others out.

    Raises what `prepare_data` does where none is left out, or no other is left.
    """
    prepared, left_out = list[PreparedData](), dict[str, str]()
    if not all(recipe.data.sources for recipe in recipes):
        return prepared, left_out
    tokenizer = Checkpoint.open(recipes[0].base).load_tokenizer()
    for recipe in recipes:
        try:
            prepared.append(prepare_data(recipe.data, tokenizer, reporter))
        except LoraGpt2Error as error:
            left_out[recipe.name] = error.message
            if not leaves_out or len(left_out) == len(recipes):
                raise
            reporter.message(f"{recipe.name} is left out: {error.message}")
    return prepared, left_out


def measure_speed(recipes: Sequence[Recipe], runtime: Runtime, reporter: Reporter) -> float:
    """Returns tokens per second over all slots; text that is replayed takes its time, and does not count."""
    base: Base = load_base(recipes[0].base, runtime, recipes[0].train.quantize)
    warm_up = WARM_UP + 1 if runtime.device.type == "cuda" else 1
    num_steps = warm_up + PROBE_STEPS
    short = [r.model_copy(update={"train": r.train.model_copy(update={"steps": num_steps})}) for r in recipes]
    slots = [TrainingSlot(recipe=r, data=build_random_data(r, base.config.vocab_size)) for r in short]
    trainer = Trainer(base, slots, reporter)
    with reporter.task("probing", num_steps, "steps") as task:
        for step in range(num_steps):
            if step == warm_up:
                started = time.monotonic()
            trainer.run_step(list(range(len(slots))))
            task.advance(1)
    tokens = sum(slot.tokens_per_step for slot in slots)
    work = sum(r.blocks_per_step for r in recipes) / sum(r.blocks_per_step + r.replayed_per_step for r in recipes)
    return work * PROBE_STEPS * tokens / (time.monotonic() - started)


def build_random_data(recipe: Recipe, vocab_size: int) -> PreparedData:
    """Returns random tokens, enough for one step, in the place of text."""
    tokens = (recipe.blocks_per_step + 1) * recipe.data.block_size
    stream = np.random.default_rng(0).integers(0, vocab_size, tokens + 1).astype(np.uint32)
    size = recipe.data.block_size
    bounds = np.arange(0, len(stream) + 1, size + 1) if recipe.data.layout == "packed" else None
    rows = None if bounds is None else np.arange(len(bounds))
    blocks = TokenBlocks(stream=stream, block_size=size, loss=None, sequence_offsets=bounds, block_offsets=rows)
    return PreparedData(path=Path(), fingerprint="", train=blocks, validation=blocks, test=blocks, report={})
