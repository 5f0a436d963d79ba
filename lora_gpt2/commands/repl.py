"""`lora-gpt2 repl`: write a text together with adapters."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from lora_gpt2.commands.settings import setting_options
from lora_gpt2.commands.shared import base_option, seed_option, set_option, store_option
from lora_gpt2.core.console import Reporter
from lora_gpt2.core.dirs import find_state_dir
from lora_gpt2.core.errors import LoraGpt2Error
from lora_gpt2.core.printable import printable
from lora_gpt2.recipe_files import load_recipe
from lora_gpt2.store.catalog import Store

if TYPE_CHECKING:
    from lora_gpt2.inference.repl import Repl


OWN_TEXT = ("/show", "/compare")  # what the user has written and generated


@click.command("repl")
@click.option(
    "--adapter", "adapters", multiple=True, metavar="A[:W]", help="Adapter or mix (a:0.6+b:0.4) to begin with."
)
@click.option("--no-log", is_flag=True, help="Keep no record of what is written; so does LORA_GPT2_LOG=off.")
@seed_option
@setting_options("generate")
@base_option
@set_option
@store_option
@click.pass_obj
def command(
    reporter: Reporter,
    adapters: tuple[str, ...],
    no_log: bool,
    seed: int | None,
    flags: dict[str, Any],
    base: str | None,
    overrides: tuple[str, ...],
    store: Store,
) -> None:
    """Write a text together with adapters: type, let one continue, try another, undo. /help lists the commands.

    GPT-2 continues text; it is no partner for a conversation.

    \b
    Examples:
      lora-gpt2 repl --adapter shakespeare
      printf 'ROMEO:\\n/stats\\n' | lora-gpt2 repl --adapter shakespeare --seed 1
    """
    recipe = load_recipe(None, overrides, {**flags, "base": base})
    from lora_gpt2.inference.history import LocalLog, find_log
    from lora_gpt2.inference.mix import Mix
    from lora_gpt2.inference.open import open_session
    from lora_gpt2.inference.repl import Repl
    from lora_gpt2.inference.routing import AUTO_MIX

    mix = Mix.parse(adapters)
    named = [] if mix == AUTO_MIX else mix.references
    session, _ = open_session(store, named, recipe, recipe.generate.dtype)
    session.load(session.resolve(mix).references if named else [])
    log = LocalLog(None if no_log else find_log(), reporter)
    first = (secrets.randbelow(2**31) if seed is None else seed) - 1
    repl = Repl(
        session=session,
        settings=recipe.generate,
        seed=first,
        log=log,
        on_text=lambda _, piece: click.echo(piece, nl=False, color=True),
        mix=mix,
    )
    if log.path:
        reporter.message(f"continuations are recorded in {log.path}; --no-log ends that")
    is_terminal = sys.stdin.isatty()
    for line in _iter_terminal(repl) if is_terminal else (text.rstrip("\r\n") for text in sys.stdin):
        _run_line(repl, line, reporter)
        if repl.is_over:
            break


def _run_line(repl: Repl, line: str, reporter: Reporter) -> None:
    is_text = not line.startswith("/")
    try:
        if is_text or line.startswith("/retry"):
            click.echo(line if is_text else "", nl=False, color=True)
            said = repl.run(line)
            click.echo()
            for part in said.splitlines():
                reporter.message(part)
        elif said := repl.run(line):
            is_own_text = line.split(maxsplit=1)[0] in OWN_TEXT
            click.echo(said if is_own_text else printable(said, keep_lines=True), color=True)
    except LoraGpt2Error as error:  # one line went wrong: the text is kept
        sys.stderr.write(f"error: {printable(error.message)}\n  {printable(error.hint)}\n")


def _iter_terminal(repl: Repl) -> Iterator[str]:
    """Yields lines from a terminal, with history and completion, until Ctrl-D; Ctrl-C empties the line."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    folder = find_state_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "history").touch(mode=0o600)
        history: Any = FileHistory(str(folder / "history"))
    except OSError:
        history = InMemoryHistory()
    session: Any = PromptSession(history=history, completer=_build_completer(repl), complete_while_typing=False)
    while True:
        try:
            yield session.prompt(lambda: f"{repl.name}> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def _build_completer(repl: Repl) -> Any:
    from prompt_toolkit.completion import Completer, Completion

    class ReplCompleter(Completer):
        """Completes commands, and what belongs behind them."""

        def get_completions(self, document: Any, complete_event: Any) -> Iterator[Any]:
            """Yields the words that may stand at the cursor."""
            text = document.text_before_cursor
            word = text.rpartition(" ")[2]
            for candidate in repl.complete(text):
                yield Completion(candidate, start_position=-len(word))

    return ReplCompleter()
