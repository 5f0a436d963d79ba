"""Progress and messages on stderr; stdout belongs to results.

The domain reports through the `Reporter` protocol and never prints. `RichReporter` draws a live line on a terminal and
plain lines elsewhere; `LoggingReporter` is for Python users, `SilentReporter` for tests. `rich` is imported only when
something is drawn.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import IO, Any, Protocol, TextIO, cast, runtime_checkable

from lora_gpt2.core.printable import printable

LOG = logging.getLogger("lora_gpt2")


@runtime_checkable
class ProgressTask(Protocol):
    """One piece of long work with a known amount."""

    def advance(self, amount: int, note: str = "") -> None:
        """Says that `amount` more units are done; `note` is shown beside the bar."""


@runtime_checkable
class Reporter(Protocol):
    """Where long work says how far it is."""

    def message(self, text: str) -> None:
        """Says one line that a user should read."""

    def detail(self, text: str) -> None:
        """Says one line that only a curious user wants (`-v`)."""

    def task(self, title: str, total: int, unit: str) -> AbstractContextManager[ProgressTask]:
        """Opens a piece of work of `total` units."""


class SilentTask:
    """Counts and says nothing."""

    def advance(self, amount: int, note: str = "") -> None:
        """Does nothing."""


class SilentReporter:
    """Says nothing."""

    def message(self, text: str) -> None:
        """Does nothing."""

    def detail(self, text: str) -> None:
        """Does nothing."""

    @contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[ProgressTask]:
        """Yields a task that says nothing."""
        yield SilentTask()


@dataclass(frozen=True)
class OnceReporter:
    """Passes on to another reporter, each message once."""

    reporter: Reporter
    _said: set[str] = field(default_factory=set)

    def message(self, text: str) -> None:
        """Shows a line that has not been shown."""
        if text not in self._said:
            self._said.add(text)
            self.reporter.message(text)

    def detail(self, text: str) -> None:
        """Passes a detail on."""
        self.reporter.detail(text)

    def task(self, title: str, total: int, unit: str) -> AbstractContextManager[ProgressTask]:
        """Returns a task of the other reporter."""
        return self.reporter.task(title, total, unit)


def _write_line(line: str) -> None:
    with contextlib.suppress(OSError):  # whoever read it has gone: that ends no work
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


class LineTask:
    """Progress as plain lines, at most one every five seconds, for logs and pipes."""

    def __init__(self, title: str, total: int, unit: str, write: Callable[[str], None] = _write_line) -> None:
        self.write = write
        self.title, self.total, self.unit = printable(title), total, unit
        self.done = 0
        self.started = self.last = time.monotonic()

    def advance(self, amount: int, note: str = "") -> None:
        """Adds `amount`; writes a line when five seconds have passed or the work is complete."""
        self.done += amount
        now = time.monotonic()
        if now - self.last < 5 and self.done < self.total:
            return
        self.last = now
        rate = self.done / max(now - self.started, 1e-9)
        left = max(0, self.total - self.done) / max(rate, 1e-9)
        shown = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        line = f"{self.title}: {self.done:,}/{self.total:,} {self.unit}, {shown} {self.unit}/s, {left:.0f} s left"
        self.write(f"{line}  {printable(note)}".rstrip())


class LoggingReporter:
    """Logs to `logging.getLogger("lora_gpt2")`: messages and progress at INFO, details at DEBUG."""

    def message(self, text: str) -> None:
        """Logs at INFO."""
        LOG.info("%s", printable(text))

    def detail(self, text: str) -> None:
        """Logs at DEBUG."""
        LOG.debug("%s", printable(text))

    @contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[ProgressTask]:
        """Yields a task that logs its progress at INFO, at most every five seconds."""
        yield LineTask(title, total, unit, LOG.info)


class RichReporter:
    """Draws on stderr: a live bar with rate and time left on a terminal, plain lines elsewhere."""

    def __init__(self, verbosity: int = 0) -> None:
        self.verbosity = verbosity

    def message(self, text: str) -> None:
        """Writes one line unless `-q` was given; what a terminal would obey is written out."""
        if self.verbosity >= 0:
            _write_line(printable(text))

    def detail(self, text: str) -> None:
        """Writes one line if `-v` was given."""
        if self.verbosity > 0:
            self.message(text)

    @contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[ProgressTask]:
        """Yields a task that draws itself."""
        if self.verbosity < 0:
            yield SilentTask()
        elif not sys.stderr.isatty():
            yield LineTask(title, total, unit)
        else:
            with _live_bar(title, total, unit) as task:
                yield task


class _PatientStream:
    """A stream whose reader may have gone, which ends no work."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes what can be written."""
        with contextlib.suppress(OSError):
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Sends on what can be sent."""
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _live_bar(title: str, total: int, unit: str) -> Iterator[ProgressTask]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}", markup=False),
    ]
    started = time.monotonic()
    with Progress(
        *columns, console=Console(file=cast("IO[str]", _PatientStream(sys.stderr))), transient=True
    ) as progress:
        identifier = progress.add_task(printable(title), total=total, rate="", note="")

        class BarTask:
            """One line of the live display."""

            done = 0

            def advance(self, amount: int, note: str = "") -> None:
                """Adds `amount` and redraws."""
                self.done += amount
                rate = self.done / max(time.monotonic() - started, 1e-9)
                progress.update(identifier, advance=amount, rate=f"{rate:,.0f} {unit}/s", note=printable(note))

        yield BarTask()
