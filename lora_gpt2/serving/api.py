"""The routes: completions, chats, embeddings, models, adapters, health, metrics, and the web page's files.

A handler reads and validates a body, fetches the adapters in another thread, submits the sequences to the worker, and
returns or streams their outputs. Nothing here computes, and nothing waits without a timeout.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from lora_gpt2.core.dirs import find_runs_dir
from lora_gpt2.core.errors import BusyError, EngineFailed, LoraGpt2Error
from lora_gpt2.core.names import AUTO
from lora_gpt2.inference.embedding import batch_by_length, embed_batch
from lora_gpt2.inference.history import LocalLog
from lora_gpt2.inference.routing import RoutedMix, Router
from lora_gpt2.inference.session import Session
from lora_gpt2.rating.votes import Marks, Vote, check_marks, check_vote
from lora_gpt2.recipe import DataSettings, GenerateSettings, ServeSettings
from lora_gpt2.serving.answers import ApiError, show_bug, show_http_error, translate_error
from lora_gpt2.serving.chat import ChatRequest, build_completion, parse_chat, route_body
from lora_gpt2.serving.embeddings import build_embeddings, parse_embeddings
from lora_gpt2.serving.metrics import Metrics
from lora_gpt2.serving.middleware import Access, AccessMiddleware, CountingMiddleware, has_key
from lora_gpt2.serving.models import describe_mix, describe_model, parse_time
from lora_gpt2.serving.protocol import (
    CompletionBody,
    build_sequences,
    build_settings,
    check_choices,
    count_cut,
    cut_prompt,
    describe_sequences,
    fetch_model,
    parse_body,
    parse_json,
    parse_model,
    parse_names,
)
from lora_gpt2.serving.request import CompletionRequest, EventStream
from lora_gpt2.serving.training_job import TrainingJob
from lora_gpt2.serving.watch import RunPages
from lora_gpt2.serving.worker import Worker
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.listing import list_current
from lora_gpt2.store.references import BASE, label_of

PAGE = Path(__file__).parent / "page"
AUTO_DESCRIPTION = "the adapter under which the prompt is most likely, or the base"
EMBEDDING_TOKENS = 1024
READ_AND_REFUSED = 4  # times the largest body: who sends a little too much shall read the answer
T = TypeVar("T")


@dataclass(kw_only=True)
class Server:
    """A session, the worker that decodes, the metrics, and the file of blind votes."""

    session: Session
    defaults: GenerateSettings
    limits: ServeSettings
    access: Access = field(default_factory=Access)
    vote_log: LocalLog | None = None
    metrics: Metrics = field(default_factory=Metrics)
    is_leaving: bool = False
    """True once load balancers shall turn away: requests are still taken on, until `is_draining`."""
    is_draining: bool = False

    def __post_init__(self) -> None:
        runs, store = find_runs_dir(), self.session.store
        self.job = None if store is None else self._build_job(store, runs)
        self.pages = RunPages(
            folder=runs, access=self.access, job=self.job, is_closing=lambda: self.is_draining, is_private=True
        )
        self.router = Router(self.session)
        self._computing, self._num_computing = asyncio.Semaphore(1), 0
        self.worker = Worker(self.session, self.limits.max_num_seqs, self.limits.max_waiting, self.metrics.record_step)

    def _build_job(self, store: Store, runs: Path) -> TrainingJob:
        base = self.session.base
        return TrainingJob(
            base=base.name,
            block_size=min(DataSettings().block_size, base.config.n_positions),
            store=store.root,
            runs=runs,
            access=self.access,
            max_upload_bytes=self.limits.max_upload_bytes,
        )

    def build_app(self) -> Starlette:
        """Returns the ASGI application; the worker must be started."""
        page = StaticFiles(directory=PAGE, html=True)
        routes = [
            Route("/v1/completions", self._answer(self.complete), methods=["POST"]),
            Route("/v1/chat/completions", self._answer(self.chat), methods=["POST"]),
            Route("/v1/embeddings", self._answer(self.embed), methods=["POST"]),
            Route("/v1/choices", self._answer(self.record_vote), methods=["POST"]),
            Route("/v1/models", self._answer(self.list_models)),
            Route("/v1/models/{model:path}", self._answer(self.show_model)),
            Route("/v1/adapters", self._answer(self.list_adapters)),
            Route("/v1/adapters/load", self._answer(self.load_adapter), methods=["POST"]),
            Route("/v1/adapters/unload", self._answer(self.unload_adapter), methods=["POST"]),
            Route("/healthz", self._answer(self.show_health)),
            Route("/readyz", self._answer(self.show_ready)),
            Route("/metrics", self._answer(self.show_metrics)),
            Mount("/training", routes=self.pages.list_routes()),
            *(Route(f"/{name}", page) for name in ("", *(path.name for path in PAGE.iterdir()))),
        ]
        middleware = [Middleware(AccessMiddleware, access=self.access)]
        if self.access.origins:
            methods, headers = ["GET", "POST"], ["Authorization", "Content-Type"]
            cors = Middleware(
                CORSMiddleware, allow_origins=self.access.origins, allow_methods=methods, allow_headers=headers
            )
            middleware.insert(0, cors)
        middleware.insert(0, Middleware(CountingMiddleware, count=self.metrics.record_status))
        handlers: dict[Any, Any] = {HTTPException: show_http_error, Exception: show_bug}
        return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)

    def _answer(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Wraps a handler: errors get OpenAI's shape."""

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
                unread = {"Connection": "close"} if error.status in (408, 413) else None  # the body may still come
                response = JSONResponse(error.to_json(), error.status, unread)
            except EngineFailed as error:
                response = JSONResponse(ApiError(500, f"{error.message}; {error.hint}").to_json(), 500)
            except LoraGpt2Error as error:
                ours = translate_error(error)
                response = JSONResponse(ours.to_json(), ours.status)
            return response

        return answer

    def estimate_wait(self) -> int:
        """Returns in how many seconds a waiting place is likely free: the mean time of a request, at least 1."""
        return max(1, round(self.metrics.mean_seconds))

    async def read_body(self, request: Request) -> bytes:
        """Returns a JSON request's body; raises `ApiError` 408, 413 or 415."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        limit, content = self.limits.max_body_bytes, bytearray()
        declared = request.headers.get("content-length", "0")
        too_large = ApiError(413, f"the body is larger than {limit} bytes")
        if not declared.isdigit() or int(declared) > READ_AND_REFUSED * limit:
            raise too_large
        size = 0
        try:
            async with asyncio.timeout(self.limits.body_timeout_seconds):
                async for piece in request.stream():
                    size += len(piece)
                    content += piece if size <= limit else b""
                    if size > READ_AND_REFUSED * limit:
                        break
        except TimeoutError as error:
            raise ApiError(408, f"the body did not come within {self.limits.body_timeout_seconds:g} seconds") from error
        if size > limit:
            raise too_large
        if kind != "application/json":
            raise ApiError(415, "the body must be application/json")
        return bytes(content)

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        content = await self.read_body(request)
        started = time.monotonic()
        body = parse_body(content)
        self._check_open()
        routes = await self._route(body) if body.model == AUTO else []
        dropped = await run_in_threadpool(count_cut, body, self.session, self.defaults)
        more = {"dropped_prompt_tokens": dropped} if any(dropped) else {}
        return await self._complete(request, body, started, CompletionRequest, routes=routes, **more)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        content = await self.read_body(request)
        started = time.monotonic()
        body = parse_chat(content)
        self._check_open()
        route = None
        if body.model == AUTO:
            route = await self._compute(partial(route_body, body, self.router, self.defaults))
        completion, dropped = await run_in_threadpool(build_completion, body, self.session, self.defaults, route)
        routes = [] if route is None else [route]
        return await self._complete(request, completion, started, ChatRequest, routes=routes, dropped_messages=dropped)

    def _check_open(self) -> None:
        """Raises what a request gets that is not taken on; asked before anything is computed for it."""
        if self.is_draining:
            raise ApiError(503, "the server is shutting down")
        self.worker.check_room()

    async def _complete(
        self,
        request: Request,
        body: CompletionBody,
        started: float,
        kind: type[CompletionRequest],
        *,
        routes: Sequence[RoutedMix] = (),
        **more: Any,
    ) -> Response:
        """Decodes a request and answers it, whole or as a stream; `more` is added to its provenance.

        `routes` is what was chosen for each prompt, where the model is `auto`.
        """
        self._check_open()
        seed = secrets.randbelow(2**31) if body.seed is None else body.seed % 2**63
        sequences = await run_in_threadpool(
            build_sequences, body, self.session, self.defaults, self.limits, seed, routes
        )
        provenance = describe_sequences(self.session, sequences) | more
        choices = [kind.choice(sequence, body) for sequence in sequences]
        completion = kind(
            worker=self.worker, metrics=self.metrics, body=body, choices=choices, provenance=provenance, started=started
        )
        completion.submit()
        if body.stream:
            return EventStream(completion, self.limits.send_timeout_seconds)
        return JSONResponse(await completion.collect(request))

    async def _route(self, body: CompletionBody) -> list[RoutedMix]:
        """Returns what `auto` chooses for each prompt of a request."""
        prompts = check_choices(body, build_settings(body, self.defaults), self.limits)
        texts = await run_in_threadpool(lambda: [cut_prompt(each, self.session) for each in prompts])
        return [await self._compute(partial(self.router.route, text)) for text in texts]

    async def embed(self, request: Request) -> Response:
        """POST /v1/embeddings."""
        content = await self.read_body(request)
        self._check_open()
        body, texts = await run_in_threadpool(parse_embeddings, content, self.session)
        mix, loaded = await run_in_threadpool(fetch_model, body.model, self.session)
        vectors = torch.empty(len(texts), self.session.base.config.n_embd)

        def compute(batch: list[int]) -> torch.Tensor:
            self.session.slots.load(loaded)
            return embed_batch(self.session, mix, [texts[index] for index in batch])

        for batch in batch_by_length(texts, EMBEDDING_TOKENS):  # what is being decoded goes on in between
            if await request.is_disconnected():
                raise ClientDisconnect
            vectors[batch] = await self._compute(partial(compute, batch))
            self.metrics.prompt_tokens.inc(sum(len(texts[index]) for index in batch))
        return await run_in_threadpool(lambda: JSONResponse(build_embeddings(body, texts, vectors)))

    async def record_vote(self, request: Request) -> Response:
        """POST /v1/choices: records what was said of texts while the names were hidden, each held to its version."""
        values = parse_json(await self.read_body(request))
        check = check_marks if "marks" in values else check_vote
        choice: Vote | Marks = check(values)
        if self.vote_log is None:
            return JSONResponse({"kept": False})

        def pin(model: str) -> str:
            return str(parse_model(model, self.session))

        pinned = {model: await run_in_threadpool(pin, model) for model in choice.models}
        record = {**vars(choice), "models": list(pinned.values()), "base": self.session.base.name}
        record |= {"chosen": pinned[choice.chosen]} if isinstance(choice, Vote) else {}
        check(record)  # two names may be one model
        return JSONResponse({"kept": await run_in_threadpool(self.vote_log.add, record)})

    async def list_models(self, request: Request) -> Response:
        """GET /v1/models: the base, then the adapters of this base."""
        return JSONResponse({"object": "list", "data": await run_in_threadpool(self._describe_models)})

    async def show_model(self, request: Request) -> Response:
        """GET /v1/models/{model}; a version or a mix is shown too."""
        name = request.path_params["model"]
        known = {model["id"]: model for model in await run_in_threadpool(self._describe_models)}
        return JSONResponse(known.get(name) or await run_in_threadpool(describe_mix, name, self.session))

    def _describe_models(self) -> list[dict[str, Any]]:
        base, store = self.session.base, self.session.store
        models = [describe_model(BASE, base=base.name, context=base.config.n_positions)]
        for row in list_current(store)[0] if store is not None else []:
            if row["base_fingerprint"] == base.fingerprint:
                more = {key: row[key] for key in row if key not in ("name", "created")}
                models.append(describe_model(row["name"], created=parse_time(row["created"]), **more))
        return [*models, describe_model(AUTO, description=AUTO_DESCRIPTION)] if len(models) > 1 else models

    async def list_adapters(self, request: Request) -> Response:
        """GET /v1/adapters: what is in the slots."""
        self._check_admin(request)
        loaded = await self._call(lambda: self.session.slots.references)
        return JSONResponse({"loaded": [label_of(name) for name in loaded], "max_slots": self.limits.max_slots})

    async def load_adapter(self, request: Request) -> Response:
        """POST /v1/adapters/load {"name": ...}: brings an adapter into a slot before it is asked for."""
        _, loaded = await run_in_threadpool(fetch_model, await self._read_admin_name(request), self.session)
        await self._call(lambda: self.session.slots.load(loaded))
        return JSONResponse({"loaded": [label_of(name) for name in loaded]})

    async def unload_adapter(self, request: Request) -> Response:
        """POST /v1/adapters/unload {"name": ...}: frees its slot; 409 while it is in use."""
        named = parse_names(await self._read_admin_name(request))
        dropped = await self._call(lambda: self._evict(named))
        if not dropped:
            raise ApiError(409, "the adapter is in use, or not loaded", "name")
        return JSONResponse({"unloaded": [label_of(name) for name in dropped]})

    def _evict(self, named: Sequence[str]) -> list[str]:
        """Frees the slots of names and versions; a name is every version of it that is loaded, wherever it is now."""
        slots = self.session.slots
        found = [ref for ref in slots.references if {label_of(ref), label_of(ref).partition("@")[0]} & set(named)]
        return [reference for reference in found if slots.evict(reference)]

    async def _read_admin_name(self, request: Request) -> str:
        self._check_admin(request)
        values = parse_json(await self.read_body(request))
        name = values.pop("name", None)
        if not isinstance(name, str) or values:
            raise ApiError(400, 'the body is {"name": NAME}, an adapter of the store or name@version', "name")
        return name

    def _check_admin(self, request: Request) -> None:
        key = self.access.admin_key
        if key is None:
            raise ApiError(403, "start the server with LORA_GPT2_ADMIN_KEY to use this", None, "no_admin_key")
        if not has_key(request.headers, key):
            raise ApiError(401, "the admin key is needed: Authorization: Bearer KEY", None, "invalid_api_key")

    async def _compute(self, action: Callable[[], T]) -> T:
        """Runs a forward pass in the engine's thread, one at a time, so that decoding goes on between any two.

        Raises `BusyError` if too many are waiting.
        """
        if self._num_computing >= self.limits.max_waiting:
            raise BusyError(f"{self._num_computing} requests are waiting to be computed", "retry later")
        self._num_computing += 1
        try:
            async with self._computing:
                return await self._call(action)
        finally:
            self._num_computing -= 1

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
        if self.is_leaving or self.is_draining:
            raise ApiError(503, "the server is shutting down")
        return JSONResponse({"status": "ready", "base": self.session.base.name})

    async def show_metrics(self, request: Request) -> Response:
        """GET /metrics in Prometheus' text format."""
        return Response(self.metrics.render(self.session.slots.num_loads), media_type="text/plain; version=0.0.4")
