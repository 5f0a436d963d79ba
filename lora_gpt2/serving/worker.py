"""One thread owns the session and grows every request's rows in one batch; the rest of the server only asks it.

A request is admitted whole or not at all: what may wait is bounded, so an overload is answered at once instead of
being kept. A step that fails ends what it grew, with an error, and the next request finds a new engine; when it fails
again and again the worker is dead, says so, and the server ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from lora_gpt2.core.errors import LoraGpt2Error, ResourceError
from lora_gpt2.inference.engine import Engine, Row
from lora_gpt2.inference.session import Session

MAX_FAILURES = 3
T = TypeVar("T")


class BusyError(ResourceError):
    """As much is waiting as may wait."""


class EngineFailed(ResourceError):
    """A step failed, or one row of it; what it grew is lost."""


@dataclass(frozen=True)
class StepOutput:
    """What a step did to one row: the text it completed, its log-probabilities by then, and whether it has ended."""

    row: Row
    text: str
    num_logprobs: int
    is_end: bool


@dataclass(eq=False)
class PendingRequest:
    """The rows of one request, and where its answers go; both callbacks are called in the worker's thread."""

    rows: Sequence[Row]
    on_output: Callable[[list[StepOutput]], None]
    on_error: Callable[[BaseException], None]


class Worker:
    """Grows the rows of tickets until they end; `error` is what it died of.

    Args:
        session: used by nobody else from now on, its `resolve` and `read` excepted.
        max_num_seqs: continuations that grow at the same time.
        max_waiting: continuations that may wait.
        on_step: called after each step with the number of rows that grew, of those that go on and of those that wait.
    """

    def __init__(
        self,
        session: Session,
        max_num_seqs: int,
        max_waiting: int,
        on_step: Callable[[int, int, int], None] | None = None,
    ) -> None:
        self.session, self.max_num_seqs, self.max_waiting, self.on_step = session, max_num_seqs, max_waiting, on_step
        self.error: BaseException | None = None
        self._engine = Engine(session, max_num_seqs, session.base.config.context)
        self._changed = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._tickets: dict[int, PendingRequest] = {}
        self._num_admitted = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="lora-gpt2-engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    @property
    def num_admitted(self) -> int:
        """Rows that grow or wait."""
        return self._num_admitted

    def check_room(self) -> None:
        """Raises what `submit` would for one more row; asked before anything is read for it."""
        with self._changed:
            self._check_alive()
            self._check_room(1)

    def _check_room(self, wanted: int) -> None:
        if self._num_admitted and self._num_admitted + wanted > self.max_num_seqs + self.max_waiting:
            raise BusyError(f"{self._num_admitted} continuations are in work or waiting", "try again later")

    def submit(self, ticket: PendingRequest) -> None:
        """Admits a request; any thread may call it.

        Raises:
            BusyError: too many rows grow and wait already.
            ResourceError: the worker is dead or closed.
        """
        with self._changed:
            self._check_alive()
            self._check_room(sum(map(_weigh, ticket.rows)))
            self._num_admitted += sum(map(_weigh, ticket.rows))
            self._inbox.append(lambda: self._admit(ticket))
            self._changed.notify()

    def cancel(self, ticket: PendingRequest) -> None:
        """Ends a request whose client has gone; any thread may call it."""
        with self._changed:
            self._inbox.append(lambda: self._stop(ticket))
            self._changed.notify()

    def call(self, action: Callable[[], T]) -> Future[T]:
        """Lets the worker's thread do something with the session between two steps; any thread may call it."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(action())
            except Exception as error:  # noqa: BLE001 - it is raised again where it is waited for
                future.set_exception(error)

        with self._changed:
            self._check_alive()
            self._inbox.append(run)
            self._changed.notify()
        return future

    def close(self) -> None:
        """Ends the thread; what has not ended by then gets an error."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def _check_alive(self) -> None:
        if self.error is not None:
            raise EngineFailed("the engine has failed", "restart the server")
        if self._is_closed:
            raise ResourceError("the server is shutting down", "ask another one")

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:  # noqa: BLE001 - whatever it was, nobody may wait for ever
            self._die(error)

    def _loop(self) -> None:
        failures = 0
        while True:
            with self._changed:
                while not (self._inbox or self._engine.is_busy or self._is_closed):
                    self._changed.wait()
                actions, self._inbox = self._inbox, []
            for action in actions:
                action()
            if self._is_closed:
                self._fail_all(ResourceError("the server was shut down", "ask again"))
                return
            if not self._engine.is_busy:
                continue
            try:
                self._step()
                failures = 0
            except Exception as error:  # noqa: BLE001 - those who wait are told, and the next ones find it empty
                failures += 1
                if failures >= MAX_FAILURES:
                    self._die(error)
                    return
                self._fail_all(error)

    def _die(self, error: BaseException) -> None:
        with self._changed:
            self.error = error
            actions, self._inbox = self._inbox, []
        for action in actions:
            action()  # who has just come is told as well
        self._fail_all(error)

    def _admit(self, ticket: PendingRequest) -> None:
        for row in ticket.rows:
            self._tickets[id(row)] = ticket
            self._engine.submit(row)

    def _stop(self, ticket: PendingRequest) -> None:
        for row in ticket.rows:
            if id(row) in self._tickets:
                self._engine.stop(row, "cancelled")
                self._forget(row)

    def _step(self) -> None:
        grown: dict[PendingRequest, list[StepOutput]] = {}
        stepped = self._engine.step()
        for row, text in stepped:
            if ticket := self._tickets.get(id(row)):
                is_end = bool(row.finish_reason)
                grown.setdefault(ticket, []).append(StepOutput(row, text, len(row.logprobs), is_end))
                if is_end:
                    self._forget(row)
        if self.on_step is not None:
            self.on_step(len(stepped), self._engine.num_running, len(self._engine.waiting))
        for ticket, events in grown.items():
            ticket.on_output(events)

    def _forget(self, row: Row) -> None:
        del self._tickets[id(row)]
        with self._changed:
            self._num_admitted -= _weigh(row)

    def _fail_all(self, error: BaseException) -> None:
        """Tells every request that it has failed, and forgets its rows and what they held."""
        tickets = set(self._tickets.values())
        for ticket in tickets:
            for row in ticket.rows:
                if id(row) in self._tickets:
                    self._forget(row)
        self._engine.reset()
        self.session.release_all()
        shown = error if isinstance(error, LoraGpt2Error) else EngineFailed("the engine failed", "ask again")
        for ticket in tickets:
            ticket.on_error(shown)


def _weigh(row: Row) -> int:
    """Returns how many sequences a row is: one, or its beams."""
    return row.settings.num_beams
