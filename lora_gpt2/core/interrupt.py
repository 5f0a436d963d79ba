"""Ctrl-C and SIGTERM as a question that long work asks between two steps.

The first signal is noted, so that the step in progress ends and is kept; the second ends the process at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lora_gpt2.core.errors import Interrupted

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # Windows has no SIGHUP, but Ctrl-Break
SIGNALS: tuple[signal.Signals, ...] = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))


class StopRequest:
    """`signal_number` is 0 until somebody asks the work to stop."""

    signal_number = 0

    def raise_if_asked(self, kept: str, signal_number: int | None = None) -> None:
        """Raises `Interrupted` if a signal came (here, or to a fellow process); `kept` says what the user has now."""
        number = self.signal_number if signal_number is None else signal_number
        if number:
            raise Interrupted(f"stopped by {signal.Signals(number).name}", kept, number)


@contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """Yields a request that a first signal fills in; outside the main thread it stays empty.

    Signals that are ignored (under `nohup`, say) stay so.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    found = {number: signal.getsignal(number) for number in SIGNALS}
    previous = {number: handler for number, handler in found.items() if handler not in (signal.SIG_IGN, None)}

    def note(number: int, frame: FrameType | None) -> None:
        request.signal_number = number
        for each, handler in previous.items():
            signal.signal(each, handler)

    for number in previous:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
