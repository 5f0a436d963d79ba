"""`lora-gpt2 demo`: the main job in a minute."""

from __future__ import annotations

from dataclasses import asdict

import click

from lora_gpt2.commands.shared import emit, json_option, store_option, suggest_next
from lora_gpt2.core.console import Reporter
from lora_gpt2.evaluation.report import format_matrix
from lora_gpt2.store.catalog import Store


@click.command("demo")
@store_option
@json_option
@click.pass_obj
def command(reporter: Reporter, store: Store, as_json: bool) -> None:
    """Train three adapters together on text from this machine, swap them on one prompt, print the matrix.

    \b
    Example:
      lora-gpt2 demo
    """
    from lora_gpt2.demo.tour import run_demo

    report = run_demo(store, reporter)
    cells = [cell.to_json() for cell in report.matrix]
    result = {
        "adapters": [asdict(adapter) for adapter in report.adapters],
        "matrix": cells,
        "samples": [asdict(sample) for sample in report.samples],
        "seconds": report.seconds,
    }

    def render() -> str:
        parts = [f"--- {s.adapter}\n{s.prompt}{s.text}" for s in report.samples]
        title = "Perplexity on held-out text (rows: adapters; columns: domains; lower is better, * is the best)"
        return "\n\n".join([*parts, f"{title}\n{format_matrix(cells)}", f"done in {report.seconds:.0f} s"])

    emit(result, as_json, render, is_own_text=True)
    name = report.adapters[0].name
    suggest_next(reporter, "generate", "def main", "--adapter", name, store=store)
