"""What stands before every route: the Host that was asked, the key, and headers that keep a browser in its place.

A name in Host that is not ours is how a web page reaches a server on this machine (DNS rebinding, CVE-2024-28224), so
only IP addresses, `localhost` and the hosts given at the start are answered. A body must be `application/json`, which
a page of another origin cannot send without asking first; nothing allows it to unless CORS was turned on.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_gpt2.serving.answers import ApiError

PROXY_HEADERS = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip", "via")
SAFE_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'"),
)


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may ask.

    Args:
        key: what a client must send, as a bearer token or as the password of basic authentication; None for nothing.
        admin_key: opens everything as well, and is needed for what changes something; None: see `check_control`.
        hosts: names, besides `localhost` and IP addresses, that the server is asked under.
        origins: what pages of other origins may ask from a browser.
        is_local: only this machine can reach the server.
    """

    key: str | None = None
    admin_key: str | None = None
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    is_local: bool = False

    def check_control(self, headers: Headers) -> None:
        """Raises `ApiError` unless a request may start and stop training, and see what is trained.

        Without an admin key who sits at this machine may: not who comes through a proxy, where that can be told, nor
        who has the key of an API that is given to others, nor a page of another origin.
        """
        if self.admin_key is not None:
            if not has_key(headers, self.admin_key):
                raise ApiError(401, "the admin key is needed: Authorization: Bearer KEY", None, "invalid_api_key")
        elif not self.is_local or self.key or _is_foreign(headers) or any(name in headers for name in PROXY_HEADERS):
            raise ApiError(403, "start the server with LORA_GPT2_ADMIN_KEY to use this", None, "no_admin_key")


def _is_foreign(headers: Headers) -> bool:
    """True if a browser says that a page of another origin asks."""
    origin = headers.get("origin")
    return origin is not None and urlsplit(origin).netloc != headers.get("host")


class CountingMiddleware:
    """Counts every answer, also those of the middleware within; an ASGI application around another, `app`."""

    def __init__(self, app: ASGIApp, count: Callable[[str, int], None]) -> None:
        self.app, self.count = app, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Calls `count` with the path and the status of the answer: 500 for a bug, which is answered further out."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        is_answered = False

        async def send_counted(message: Message) -> None:
            nonlocal is_answered
            if message["type"] == "http.response.start":
                is_answered = True
                self.count(scope["path"], message["status"])
            await send(message)

        try:
            await self.app(scope, receive, send_counted)
        except Exception:
            if not is_answered:
                self.count(scope["path"], 500)
            raise


class AccessMiddleware:
    """Checks Host and key, adds headers; an ASGI application around another, `app`."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.hosts = app, {"localhost", *(host.lower() for host in access.hosts)}
        self.keys = [each for each in (access.key, access.admin_key) if each] if access.key else []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 403 or 401, or lets a request through."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_safe(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *SAFE_HEADERS]
            await send(message)

        headers = Headers(scope=scope)
        answer: ASGIApp = self.app
        if not self._is_known(headers.get("host", "")):
            error = ApiError(403, "this host is not served; start with --allow-host NAME", None, "host_not_allowed")
            answer = JSONResponse(error.to_json(), 403)
        elif self.keys and not any(has_key(headers, key) for key in self.keys):
            error = ApiError(401, "a key is needed: Authorization: Bearer KEY", None, "invalid_api_key")
            answer = JSONResponse(error.to_json(), 401, {"WWW-Authenticate": 'Basic realm="lora-gpt2"'})
        await answer(scope, receive, send_safe)

    def _is_known(self, host: str) -> bool:
        before, _, port = host.rpartition(":")
        name = before if port.isascii() and port.isdecimal() else host
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return name.lower() in self.hosts
        return True


def has_key(headers: Headers, key: str) -> bool:
    """True if a request carries the key; compared in constant time."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        try:
            value = base64.b64decode(value, validate=True).decode(errors="replace").partition(":")[2]
        except (binascii.Error, ValueError):
            return False
    elif scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(value.strip().encode(), key.encode())
