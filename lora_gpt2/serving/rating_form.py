"""The rating form on this machine: answers go into the round's folder as they are given."""

from __future__ import annotations

import socket
from collections import Counter
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import LoraGpt2Error
from lora_gpt2.core.interrupt import catch_signals
from lora_gpt2.rating.form import FOLDER, SCRIPT, STYLE, build_form
from lora_gpt2.rating.rounds import add_answers, check_answer, check_saved, read_answers, read_round
from lora_gpt2.serving.http import PatientProtocol, build_config, describe_url
from lora_gpt2.serving.middleware import Access, AccessMiddleware

MAX_BODY_BYTES = 2**20
DRAIN_SECONDS = 2
KINDS = {STYLE: "text/css", SCRIPT: "text/javascript"}


def build_rating_server(folder: Path) -> uvicorn.Server:
    """Returns what gives out the form of a round's folder and takes answers; raises what `read_round` does."""
    round_ = read_round(folder)
    page = build_form(round_, linked=True)

    async def show(request: Request) -> Response:
        return HTMLResponse(page)

    async def give(request: Request) -> Response:
        name = request.url.path.rsplit("/", 1)[-1]
        return Response((FOLDER / name).read_bytes(), media_type=KINDS[name])

    async def take(request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            return _refuse(415, "send application/json")
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                return _refuse(413, "that is too much at once")
        try:
            answers = [check_answer(round_, item) for item in check_saved(round_, body, "the request")]
            add_answers(folder, answers)
        except LoraGpt2Error as error:
            return _refuse(400, error.message)
        return JSONResponse({"kept": len(answers)})

    async def count(request: Request) -> Response:
        known = Counter(answer.rater for answer in await run_in_threadpool(read_answers, folder, round_))
        return JSONResponse({"raters": known})

    routes = [
        Route("/", show),
        Route("/raters", count),
        Route("/answers", take, methods=["POST"]),
        *(Route(f"/{name}", give) for name in KINDS),
    ]
    return uvicorn.Server(
        build_config(AccessMiddleware(Starlette(routes=routes), Access()), PatientProtocol, DRAIN_SECONDS)
    )


def _refuse(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message}}, status)


def serve_rating(folder: Path, bound: socket.socket, reporter: Reporter) -> None:
    """Gives out the form and takes answers until a signal comes; raises what `read_round` does."""
    server = build_rating_server(folder)
    reporter.message(f"rate at {describe_url(bound)} (Ctrl-C ends it and shows the result)")
    with catch_signals():
        server.run(sockets=[bound])
