"""`lora-gpt2 train`: recipes or files in, adapters out."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lora_gpt2.commands.settings import setting_options
from lora_gpt2.commands.shared import (
    SAMPLE_PROMPT,
    RunOptions,
    base_option,
    data_option,
    emit,
    end_with,
    format_bytes,
    format_seconds,
    items_argument,
    json_option,
    list_training,
    memory_option,
    parent_options,
    queue_options,
    run_options,
    set_option,
    skip_bad_option,
    store_option,
    suggest_next,
)
from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import InterruptedRunError, LoraGpt2Error, UsageError
from lora_gpt2.core.tables import format_table
from lora_gpt2.recipe_files import load_recipe, name_recipe
from lora_gpt2.store.catalog import Store

if TYPE_CHECKING:
    from lora_gpt2.recipe import Recipe
    from lora_gpt2.training.publish import TrainReport
    from lora_gpt2.training.publish_preferences import PreferenceReport

T = TypeVar("T")
MOST_EXPLAINED = 8  # adapters, line by line


@click.command("train")
@items_argument
@data_option
@click.option("--name", metavar="N", help="Name of the adapter; else the recipe's, else the first file's.")
@base_option
@parent_options
@setting_options("train")
@set_option
@skip_bad_option
@run_options
@queue_options
@click.option("--ray", metavar="ADDRESS", help="Train on the machines of a Ray cluster: auto, local, or its address.")
@click.option("--fit", is_flag=True, help="Change settings so that it fits into memory; see 'plan'.")
@memory_option
@click.option("--dry-run", is_flag=True, help="Print the plan and train nothing.")
@store_option
@json_option
@click.pass_obj
def command(
    reporter: Reporter,
    items: tuple[str, ...],
    data: tuple[str, ...],
    name: str | None,
    base: str | None,
    parent: dict[str, Any],
    flags: dict[str, Any],
    overrides: tuple[str, ...],
    skip_bad: bool,
    run: RunOptions,
    queue: tuple[Path | None, int | None],
    ray: str | None,
    fit: bool,
    gpu_memory: int | None,
    dry_run: bool,
    store: Store,
    as_json: bool,
) -> None:
    """Train one adapter on a SOURCE of text, or several together over one base.

    A source is a file, a folder, a glob, - or hf:NAME; label=SOURCE names its adapter. A RECIPE is a YAML file, or the
    name of one that comes with the package.

    \b
    Examples:
      lora-gpt2 train my_text.txt
      lora-gpt2 train notes/ --name mine --epochs 5 --rank 32
      lora-gpt2 train law=law.jsonl code=src/     two adapters, one pass over the base
      lora-gpt2 train prose notes/ --set train.patience=3
      lora-gpt2 train more_law.txt --from law     the next version of law, from its present one
      lora-gpt2 train --from law --preferences choices.jsonl   the next version, as people chose
      lora-gpt2 train --all domains/              an adapter for each folder, file or recipe in it
      lora-gpt2 train --all domains/ --ray auto   over the machines of a Ray cluster
      lora-gpt2 train my_text.txt --watch         curves and samples in a browser, as they come
      lora-gpt2 train a.yaml b.yaml --resume      after an interruption; --fresh begins anew
      lora-gpt2 train a.yaml --fit --gpu-memory 6GB
    """
    own = {**flags, "base": base, "data.skip_bad": skip_bad or None, **parent}
    found, num_slots = list_training(items, data, name, queue, reporter)
    chosen = [name_recipe(load_recipe(item.recipe, overrides, {**own, **item.flags})) for item in found]
    if any(recipe.preferences.sources for recipe in chosen):
        is_special = any((queue[0], ray, fit, gpu_memory, dry_run, run.watch))
        _train_preferences(chosen, is_special, run, store, reporter, as_json)
        return
    if ray and (fit or gpu_memory is not None or dry_run or run.watch):
        what = "--fit, --gpu-memory, --dry-run or --watch"
        raise UsageError(f"--ray cannot be combined with {what}", "'plan' here, then train")
    if dry_run:
        from lora_gpt2.commands.plan import show_plan
        from lora_gpt2.training.plan import plan_run

        show_plan(plan_run(chosen, store, reporter, gpu_memory, num_slots=num_slots), as_json)
        return
    if fit or gpu_memory is not None:
        from lora_gpt2.training.plan import fit_to_memory

        chosen, num_slots = fit_to_memory(chosen, store, gpu_memory, reporter, num_slots)

    train = functools.partial(_train, chosen, store, reporter, ray, num_slots)
    with run.watching(reporter):
        report, error = _train_what_can_be(train, run)
    if not report.adapters:  # another process of this launch speaks
        return
    result = {"adapters": [asdict(item) for item in report.adapters], "failures": report.failures}
    emit(result, as_json, lambda: _render(report.adapters))
    for item in report.adapters[:MOST_EXPLAINED]:
        reporter.message(f"{item.name}: {item.verdict}; {item.forgetting}")
    if error is not None:
        end_with(error, as_json)
    first = report.adapters[0].name
    suggest_next(reporter, "generate", SAMPLE_PROMPT, "--adapter", first, store=store)
    reporter.message(f"see:  {store.resolve(first) / 'report.html'}")


def _train_preferences(
    recipes: list[Recipe], is_special: bool, run: RunOptions, store: Store, reporter: Reporter, as_json: bool
) -> None:
    from lora_gpt2.training.preference_run import train_preferences

    if len(recipes) > 1 or is_special:
        raise UsageError(
            "preferences train one adapter, on this machine, without a page", "leave the other options out"
        )
    train = functools.partial(train_preferences, recipes[0], store, reporter)
    report = _ask_to_resume(lambda resume, fresh: train(resume=resume, fresh=fresh), run)
    emit({"adapters": [asdict(report)]}, as_json, lambda: _render_preferred(report))
    reporter.message(f"{report.name}: {report.verdict}")
    compared = ["--adapter", str(report), "--adapter", report.parents[0], "--prompts", "FILE"]
    suggest_next(reporter, "rate", *compared, store=store)


def _train_what_can_be(
    train: Callable[[bool, bool], TrainReport], run: RunOptions
) -> tuple[TrainReport, LoraGpt2Error | None]:
    """Returns the report, with the error of a run of which other adapters were published."""
    try:
        return _ask_to_resume(train, run), None
    except LoraGpt2Error as error:
        if error.report is None or not error.report.adapters:
            raise
        return error.report, error


def _ask_to_resume(train: Callable[[bool, bool], T], run: RunOptions) -> T:
    """Returns what `train(resume, fresh)` does; at a terminal it is asked what becomes of an interrupted run."""
    try:
        return train(run.resume, run.fresh)
    except InterruptedRunError as error:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise
        goes_on = click.confirm(f"{error.message}: resume it? (no starts over)", default=True, err=True)
        return train(goes_on, not goes_on)


def _render_preferred(report: PreferenceReport) -> str:
    def show(name: str, before: float | None, after: float | None) -> list[str]:
        return [name, *("" if value is None else f"{value:.2f}" for value in (before, after))]

    right = f"{report.held_out_accuracy:.0%} of {report.held_out_pairs}"
    rows = [
        ["held-out pairs: loss", f"{report.held_out_loss_before:.4f}", f"{report.held_out_loss:.4f}"],
        ["held-out pairs: chosen text is ahead of the parent's opinion", "", right],
        show("own text: perplexity", report.parent_perplexity, report.validation_perplexity),
        show("general English: perplexity", report.general_perplexity_before, report.general_perplexity),
    ]
    return format_table([f"step {report.best_step} of {report.steps}", report.parents[0], str(report)], rows)


def _train(
    recipes: list[Recipe],
    store: Store,
    reporter: Reporter,
    ray: str | None,
    num_slots: int | None,
    resume: bool,
    fresh: bool,
) -> TrainReport:
    if ray:
        from lora_gpt2.training.ray_training import train_on_ray

        return train_on_ray(recipes, store, reporter, ray, resume=resume, fresh=fresh, num_slots=num_slots or 0)
    from lora_gpt2.training.run import train_recipes

    return train_recipes(recipes, store, reporter, resume=resume, fresh=fresh, num_slots=num_slots)


def _render(adapters: list[Any]) -> str:
    is_continued = any(a.parent_perplexity is not None for a in adapters)
    rows = [
        [
            f"{a.name}@{a.version}",
            f"{a.steps}",
            f"{a.train_tokens:,}",
            *([] if not is_continued else ["" if a.parent_perplexity is None else f"{a.parent_perplexity:.2f}"]),
            f"{a.base_perplexity:.2f} -> {a.validation_perplexity:.2f}",
            "" if a.test_perplexity is None else f"{a.base_test_perplexity:.2f} -> {a.test_perplexity:.2f}",
            f"{a.best_step}",
            f"{a.tokens_per_second:,.0f}",
            format_bytes(a.peak_memory_bytes),
            format_seconds(a.seconds),
        ]
        for a in adapters
    ]
    header = [
        "adapter",
        "steps",
        "tokens",
        *(["parent ppl"] if is_continued else []),
        "validation ppl (blocks)",
        "test ppl",
        "best step",
        "tokens/s",
        "peak",
        "time",
    ]
    return format_table(header, rows)
