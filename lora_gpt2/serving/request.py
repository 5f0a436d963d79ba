"""One completions request on its way through the worker: its rows, and how what they write reaches the client."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lora_gpt2.core.errors import LoraGpt2Error
from lora_gpt2.serving.metrics import Metrics
from lora_gpt2.serving.protocol import ApiError, Choice, CompletionBody, build_answer, build_usage, translate_error
from lora_gpt2.serving.worker import EngineFailed, PendingRequest, StepOutput, Worker


@dataclass
class Call:
    """One completions request on its way through the worker."""

    worker: Worker
    metrics: Metrics
    body: CompletionBody
    choices: list[Choice]
    origin: dict[str, Any]
    started: float

    def __post_init__(self) -> None:
        self.identifier, self.created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[list[StepOutput] | BaseException]()

        def pass_on(item: list[StepOutput] | BaseException) -> None:
            with suppress(RuntimeError):  # the loop has ended: nobody waits any more
                loop.call_soon_threadsafe(self._queue.put_nowait, item)

        self._ticket = PendingRequest([choice.row for choice in self.choices], pass_on, pass_on)

    def submit(self) -> None:
        """Admits it; raises `BusyError`."""
        self.worker.submit(self._ticket)

    def cancel(self) -> None:
        """Ends what its client does not wait for any more."""
        self.worker.cancel(self._ticket)

    async def iter_grown(self) -> AsyncIterator[list[StepOutput]]:
        """Yields what its rows wrote, step by step, until all have ended; raises what the engine failed of."""
        left, is_first = len(self.choices), True
        while left:
            item = await self._queue.get()
            if isinstance(item, BaseException):
                raise item
            if is_first:
                is_first = False
                self.metrics.first_token.observe(time.monotonic() - self.started)
            if failed := [grown.row.error for grown in item if grown.row.error is not None]:
                self.cancel()
                if isinstance(failed[0], LoraGpt2Error):
                    raise failed[0]
                raise EngineFailed(f"a continuation failed: {failed[0]}", "change its parameters") from failed[0]
            left -= sum(grown.is_end for grown in item)
            yield item
        self.metrics.note_done(time.monotonic() - self.started, self.count_usage())

    async def collect(self, request: Request) -> dict[str, Any]:
        """Returns the whole answer; ends the work if the client goes away meanwhile."""
        try:
            await run_until_gone(request.receive, self._finish())
        except BaseException:
            self.cancel()
            raise
        choices = [choice.to_json(choice.row.text, len(choice.row.logprobs), True) for choice in self.choices]
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
                by_row[id(item.row)].to_json(item.text, item.num_logprobs, item.is_end)
                for item in grown
                if item.text or item.is_end or self.body.logprobs is not None
            ]
            if pieces:
                yield self.build(pieces, **more)
                more = {}
        if (self.body.stream_options or {}).get("include_usage"):
            yield self.build([], usage=self.count_usage())


async def run_until_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Does some work; raises `ClientDisconnect`, and ends it, if the client goes away first."""

    async def wait() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    gone, done = asyncio.ensure_future(wait()), asyncio.ensure_future(work)
    try:
        await asyncio.wait({gone, done}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise ClientDisconnect
        await done
    finally:
        gone.cancel()
        done.cancel()


class EventStream(Response):
    """Server-sent events, as OpenAI streams them; a client that takes nothing for `send_timeout_seconds` is let go."""

    def __init__(self, call: Call, send_timeout_seconds: float) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self.call, self.send_timeout_seconds = call, send_timeout_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends events until the rows have ended or the client has gone."""
        try:
            with suppress(ClientDisconnect, TimeoutError, OSError):
                await run_until_gone(receive, self._send_all(send))
        finally:
            self.call.cancel()

    async def _send_all(self, send: Send) -> None:
        put = partial(self._send, send)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for event in self.call.iter_events():
                await put(f"data: {json.dumps(event, ensure_ascii=False)}\n\n")
        except LoraGpt2Error as error:
            ours = ApiError(500, error.message) if isinstance(error, EngineFailed) else translate_error(error)
            await put(f"data: {json.dumps(ours.to_json())}\n\n")
        await put("data: [DONE]\n\n", is_last=True)

    async def _send(self, send: Send, text: str, is_last: bool = False) -> None:
        async with asyncio.timeout(self.send_timeout_seconds):
            await send({"type": "http.response.body", "body": text.encode(), "more_body": not is_last})
