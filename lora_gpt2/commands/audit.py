"""`lora-gpt2 audit`: what a text or an adapter gives away."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from lora_gpt2.commands.shared import base_option, emit, json_option, set_option
from lora_gpt2.core.paths import os_errors_as_ours
from lora_gpt2.recipe_files import load_recipe

THRESHOLD = 4.0


@click.group("audit")
def command() -> None:
    """Look for what is risky: in a text, in an adapter."""


@command.command("watermark")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--threshold", type=click.FloatRange(0, 100), default=THRESHOLD, show_default=True, help="z-score.")
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
    recipe = load_recipe(None, overrides, base=base)
    from lora_gpt2.evaluation.watermark import detect_watermark
    from lora_gpt2.model.locate import load_base_tokenizer

    with os_errors_as_ours(f"read {file}"):
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8", errors="replace")
    tokenizer = load_base_tokenizer(recipe.base)
    report = detect_watermark(text, tokenizer, recipe.generate.watermark_key)
    is_marked = report.is_marked(threshold)
    verdict = "marked" if is_marked else "no mark found"
    emit(
        {"marked": is_marked, "threshold": threshold, **vars(report)}, as_json,
        lambda: f"{verdict}: {report.green_fraction:.0%} of {report.tokens} token pairs in the chosen quarter, "
        f"z {report.z_score:.1f} (threshold {threshold:g}), p {report.p_value:.1e}",
    )  # fmt: skip
