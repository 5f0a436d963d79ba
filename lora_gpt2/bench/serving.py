"""A real server process under load: a steady stream, everybody at once, and clients that are slow.

Requests name the store's adapters in turn, so every batch is mixed. Times are the clients' own; the ideal drain time
of a burst is its accepted tokens at the steady rate.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import FrameType

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import Interrupted, ResourceError, UsageError
from lora_gpt2.model.runtime import raise_file_limit
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.listing import list_current

PROMPT = "It was a"
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@dataclass(frozen=True, kw_only=True)
class Load:
    """Answers by status (0: the connection was cut), rates, and the seconds of the accepted requests."""

    name: str
    statuses: dict[int, int]
    seconds: float
    requests_per_second: float
    tokens_per_second: float
    median_seconds: float
    p99_seconds: float


@dataclass(frozen=True, kw_only=True)
class ServingReport:
    """The three loads; `p99_of_ideal` is the burst's p99 over its ideal drain time."""

    adapters: tuple[str, ...]
    loads: tuple[Load, ...]
    p99_of_ideal: float


def measure_serving(
    base: str, store: Store, clients: int, burst: int, slow: int, *, tokens: int, reporter: Reporter
) -> ServingReport:
    """Returns how a server of this store does under load.

    Raises `UsageError` if the store has no adapter of the base, `ResourceError` if the server does not start.
    """
    names = tuple(row["name"] for row in list_current(store)[0] if row["base"] == base)
    if not names:
        raise UsageError(f"{store.root} has no adapter of {base}", "train one first, or use --base and --store")
    raise_file_limit()
    with _serve(base, store) as port, reporter.task("measuring", 3, "loads") as task:
        asyncio.run(_steady(port, names, 4, 8, tokens))
        steady = asyncio.run(_steady(port, names, clients, 8 * clients, tokens))
        task.advance(1, f"{steady.tokens_per_second:,.0f} tokens/s")
        crowd = asyncio.run(_burst(port, names, burst, tokens))
        task.advance(1, str(crowd.statuses))
        beside = asyncio.run(_beside_slow(port, names, slow, tokens))
        task.advance(1)
    ideal = crowd.tokens_per_second * crowd.seconds / steady.tokens_per_second
    return ServingReport(
        adapters=names, loads=(steady, crowd, beside), p99_of_ideal=crowd.p99_seconds / max(ideal, 1e-9)
    )


@contextmanager
def _serve(base: str, store: Store) -> Iterator[int]:
    command = [sys.executable, "-m", "lora_gpt2", "serve", "--port", "0", "--base", base, "--store", str(store.root)]
    environment = {key: value for key, value in os.environ.items() if key != "LORA_GPT2_API_KEY"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)  # noqa: S603
    assert process.stderr is not None
    previous = signal.signal(signal.SIGTERM, _raise_interrupted)  # which would leave the server behind
    try:
        line = process.stderr.readline()
        if "http://127.0.0.1:" not in line:
            raise ResourceError(f"the server did not start: {line.strip()}", "try 'lora-gpt2 serve' by itself")
        yield int(line.partition("127.0.0.1:")[2].partition("/")[0])
    finally:
        signal.signal(signal.SIGTERM, previous)
        process.terminate()
        process.communicate(timeout=60)


def _raise_interrupted(number: int, frame: FrameType | None) -> None:
    raise Interrupted("stopped", "nothing is kept", number)


async def _ask(port: int, name: str, tokens: int) -> tuple[int, int, float]:
    """Returns status, tokens written and seconds of one request on a connection of its own."""
    body = json.dumps({"model": name, "prompt": PROMPT, "max_tokens": tokens}).encode()
    started = time.perf_counter()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"{HEAD}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = await reader.read()
        writer.close()
        status = int(answer.split(None, 2)[1])
        usage = json.loads(answer.partition(b"\r\n\r\n")[2]).get("usage", {})
    except (OSError, IndexError, ValueError):
        return 0, 0, time.perf_counter() - started
    return status, usage.get("completion_tokens", 0), time.perf_counter() - started


def _summarise(name: str, answers: Sequence[tuple[int, int, float]], seconds: float) -> Load:
    accepted = sorted(taken for status, _, taken in answers if status == 200) or [0.0]
    statuses = dict(sorted(Counter(status for status, _, _ in answers).items()))
    return Load(
        name=name,
        statuses=statuses,
        seconds=seconds,
        requests_per_second=statuses.get(200, 0) / seconds,
        tokens_per_second=sum(tokens for _, tokens, _ in answers) / seconds,
        median_seconds=accepted[len(accepted) // 2],
        p99_seconds=accepted[min(len(accepted) - 1, int(0.99 * len(accepted)))],
    )


async def _steady(port: int, names: Sequence[str], clients: int, count: int, tokens: int) -> Load:
    """Each client asks again as soon as it is answered."""
    left, answers = iter(range(count)), []

    async def work() -> None:
        for index in left:
            answers.append(await _ask(port, names[index % len(names)], tokens))

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(clients)))
    return _summarise(f"{clients} clients, steady", answers, time.perf_counter() - started)


async def _burst(port: int, names: Sequence[str], count: int, tokens: int) -> Load:
    started = time.perf_counter()
    answers = await asyncio.gather(*(_ask(port, names[index % len(names)], tokens) for index in range(count)))
    return _summarise(f"{count} at once", answers, time.perf_counter() - started)


async def _beside_slow(port: int, names: Sequence[str], slow: int, tokens: int) -> Load:
    """Honest clients beside some that send half a header, no body, or take no answer."""
    opened = []
    stream = json.dumps({"model": names[0], "prompt": PROMPT, "max_tokens": tokens, "stream": True})
    for index in range(slow):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        whole = f"{HEAD}Content-Length: {len(stream)}\r\n\r\n"
        writer.write((HEAD[:30], whole + "{", whole + stream)[index % 3 if index % 30 < 3 else index % 2].encode())
        opened.append(writer)
    load = await _steady(port, names, 8, 50, tokens)
    for writer in opened:
        writer.close()
    return Load(**{**asdict(load), "name": f"50 requests beside {slow} slow clients"})
