"""What is answered where no handler answers: routes that other servers have, and bugs."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lora_gpt2.serving.protocol import ApiError

CONTINUES = ": POST /v1/chat/completions, or /v1/completions with a prompt"
ELSEWHERE = {
    "/v1/responses": CONTINUES,
    "/v1/messages": CONTINUES,
    "/api/chat": CONTINUES,
    "/api/generate": ": this is no ollama; POST /v1/completions with a prompt",
    "/generate": ": POST /v1/completions with a prompt",
    "/completions": ": POST /v1/completions",
    "/models": ": GET /v1/models",
    "/api/tags": ": GET /v1/models",
    "/v1/load_lora_adapter": ": POST /v1/adapters/load",
    "/v1/unload_lora_adapter": ": POST /v1/adapters/unload",
    "/health": ": GET /healthz",
}
"""Routes of other servers, and what is asked here instead."""


async def show_http_error(request: Request, error: Exception) -> Response:
    """Answers an unknown route or method, and says what is asked here instead."""
    assert isinstance(error, HTTPException)
    ours = ApiError(error.status_code, f"{error.detail}{ELSEWHERE.get(request.url.path.rstrip('/'), '')}")
    return JSONResponse(ours.to_json(), ours.status, error.headers)


async def show_bug(request: Request, error: Exception) -> Response:
    """Answers what should not have happened."""
    return JSONResponse(ApiError(500, f"a bug: {type(error).__name__}; see the server's log").to_json(), 500)
