"""`lora-gpt2 rate`: people compare texts without knowing who wrote them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from lora_gpt2.commands.shared import emit, seed_option, session_options, suggest_next
from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import ResourceError, UsageError
from lora_gpt2.core.files import wrap_os_errors
from lora_gpt2.core.printable import printable
from lora_gpt2.core.tables import format_table
from lora_gpt2.core.user_files import check_output
from lora_gpt2.inference.history import find_log, find_votes, read_log
from lora_gpt2.rating.choices import find_texts, read_votes
from lora_gpt2.rating.rounds import (
    CRITERIA,
    Answer,
    Mode,
    Round,
    Task,
    add_answers,
    check_free,
    check_rater,
    find_open,
    import_answers,
    read_answers,
    read_round,
    write_round,
)
from lora_gpt2.recipe import Recipe
from lora_gpt2.recipe_files import load_recipe
from lora_gpt2.store.catalog import Store

KEYS: dict[str, dict[str, str | int]] = {
    "pairwise": {"1": "first", "2": "second", "0": "tie"},
    "scale": {str(n): n for n in range(1, 6)},
}
QUESTION = {"pairwise": "better is 1, 2, or 0 for equally good", "scale": "1 is bad, 5 is very good"}


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
      lora-gpt2 rate --recorded page
    """
    check_rater(rater)
    check_output(export)
    from lora_gpt2.rating.ranking import rank_votes, summarize_round

    if recorded == "page":
        chosen = rank_votes(read_votes(read_log(find_votes())))
        emit(chosen, as_json, lambda: _render(chosen))
        return
    if adapters or prompts or recorded:
        check_free(folder)
        if len(set(adapters)) < 2 or len(set(adapters)) < len(adapters) or (prompts is None) is (recorded is None):
            raise UsageError(
                "a round needs two different adapters or more, and prompts",
                "--adapter a --adapter base --prompts FILE, or --recorded repl",
            )
        if prompts:
            recipe = load_recipe(None, overrides, {"base": base})
            name, asked, texts = _write_texts(adapters, prompts, seed or 0, reporter, store, recipe)
        else:
            name, adapters, (asked, texts) = _read_texts(adapters)
        write_round(
            folder,
            Round(base=name, adapters=adapters, prompts=asked, texts=texts, mode=mode, criteria=criteria or CRITERIA),
        )
    round_ = read_round(folder)
    if files:
        reporter.message(f"{import_answers(folder, round_, files)} answers added")
    if export:
        from lora_gpt2.rating.form import build_form

        with wrap_os_errors(f"write {export}"):
            export.write_text(build_form(round_), encoding="utf-8")
        reporter.message(f"form for {len(round_.tasks)} tasks written: {export}")
        suggest_next(reporter, "rate", "--out", folder, "--import", "answers-me.json")
    if serve:
        _serve(folder, port, reporter)
    elif not (files or export or report):
        _ask(folder, round_, rater)
    answers = read_answers(folder, round_)
    result = summarize_round(round_, answers)
    is_rating = not (files or export or report or serve)
    left = len(find_open(round_, answers, rater)) if is_rating else 0
    hidden = f"{left} tasks are left for {rater}; who wrote what stays hidden until then (--report shows it)"
    emit(result, as_json, lambda: hidden if left else _render(result))


def _write_texts(
    adapters: Sequence[str], prompts: Path, seed: int, reporter: Reporter, store: Store, recipe: Recipe
) -> tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Returns the base's name, the prompts, and what the adapters write, `[prompts][adapters]`."""
    from lora_gpt2.core.interrupt import catch_signals
    from lora_gpt2.inference.batch import read_prompts
    from lora_gpt2.inference.generate import build_writer
    from lora_gpt2.inference.mix import Mix
    from lora_gpt2.inference.open import open_session

    asked = [request.prompt for request in read_prompts(prompts, Mix(), seed)]
    if not asked:
        raise UsageError(f"{prompts} has no prompt", "write one on each line")
    names = [name for spec in adapters for name in Mix.parse(spec).references]
    session, _ = open_session(store, names, recipe, recipe.generate.dtype)
    with catch_signals() as stop:
        write = build_writer(session, reporter, stop, seed)
        columns = [write(spec, asked, recipe.generate) for spec in adapters]
    return session.base.name, tuple(asked), tuple(zip(*columns, strict=True))


def _read_texts(
    adapters: Sequence[str],
) -> tuple[str, tuple[str, ...], tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]]:
    """Returns what stands for the base, the adapters as the REPL names them, and what it recorded of them."""
    from lora_gpt2.inference.mix import Mix

    named = tuple(str(Mix.parse(spec)) for spec in adapters)
    return "recorded", named, find_texts(read_log(find_log()), named)


def _ask(folder: Path, round_: Round, rater: str) -> None:
    """Asks in the terminal until all is answered or the rater stops."""
    tasks = find_open(round_, read_answers(folder, round_), rater)
    click.echo(f"{len(tasks)} tasks for {rater}. {QUESTION[round_.mode]}; s skips, q stops.", err=True)
    for number, (task, swapped) in enumerate(tasks, start=1):
        _show(task, swapped, f"{number} of {len(tasks)}")
        values = _read_marks(round_)
        if values is None:
            return
        if values:
            add_answers(folder, _to_answers(round_, task, swapped, rater, values))


def _show(task: Task, swapped: bool, where: str) -> None:
    texts = task.texts[::-1] if swapped else task.texts
    lines = [f"\n===== {where} ====="]
    for number, text in enumerate(texts, start=1):
        lines += [f"--- text {number}" if len(texts) > 1 else "---", task.prompt + text]
    click.echo(printable("\n".join(lines), keep_lines=True), err=True)


def _read_marks(round_: Round) -> list[str] | None:
    """Returns a mark for each criterion, none to skip; None to stop. One mark alone is for all criteria."""
    keys, number = KEYS[round_.mode], len(round_.criteria)
    asked = printable(f"{' '.join(round_.criteria)} ({'/'.join(keys)}, s, q)")
    while True:
        try:
            typed = click.prompt(asked, err=True, prompt_suffix=": ")
        except click.Abort:
            return None
        marks = typed.split()
        if marks in (["q"], ["s"]):
            return None if marks == ["q"] else []
        if all(mark in keys for mark in marks) and len(marks) in (1, number):
            return marks * number if len(marks) == 1 else marks
        click.echo(f"type {number} marks, or one for all: {QUESTION[round_.mode]}", err=True)


def _to_answers(round_: Round, task: Task, swapped: bool, rater: str, marks: Sequence[str]) -> list[Answer]:
    other = {"first": "second", "second": "first"}
    values = [KEYS[round_.mode][mark] for mark in marks]
    values = [other.get(str(value), value) if swapped else value for value in values]
    return [
        Answer(rater=rater, task=task.number, criterion=c, value=value)
        for c, value in zip(round_.criteria, values, strict=True)
    ]


def _serve(folder: Path, port: int, reporter: Reporter) -> None:
    try:
        from lora_gpt2.serving.http import bind
        from lora_gpt2.serving.rating_form import serve_rating
    except ImportError as error:
        missing = str(error).rpartition(" ")[2]
        raise ResourceError(f"serving needs {missing}", "pip install 'lora-gpt2[serve]'") from error
    serve_rating(folder, bind("127.0.0.1", port), reporter)


def _render(result: dict[str, Any]) -> str:
    is_pair, agreement = result["mode"] == "pairwise", result["agreement"]
    figure = "strength" if is_pair else "mean"
    rows = [
        [
            row["adapter"],
            *(_show_number(row[key]) for key in (figure, "preferred") if key in row),
            "" if row["interval"] is None else "{:.2f} to {:.2f}".format(*row["interval"]),
            str(row["judgements"]),
        ]
        for row in result["ranking"]
    ]
    header = ["adapter", figure, *(["preferred"] if is_pair else []), "95 % interval", "judgements"]
    lines = [format_table(header, rows), f"{result['answers']} answers of {len(result['raters'])} raters"]
    known = [f"{name} {value:.2f}" for name, value in agreement.items() if value is not None]
    if known:
        lines.append(f"agreement (Krippendorff's alpha, 1 is full, 0 is chance): {', '.join(known)}")
    for pair in result["missing"]:
        if pair["ratings"]:
            lines.append(printable(_describe_missing(pair)))
    return "\n".join(lines)


def _describe_missing(pair: dict[str, Any]) -> str:
    said = f"{pair['a']} preferred to {pair['b']} in {pair['a_preferred']:.0%} of {pair['ratings']}"
    if pair["more"] is None:
        return f"{said}: no difference seen"
    if not pair["more"]:
        return f"{said}: settled"
    return f"{said}: about {pair['more']} more ratings would settle it"


def _show_number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
