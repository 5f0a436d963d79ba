"""The pages of runs while they train: curves over server-sent events, and requests to stop.

Everything goes through a run's folder, so the run may be in this process, in another one or on another machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import ConflictError, NotFoundError
from lora_gpt2.core.interrupt import catch_signals
from lora_gpt2.core.pages import STYLE, read_asset, render_page
from lora_gpt2.serving.answers import ApiError, answer_errors, read_json, show_http_error
from lora_gpt2.serving.http import PatientProtocol, bind, build_config, describe_url
from lora_gpt2.serving.middleware import Access, AccessMiddleware
from lora_gpt2.serving.training_job import TrainingJob
from lora_gpt2.training.report import render_run
from lora_gpt2.training.run_reader import Curves, RunReader, list_runs
from lora_gpt2.training.run_status import ALL, OWNER, request_stop

SCRIPT, LIST_SCRIPT = "training.js", "runs.js"
REFRESH_SECONDS, NEWS_SECONDS = 1.0, 10.0
MOST_LISTED, MOST_WATCHED = 100, 16
DRAIN_SECONDS = 2
DEFAULT_PORT = 8002
PAGE, ICON = Path(__file__).parent / "page", "icon.svg"
KINDS = {STYLE: "text/css", SCRIPT: "text/javascript", LIST_SCRIPT: "text/javascript", ICON: "image/svg+xml"}


@dataclass(kw_only=True)
class _Watched:
    """A run that somebody looks at; it is read once for all who do."""

    reader: RunReader
    read_at: float = 0.0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def refresh(self) -> RunReader:
        """Returns the run as it is now, or was a second ago; `lock` must be held."""
        if time.monotonic() > self.read_at + REFRESH_SECONDS / 2:
            await run_in_threadpool(self.reader.refresh)
            self.read_at = time.monotonic()
        return self.reader


@dataclass(kw_only=True)
class RunPages:
    """The routes of the runs in a folder.

    Args:
        folder: a run, or a folder of runs.
        access: who may stop them.
        is_closing: True once streams are to end.
        job: what trains texts that the page sends; None where it takes none.
        owner: only runs that have it are listed; None for all.
        is_private: only who may stop runs sees them.
    """

    folder: Path
    access: Access
    is_closing: Callable[[], bool] = lambda: False
    job: TrainingJob | None = None
    owner: str | None = None
    is_private: bool = False
    _watched: dict[Path, _Watched] = field(default_factory=dict)

    def list_routes(self) -> list[BaseRoute]:
        """Returns the routes, whose pages link each other relatively."""
        own = [] if self.job is None else [Mount("/job", routes=self.job.list_routes())]
        return [
            *own,
            Route("/", answer_errors(self.show_list)),
            Route("/list", answer_errors(self.list_json)),
            *(Route(f"/{name}", answer_errors(self.give_asset)) for name in (STYLE, ICON, LIST_SCRIPT)),
            Route("/{run}/", answer_errors(self.show_run)),
            Route("/{run}/events", answer_errors(self.send_events)),
            Route("/{run}/stop", answer_errors(self.stop), methods=["POST"]),
            Route("/{run}/{asset}", answer_errors(self.give_asset)),
        ]

    def list_runs(self) -> list[RunReader]:
        """Returns the runs, those written to last first."""
        found = []
        for folder in list_runs(self.folder)[:MOST_LISTED]:
            try:
                reader = RunReader(folder, has_curves=False)
            except NotFoundError:
                continue  # it went away
            if self.owner in (None, reader.description.get("owner")):
                found.append(reader)
        return found

    async def show_list(self, request: Request) -> Response:
        """The runs; where there is but one, its page."""
        self._check_view(request)
        runs = await run_in_threadpool(self.list_runs)
        if len(runs) == 1 and self.job is None:
            return RedirectResponse(f"{runs[0].folder.name}/", 302)
        rows = [_describe(run) for run in runs]
        page = render_page("runs.html", linked=True, title="Training", runs=rows, can_train=self.job is not None)
        return HTMLResponse(page)

    async def list_json(self, request: Request) -> Response:
        """The same, for a page that shows it."""
        self._check_view(request)
        return JSONResponse({"runs": [_describe(run) for run in await run_in_threadpool(self.list_runs)]})

    async def give_asset(self, request: Request) -> Response:
        """The style, the script and the icon."""
        name = request.url.path.rpartition("/")[2]
        if name not in KINDS:
            raise ApiError(404, "Not Found")
        content = (PAGE / ICON).read_text(encoding="utf-8") if name == ICON else read_asset(name)
        return Response(content, media_type=KINDS[name], headers={"Cache-Control": "no-cache"})

    def _check_view(self, request: Request) -> None:
        if self.is_private:
            self.access.check_control(request.headers)

    def _find(self, request: Request) -> Path:
        """Returns the folder of the run that a request names; raises `ApiError` 404, or 403 and 401."""
        self._check_view(request)
        name = request.path_params["run"]
        found = [folder for folder in list_runs(self.folder) if folder.name == name]
        if not found:
            raise ApiError(404, f"there is no run {name}")
        return found[0]

    async def _watch(self, request: Request) -> _Watched:
        folder = await run_in_threadpool(self._find, request)
        if folder not in self._watched:
            for old in list(self._watched)[: 1 - MOST_WATCHED]:
                del self._watched[old]  # who looks at it goes on
            self._watched[folder] = _Watched(reader=await run_in_threadpool(RunReader, folder))
        return self._watched[folder]

    async def show_run(self, request: Request) -> Response:
        """The page of a run, which then listens to its events."""
        reader = RunReader(await run_in_threadpool(self._find, request), has_curves=False)
        return HTMLResponse(render_run(reader, is_live=True))

    async def send_events(self, request: Request) -> Response:
        """The whole run, and then what is new about it every second."""
        watched = await self._watch(request)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(self._iter_events(watched), media_type="text/event-stream", headers=headers)

    async def _iter_events(self, watched: _Watched) -> AsyncIterator[str]:
        cursor, sent_at = _Cursor(), 0.0
        while not self.is_closing() or (self.job and self.job.is_busy):  # it shows how a training ends
            async with watched.lock:
                reader = await watched.refresh()
                message = await run_in_threadpool(cursor.take, reader)
            if message or time.monotonic() > sent_at + NEWS_SECONDS:
                message = message or {"status": reader.describe_status(), "curves": {}}
                yield f"data: {json.dumps(message, allow_nan=False)}\n\n"
                sent_at = time.monotonic()
            await asyncio.sleep(REFRESH_SECONDS)
        async with watched.lock:
            watched.read_at = 0.0  # how it ended, which was written just now
            message = await run_in_threadpool(cursor.take, await watched.refresh())
        if message:
            yield f"data: {json.dumps(message, allow_nan=False)}\n\n"

    async def stop(self, request: Request) -> Response:
        """POST {"adapter": NAME, or null for all}: their training ends, and what they have learnt is published."""
        self.access.check_control(request.headers)
        name = (await read_json(request)).get("adapter")
        reader = RunReader(await run_in_threadpool(self._find, request), has_curves=False)
        if name is not None and name not in reader.names:
            raise ApiError(404, "no adapter of this run has that name", "adapter")
        if reader.state != "training":
            raise ApiError(409, "the run has ended")
        await run_in_threadpool(request_stop, reader.folder, ALL if name is None else name)
        return JSONResponse({"asked": name})


@dataclass(kw_only=True)
class _Cursor:
    """How much of a run a page has."""

    generation: int = -1
    counts: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    state: str = ""

    def take(self, reader: RunReader) -> dict[str, Any] | None:
        """Returns what is new, None if nothing is."""
        before, self.counts = self.counts, {name: _count(curves) for name, curves in reader.curves.items()}
        is_same = (reader.status, reader.state) == (self.status, self.state)
        self.status, self.state = reader.status, reader.state
        if reader.generation != self.generation:
            self.generation = reader.generation
            return reader.to_json()
        grown = [name for name, count in self.counts.items() if count != before.get(name)]
        if is_same and not grown:
            return None
        news = {name: reader.curves[name].to_json(before.get(name, (0, 0, 0))) for name in grown}
        return {"status": reader.describe_status(), "curves": news}


def _count(curves: Curves) -> tuple[int, int, int]:
    return len(curves.points), len(curves.validations), curves.num_open


def _describe(run: RunReader) -> dict[str, Any]:
    """Returns what a list of runs shows of one."""
    names = run.names
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    begun = run.description.get("started", "")
    return {"key": run.folder.name, "adapters": shown, "state": run.state, "begun": begun}


def build_watch_server(pages: RunPages) -> uvicorn.Server:
    """Returns what gives out the pages of runs."""
    app = Starlette(routes=pages.list_routes(), exception_handlers={404: show_http_error, 405: show_http_error})
    server = uvicorn.Server(build_config(AccessMiddleware(app, pages.access), PatientProtocol, DRAIN_SECONDS))
    pages.is_closing = lambda: server.should_exit
    return server


def watch(folder: Path, host: str, port: int | None, access: Access, reporter: Reporter) -> None:
    """Gives out the pages of the runs in a folder until a signal comes; raises what `bind` does."""
    bound = _bind_free(host) if port is None else bind(host, port)
    server = build_watch_server(RunPages(folder=folder, access=access))
    reporter.message(f"watch at {describe_url(bound)} (Ctrl-C ends it, and no training)")
    with catch_signals():
        server.run(sockets=[bound])


def _bind_free(host: str) -> socket.socket:
    """Returns a listening socket on the usual port, or on any where that is taken, as by another run."""
    try:
        bound = bind(host, DEFAULT_PORT)
        bound.listen()  # so that who reads the address at once is answered, as soon as the server runs
    except (ConflictError, OSError):
        bound = bind(host, 0)
        bound.listen()
    return bound


@contextmanager
def watch_this_process(folder: Path, reporter: Reporter) -> Iterator[None]:
    """Gives out the pages of this process's runs, to this machine alone, while the block runs."""
    bound = _bind_free("127.0.0.1")
    access = Access(admin_key=os.environ.get("LORA_GPT2_ADMIN_KEY") or None, is_local=True)
    owner = os.environ.setdefault(OWNER, secrets.token_hex(8))
    server = build_watch_server(RunPages(folder=folder, access=access, owner=owner))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, name="lora-gpt2-watch", daemon=True)
    thread.start()
    reporter.message(f"watch at {describe_url(bound)}")
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(timeout=2 * DRAIN_SECONDS)
