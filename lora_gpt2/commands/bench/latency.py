"""`lora-gpt2 bench`: waiting: start-up, swapping adapters."""

from __future__ import annotations

import click

from lora_gpt2.commands.shared import emit, json_option
from lora_gpt2.core.console import Reporter
from lora_gpt2.core.tables import format_table


@click.command("startup")
@click.option("--base", default="nano", show_default=True, metavar="B", help="Base of the first token; or S, M, L, XL.")
@click.option("--runs", type=click.IntRange(1, 100), default=5, show_default=True)
@json_option
@click.pass_obj
def startup(reporter: Reporter, base: str, runs: int, as_json: bool) -> None:
    """Time commands from the shell, as whole processes, and the first token beside a transformers + PEFT script.

    \b
    Example:
      lora-gpt2 bench startup --base S
    """
    from lora_gpt2.bench.startup import measure_startup

    medians = measure_startup(base, runs, reporter)
    rows = [[name, f"{seconds:.2f}"] for name, seconds in medians.items()]
    emit({"seconds": medians}, as_json, lambda: format_table(["", "seconds"], rows))


@click.command("swap")
@click.option("--base", default="S", show_default=True, metavar="B", help="S, M, L, XL (random weights), or a base.")
@click.option("--rank", type=click.IntRange(1, 256), default=16, show_default=True, help="Rank at each target.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Processes of each side, in turn.")
@json_option
@click.pass_obj
def swap(reporter: Reporter, base: str, rank: int, rounds: int, as_json: bool) -> None:
    """Benchmark switching adapters against PEFT: to a loaded one, and to one that comes from disk.

    \b
    Example:
      lora-gpt2 bench swap --base M
    """
    from lora_gpt2.bench.decoding import measure_decoding

    sides = measure_decoding(base, 2, rounds, rank, reporter).sides
    kept = [{key: getattr(side, key) for key in ("name", "swap_seconds", "load_seconds")} for side in sides]
    shown = [[side.name, f"{1000 * side.swap_seconds:.2f} ms", f"{1000 * side.load_seconds:.1f} ms"] for side in sides]
    emit({"sides": kept}, as_json, lambda: format_table(["", "another that is loaded", "one from disk"], shown))


COMMANDS = (
    startup,
    swap,
)
