"""`lora-gpt2 audit`: what a text or an adapter gives away."""

from __future__ import annotations

import secrets
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_gpt2.commands.shared import (
    CommandGroup,
    FiniteRange,
    base_option,
    emit,
    end_as_failed,
    json_option,
    seed_option,
    session_options,
    set_option,
)
from lora_gpt2.core.console import Reporter
from lora_gpt2.core.printable import count_of, printable
from lora_gpt2.core.tables import format_table
from lora_gpt2.core.user_files import read_stdin, read_user_text
from lora_gpt2.recipe_files import load_recipe
from lora_gpt2.store.catalog import Store

if TYPE_CHECKING:
    from lora_gpt2.audit.memorization import MemorizationReport
    from lora_gpt2.audit.training_text import TextReport

THRESHOLD = 4.0
SHOWN = 160


@click.group("audit", cls=CommandGroup)
def command() -> None:
    """Look for what is risky: in a text, in an adapter."""


@command.command("data")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--adapter", metavar="N", help="Also: does it prefer groups of people more than its base does?")
@session_options
def data(
    reporter: Reporter,
    sources: tuple[str, ...],
    adapter: str | None,
    base: str | None,
    overrides: tuple[str, ...],
    store: Store,
    as_json: bool,
) -> None:
    """Report what is risky in text: personal data, duplicates, toxic terms, languages, licence notices; change nothing.

    The identity-term swap says how much likelier sentences are than the same ones about another group (he and she,
    Christian and Muslim, ...): of the base, or what the adapter changed.

    \b
    Examples:
      lora-gpt2 audit data my_text.txt
      lora-gpt2 audit data notes/ "more/*.jsonl" --adapter mine --json
    """
    recipe = load_recipe(None, overrides, {"base": base})
    from lora_gpt2.audit.run import audit_text

    report = audit_text(sources, adapter, store, recipe, reporter)
    emit(report.to_json(), as_json, lambda: _render_data(report))


def _render_data(report: TextReport) -> str:
    lines = [f"{count_of(report.documents, 'document')}, {report.characters:,} characters"]
    lines.append(f"copies: {report.exact_copies:,} exact, {report.near_copies:,} near")
    found = {"personal data": report.pii, "toxic terms": report.harsh, "licence notices": report.licences}
    for title, counts in found.items():
        lines.append(f"{title}: {', '.join(f'{name} {count:,}' for name, count in counts.items()) or 'none found'}")
    named = "not looked at (pip install py3langid)"
    if report.languages is not None:
        named = ", ".join(f"{name} {n:,}" for name, n in list(report.languages.items())[:8])
    lines.append(f"languages: {named}")
    whose = f"{report.adapter} against its base" if report.adapter else "the base"
    for swap in report.swaps:
        interval = "" if swap.interval is None else " ({:.2f} to {:.2f})".format(*swap.interval)
        lines.append(
            f"swap of {swap.group} terms, {whose}: own sentences likelier by {swap.mean_nats:.2f}{interval} nats "
            f"than swapped, over {swap.sentences}"
        )
    for kind, examples in report.examples.items():
        lines += [printable(f"    {kind}: {item['origin']}: {item['text']}") for item in examples]
    return "\n".join(lines)


@command.command("memorization")
@click.argument("adapter", metavar="ADAPTER")
@click.option("--windows", type=click.IntRange(1, 100_000), default=200, show_default=True, help="Places to look at.")
@click.option("--texts", type=click.IntRange(0, 10_000), default=40, show_default=True, help="Texts to sample.")
@click.option(
    "--canaries", type=click.Path(path_type=Path), metavar="FILE", help="Secrets that were in the training text."
)
@click.option(
    "--fail-above",
    type=FiniteRange(0, 1),
    metavar="FRACTION",
    help="Exit with 9 if a larger fraction is reproduced.",
)
@session_options
def memorization(
    reporter: Reporter,
    adapter: str,
    windows: int,
    texts: int,
    canaries: Path | None,
    fail_above: float | None,
    base: str | None,
    overrides: tuple[str, ...],
    store: Store,
    as_json: bool,
) -> None:
    """Say what ADAPTER repeats verbatim of the text it was trained on.

    Needs that text where it was (or the prepared blocks). Compares training text with held-out text and with the base,
    samples texts and looks for copies of 50 tokens, and ranks planted secrets. The result is kept for the card.

    \b
    Examples:
      lora-gpt2 audit memorization mine
      lora-gpt2 audit memorization mine --texts 200 --fail-above 0.01
      lora-gpt2 audit memorization mine --canaries secrets.jsonl --json
    """
    recipe = load_recipe(None, overrides, {"base": base})
    from lora_gpt2.audit.canaries import read_canaries
    from lora_gpt2.audit.memorization import AuditSettings
    from lora_gpt2.audit.run import audit_adapter

    planted = read_canaries(canaries) if canaries else []
    settings = AuditSettings(windows=windows, texts=texts)
    report = audit_adapter(adapter, store, recipe, settings, reporter, canaries=planted)
    emit(report.to_json(), as_json, lambda: _render_memorization(report))
    if fail_above is not None and report.largest_share > fail_above:
        hint = "train it with fewer steps or more text; generate --no-verbatim 50 keeps copies out"
        end_as_failed(f"{adapter} repeats more than {fail_above:.1%}: {report.verdict}", hint, as_json)


def _render_memorization(report: MemorizationReport) -> str:
    names = {"train": "training text", "held_out": "held-out text", "base_on_train": "base", "drafter": "drafter alone"}
    lines = [f"{report.adapter}: {report.verdict}", ""]
    rows = [
        [names[key], f"{value.extracted:,} of {value.windows:,}", f"{value.mean_tokens:.2f}"]
        for key, value in report.extraction.items()
    ]
    header = [f"next {report.run_tokens} tokens reproduced", "places", "correct tokens on average"]
    lines.append(format_table(header, rows))
    copies = report.copies
    if copies:
        lines.append(
            f"sampled: {copies.with_copies} of {copies.texts} texts hold {copies.run_tokens} tokens or more "
            f"of the training text, the longest {copies.longest_copy_tokens}"
        )
    for canary in report.canaries:
        lines.append(
            f"planted: {canary.text!r} is number {canary.rank} of {canary.of}, {canary.exposure_bits:.1f} bits"
        )
    for excerpt in [*report.extracted_examples, *(copies.worst if copies else [])]:
        shown = textwrap.shorten(excerpt.text, SHOWN)
        lines.append(printable(f"    {excerpt.tokens} tokens of {excerpt.source}: {shown!r}"))
    return "\n".join(lines)


@command.command("canaries")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-n", "--num", type=click.IntRange(1, 1000), default=10, show_default=True, help="How many.")
@seed_option
@json_option
def canaries(file: Path, num: int, seed: int | None, as_json: bool) -> None:
    """Write secrets to FILE (.jsonl), to be trained on beside a text: does the adapter give them away?

    \b
    Examples:
      lora-gpt2 audit canaries secrets.jsonl
      lora-gpt2 train --data notes.txt --data secrets.jsonl --name mine
      lora-gpt2 audit memorization mine --canaries secrets.jsonl
    """
    from lora_gpt2.audit.canaries import write_canaries

    written = write_canaries(file, num, secrets.randbelow(2**31) if seed is None else seed)
    result = {"path": str(file), "canaries": [canary.text for canary in written]}
    emit(result, as_json, lambda: [f"{num} secrets written to {file}; train with --data {file} beside the text"])


@command.command("watermark")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--threshold", type=FiniteRange(0, 100), default=THRESHOLD, show_default=True, help="z-score.")
@base_option
@set_option
@json_option
def watermark(file: Path, threshold: float, base: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Say whether the text in FILE ('-' for standard input) was sampled with generate.watermark.

    The base must be the one that wrote it, because the mark is in the tokens; the key too, if it was changed.

    \b
    Examples:
      lora-gpt2 generate "Once" --set generate.watermark=true > story.txt
      lora-gpt2 audit watermark story.txt
      lora-gpt2 audit watermark story.txt --base gpt2 --set generate.watermark_key=42
    """
    recipe = load_recipe(None, overrides, {"base": base})
    from lora_gpt2.audit.watermark import detect_watermark
    from lora_gpt2.model.checkpoint import Checkpoint

    text = read_stdin() if str(file) == "-" else read_user_text(file, errors="replace")
    tokenizer = Checkpoint.open(recipe.base).load_tokenizer()
    report = detect_watermark(text, tokenizer, recipe.generate.watermark_key)
    is_marked = report.is_marked(threshold)
    verdict = "marked" if is_marked else "no mark found"
    emit(
        {"marked": is_marked, "threshold": threshold, **vars(report)},
        as_json,
        lambda: (
            f"{verdict}: {report.green_fraction:.0%} of {report.tokens} token pairs in the chosen quarter, "
            f"z {report.z_score:.1f} (threshold {threshold:g}), p {report.p_value:.1e}"
        ),
    )
