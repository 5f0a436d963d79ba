"""The command line: finds commands, and turns errors into one line, a hint and an exit code. Nothing else.

A command's module is imported only when it runs, so `--help` needs neither torch nor any command.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
import traceback
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import click

from lora_gpt2 import __version__
from lora_gpt2.core.console import RichReporter
from lora_gpt2.core.errors import Interrupted, LoraGpt2Error, ResourceError, UsageError
from lora_gpt2.core.files import translate_os_error
from lora_gpt2.core.memory import HINT, is_out_of_memory
from lora_gpt2.core.printable import printable
from lora_gpt2.core.synonyms import ARGUMENTS

COMMANDS = {
    "demo": "Train adapters from text on this machine, swap them, print the matrix.",
    "prepare": "Read, clean, split and tokenise text; train does it on demand.",
    "train": "Train one adapter, or several together over one base.",
    "tune": "Search for an adapter's settings in one run.",
    "plan": "Say what training will take: memory, time, and settings that fit.",
    "generate": "Continue a prompt with an adapter, a mix, or several side by side.",
    "repl": "Write a text together with adapters, at the keyboard.",
    "chat": "Talk to an adapter that was trained on chats.",
    "watch": "Curves, speed and samples of training runs in a browser, here or on another machine.",
    "serve": "OpenAI-compatible HTTP API and a web page; the model is an adapter.",
    "evaluate": "Measure the perplexity of adapters and the base on text.",
    "rate": "Let people compare texts without knowing who wrote them.",
    "merge": "Combine adapters into one, or write them into a plain GPT-2.",
    "adapters": "The store: list, show, verify, compare, copy, remove, exchange adapters.",
    "audit": "Look for what is risky: in a text, in what an adapter repeats.",
    "recipes": "List, show, copy and check recipes.",
    "bases": "List and show bases, or write one as GGUF.",
    "bench": "Measure this machine: training, writing and serving, quality, start-up.",
    "doctor": "Say what works on this machine, in one block for a bug report.",
    "completion": "Write the completion script of a shell: bash, zsh or fish.",
}


NEAR = 0.75  # as alike as a typing error leaves two words
COMPLETE = "_LORA_GPT2_COMPLETE"
SPIN_COUNT = "3000"
"""For how long a thread of PyTorch on a CPU (GNU OpenMP) looks for work before it sleeps. The library's own 300,000
gain one process nothing, and of two that train at the same time each then holds cores that the other needs."""
CACHED_KERNELS = "64"
"""How many kernels oneDNN, and PyTorch beside it, keep of bfloat16 products on a CPU: one of 0.27 MB for each shape.
Their own 1,024 grow to half a gigabyte as texts of ever more lengths come; a training step has a few dozen."""
GLOBAL_OPTIONS = ("-v", "--verbose", "-q", "--quiet", "--debug")


class LazyGroup(click.Group):
    """Lists commands from a table and imports one when it is asked for."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keeps what was typed, from which commands suggest the next one."""
        ctx.meta[ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Returns the names in the table's order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports `commands/<name>.py` and returns its `command`."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"lora_gpt2.commands.{cmd_name}").command
        assert isinstance(command, click.Command)
        if COMPLETE in os.environ:
            from lora_gpt2.commands.complete import add_completion

            add_completion(command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Finds the command; an unknown one is answered with the nearest."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise UsageError(f"there is no command '{args[0]}'", _suggest_command(args[0]))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the table."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _suggest_command(name: str) -> str:
    """Returns the hint for a word that is no command: what other tools mean by it, else what is spelt like it."""
    from difflib import get_close_matches

    from lora_gpt2.core.synonyms import COMMANDS as ELSEWHERE

    if found := ELSEWHERE.get(name.lower()):
        return f"it is: lora-gpt2 {found}"
    if near := get_close_matches(name.lower(), COMMANDS, n=1, cutoff=NEAR):
        return f"did you mean '{near[0]}'?"
    return "'lora-gpt2 --help' lists them"


def _name_option(name: str) -> str:
    """Returns an option in our spelling, with `-` for `_`."""
    return name.replace("_", "-")


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": _name_option},
    invoke_without_command=True,
)
@click.version_option(__version__, "-V", "--version", prog_name="lora-gpt2")
@click.option("-v", "--verbose", count=True, help="Say more on stderr.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing on stderr but errors.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(ctx: click.Context, verbose: int, quiet: bool, debug: bool) -> None:
    """One frozen GPT-2, many small adapters: train, keep, swap, mix and measure them.

    \b
    Examples:
      lora-gpt2 demo
      lora-gpt2 train my_text.txt --name mine
      lora-gpt2 generate "Once upon a time" --adapter mine
    """
    ctx.obj = RichReporter(-1 if quiet else verbose)
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line and exits with its code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - as long as the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a Latin-1 terminal shows ? where it must
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # which is read when torch is imported
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, CACHED_KERNELS)
    sys.exit(run(arguments))


def run(arguments: list[str]) -> int:
    """Runs the command line; returns the exit code, one of those that `core/errors.py` lists."""
    try:
        result = cli.main(_translate_words(arguments), prog_name="lora-gpt2", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except (BrokenPipeError, SystemExit):  # click answers a closed pipe with SystemExit; the reader has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except BaseException as error:  # noqa: BLE001 - everything becomes a line and an exit code, and only here
        if "--debug" in arguments:
            sys.stderr.write(printable(traceback.format_exc(), keep_lines=True))
        ours = translate(error)
        report(ours, as_json="--json" in arguments)
        return ours.exit_code


def _translate_words(arguments: list[str]) -> list[str]:
    """Returns the arguments with `help`, `help COMMAND` and `version` as the options that they mean."""
    if arguments[:1] == ["version"]:
        return ["--version"]
    return [*arguments[1:2], "--help"] if arguments[:1] == ["help"] else arguments


def translate(error: BaseException) -> LoraGpt2Error:
    """Returns our error for any that reached the top; what we do not know is a bug."""
    if isinstance(error, LoraGpt2Error):
        return error
    if isinstance(error, click.exceptions.Abort | KeyboardInterrupt):
        return Interrupted("stopped", "what was finished is kept")
    if isinstance(error, click.ClickException):
        return _translate_usage(error)
    if is_out_of_memory(error):
        return ResourceError("there is not enough memory", HINT)
    if isinstance(error, OSError):
        return translate_os_error(error, "use a file")
    frames = traceback.extract_tb(error.__traceback__)
    name = frames[-1].name if frames else ""
    identifier = f"{zlib.crc32(f'{name}:{type(error).__name__}'.encode()):08x}"
    return LoraGpt2Error(
        f"a bug ({identifier}): {type(error).__name__}: {error}", "please report it with the output of --debug"
    )


def _translate_usage(error: click.ClickException) -> UsageError:
    """Returns our error for what click says of the words of a command line."""
    context = getattr(error, "ctx", None)
    hint = f"see '{context.command_path} --help'" if context else "see 'lora-gpt2 --help'"
    if isinstance(error, click.NoSuchOption):
        return UsageError(f"there is no option {error.option_name}", _suggest_option(error) or hint)
    is_bare = isinstance(error, click.exceptions.NoArgsIsHelpError)
    return UsageError("a command is missing" if is_bare else " ".join(error.format_message().split()), hint)


def _suggest_option(error: click.NoSuchOption) -> str:
    from difflib import get_close_matches

    from lora_gpt2.core.synonyms import find_option

    if error.option_name in GLOBAL_OPTIONS:
        return f"it goes before the command: lora-gpt2 {error.option_name} …"
    found = find_option(error.option_name)
    known = {name for param in error.ctx.command.params for name in param.opts} if error.ctx else set()
    is_here = not found.startswith("--") or found.split()[0] in known
    if found and is_here:
        return f"here it is: {found}"
    near = get_close_matches(error.option_name, known, n=1, cutoff=NEAR)
    return f"did you mean {near[0]}?" if near else ""


def report(error: LoraGpt2Error, as_json: bool) -> None:
    """Writes an error: one line and a hint on stderr, or one JSON document on stdout."""
    if as_json:
        content = {"type": type(error).__name__, "message": error.message, "hint": error.hint}
        try:
            sys.stdout.write(json.dumps({"error": content}) + "\n")
            sys.stdout.flush()
        except OSError:  # it may be why there is an error
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        else:
            return
    said = "" if isinstance(error, Interrupted) else "error: "  # which the user asked for
    with suppress(OSError):
        sys.stderr.write(f"{said}{printable(error.message)}\n  {printable(error.hint)}\n")
        sys.stderr.flush()
