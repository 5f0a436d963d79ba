"""Answers that are no success: errors in OpenAI's shape, routes that other servers have, and bugs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from lora_gpt2.core.errors import IntegrityError, LoraGpt2Error, MismatchError, NotFoundError
from lora_gpt2.core.printable import hide_paths

LOG = logging.getLogger("lora_gpt2.serving")
CONTINUES = ": POST /v1/chat/completions, or /v1/completions with a prompt"
CHALLENGE = {"WWW-Authenticate": 'Basic realm="lora-gpt2"'}
MOST_BODY_BYTES = 4096  # of requests that are a few words
ELSEWHERE = {
    "/v1/responses": CONTINUES,
    "/v1/messages": CONTINUES,
    "/api/chat": CONTINUES,
    "/api/generate": ": this is no ollama; POST /v1/completions with a prompt",
    "/generate": ": POST /v1/completions with a prompt",
    "/completions": ": here it is POST /v1/completions",
    "/models": ": here it is GET /v1/models",
    "/api/tags": ": here it is GET /v1/models",
    "/v1/load_lora_adapter": ": here it is POST /v1/adapters/load",
    "/v1/unload_lora_adapter": ": here it is POST /v1/adapters/unload",
    "/health": ": here it is GET /healthz",
}
"""Routes of other servers, and what is asked here instead."""


class ApiError(Exception):
    """An answer that is no success: status, and the fields of OpenAI's error object."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def to_json(self) -> dict[str, Any]:
        """Returns the body."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        message = self.message.encode("utf-8", "replace").decode()  # a name on disk may be no Unicode
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


def translate_error(error: LoraGpt2Error, param: str | None = None) -> ApiError:
    """Returns the answer to one of our errors; paths of this machine are in the log alone."""
    whole = f"{error.message}; {error.hint}"
    text = hide_paths(whole)
    if text != whole:
        LOG.warning("%s", whole)
    if isinstance(error, NotFoundError | MismatchError):  # an adapter of another base is none of this server's models
        return ApiError(404, text, param, "model_not_found")
    if isinstance(error, IntegrityError):
        return ApiError(503, text, param, "adapter_unusable")
    return ApiError(400 if error.exit_code in (2, 3) else 503, text, param)


def answer_errors(handler: Callable[[Request], Any]) -> Callable[[Request], Any]:
    """Wraps a handler: errors become answers."""

    async def answer(request: Request) -> Response:
        try:
            response: Response = await handler(request)
        except ClientDisconnect:
            response = Response(status_code=499)
        except ApiError as error:
            is_asked = error.status == 401 and request.method == "GET"  # a browser asks for the key, as a password
            response = JSONResponse(error.to_json(), error.status, CHALLENGE if is_asked else None)
        except LoraGpt2Error as error:
            ours = translate_error(error)
            response = JSONResponse(ours.to_json(), ours.status)
        return response

    return answer


async def read_json(request: Request) -> dict[str, Any]:
    """Returns the object in a small body; raises `ApiError` 400, 413 or 415."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be application/json")
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MOST_BODY_BYTES:
            raise ApiError(413, f"the body is larger than {MOST_BODY_BYTES} bytes")
    try:
        found = json.loads(body)
    except ValueError as error:
        raise ApiError(400, "the body is no JSON") from error
    if not isinstance(found, dict):
        raise ApiError(400, "the body must be a JSON object")
    return found


async def show_http_error(request: Request, error: Exception) -> Response:
    """Answers an unknown route or method, and says what is asked here instead."""
    assert isinstance(error, HTTPException)
    ours = ApiError(error.status_code, f"{error.detail}{ELSEWHERE.get(request.url.path.rstrip('/'), '')}")
    return JSONResponse(ours.to_json(), ours.status, error.headers)


async def show_bug(request: Request, error: Exception) -> Response:
    """Answers what should not have happened."""
    return JSONResponse(ApiError(500, f"a bug: {type(error).__name__}; see the server's log").to_json(), 500)
