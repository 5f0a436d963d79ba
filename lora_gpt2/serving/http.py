"""uvicorn around the application: the socket, clients that are slow, and an orderly end.

uvicorn waits for ever for headers that do not come; here a connection without a complete request is closed after a
time. The socket is bound before the base is loaded, so that a port that is taken is said at once.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import ConflictError, ResourceError, UsageError
from lora_gpt2.core.interrupt import StopRequest, catch_signals

if TYPE_CHECKING:
    from lora_gpt2.serving.api import Server

BACKLOG = 4096
KEEP_ALIVE_SECONDS = 15
CUT_OFF_SECONDS = 10  # for a last step, and for the errors to be sent


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket bound to an address.

    Raises:
        UsageError: the host is no address of this machine.
        ConflictError: the port is taken.
        ResourceError: the port needs rights that we have not.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with ExitStack() as undo:
            bound = undo.enter_context(socket.socket(family, kind))
            # where Windows has SO_REUSEADDR, a second server could take the port of the first
            option = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)
            bound.setsockopt(socket.SOL_SOCKET, option, 1)
            bound.bind(address)
            undo.pop_all()
    except PermissionError as error:
        raise ResourceError(f"port {port} requires elevated privileges", "use one above 1023") from error
    except OSError as error:
        if isinstance(error, socket.gaierror) or not is_taken(error):
            raise UsageError(f"{host}:{port} is no address of this machine", "use --host 127.0.0.1") from error
        raise ConflictError(f"port {port} on {host} is taken", "choose another with --port, or 0 for any") from error
    return bound


def is_taken(error: OSError) -> bool:
    """True if an error of `bind` means that somebody else listens there."""
    import errno

    return error.errno == errno.EADDRINUSE


def is_loopback(host: str) -> bool:
    """True if only this machine can reach the host."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def describe_url(bound: socket.socket) -> str:
    """Returns the URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


class PatientProtocol(H11Protocol):
    """uvicorn's protocol, which lets clients go that send no complete request, or take no answer, in time."""

    header_timeout_seconds = 10.0
    send_timeout_seconds = 30.0

    def connection_made(self, transport: Any) -> None:
        """Starts the clocks."""
        self._head_timer: asyncio.TimerHandle | None = None
        self._unsent, self._was_asked = 0, False
        super().connection_made(transport)
        self._send_timer = self.loop.call_later(self.send_timeout_seconds, self._check_sending)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Stops the clock of the head once it is complete; starts it for the next one."""
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clocks."""
        self._send_timer.cancel()
        if self._head_timer is not None:
            self._head_timer.cancel()
        super().connection_lost(exc)

    def _watch_head(self) -> None:
        is_begun = not self._was_asked or bool(self.conn.trailing_data[0])
        is_incomplete = self.conn.their_state is h11.IDLE and is_begun
        # a body that goes on after its answer is no request either
        is_incomplete |= self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE
        self._was_asked |= self.conn.their_state is not h11.IDLE
        if is_incomplete and self._head_timer is None:
            self._head_timer = self.loop.call_later(self.header_timeout_seconds, self.transport.close)
        elif not is_incomplete and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _check_sending(self) -> None:
        """Cuts the connection if nothing of a full buffer, or of a last answer, was taken since the last time."""
        unsent = self.transport.get_write_buffer_size()
        if unsent and unsent >= self._unsent > 0 and (self.flow.write_paused or self.transport.is_closing()):
            self.transport.abort()
            return
        self._unsent = unsent
        self._send_timer = self.loop.call_later(self.send_timeout_seconds / 2, self._check_sending)


class HttpServer(uvicorn.Server):
    """Tells the application when the end begins, and ends when the engine has died."""

    def __init__(self, config: uvicorn.Config, server: Server, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self.served, self.on_started = server, on_started
        self.stop = StopRequest()
        self.was_cut_off = False
        self._leave_at = math.inf

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, then says so."""
        await super().startup(sockets)
        self.on_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to leave at the first signal; the second one ends the server."""
        if self.stop.signal_number:
            super().handle_exit(sig, frame)
        self.stop.signal_number = sig

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second by uvicorn."""
        if self.stop.signal_number and not self.served.is_leaving:
            self.served.is_leaving = True
            is_drained = self.stop.signal_number == signal.SIGTERM
            self._leave_at = time.monotonic() + (self.served.limits.lameduck_seconds if is_drained else 0)
        if self.served.worker.error is not None or time.monotonic() >= self._leave_at:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Lets what has begun end, then stops."""
        self.served.is_draining = True
        if self.served.job is not None:
            self.served.job.tell_to_end()
        cut = asyncio.create_task(self._cut_off())
        await super().shutdown(sockets)
        cut.cancel()

    async def _cut_off(self) -> None:
        """Ends the engine after the grace period: what has not been answered by then gets an error."""
        await asyncio.sleep(self.served.limits.shutdown_grace_seconds)
        self.was_cut_off = True
        await asyncio.to_thread(self.served.worker.close)


def build_http(server: Server, on_started: Callable[[], None] = lambda: None) -> HttpServer:
    """Returns what answers requests on a socket until its `should_exit` is set; the worker must be started."""
    limits = server.limits
    times = {
        "header_timeout_seconds": limits.header_timeout_seconds,
        "send_timeout_seconds": limits.send_timeout_seconds,
    }
    protocol = type("Protocol", (PatientProtocol,), times)
    config = build_config(server.build_app(), protocol, math.ceil(limits.shutdown_grace_seconds) + CUT_OFF_SECONDS)
    return HttpServer(config, server, on_started)


def build_config(app: ASGIApp, protocol: type[PatientProtocol], shutdown_grace_seconds: int) -> uvicorn.Config:
    """Returns how all of our servers listen: quietly, without a proxy's word, and named by nobody."""
    return uvicorn.Config(
        app,
        http=protocol,
        loop="asyncio",
        lifespan="off",
        log_config=None,  # its own would close the handlers of the program that we are part of
        log_level="warning",
        access_log=False,
        ws="none",
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=shutdown_grace_seconds,
    )


def serve(server: Server, bound: socket.socket, reporter: Reporter) -> None:
    """Answers requests until a signal comes.

    Raises:
        Interrupted: SIGINT or SIGTERM, after what had begun was answered.
        ResourceError: the engine died.
    """
    from lora_gpt2.model.runtime import raise_file_limit

    raise_file_limit()
    limits = server.limits
    said = f"serving {server.session.base.name} at {describe_url(bound)} (Ctrl-C ends it)"
    http = build_http(server, lambda: reporter.message(said))
    server.worker.start()
    if server.job is not None:
        server.job.offer_interrupted()
    with catch_signals() as stop:
        http.stop = stop  # uvicorn itself knows nothing of SIGHUP
        try:
            http.run(sockets=[bound])
        finally:
            server.worker.close()
            if server.job is not None:
                server.job.close()
        if server.worker.error is not None:
            raise ResourceError(
                f"the engine failed again and again: {server.worker.error!r}", "restart; please report it"
            ) from server.worker.error
        cut = f"what was not answered within {limits.shutdown_grace_seconds:g} s was cut off"
        stop.raise_if_asked(cut if http.was_cut_off else "what had begun was answered")
