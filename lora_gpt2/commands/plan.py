"""`lora-gpt2 plan`: what a run will take, before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_gpt2.commands.settings import setting_options
from lora_gpt2.commands.shared import (
    base_option,
    data_option,
    emit,
    end_as_failed,
    format_bytes,
    format_seconds,
    from_option,
    items_argument,
    json_option,
    list_training,
    memory_option,
    queue_options,
    set_option,
    store_option,
    suggest_next,
)
from lora_gpt2.core.console import Reporter
from lora_gpt2.core.synonyms import ARGUMENTS
from lora_gpt2.core.tables import format_table
from lora_gpt2.recipe_files import load_recipe
from lora_gpt2.store.catalog import Store

if TYPE_CHECKING:
    from lora_gpt2.training.plan import Plan


@click.command("plan")
@items_argument
@data_option
@base_option
@from_option
@queue_options
@memory_option
@click.option("--probe/--no-probe", default=True, help="Time two steps on random tokens.  [default: probe]")
@setting_options("train")
@set_option
@store_option
@json_option
@click.pass_obj
def command(
    reporter: Reporter,
    items: tuple[str, ...],
    data: tuple[str, ...],
    base: str | None,
    init_from: str | None,
    queue: tuple[Path | None, int | None],
    gpu_memory: int | None,
    probe: bool,
    flags: dict[str, Any],
    overrides: tuple[str, ...],
    store: Store,
    as_json: bool,
) -> None:
    """Say how much memory and time training will take, and the fastest settings that fit.

    \b
    Examples:
      lora-gpt2 plan my_texts/ --epochs 5
      lora-gpt2 plan notebook.yaml --gpu-memory 6GB
      lora-gpt2 plan a.yaml b.yaml c.yaml         together, over one base
      lora-gpt2 plan --all domains/               a few at a time, as 'train --all' does
    """
    from lora_gpt2.training.plan import plan_run

    found, num_slots = list_training(items, data, None, queue, reporter)
    chosen = [
        load_recipe(
            item.recipe,
            overrides,
            {**flags, "base": base, "lora.init_from": init_from, **item.flags},
        )
        for item in found
    ]
    plan = plan_run(chosen, store, reporter, gpu_memory, probe, num_slots=num_slots)
    show_plan(plan, as_json)
    typed = click.get_current_context().meta[ARGUMENTS]
    same = [word for word in typed[typed.index("plan") + 1 :] if word not in ("--probe", "--no-probe", "--json")]
    suggest_next(reporter, "train", *same, *(["--fit"] if plan.changes else []))


def show_plan(plan: Plan, as_json: bool) -> None:
    """Writes a plan on stdout; ends the command as failed if it does not fit."""
    emit(_to_json(plan), as_json, lambda: _render(plan))
    if not plan.fits:
        end_as_failed("it does not fit", "use a smaller base, or a GPU with more memory", as_json)


def _to_json(plan: Plan) -> dict[str, Any]:
    return {
        "fits": plan.fits,
        "peak_bytes": plan.memory.peak,
        "parts": vars(plan.memory),
        "settings": plan.changes,
        "adapters": len(plan.recipes),
        "left_out": plan.left_out,
        "slots": plan.num_slots,
        "budget_bytes": plan.budget_bytes,
        "device": plan.device,
        "dtype": plan.dtype,
        "tokens": plan.tokens,
        "tokens_per_second": plan.tokens_per_second,
        "seconds": plan.seconds,
    }


def _render(plan: Plan) -> str:
    meaning = {
        "weights": "the frozen base",
        "adapters": "adapters, gradients, AdamW, best so far",
        "activations": "kept for the backward pass",
        "loss": "logits of one chunk, or the last backward pass",
        "reserve": "runtime and allocator",
    }
    rows = [[f"{part} ({meaning[part]})", format_bytes(size)] for part, size in vars(plan.memory).items()]
    verdict = "fits" if plan.fits else "does NOT fit"
    rows.append([f"peak on {plan.device} in {plan.dtype}: {verdict} into", format_bytes(plan.budget_bytes)])
    rows.insert(-1, ["peak", format_bytes(plan.memory.peak)])
    lines = [format_table(["memory", ""], rows)]
    if plan.num_slots < len(plan.recipes):
        lines.append(f"slots  {plan.num_slots} for {len(plan.recipes)} adapters, which take turns")
    if plan.changes:
        lines.append("with " + " ".join(f"--set {key}={str(value).lower()}" for key, value in plan.changes.items()))
    if plan.tokens_per_second:
        lines.append(f"speed  {plan.tokens_per_second:,.0f} tokens/s, measured over two steps")
    if plan.seconds:
        lines.append(f"time   {format_seconds(plan.seconds)} for {plan.tokens:,} tokens, without validation")
    return "\n".join(lines)
