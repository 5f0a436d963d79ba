"""Options that several commands share, and the two ways a result leaves: a table for people, JSON for programs."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import click

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.dirs import find_runs_dir
from lora_gpt2.core.errors import CheckFailed, LoraGpt2Error, ResourceError, UsageError
from lora_gpt2.core.printable import printable
from lora_gpt2.recipe_files import TrainingItem, check_read, list_items
from lora_gpt2.store.catalog import Store

SAMPLE_PROMPT = "Once upon a time"
MEMORY_UNITS = {"gb": 1e9, "mb": 1e6, "gib": 2**30, "mib": 2**20}


class FiniteRange(click.FloatRange):
    """A range of numbers; NaN, which every limit lets pass, is none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Returns the number."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, ctx)
        return number


json_option = click.option("--json", "as_json", is_flag=True, help="Write one JSON document on stdout.")
items_argument = click.argument("items", nargs=-1, metavar="[SOURCE|RECIPE]...")
data_option = click.option(
    "--data", multiple=True, metavar="SOURCE", help="File, folder, glob, - or hf:NAME; repeatable."
)


def _check_read(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Refuses settings of other commands."""
    command = ctx
    while command.parent is not None and command.parent.parent is not None:
        command = command.parent
    check_read(command.info_name or "", (value.partition("=")[0].strip() for value in values))
    return values


set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    callback=_check_read,
    help="Change a setting, such as train.steps=300.",
)
base_option = click.option("--base", metavar="B", help="Base: nano, gpt2, gpt2-medium, …, a hub id or a folder.")
from_option = click.option(
    "--from",
    "init_from",
    metavar="REF",
    help="Continue from this adapter: law, law@2, a folder that PEFT saved, a hub id; auto: the store's best mix.",
)
seed_option = click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Makes the run repeatable.")


skip_bad_option = click.option("--skip-bad", is_flag=True, help="Set aside what cannot be read, instead of stopping.")


class CommandGroup(click.Group):
    """Lists its commands with their whole first sentences, which click would cut to a line."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the table."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.commands[name].get_short_help_str(limit=1000)) for name in self.commands])


def _open_store(ctx: click.Context, param: click.Parameter, value: str | None) -> Store:
    return Store.find(value)


def _parse_memory(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    match = re.fullmatch(r"([0-9.]+)\s*(GB|MB|GiB|MiB)", value.strip(), re.IGNORECASE)
    try:
        amount = float(match[1]) if match else 0.0
    except ValueError:
        amount = 0.0
    if not match or amount <= 0:
        raise UsageError(f"{(param.opts or ['it'])[0]} {value}: expected an amount of memory", "such as 6GB or 512MB")
    return int(amount * MEMORY_UNITS[match[2].lower()])


memory_option = click.option(
    "--gpu-memory", metavar="SIZE", callback=_parse_memory, help="Memory to fit into, such as 6GB; else the device's."
)
store_option = click.option(
    "--store", metavar="DIR", callback=_open_store, help="Store; else $LORA_GPT2_STORE, else ./adapters."
)


def session_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds what every command over a base and a store takes: --base, --set, --store, --json and the reporter."""
    for option in (click.pass_obj, json_option, store_option, set_option, base_option):
        command = option(command)
    return command


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run begins, and whether it can be watched."""

    resume: bool
    fresh: bool
    watch: bool

    def watching(self, reporter: Reporter) -> AbstractContextManager[None]:
        """Gives out the page of the run while the block runs, if that is wanted; raises `ResourceError`."""
        if not self.watch or os.environ.get("RANK", "0") != "0":  # the first process of a launch has the page
            return nullcontext()
        try:
            from lora_gpt2.serving.watch import watch_this_process
        except ImportError as error:
            raise missing_extra("--watch", "serve", error) from error
        return watch_this_process(find_runs_dir(), reporter)


def missing_extra(what: str, extra: str, error: ImportError) -> ResourceError:
    """Returns the error for a library of an extra that is not installed."""
    missing = str(error).rpartition(" ")[2]
    return ResourceError(f"{what} needs {missing}", f"pip install 'lora-gpt2[{extra}]'")


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --resume, --fresh and --watch, and passes them as `run`: `RunOptions`."""

    @functools.wraps(command)
    def wrapped(*arguments: Any, resume: bool, fresh: bool, watch: bool, **values: Any) -> Any:
        if resume and fresh:
            raise UsageError("--resume and --fresh exclude each other", "--resume continues, --fresh starts over")
        return command(*arguments, run=RunOptions(resume=resume, fresh=fresh, watch=watch), **values)

    result: Callable[..., Any] = click.option("--watch", is_flag=True, help="Show it in a browser; see 'watch'.")(
        wrapped
    )
    text = "Begin anew; an interrupted run of the same adapters is set aside."
    result = click.option("--fresh", is_flag=True, help=text)(result)
    return click.option("--resume", is_flag=True, help="Resume the interrupted run of the same recipes.")(result)


def queue_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of a run whose adapters take turns, and passes them as `queue`: the folder and the slots."""

    @functools.wraps(command)
    def wrapped(*arguments: Any, folder: Path | None, slots: int | None, **values: Any) -> Any:
        return command(*arguments, queue=(folder, slots), **values)

    text = "An adapter for each folder, file or recipe in FOLDER, a few at a time."
    slots_option = click.option(
        "--slots", type=click.IntRange(1, 4096), help="Adapters at a time; else as memory allows."
    )
    result: Callable[..., Any] = slots_option(wrapped)
    return click.option("--all", "folder", metavar="FOLDER", type=click.Path(path_type=Path), help=text)(result)


def parent_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds what a run continues from and which choices it learns from, and passes them as `parent`: settings by key."""

    @functools.wraps(command)
    def wrapped(*arguments: Any, init_from: str | None, preferences: tuple[str, ...], **values: Any) -> Any:
        parent = {"lora.init_from": init_from, "preferences.sources": preferences or None}
        return command(*arguments, parent=parent, **values)

    text = "Train on choices: pairs (prompt, chosen, rejected), a round of 'rate', choices of 'serve'; with --from."
    return from_option(click.option("--preferences", multiple=True, metavar="FILE", help=text)(wrapped))


def list_training(
    items: Sequence[str],
    data: Sequence[str],
    name: str | None,
    queue: tuple[Path | None, int | None],
    reporter: Reporter,
) -> tuple[list[TrainingItem], int | None]:
    """Returns what to train, and in how many slots: None for all at the same time, 0 for as many as memory allows.

    One recipe may stand beside a folder, and is for those domains that have none of their own.
    """
    found, (folder, slots) = list_items(items, data, name), queue
    if folder is None:
        return found, slots
    from lora_gpt2.data.domains import list_domains, list_left_out

    if len(found) > 1 or found[0].sources or name:
        raise UsageError("--all names the adapters and their text", "leave other text and --name out")
    domains = [replace(item, recipe=item.recipe or found[0].recipe) for item in list_domains(folder)]
    if left_out := list_left_out(folder):
        reporter.message(f"no text that is read by its name, left out of {folder}: {', '.join(left_out)}")
    return domains, slots or 0


def suggest_next(reporter: Reporter, *words: str | Path, store: Store | None = None, title: str = "next") -> None:
    """Names the command to type next, such that it can be pasted; `store` is added where it is not the default one."""
    where = [] if store is None or store == Store.find() else ["--store", str(store.root)]
    line = ["lora-gpt2", *map(str, words), *where]
    reporter.message(f"{title}: {subprocess.list2cmdline(line) if os.name == 'nt' else shlex.join(line)}")


def emit(
    result: dict[str, Any], as_json: bool, render: Callable[[], str | list[str]], is_own_text: bool = False
) -> None:
    """Writes a result on stdout: as JSON, in which what is not finite is null, or as `render` shows it.

    `render` returns a text, or lines, in which a line end of a name does not make another line. What a terminal would
    obey is written out, but in text that the user has generated (`is_own_text`).
    """
    if as_json:
        click.echo(json.dumps(_finite(result), indent=1, allow_nan=False))
        return
    shown = render()
    if isinstance(shown, list):
        shown = "\n".join(map(printable, shown))
    click.echo(shown if is_own_text else printable(shown, keep_lines=True), color=True)  # click changes nothing


def end_as_failed(message: str, hint: str, as_json: bool) -> NoReturn:
    """Ends the command as `CheckFailed` does; quietly with --json, where the one document has said it."""
    end_with(CheckFailed(message, hint), as_json)


def end_with(error: LoraGpt2Error, as_json: bool) -> NoReturn:
    """Ends the command with an error after its result; quietly with --json, where the one document has said it."""
    if as_json:
        raise click.exceptions.Exit(error.exit_code)
    raise error


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_seconds(seconds: float) -> str:
    """Returns a time with units: 1 h 5 min, 12 min 3 s, 41 s."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def format_bytes(count: int) -> str:
    """Returns a number of bytes with a unit: 1.2 MB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
