"""Sessions at the keyboard, for `repl` and `chat`: opens one, and does line after line from a terminal or a pipe."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.dirs import find_state_dir
from lora_gpt2.core.errors import LoraGpt2Error
from lora_gpt2.core.printable import printable

if TYPE_CHECKING:
    from lora_gpt2.inference.command_loop import CommandLoop
    from lora_gpt2.recipe import Recipe
    from lora_gpt2.store.catalog import Store

    Loop = TypeVar("Loop", bound=CommandLoop)

OWN_TEXT = ("/show", "/compare")  # what the user has written and generated


def open_loop(
    kind: type[Loop],
    store: Store,
    adapters: Sequence[str],
    recipe: Recipe,
    reporter: Reporter,
    *,
    seed: int | None,
    is_logged: bool,
) -> Loop:
    """Returns a session with these adapters loaded; says where what is written is recorded."""
    from lora_gpt2.inference.history import LocalLog, find_log
    from lora_gpt2.inference.mix import Mix
    from lora_gpt2.inference.open import open_session
    from lora_gpt2.inference.routing import AUTO_MIX

    mix = Mix.parse(adapters)
    named = [] if mix == AUTO_MIX else mix.references
    session, _ = open_session(store, named, recipe, recipe.generate.dtype)
    session.load(session.resolve(mix).references if named else [])
    log = LocalLog(find_log() if is_logged else None, reporter)
    if log.path:
        reporter.message(f"continuations are recorded in {log.path}; --no-log ends that")
    return kind(
        session=session,
        settings=recipe.generate,
        seed=(secrets.randbelow(2**31) if seed is None else seed) - 1,
        log=log,
        on_text=lambda _, piece: click.echo(piece, nl=False, color=True),
        mix=mix,
    )


def run_lines(loop: CommandLoop, reporter: Reporter, *, is_echoed: bool) -> None:
    """Does what is typed, or comes on stdin, line by line; with `is_echoed` typed text is part of what is written."""
    is_terminal = sys.stdin.isatty()
    for line in _iter_terminal(loop) if is_terminal else (text.rstrip("\r\n") for text in sys.stdin):
        _run_line(loop, line, reporter, is_echoed=is_echoed)
        if loop.is_over:
            break


def _run_line(loop: CommandLoop, line: str, reporter: Reporter, *, is_echoed: bool) -> None:
    is_text = not line.startswith("/")
    try:
        if is_text or line.startswith("/retry"):
            click.echo(line if is_text and is_echoed else "", nl=False, color=True)
            said = loop.run(line)
            click.echo()
            for part in said.splitlines():
                reporter.message(part)
        elif said := loop.run(line):
            is_own_text = line.split(maxsplit=1)[0] in OWN_TEXT
            click.echo(said if is_own_text else printable(said, keep_lines=True), color=True)
    except LoraGpt2Error as error:  # one line went wrong: all before it is kept
        sys.stderr.write(f"error: {printable(error.message)}\n  {printable(error.hint)}\n")


def _iter_terminal(loop: CommandLoop) -> Iterator[str]:
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
    session: Any = PromptSession(history=history, completer=_build_completer(loop), complete_while_typing=False)
    while True:
        try:
            yield session.prompt(lambda: f"{loop.name}> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def _build_completer(loop: CommandLoop) -> Any:
    from prompt_toolkit.completion import Completer, Completion

    class LineCompleter(Completer):
        """Completes commands, and what belongs behind them."""

        def get_completions(self, document: Any, complete_event: Any) -> Iterator[Any]:
            """Yields the words that may stand at the cursor."""
            text = document.text_before_cursor
            word = text.rpartition(" ")[2]
            for candidate in loop.complete(text):
                yield Completion(candidate, start_position=-len(word))

    return LineCompleter()
