"""`lora-gpt2 bench`: training, evaluation, decoding and serving, in tokens per second."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_gpt2.commands.shared import emit, format_bytes, json_option, store_option
from lora_gpt2.core.console import Reporter
from lora_gpt2.core.tables import format_table
from lora_gpt2.store.catalog import Store

if TYPE_CHECKING:
    from lora_gpt2.bench.decoding import Decoding
    from lora_gpt2.bench.evaluating import EvaluationBenchmark
    from lora_gpt2.bench.serving import ServingReport
    from lora_gpt2.bench.training import TrainingBenchmark


@click.command("train")
@click.option("--base", default="S", show_default=True, metavar="B", help="S, M, L, XL (random weights), or a base.")
@click.option(
    "--batch",
    nargs=2,
    type=click.IntRange(1),
    default=(2, 512),
    show_default=True,
    metavar="ROWS TOKENS",
    help="Rows of a step and tokens of a row.",
)
@click.option("--steps", type=click.IntRange(2), default=10, show_default=True, help="Timed steps of each run.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Runs of each side, in turn.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Dtype of the frozen base's weights.",
)
@click.option("--slots", type=click.IntRange(1, 64), default=1, show_default=True, help="Also train so many together.")
@click.option("--lines", type=click.Path(path_type=Path), help="Also the usual notebook: lines of FILE, padded.")
@click.option("--checkpointing", is_flag=True, help="Gradient checkpointing on all sides.")
@json_option
@click.pass_obj
def train(
    reporter: Reporter,
    base: str,
    batch: tuple[int, int],
    steps: int,
    rounds: int,
    dtype: str,
    slots: int,
    lines: Path | None,
    checkpointing: bool,
    as_json: bool,
) -> None:
    """Benchmark training against transformers' Trainer + PEFT: the same weights, tokens and settings, in turn.

    \b
    Examples:
      lora-gpt2 bench train
      lora-gpt2 bench train --base XL --batch 1 1024 --steps 50
    """
    from lora_gpt2.bench.training import measure_training

    report = measure_training(
        base,
        batch[0],
        batch[1],
        steps,
        rounds,
        reporter=reporter,
        dtype=dtype,
        checkpointing=checkpointing,
        slots=slots,
        lines=lines,
    )
    emit(report.to_json(), as_json, lambda: _render_training(report))


def _render_training(report: TrainingBenchmark) -> str:
    rows = [
        [
            side.name,
            f"{side.tokens_per_second:,.0f}",
            f"{report.speed_of_ours(side):.2f}x",
            f"{100 * report.share_of_limit(side):.0f} %",
            format_bytes(side.peak_memory_bytes),
            f"{report.memory_of_ours(side):.2f}x",
            f"{side.losses[-1]:.4f}",
            f"{side.start_seconds:.1f} s",
        ]
        for side in report.sides
    ]
    header = [
        "",
        "tokens/s",
        "our speed-up",
        "of GEMM peak",
        "peak memory",
        "our memory",
        "last loss",
        "to first step",
    ]
    limits = [side.gemm_flops_per_second / 1e9 for side in report.sides]
    shown = ", ".join(f"{limit:,.0f}" for limit in limits)
    return (
        f"{format_table(header, rows)}\nlimit: the MLP's matrix product in the same processes, {shown} GFLOP/s; "
        f"{report.flops_per_token / 1e6:,.0f} MFLOP per token"
    )


@click.command("decode")
@click.option("--base", default="S", show_default=True, metavar="B", help="S, M, L, XL (random weights), or a base.")
@click.option("--tokens", type=click.IntRange(2, 512), default=64, show_default=True, help="Tokens of each row.")
@click.option("--rank", type=click.IntRange(1, 256), default=16, show_default=True, help="Rank at each target.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Processes of each side, in turn.")
@json_option
@click.pass_obj
def decode(reporter: Reporter, base: str, tokens: int, rank: int, rounds: int, as_json: bool) -> None:
    """Benchmark generation against transformers + PEFT: one sequence, eight with one adapter, or eight adapters.

    \b
    Examples:
      lora-gpt2 bench decode
      lora-gpt2 bench decode --base nano --tokens 128
    """
    from lora_gpt2.bench.decoding import measure_decoding

    report = measure_decoding(base, tokens, rounds, rank, reporter)
    emit(report.to_json(), as_json, lambda: _render_decoding(report.sides))


def _compare_loss(nll: float, reference: float) -> str:
    return "" if math.isnan(nll) else f"{math.exp(nll - reference) - 1:+.3%}"


def _render_decoding(sides: list[Decoding]) -> str:
    rows = [
        [
            side.name,
            f"{side.single:,.1f}",
            _show_rate(side.merged),
            f"{side.batch_one:,.1f}",
            f"{side.batch_mixed:,.1f}",
            f"{side.batch_mixed / side.batch_one:.2f}x",
            f"{1000 * side.swap_seconds:.2f} ms",
            f"{1000 * side.load_seconds:.1f} ms",
            format_bytes(side.peak_memory_bytes),
            _compare_loss(side.nll_nats, sides[0].nll_nats),
        ]
        for side in sides
    ]
    header = [
        "tokens/s",
        "one row",
        "merged",
        "8, one adapter",
        "8, eight adapters",
        "mixed / one",
        "swap",
        "load",
        "peak memory",
        "perplexity",
    ]
    others = [side.name for side in sides if side.ids != sides[0].ids]
    same = f"other tokens than ours: {', '.join(others)}" if others else "every side writes the same first tokens"
    return f"{format_table(header, rows)}\nmixed batch: {same}"


def _show_rate(rate: float) -> str:
    return "" if math.isnan(rate) else f"{rate:,.1f}"


@click.command("serve")
@click.option("--base", default="nano", show_default=True, metavar="B", help="Base of the store's adapters.")
@click.option("--clients", type=click.IntRange(1), default=16, show_default=True, help="Clients of the steady stream.")
@click.option("--burst", type=click.IntRange(1), default=1000, show_default=True, help="Requests at the same moment.")
@click.option("--slow", type=click.IntRange(0), default=500, show_default=True, help="Clients that never finish.")
@click.option("--tokens", type=click.IntRange(1, 512), default=32, show_default=True, help="Tokens of each request.")
@store_option
@json_option
@click.pass_obj
def serve(
    reporter: Reporter, base: str, clients: int, burst: int, slow: int, tokens: int, store: Store, as_json: bool
) -> None:
    """Load a server of this store: a steady stream, everybody at once, and beside clients that are slow.

    \b
    Example:
      lora-gpt2 bench serve --clients 16 --burst 1000
    """
    from lora_gpt2.bench.serving import measure_serving

    report = measure_serving(base, store, clients, burst, slow, tokens=tokens, reporter=reporter)
    emit(asdict(report), as_json, lambda: _render_serving(report))


def _render_serving(report: ServingReport) -> str:
    rows = [
        [
            load.name,
            ", ".join(f"{count} x {status}" for status, count in load.statuses.items()),
            f"{load.requests_per_second:.1f}",
            f"{load.tokens_per_second:,.0f}",
            f"{load.median_seconds:.2f} s",
            f"{load.p99_seconds:.2f} s",
        ]
        for load in report.loads
    ]
    table = format_table(["", "answers", "requests/s", "tokens/s", "median", "p99"], rows)
    return f"{table}\np99 of the burst: {report.p99_of_ideal:.2f}x its ideal drain time"


@click.command("evaluate")
@click.option("--base", default="S", show_default=True, metavar="B", help="S, M, L, XL (random weights), or a base.")
@click.option("--tokens", type=click.IntRange(16), default=4096, show_default=True, help="Tokens of text.")
@click.option("--stride", type=click.IntRange(1, 1024), default=512, show_default=True, help="Stride of the stream.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Processes of each side, in turn.")
@json_option
@click.pass_obj
def evaluate(reporter: Reporter, base: str, tokens: int, stride: int, rounds: int, as_json: bool) -> None:
    """Benchmark perplexity against the loop of transformers' documentation and, if installed, lm-evaluation-harness.

    \b
    Example:
      lora-gpt2 bench evaluate --base S --tokens 8192
    """
    from lora_gpt2.bench.evaluating import measure_evaluation

    report = measure_evaluation(base, tokens, stride, rounds, reporter)
    emit(report.to_json(), as_json, lambda: _render_evaluation(report))


def _render_evaluation(report: EvaluationBenchmark) -> str:
    from lora_gpt2.bench.evaluating import PARTNERS

    sides = {side.name: side for side in report.sides}
    rows = []
    for name, side in sides.items():
        ours = next((sides[own] for own, other in PARTNERS.items() if other == name), side)
        rows.append(
            [
                name,
                f"{side.tokens_per_second:,.0f}",
                f"{side.seconds / ours.seconds:.2f}x",
                format_bytes(side.peak_memory_bytes),
                f"{side.nll_nats_per_token:.6f}",
            ]
        )
    table = format_table(["", "tokens/s", "time of ours", "peak memory", "nats per token"], rows)
    lines = [
        f"{report.adapters} adapters on a text of {row.tokens} tokens: {row.together_seconds:.2f} s in one "
        f"pass, {row.one_by_one_seconds:.2f} s one by one"
        for row in report.lineup
    ]
    return "\n".join([table, *lines])


COMMANDS = (
    train,
    decode,
    serve,
    evaluate,
)
