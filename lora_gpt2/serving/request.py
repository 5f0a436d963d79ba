"""One completions request on its way through the worker, and how its output reaches the client."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lora_gpt2.core.errors import EngineFailed, LoraGpt2Error
from lora_gpt2.inference.generate import describe_routes
from lora_gpt2.serving.answers import ApiError, translate_error
from lora_gpt2.serving.choices import CompletionChoice, count_usage
from lora_gpt2.serving.metrics import Metrics
from lora_gpt2.serving.protocol import CompletionBody
from lora_gpt2.serving.worker import PendingRequest, StepOutput, Worker


@dataclass(kw_only=True)
class CompletionRequest:
    """One completions request: its choices, and the queue that their outputs arrive in.

    Args:
        worker: decodes the sequences.
        metrics: counts them.
        body: the request.
        choices: one for each sequence, in the order of their indices.
        provenance: is sent with the answer.
        started: when the body had arrived, by `time.monotonic`.
    """

    worker: Worker
    metrics: Metrics
    body: CompletionBody
    choices: list[CompletionChoice]
    provenance: dict[str, Any]
    started: float

    prefix: ClassVar[str] = "cmpl"
    whole: ClassVar[str] = "text_completion"
    chunk: ClassVar[str] = "text_completion"
    choice: ClassVar[type[CompletionChoice]] = CompletionChoice

    def __post_init__(self) -> None:
        self.identifier, self.created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())
        loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[list[StepOutput] | BaseException]()

        def enqueue(item: list[StepOutput] | BaseException) -> None:
            with suppress(RuntimeError):  # the loop has ended: nobody is waiting any more
                loop.call_soon_threadsafe(self._queue.put_nowait, item)

        self._pending = PendingRequest(
            sequences=[choice.sequence for choice in self.choices], on_output=enqueue, on_error=enqueue
        )

    def submit(self) -> None:
        """Submits it to the worker; raises `BusyError`."""
        self.worker.submit(self._pending)

    def cancel(self) -> None:
        """Ends its sequences, because the client is no longer waiting."""
        self.worker.cancel(self._pending)

    async def iter_outputs(self) -> AsyncIterator[list[StepOutput]]:
        """Yields the outputs of each step until all sequences have finished; raises the engine's errors."""
        num_running, is_first = len(self.choices), True
        while num_running:
            item = await self._queue.get()
            if isinstance(item, BaseException):
                raise item
            before = count_usage(self.choices, self.body.n)
            for output in item:
                self.choices[output.index].add(output)
            usage = count_usage(self.choices, self.body.n)
            self.metrics.generation_tokens.inc(usage["completion_tokens"] - before["completion_tokens"])
            failed = [output.error for output in item if output.error is not None]
            if is_first:
                is_first = False
                self.metrics.prompt_tokens.inc(usage["prompt_tokens"])
                if not failed:
                    self.metrics.time_to_first_token.observe(time.monotonic() - self.started)
            if failed:
                self.cancel()
                if isinstance(failed[0], LoraGpt2Error):
                    raise failed[0]
                raise EngineFailed(f"a sequence failed: {failed[0]}", "change its parameters") from failed[0]
            num_running -= sum(bool(output.finish_reason) for output in item)
            yield item
        self.metrics.record_request(time.monotonic() - self.started)

    async def collect(self, request: Request) -> dict[str, Any]:
        """Returns the whole response; ends the work if the client disconnects meanwhile."""
        try:
            await run_until_gone(request.receive, self._finish())
        except BaseException:
            self.cancel()
            raise
        choices = [choice.take_json() for choice in self.choices]
        provenance = self.provenance | self._describe_routes()
        return self.build(choices, usage=count_usage(self.choices, self.body.n), provenance=provenance)

    def _describe_routes(self) -> dict[str, Any]:
        """Returns what `auto` chose for each choice, in order; empty for a model that was named."""
        routes = [describe_routes(choice.sequence).get("auto") for choice in self.choices]
        return {"auto": routes} if any(routes) else {}

    async def _finish(self) -> None:
        async for _ in self.iter_outputs():
            pass

    def build(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Returns the whole response, or a chunk of a stream, in OpenAI's shape."""
        return {
            "id": self.identifier,
            "object": self.chunk if self.body.stream else self.whole,
            "created": self.created,
            "model": self.body.model,
            "choices": choices,
            **more,
        }

    async def iter_chunks(self) -> AsyncIterator[dict[str, Any]]:
        """Yields the chunks of a stream; the first one has the provenance."""
        more: dict[str, Any] = {"provenance": self.provenance | self._describe_routes()}
        async for outputs in self.iter_outputs():
            chunks = [
                self.choices[output.index].take_json()
                for output in outputs
                if output.text or output.finish_reason or self.body.logprobs is not None
            ]
            if chunks:
                yield self.build(chunks, **more)
                more = {}
        if any(len(choice.sequence.routes) > 1 for choice in self.choices):  # it was chosen again meanwhile
            yield self.build([], provenance=self.provenance | self._describe_routes())
        if self.body.stream_options and self.body.stream_options.include_usage:
            yield self.build([], usage=count_usage(self.choices, self.body.n))


async def run_until_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Awaits some work; cancels it and raises `ClientDisconnect` if the client disconnects first."""

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
    """Server-sent events as OpenAI streams them; disconnects clients that read nothing for `send_timeout_seconds`."""

    def __init__(self, completion: CompletionRequest, send_timeout_seconds: float) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self.completion, self.send_timeout_seconds = completion, send_timeout_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends events until the sequences have finished or the client has disconnected."""
        try:
            with suppress(ClientDisconnect, TimeoutError, OSError):
                await run_until_gone(receive, self._send_all(send))
        finally:
            self.completion.cancel()

    async def _send_all(self, send: Send) -> None:
        put = partial(self._send, send)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for event in self.completion.iter_chunks():
                await put(f"data: {json.dumps(event, ensure_ascii=False)}\n\n")
        except LoraGpt2Error as error:
            ours = ApiError(500, error.message) if isinstance(error, EngineFailed) else translate_error(error)
            await put(f"data: {json.dumps(ours.to_json())}\n\n")
        await put("data: [DONE]\n\n", is_last=True)

    async def _send(self, send: Send, text: str, is_last: bool = False) -> None:
        async with asyncio.timeout(self.send_timeout_seconds):
            await send({"type": "http.response.body", "body": text.encode(), "more_body": not is_last})
