"""The routes: completions, models, adapters, health, metrics, and the web page's files.

A handler reads and checks a body, has the adapters read in another thread, admits the rows to the worker, and passes
on what they write. Nothing here computes, and nothing waits without a limit.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from lora_gpt2.core.errors import LoraGpt2Error
from lora_gpt2.inference.generate import describe_provenance
from lora_gpt2.inference.session import BASE, Loaded, Mix, Session
from lora_gpt2.recipe import GenerateSettings, ServeSettings
from lora_gpt2.serving.guard import Guard, has_key
from lora_gpt2.serving.metrics import Metrics
from lora_gpt2.serving.wire import (
    ApiError,
    Choice,
    CompletionBody,
    build_answer,
    build_rows,
    build_usage,
    parse_body,
    parse_json,
    parse_model,
    read_model,
    translate_error,
)
from lora_gpt2.serving.worker import BusyError, EngineFailed, Grown, Ticket, Worker
from lora_gpt2.store.listing import list_current

PAGE = Path(__file__).parent / "page"
CREATED = 1_546_300_800  # what OpenAI's list says of a base: when it came out; GPT-2's year, 2019
READ_AND_REFUSED = 4  # times the largest body: who sends a little too much shall read the answer
T = TypeVar("T")


@dataclass(frozen=True)
class Access:
    """Who may ask: keys (None for none), further host names, and origins that browsers may come from."""

    key: str | None = None
    admin_key: str | None = None
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()


@dataclass
class Server:
    """A session, the worker that grows its rows, and what is counted."""

    session: Session
    defaults: GenerateSettings
    limits: ServeSettings
    access: Access = Access()
    metrics: Metrics = field(default_factory=Metrics)
    is_draining: bool = False
    num_done: int = 0
    busy_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.worker = Worker(self.session, self.limits.max_rows, self.limits.max_waiting, self._note_step)

    def _note_step(self, growing: int, waiting: int) -> None:
        self.metrics.note_step(growing, waiting, self.session.num_loads)

    def build_app(self) -> Starlette:
        """Returns the ASGI application; the worker must be started."""
        routes = [
            Route("/v1/completions", self._answer("completions", self.complete), methods=["POST"]),
            Route("/v1/models", self._answer("models", self.list_models)),
            Route("/v1/models/{model:path}", self._answer("models", self.show_model)),
            Route("/v1/adapters", self._answer("adapters", self.list_adapters)),
            Route("/v1/adapters/load", self._answer("adapters", self.load_adapter), methods=["POST"]),
            Route("/v1/adapters/unload", self._answer("adapters", self.unload_adapter), methods=["POST"]),
            Route("/healthz", self._answer("health", self.show_health)),
            Route("/readyz", self._answer("health", self.show_ready)),
            Route("/metrics", self._answer("metrics", self.show_metrics)),
            Mount("/", StaticFiles(directory=PAGE, html=True)),
        ]
        access = self.access
        middleware = [Middleware(Guard, hosts=access.hosts, key=access.key, admin_key=access.admin_key)]
        if access.origins:
            methods, headers = ["GET", "POST"], ["Authorization", "Content-Type"]
            cors = Middleware(
                CORSMiddleware, allow_origins=access.origins, allow_methods=methods, allow_headers=headers
            )
            middleware.insert(0, cors)
        handlers: dict[Any, Any] = {HTTPException: _show_http_error, Exception: _show_bug}
        return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)

    def _answer(
        self, route: str, handler: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """Wraps a handler: errors get OpenAI's shape, answers are counted."""

        async def answer(request: Request) -> Response:
            try:
                response = await handler(request)
            except ClientDisconnect:
                response = Response(status_code=499)
            except BusyError as error:
                wait = {"Retry-After": str(self.estimate_wait())}
                busy = ApiError(429, f"{error.message}; {error.hint}", None, "rate_limit_exceeded")
                response = JSONResponse(busy.to_json(), 429, wait)
            except ApiError as error:
                unread = {"Connection": "close"} if error.status in (408, 413, 415) else None  # the body may still come
                response = JSONResponse(error.to_json(), error.status, unread)
            except EngineFailed as error:
                response = JSONResponse(ApiError(500, f"{error.message}; {error.hint}").to_json(), 500)
            except LoraGpt2Error as error:
                ours = translate_error(error)
                response = JSONResponse(ours.to_json(), ours.status)
            self.metrics.requests.labels(route, response.status_code).inc()
            return response

        return answer

    def estimate_wait(self) -> int:
        """Returns in how many seconds a waiting place is likely free: the mean time of a request, at least 1."""
        return max(1, round(self.busy_seconds / self.num_done)) if self.num_done else 1

    async def read_body(self, request: Request) -> bytes:
        """Returns a JSON request's body; raises `ApiError` 408, 413 or 415."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "the body must be application/json")
        limit, content = self.limits.max_body_bytes, bytearray()
        declared = request.headers.get("content-length", "0")
        too_large = ApiError(413, f"the body is larger than {limit} bytes")
        if not declared.isdigit() or int(declared) > READ_AND_REFUSED * limit:
            raise too_large
        size = 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for piece in request.stream():
                    size += len(piece)
                    content += piece if size <= limit else b""
                    if size > READ_AND_REFUSED * limit:
                        break
        except TimeoutError as error:
            raise ApiError(408, f"the body did not come within {self.limits.body_seconds:g} seconds") from error
        if size > limit:
            raise too_large
        return bytes(content)

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        content = await self.read_body(request)
        started = time.monotonic()
        body = parse_body(content)
        if self.is_draining:
            raise ApiError(503, "the server is shutting down")
        seed = secrets.randbelow(2**31) if body.seed is None else body.seed % 2**63
        rows = await run_in_threadpool(build_rows, body, self.session, self.defaults, self.limits, seed)
        origin = describe_provenance(self.session, rows[0])
        call = Call(self, body, [Choice(row, body) for row in rows], origin, started)
        call.submit()
        if body.stream:
            return EventStream(call, self.limits.send_seconds)
        return JSONResponse(await call.collect(request))

    async def list_models(self, request: Request) -> Response:
        """GET /v1/models: the base, then the adapters of this base."""
        return JSONResponse({"object": "list", "data": await run_in_threadpool(self._describe_models)})

    async def show_model(self, request: Request) -> Response:
        """GET /v1/models/{model}; a version or a mix is shown too."""
        name = request.path_params["model"]
        known = {model["id"]: model for model in await run_in_threadpool(self._describe_models)}
        if name not in known:
            await run_in_threadpool(parse_model, name, self.session)
        return JSONResponse(known.get(name) or describe_model(name))

    def _describe_models(self) -> list[dict[str, Any]]:
        base, store = self.session.base, self.session.store
        models = [describe_model(BASE, base=base.name, context=base.config.context)]
        for row in list_current(store)[0] if store is not None else []:
            if row["base_fingerprint"] == base.fingerprint:
                models.append(describe_model(row["name"], **{key: row[key] for key in row if key != "name"}))
        return models

    async def list_adapters(self, request: Request) -> Response:
        """GET /v1/adapters: what is in the slots."""
        self._check_admin(request)
        loaded = await self._call(lambda: self.session.loaded)
        return JSONResponse({"loaded": loaded, "max_slots": self.limits.max_slots})

    async def load_adapter(self, request: Request) -> Response:
        """POST /v1/adapters/load {"name": ...}: brings an adapter into a slot before it is asked for."""
        _, loaded = await self._read_admin_model(request)
        await self._call(lambda: self.session.put(loaded))
        return JSONResponse({"loaded": list(loaded)})

    async def unload_adapter(self, request: Request) -> Response:
        """POST /v1/adapters/unload {"name": ...}: frees its slot; 409 while it is in use."""
        mix, _ = await self._read_admin_model(request)
        dropped = await self._call(lambda: [name for name, _ in mix if self.session.drop(name)])
        if not dropped:
            raise ApiError(409, "the adapter is in use, or not loaded", "name")
        return JSONResponse({"unloaded": dropped})

    async def _read_admin_model(self, request: Request) -> tuple[Mix, dict[str, Loaded]]:
        self._check_admin(request)
        name = parse_json(await self.read_body(request)).get("name")
        if not isinstance(name, str):
            raise ApiError(400, "name is an adapter, or name@version", "name")
        return await run_in_threadpool(read_model, name, self.session)

    def _check_admin(self, request: Request) -> None:
        key = self.access.admin_key
        if key is None:
            raise ApiError(403, "start the server with LORA_GPT2_ADMIN_KEY to use this", None, "no_admin_key")
        if not has_key(request.headers, key):
            raise ApiError(401, "the admin key is needed: Authorization: Bearer KEY", None, "invalid_api_key")

    async def _call(self, action: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self.worker.call(action))

    async def show_health(self, request: Request) -> Response:
        """GET /healthz: 200 while the engine lives."""
        if self.worker.error is not None:
            raise ApiError(503, f"the engine has failed: {type(self.worker.error).__name__}")
        return JSONResponse({"status": "ok"})

    async def show_ready(self, request: Request) -> Response:
        """GET /readyz: 200 while new requests are taken on."""
        await self.show_health(request)
        if self.is_draining:
            raise ApiError(503, "the server is shutting down")
        return JSONResponse({"status": "ready", "base": self.session.base.name})

    async def show_metrics(self, request: Request) -> Response:
        """GET /metrics in Prometheus' text format."""
        return Response(self.metrics.render(), media_type="text/plain; version=0.0.4")


def describe_model(name: str, **more: Any) -> dict[str, Any]:
    """Returns a model object."""
    return {"id": name, "object": "model", "created": CREATED, "owned_by": "lora-gpt2", **more}


async def _show_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(ApiError(error.status_code, error.detail).to_json(), error.status_code, error.headers)


async def _show_bug(request: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, f"a bug: {type(error).__name__}; see the server's log").to_json(), 500)


@dataclass
class Call:
    """One completions request on its way through the worker."""

    server: Server
    body: CompletionBody
    choices: list[Choice]
    origin: dict[str, Any]
    started: float

    def __post_init__(self) -> None:
        self.identifier, self.created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[list[Grown] | BaseException]()

        def pass_on(item: list[Grown] | BaseException) -> None:
            with suppress(RuntimeError):  # the loop has ended: nobody waits any more
                loop.call_soon_threadsafe(self._queue.put_nowait, item)

        self._ticket = Ticket([choice.row for choice in self.choices], pass_on, pass_on)

    def submit(self) -> None:
        """Admits it; raises `BusyError`."""
        self.server.worker.submit(self._ticket)

    def cancel(self) -> None:
        """Ends what its client does not wait for any more."""
        self.server.worker.cancel(self._ticket)

    async def iter_grown(self) -> AsyncIterator[list[Grown]]:
        """Yields what its rows wrote, step by step, until all have ended; raises what the engine failed of."""
        left, metrics, is_first = len(self.choices), self.server.metrics, True
        while left:
            item = await self._queue.get()
            if isinstance(item, BaseException):
                raise item
            if is_first:
                is_first = False
                metrics.first_token.observe(time.monotonic() - self.started)
            left -= sum(grown.is_end for grown in item)
            yield item
        seconds = time.monotonic() - self.started
        self.server.num_done += 1
        self.server.busy_seconds += seconds
        metrics.latency.observe(seconds)
        usage = self.count_usage()
        metrics.prompt_tokens.inc(usage["prompt_tokens"])
        metrics.tokens.inc(usage["completion_tokens"])

    async def collect(self, request: Request) -> dict[str, Any]:
        """Returns the whole answer; ends the work if the client goes away meanwhile."""
        gone = asyncio.ensure_future(_wait_for_disconnect(request.receive))
        done = asyncio.ensure_future(self._finish())
        try:
            await asyncio.wait({gone, done}, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                raise ClientDisconnect
            await done
        finally:
            gone.cancel()
            if not done.done():
                done.cancel()
                self.cancel()
        choices = [choice.to_json(choice.row.text, is_end=True) for choice in self.choices]
        return self.build(choices, usage=self.count_usage(), provenance=self.origin)

    async def _finish(self) -> None:
        async for _ in self.iter_grown():
            pass

    def count_usage(self) -> dict[str, int]:
        """Returns the tokens that it took."""
        return build_usage([choice.row for choice in self.choices], self.body.n)

    def build(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Returns an answer, or a piece of one."""
        return build_answer(self.identifier, self.created, self.body.model, choices, **more)

    async def iter_events(self) -> AsyncIterator[dict[str, Any]]:
        """Yields the pieces of a stream; the first one has the provenance."""
        more: dict[str, Any] = {"provenance": self.origin}
        by_row = {id(choice.row): choice for choice in self.choices}
        async for grown in self.iter_grown():
            pieces = [
                by_row[id(item.row)].to_json(item.text, item.is_end)
                for item in grown
                if item.text or item.is_end or self.body.logprobs is not None
            ]
            if pieces:
                yield self.build(pieces, **more)
                more = {}
        if (self.body.stream_options or {}).get("include_usage"):
            yield self.build([], usage=self.count_usage())


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, as OpenAI streams them; a client that takes nothing for `send_seconds` is let go."""

    def __init__(self, call: Call, send_seconds: float) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self.call, self.send_seconds = call, send_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends events until the rows have ended or the client has gone."""
        gone = asyncio.ensure_future(_wait_for_disconnect(receive))
        done = asyncio.ensure_future(self._send_all(send))
        try:
            await asyncio.wait({gone, done}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (gone, done):
                task.cancel()
            with suppress(asyncio.CancelledError, TimeoutError, OSError):
                await done
            self.call.cancel()

    async def _send_all(self, send: Send) -> None:
        put = partial(self._send, send)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for event in self.call.iter_events():
                await put(f"data: {json.dumps(event, ensure_ascii=False)}\n\n")
        except LoraGpt2Error as error:
            await put(f"data: {json.dumps(ApiError(500, error.message).to_json())}\n\n")
        await put("data: [DONE]\n\n", is_last=True)

    async def _send(self, send: Send, text: str, is_last: bool = False) -> None:
        async with asyncio.timeout(self.send_seconds):
            await send({"type": "http.response.body", "body": text.encode(), "more_body": not is_last})
