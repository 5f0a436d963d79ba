"""The engine's thread: it owns the session and decodes all requests in one batch; the rest of the server only asks it.

A request is admitted as a whole or not at all: the queue is bounded, so an overload is answered at once instead of
being queued without limit. A step that fails ends the sequences that were running, with an error, and the next request
finds an empty engine; after several failures in a row the worker is dead, says so, and the server ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from lora_gpt2.core.errors import BusyError, EngineFailed, LoraGpt2Error, ResourceError
from lora_gpt2.inference.engine import Engine
from lora_gpt2.inference.sequence import SequenceState, TokenLogprobs
from lora_gpt2.inference.session import Session

MAX_FAILURES = 3
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """What a step produced for one sequence; immutable, so that another thread may read it.

    Args:
        index: the sequence's index in its request.
        text: the text that the step completed.
        logprobs: log-probabilities of the step's tokens.
        prompt_logprobs: those of the prompt, in the first output of a sequence that scores it.
        num_tokens: tokens generated so far.
        finish_reason: "" while the sequence is running.
        error: the error that finished it, if one did.
    """

    index: int
    text: str
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]
    num_tokens: int
    finish_reason: str
    error: Exception | None


@dataclass(eq=False)
class PendingRequest:
    """The sequences of one request, and the callbacks for its outputs, both called in the worker's thread."""

    sequences: Sequence[SequenceState]
    on_output: Callable[[list[StepOutput]], None]
    on_error: Callable[[BaseException], None]


@dataclass
class _Progress:
    """The request of a sequence, and how many log-probabilities were passed on."""

    request: PendingRequest
    num_logprobs: int = 0
    is_new: bool = True

    def take(self, sequence: SequenceState, text: str) -> StepOutput:
        """Returns what is new about a sequence."""
        logprobs = tuple(sequence.logprobs[self.num_logprobs :])
        prompt_logprobs = tuple(sequence.prompt_logprobs) if self.is_new else ()
        self.num_logprobs += len(logprobs)
        self.is_new = False
        return StepOutput(
            index=sequence.index,
            text=text,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            num_tokens=len(sequence.new_ids),
            finish_reason=sequence.finish_reason,
            error=sequence.error,
        )


class Worker:
    """Decodes the sequences of requests until they finish; `error` is set when it has died.

    Args:
        session: used by nobody else from now on, except for its `resolve` and `fetch`.
        max_num_seqs: maximum number of sequences decoded concurrently.
        max_waiting: maximum number of queued sequences.
        on_step: called after each step with the numbers of sequences in it, still running, and waiting.
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
        self._engine = Engine(session, max_num_seqs, session.base.config.n_positions)
        self._changed = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._progress: dict[SequenceState, _Progress] = {}
        self._num_admitted = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="lora-gpt2-engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    @property
    def num_admitted(self) -> int:
        """Number of sequences that are running or queued."""
        return self._num_admitted

    def check_room(self) -> None:
        """Raises what `submit` would for one more sequence; asked before anything is read for it."""
        with self._changed:
            self._check_alive()
            self._check_room(1)

    def _check_room(self, num_sequences: int) -> None:
        if self._num_admitted and self._num_admitted + num_sequences > self.max_num_seqs + self.max_waiting:
            raise BusyError(f"{self._num_admitted} sequences are running or queued", "retry later")

    def submit(self, request: PendingRequest) -> None:
        """Admits a request; any thread may call it.

        Raises:
            BusyError: too many sequences are running and queued already.
            ResourceError: the worker is dead or closed.
        """
        num_sequences = sum(map(_count_beams, request.sequences))
        with self._changed:
            self._check_alive()
            self._check_room(num_sequences)
            self._num_admitted += num_sequences
            self._inbox.append(lambda: self._admit(request))
            self._changed.notify()

    def cancel(self, request: PendingRequest) -> None:
        """Ends a request whose client has disconnected; any thread may call it."""
        with self._changed:
            self._inbox.append(lambda: self._stop(request))
            self._changed.notify()

    def call(self, action: Callable[[], T]) -> Future[T]:
        """Runs an action on the session in the worker's thread, between two steps; any thread may call it."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(action())
            except Exception as error:  # noqa: BLE001 - it is raised again where the result is awaited
                future.set_exception(error)

        with self._changed:
            self._check_alive()
            self._inbox.append(run)
            self._changed.notify()
        return future

    def close(self) -> None:
        """Ends the thread; requests that have not finished by then get an error."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def _check_alive(self) -> None:
        if self.error is not None:
            raise EngineFailed("the engine has failed", "restart the server")
        if self._is_closed:
            raise ResourceError("the server is shutting down", "retry on another server")

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
                self._fail_all(ResourceError("the server was shut down", "retry on another server"))
                return
            if not self._engine.is_busy:
                continue
            try:
                self._step()
                failures = 0
            except Exception as error:  # noqa: BLE001 - the waiting requests are told, and the next ones find it empty
                failures += 1
                if failures >= MAX_FAILURES:
                    self._die(error)
                    return
                self._fail_all(error)

    def _die(self, error: BaseException) -> None:
        with self._changed:
            self.error = error
            actions, self._inbox = self._inbox, []
        with suppress(Exception):  # nothing is left to be saved
            for action in actions:
                action()  # requests that have just arrived are told as well
            self._fail_all(error)

    def _admit(self, request: PendingRequest) -> None:
        for sequence in request.sequences:
            self._progress[sequence] = _Progress(request)
            self._engine.submit(sequence)

    def _stop(self, request: PendingRequest) -> None:
        for sequence in request.sequences:
            if sequence in self._progress:
                self._engine.stop(sequence, "cancelled")
                self._forget(sequence)

    def _step(self) -> None:
        outputs: dict[PendingRequest, list[StepOutput]] = {}
        stepped = self._engine.step()
        for sequence, text in stepped:
            if progress := self._progress.get(sequence):
                outputs.setdefault(progress.request, []).append(progress.take(sequence, text))
                if sequence.finish_reason:
                    self._forget(sequence)
        if self.on_step is not None:
            self.on_step(len(stepped), self._engine.num_running, self._engine.num_waiting)
        for request, items in outputs.items():
            request.on_output(items)

    def _forget(self, sequence: SequenceState) -> None:
        del self._progress[sequence]
        with self._changed:
            self._num_admitted -= _count_beams(sequence)

    def _fail_all(self, error: BaseException) -> None:
        """Tells every request that it has failed, and forgets its sequences and the adapters they pinned."""
        requests = {progress.request for progress in self._progress.values()}
        for sequence in list(self._progress):
            self._forget(sequence)
        shown = error if isinstance(error, LoraGpt2Error) else EngineFailed("the engine failed", "retry the request")
        for request in requests:
            request.on_error(shown)
        self._engine.reset()  # last: on a device that has failed it fails too


def _count_beams(sequence: SequenceState) -> int:
    """Returns the rows that a sequence takes; those of a beam search are counted with its best text."""
    return 0 if sequence.settings.num_beams > 1 and sequence.beam_rank else sequence.settings.num_beams
