"""Training that is begun on the page of `serve`: a text is sent, planned, and trained on by a process of its own.

One at a time. The process is the command line, so the page can do nothing that a user could not type; its run has a
page like any other. When the server ends, it is told to keep a checkpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from lora_gpt2.core.dirs import find_cache_dir
from lora_gpt2.core.errors import NotFoundError
from lora_gpt2.core.files import wrap_os_errors
from lora_gpt2.core.names import check_name
from lora_gpt2.serving.answers import ApiError, answer_errors, read_json
from lora_gpt2.serving.middleware import Access
from lora_gpt2.training.run_reader import RunReader, list_runs

UPLOAD_SECONDS, KILL_SECONDS = 300.0, 60.0
MOST_NAME, MOST_STEPS, MOST_RUNS = 100, 1_000_000, 8
BYTES_TYPE = "application/octet-stream"  # which a page of another origin cannot send without asking first
State = Literal["idle", "planning", "planned", "training", "done", "failed"]


@dataclass(kw_only=True)
class TrainingJob:
    """The one training of a server, and its routes.

    Args:
        base: the base, by name or folder.
        block_size: tokens per block, within its context.
        store: the folder of the store.
        runs: the folder of runs.
        access: who may train.
        max_upload_bytes: the largest file that is taken.
    """

    base: str
    block_size: int
    store: Path
    runs: Path
    access: Access
    max_upload_bytes: int
    state: State = "idle"
    upload: Path | None = None
    name: str = ""
    settings: tuple[str, ...] = ()
    plan: dict[str, Any] | None = None
    adapter: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    line: str = ""
    _process: subprocess.Popen[bytes] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def list_routes(self) -> list[BaseRoute]:
        """Returns the routes; `check_control` decides who may use them."""
        named = {"upload": self.take_upload, "plan": self.begin_plan, "train": self.begin_training}
        posts = [Route(f"/{name}", answer_errors(handler), methods=["POST"]) for name, handler in named.items()]
        return [*posts, Route("/", answer_errors(self.show))]

    async def show(self, request: Request) -> Response:
        """GET: how far it is; `run` is the key of its page."""
        self.access.check_control(request.headers)
        return JSONResponse(await run_in_threadpool(self._describe))

    async def take_upload(self, request: Request) -> Response:
        """POST upload?file=NAME: takes a file as it is, in any format that `train` reads."""
        self.access.check_control(request.headers)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != BYTES_TYPE:
            raise ApiError(415, f"the file must be sent as {BYTES_TYPE}")
        self._check_free()
        folder = find_cache_dir() / "uploads"
        with wrap_os_errors(f"write to {folder}"):
            shutil.rmtree(folder, ignore_errors=True)
            target = folder / secrets.token_hex(8) / clean_file_name(request.query_params.get("file", ""))
            target.parent.mkdir(parents=True)
            await self._write(request, target)
        self.state, self.upload, self.plan, self.adapter, self.error = "idle", target, None, None, None
        return JSONResponse({"file": target.name, "bytes": target.stat().st_size})

    async def _write(self, request: Request, target: Path) -> None:
        size = 0
        with target.open("wb") as file:
            async with asyncio.timeout(UPLOAD_SECONDS):
                async for piece in request.stream():
                    size += len(piece)
                    if size > self.max_upload_bytes:
                        limit = f"{self.max_upload_bytes:,} bytes (serve.max_upload_bytes)"
                        raise ApiError(413, f"the file is larger than {limit}; train it on the command line")
                    await run_in_threadpool(file.write, piece)

    async def begin_plan(self, request: Request) -> Response:
        """POST plan {"name", "steps", "forget"}: reads the text, and says what training on it will take."""
        self.access.check_control(request.headers)
        self.name, self.settings = read_settings(await read_json(request))
        self._start("planning", ["plan", "--json"], "planned")
        return JSONResponse(self._describe(), 202)

    async def begin_training(self, request: Request) -> Response:
        """POST train {"begin": null, "resume" or "fresh"}: trains what was planned."""
        self.access.check_control(request.headers)
        begin = (await read_json(request)).get("begin")
        if begin not in (None, "resume", "fresh"):
            raise ApiError(400, "begin is resume, fresh or null", "begin")
        if self.plan is None:
            raise ApiError(409, "plan it first")
        how = [] if begin is None else [f"--{begin}"]
        self._start("training", ["train", "--json", "--name", self.name, *how], "done")
        return JSONResponse(self._describe(), 202)

    def _check_free(self) -> None:
        if self._process is not None:
            raise ApiError(409, "one at a time: another training is under way")

    def _start(self, state: State, command: Sequence[str], then: State) -> None:
        with self._lock:
            self._check_free()
            if self.upload is None or not self.upload.exists():
                raise ApiError(409, "send a file first")
            where = ["--store", str(self.store), "--base", self.base, "--set", f"data.block_size={self.block_size}"]
            line = [sys.executable, "-m", "lora_gpt2", *command, str(self.upload), *where, *self.settings]
            result = tempfile.TemporaryFile()  # noqa: SIM115 - `_follow` closes it
            nothing, pipe = subprocess.DEVNULL, subprocess.PIPE
            self._process = subprocess.Popen(line, stdin=nothing, stdout=result, stderr=pipe)  # noqa: S603 - checked
            self.state, self.error, self.line = state, None, ""
        threading.Thread(target=self._follow, args=(self._process, result, then), daemon=True).start()

    def _follow(self, process: subprocess.Popen[bytes], result: IO[bytes], then: State) -> None:
        """Keeps the last line that a process says, and what it ends with; runs in a thread of its own."""
        assert process.stderr is not None
        with process.stderr, result:
            for line in process.stderr:
                self.line = line.decode(errors="replace").strip() or self.line
            code = process.wait()
            result.seek(0)
            found = _read_result(result.read())
        self.error = found.get("error")
        if self.state == "planning" and "parts" in found:
            self.plan, self.error = found, None  # also one that does not fit
        elif self.error is None and code:
            self.error = {"type": "Killed", "message": f"the process ended with {code}", "hint": self.line}
        elif self.error is None:
            self.adapter = found["adapters"][0]
            shutil.rmtree(find_cache_dir() / "uploads", ignore_errors=True)
        with self._lock:
            self._process, self.state = None, "failed" if self.error else then

    def _describe(self) -> dict[str, Any]:
        process, limit = self._process, self.max_upload_bytes
        said = {"state": self.state, "name": self.name, "file": self.upload.name if self.upload else None}
        found = {"plan": self.plan, "adapter": self.adapter, "error": self.error, "line": self.line}
        run = self._find_run(process.pid) if process is not None and self.state == "training" else None
        return {**said, **found, "run": run, "base": Path(self.base).name, "max_upload_bytes": limit}

    def _find_run(self, process: int) -> str | None:
        for folder in list_runs(self.runs)[:MOST_RUNS]:
            with contextlib.suppress(NotFoundError):
                if RunReader(folder, has_curves=False).description.get("process") == process:
                    return folder.name
        return None

    def close(self) -> None:
        """Tells a training to keep a checkpoint and end; `train` with --resume goes on."""
        process = self._process
        if process is not None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(KILL_SECONDS)


def clean_file_name(name: str) -> str:
    """Returns the name under which a file that was sent is kept: no path, no option, no pattern, no label."""
    cleaned = re.sub(r"[^\w. -]", "_", Path(name.replace("\\", "/")).name)[-MOST_NAME:].lstrip(".- ")
    return cleaned or "text.txt"


def read_settings(body: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Returns the name of the adapter and options of the command line; raises `ApiError` 400, `UsageError`."""
    name, steps, forget = body.get("name"), body.get("steps"), body.get("forget")
    if not isinstance(name, str):
        raise ApiError(400, "name is that of the adapter", "name")
    settings = []
    if steps is not None:
        if type(steps) is not int or not 1 <= steps <= MOST_STEPS:
            raise ApiError(400, f"steps is a whole number up to {MOST_STEPS:,}", "steps")
        settings += ["--steps", str(steps)]
    if forget is not None:
        if type(forget) not in (int, float) or not 0 < forget <= 10:
            raise ApiError(400, "forget is a number of nats per token, such as 0.1", "forget")
        settings += ["--forget", str(forget)]
    return check_name(name), tuple(settings)


def _read_result(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
