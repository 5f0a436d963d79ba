"""A server on a free port inside the test's process, and the plainest of clients."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from contextlib import contextmanager

import uvicorn

from lora_gpt2.model.runtime import raise_file_limit
from lora_gpt2.serving.api import Server
from lora_gpt2.serving.http import bind, build_http


@contextmanager
def serving(server: Server, send_buffer: int = 0):
    """Answers requests while the block runs; yields the port. What is sent waits in so small a buffer of the system."""
    raise_file_limit()
    server.runner = build_http(server)
    server.worker.start()
    try:
        with running(server.runner, send_buffer) as port:
            yield port
    finally:
        server.worker.close()


@contextmanager
def running(runner: uvicorn.Server, send_buffer: int = 0):
    """Runs an HTTP server in a thread while the block runs; yields the port."""
    bound = bind("127.0.0.1", 0)
    if send_buffer:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not runner.started:
        time.sleep(0.01)
    try:
        yield bound.getsockname()[1]
    finally:
        runner.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()


def ask(port, path, body=None, headers=(), method=None):
    """Returns status, headers and the answer, read as JSON where it is."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    given = {"Content-Type": "application/json", **dict(headers)}
    connection.request(method or ("GET" if body is None else "POST"), path, content, given)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    try:
        return answer.status, answer.headers, json.loads(text)
    except ValueError:
        return answer.status, answer.headers, text


async def ask_async(port, body, path="/v1/completions"):
    """Returns status and answer of a request over a connection of its own; status 0 where the connection was cut."""
    content = json.dumps(body).encode()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode()
            + content
        )
        await writer.drain()
        answer = await reader.read()
        writer.close()
    except OSError:
        return 0, {}
    head, _, text = answer.partition(b"\r\n\r\n")
    return (int(head.split()[1]), json.loads(text)) if head else (0, {})
