"""`lora-gpt2 rate`: people compare texts without knowing who wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from lora_gpt2.commands.rate_terminal import ask_in_terminal
from lora_gpt2.commands.shared import emit, missing_extra, seed_option, session_options, suggest_next
from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import UsageError
from lora_gpt2.core.printable import count_of, printable
from lora_gpt2.core.tables import format_table
from lora_gpt2.core.user_files import check_output
from lora_gpt2.inference.history import find_votes, read_log
from lora_gpt2.rating.form import write_form
from lora_gpt2.rating.rounds import (
    CRITERIA,
    Mode,
    check_rater,
    find_open,
    import_answers,
    read_answers,
    read_round,
)
from lora_gpt2.rating.votes import read_marks, read_votes
from lora_gpt2.recipe import Recipe
from lora_gpt2.recipe_files import load_recipe
from lora_gpt2.store.catalog import Store

if TYPE_CHECKING:
    from lora_gpt2.rating.ranking import PairOutcome, RatingReport


@click.command("rate")
@click.option(
    "--adapter", "adapters", multiple=True, metavar="N[:W]", help="Adapter, mix a:0.6+b:0.4 or base; two or more."
)
@click.option("--prompts", type=click.Path(path_type=Path), metavar="FILE", help="Prompts: .jsonl, or one per line.")
@click.option(
    "--out",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("ratings"),
    show_default=True,
    metavar="DIR",
    help="The round's folder.",
)
@click.option(
    "--mode",
    type=click.Choice(["pairwise", "scale"]),
    default="pairwise",
    show_default=True,
    help="Pairwise comparison, or a rating from 1 to 5.",
)
@click.option("--criterion", "criteria", multiple=True, metavar="WORD", help=f"Instead of {', '.join(CRITERIA)}.")
@click.option("--rater", default="me", show_default=True, help="Name of the rater.")
@click.option(
    "--export",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.html",
    help="Write a form for raters without this tool.",
)
@click.option(
    "--import", "files", multiple=True, type=click.Path(path_type=Path), metavar="FILE", help="Add a form's answers."
)
@click.option("--serve", is_flag=True, help="Rate in the browser, on this machine.")
@click.option("--port", type=click.IntRange(0, 65535), default=8001, show_default=True, help="For --serve; 0: any.")
@click.option(
    "--recorded",
    type=click.Choice(["repl", "page"]),
    help="Rate what 'repl' wrote, instead of --prompts; or show the results of blind comparisons on the web page.",
)
@click.option("--report", is_flag=True, help="Only show what is known so far.")
@seed_option
@session_options
def command(
    reporter: Reporter,
    adapters: tuple[str, ...],
    prompts: Path | None,
    folder: Path,
    mode: Mode,
    criteria: tuple[str, ...],
    rater: str,
    export: Path | None,
    files: tuple[Path, ...],
    serve: bool,
    port: int,
    recorded: str | None,
    report: bool,
    seed: int | None,
    base: str | None,
    overrides: tuple[str, ...],
    store: Store,
    as_json: bool,
) -> None:
    """Let people compare what adapters write, without knowing which is which; say who is preferred, and how surely.

    With --adapter and --prompts a round begins: the texts are written, then rated. Without them the round in --out
    continues. Answers are saved one by one.

    \b
    Examples:
      lora-gpt2 rate --adapter mine --adapter base --prompts prompts.txt
      lora-gpt2 rate --rater anna
      lora-gpt2 rate --serve
      lora-gpt2 rate --export form.html
      lora-gpt2 rate --import answers-anna.json --import answers-ben.json
      lora-gpt2 rate --report --json
      lora-gpt2 rate --adapter law --adapter base --recorded repl --out from-repl
      lora-gpt2 rate --recorded page              which texts were chosen; --mode scale: marks from 1 to 5
    """
    check_rater(rater)
    check_output(export)
    from lora_gpt2.rating.ranking import rank_marks, rank_votes, summarize_round

    begins = bool(adapters or prompts or recorded == "repl")
    if not begins:
        _refuse_options({"mode", "criteria", "seed", "base", "overrides"} - ({"mode"} if recorded else set()))
    if recorded == "page":
        records = read_log(find_votes())
        ranked = rank_marks(read_marks(records)) if mode == "scale" else rank_votes(read_votes(records))
        emit(ranked.to_json(), as_json, lambda: _render(ranked))
        return
    if begins:
        if (prompts is None) is (recorded is None):
            raise UsageError("a round needs prompts", "--adapter a --adapter base --prompts FILE, or --recorded repl")
        recipe = load_recipe(None, overrides, {"base": base})
        _start(folder, adapters, prompts, store, recipe, reporter, mode=mode, criteria=criteria, seed=seed or 0)
    round_ = read_round(folder)
    if files:
        reporter.message(f"{count_of(import_answers(folder, round_, files), 'answer')} added")
    if export:
        write_form(export, round_)
        reporter.message(f"form for {len(round_.tasks)} tasks written: {export}")
        suggest_next(reporter, "rate", "--out", folder, "--import", "answers-me.json")
    rates_here = not (files or export or report or serve)
    if serve:
        _serve(folder, port, reporter)
    elif rates_here:
        ask_in_terminal(folder, round_, rater)
    answers = read_answers(folder, round_)
    result = summarize_round(round_, answers)
    left = len(find_open(round_, answers, rater)) if rates_here else 0
    hidden = f"{left} tasks are left for {rater}; who wrote what stays hidden until then (--report shows it)"
    emit(result.to_json(), as_json, lambda: hidden if left else _render(result))


def _refuse_options(names: set[str]) -> None:
    """Raises `UsageError` if one of these was given, because no round begins that it could change."""
    context = click.get_current_context()
    given = [name for name in sorted(names) if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if options := [param.opts[0] for param in context.command.params if param.name in given]:
        hint = "leave it out, or begin a round with --adapter, --prompts and a new --out"
        raise UsageError(f"{options[0]} changes a round that begins, and none does", hint)


def _start(
    folder: Path,
    adapters: tuple[str, ...],
    prompts: Path | None,
    store: Store,
    recipe: Recipe,
    reporter: Reporter,
    *,
    mode: Mode,
    criteria: tuple[str, ...],
    seed: int,
) -> None:
    from lora_gpt2.inference.batch import read_prompts
    from lora_gpt2.inference.mix import Mix
    from lora_gpt2.rating.run import start_recorded_round, start_round

    criteria = criteria or CRITERIA
    if prompts is None:
        start_recorded_round(folder, adapters, mode=mode, criteria=criteria)
        return
    asked = [request.prompt for request in read_prompts(prompts, Mix(), seed)]
    start_round(folder, adapters, asked, store, recipe, reporter, mode=mode, criteria=criteria, seed=seed)


def _serve(folder: Path, port: int, reporter: Reporter) -> None:
    try:
        from lora_gpt2.serving.http import bind
        from lora_gpt2.serving.rating_form import serve_rating
    except ImportError as error:
        raise missing_extra("serving", "serve", error) from error
    serve_rating(folder, bind("127.0.0.1", port), reporter)


def _render(report: RatingReport) -> str:
    is_pair = report.mode == "pairwise"
    rows = [
        [
            row.adapter,
            _show_number(row.score),
            *([_show_number(row.preferred)] if is_pair else []),
            "" if row.interval is None else "{:.2f} to {:.2f}".format(*row.interval),
            str(row.judgements),
        ]
        for row in report.ranking
    ]
    header = ["adapter", report.score_name, *(["preferred"] if is_pair else []), "95 % interval", "judgements"]
    lines = [
        format_table(header, rows),
        f"{count_of(report.answers, 'answer')} of {count_of(len(report.raters), 'rater')}",
    ]
    known = [f"{name} {value:.2f}" for name, value in report.agreement.items() if value is not None]
    if known:
        lines.append(f"agreement (Krippendorff's alpha, 1 is full, 0 is chance): {', '.join(known)}")
    if any(row.judgements and row.interval is None for row in report.ranking):
        lines.append("no interval: too few, or all the same")
    lines += [printable(_describe_pair(pair)) for pair in report.missing if pair.ratings]
    return "\n".join(lines)


def _describe_pair(pair: PairOutcome) -> str:
    said = f"{pair.a} preferred to {pair.b} in {pair.a_preferred:.0%} of {pair.ratings}"
    if pair.more is None:
        return f"{said}: no difference seen"
    if not pair.more:
        return f"{said}: settled"
    return f"{said}: about {pair.more} more ratings would settle it"


def _show_number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
