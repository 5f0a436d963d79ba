"""Training that is begun on the page of `serve`: a text is sent, planned, and trained on by a process of its own.

One at a time. The process is the command line, so the page can do nothing that a user could not type; its run has a
page like any other. When the server ends, it is told to keep a checkpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from lora_gpt2.core.dirs import find_cache_dir
from lora_gpt2.core.errors import LoraGpt2Error, NotFoundError
from lora_gpt2.core.files import wrap_os_errors
from lora_gpt2.core.names import check_name
from lora_gpt2.core.printable import hide_paths
from lora_gpt2.core.processes import describe_process, has_ended
from lora_gpt2.serving.answers import ApiError, answer_errors, read_json
from lora_gpt2.serving.middleware import Access
from lora_gpt2.store.catalog import Store
from lora_gpt2.training.run_reader import RunReader, list_runs
from lora_gpt2.training.run_status import OWNER

UPLOAD_SECONDS, KILL_SECONDS, KEPT_SECONDS = 300.0, 60.0, 7 * 86400.0
MOST_NAME, MOST_ENDING, MOST_STEPS, MOST_RUNS = 100, 16, 1_000_000, 8
LOG_NAME, RESULT_NAME, KEPT_NAME = "~log", "~result", "~training"  # beside the file that was sent; in no file's name
LAST_BYTES = 2048
KEPT = ("base", "block_size", "name", "settings", "plan", "plan_id")
INTERRUPTED, KILLED = "InterruptedRunError", "Killed"
OWN_GROUP: dict[str, Any] = {"start_new_session": True}  # Ctrl-C is for the server, which tells its training once
if os.name == "nt":
    OWN_GROUP = {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
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
    upload_id: str = ""
    plan_id: str = ""
    adapter: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    owner: str = field(default_factory=lambda: secrets.token_hex(8))
    _folder: Path | None = None
    _log: Path | None = None
    _process: subprocess.Popen[bytes] | None = None
    _told: subprocess.Popen[bytes] | None = None
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
        with self._lock:
            self._check_free()
        uploads = find_cache_dir() / "uploads"
        with wrap_os_errors(f"write to {uploads}"):
            uploads.mkdir(parents=True, exist_ok=True)
            _remove_old(uploads)
            folder = Path(tempfile.mkdtemp(dir=uploads))
            target = folder / clean_file_name(request.query_params.get("file", ""))
            try:
                size = await self._write(request, target)
                with self._lock:
                    self._check_free()  # it took a while
                    self._forget_upload()
                    self._folder, self.upload, self.state = folder, target, "idle"
                    self.upload_id = folder.name
                    self.plan = self.adapter = self.error = None
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        return JSONResponse({"file": target.name, "bytes": size, "id": folder.name})

    def _forget_upload(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = self._log = None

    async def _write(self, request: Request, target: Path) -> int:
        """Writes a request's body to a file; returns its size."""
        size = 0
        with target.open("wb") as file:
            async with asyncio.timeout(UPLOAD_SECONDS):
                async for piece in request.stream():
                    size += len(piece)
                    if size > self.max_upload_bytes:
                        limit = f"{self.max_upload_bytes:,} bytes (serve.max_upload_bytes)"
                        raise ApiError(413, f"the file is larger than {limit}; train it on the command line")
                    await run_in_threadpool(file.write, piece)
        return size

    async def begin_plan(self, request: Request) -> Response:
        """POST plan {"name", "steps", "forget"}: reads the text, and says what training on it will take.

        With the `upload` id of a file, only that one; somebody else may have sent another meanwhile.
        """
        self.access.check_control(request.headers)
        body = await read_json(request)
        self._start("planning", ["plan", "--json"], ("upload", body.get("upload")), read_settings(body))
        return JSONResponse(await run_in_threadpool(self._describe), 202)

    async def begin_training(self, request: Request) -> Response:
        """POST train {"begin": null, "resume" or "fresh"}: trains what was planned, with a `plan` id only that."""
        self.access.check_control(request.headers)
        body = await read_json(request)
        begin = body.get("begin")
        if begin not in (None, "resume", "fresh"):
            raise ApiError(400, "begin is resume, fresh or null", "begin")
        self._start(
            "training", ["train", "--json", *([] if begin is None else [f"--{begin}"])], ("plan", body.get("plan"))
        )
        return JSONResponse(await run_in_threadpool(self._describe), 202)

    def _check_free(self) -> None:
        if self._process is not None:
            raise ApiError(409, "one at a time: another training is under way")

    def _start(
        self,
        state: Literal["planning", "training"],
        command: Sequence[str],
        meant: tuple[Literal["upload", "plan"], Any],
        named: tuple[str, tuple[str, ...]] | None = None,
    ) -> None:
        """Starts the command on what was sent; `named` is the name and the settings of a new plan.

        `meant` is the id of what it is for, None for whatever is there.
        """
        with self._lock:
            self._check_free()
            if meant[1] not in (None, self.upload_id if meant[0] == "upload" else self.plan_id):
                what = {"upload": "text was sent", "plan": "plan was made"}[meant[0]]
                raise ApiError(409, f"another {what} meanwhile: plan again", meant[0])
            if self.upload is None or self._folder is None or not self.upload.exists():
                raise ApiError(409, "send a file first")
            if named is not None:
                (self.name, self.settings), self.plan, self.plan_id = named, None, secrets.token_hex(8)
            elif self.plan is None:
                raise ApiError(409, "plan it first")
            where = ["--store", str(self.store), "--base", self.base, "--set", f"data.block_size={self.block_size}"]
            where += ["--data", str(self.upload), *(["--name", self.name] if state == "training" else [])]
            line = [sys.executable, "-m", "lora_gpt2", *command, *where, *self.settings]
            self._log, result = self._folder / LOG_NAME, self._folder / RESULT_NAME
            with wrap_os_errors(f"write to {self._folder}"), self._log.open("wb") as log, result.open("wb") as out:
                self._process = subprocess.Popen(  # noqa: S603 - checked
                    line, stdin=subprocess.DEVNULL, stdout=out, stderr=log, env=self._environment, **OWN_GROUP
                )
            self.state, self.error = state, None
            if state == "training":
                self._keep()
        threading.Thread(target=self._follow, args=(self._process, result, state), daemon=True).start()

    def _keep(self) -> None:
        """Writes what is trained beside the file, so that a server that begins later can offer to resume it."""
        assert self._folder is not None
        assert self.upload is not None
        kept = {key: getattr(self, key) for key in KEPT} | {
            "file": self.upload.name,
            "store": str(self.store.absolute()),
        }
        kept |= describe_process()
        with contextlib.suppress(OSError):
            (self._folder / KEPT_NAME).write_text(json.dumps(kept), encoding="utf-8")

    def offer_interrupted(self) -> None:
        """Takes up what an earlier server was training over this store and base when it ended, to be resumed."""
        for path in sorted((find_cache_dir() / "uploads").glob(f"*/{KEPT_NAME}"), key=_find_time, reverse=True):
            try:
                kept = json.loads(path.read_bytes())
                is_ours = kept["store"] == str(self.store.absolute()) and kept["base"] == self.base
                file = path.parent / clean_file_name(kept["file"])
                named = check_name(kept["name"]), tuple(map(str, kept["settings"]))
            except (OSError, ValueError, KeyError, TypeError, LoraGpt2Error):
                continue
            is_left = has_ended(kept) and file.is_file() and bool(kept["plan"])
            if is_ours and kept["block_size"] == self.block_size and is_left:
                self._folder, self.upload, self.upload_id = path.parent, file, path.parent.name
                (self.name, self.settings), self.plan, self.plan_id = named, kept["plan"], str(kept["plan_id"])
                message = f"training {self.name} on {file.name} was interrupted when the server ended"
                self.state, self.error = "failed", {"type": INTERRUPTED, "message": message, "hint": "resume it"}
                self._keep()  # other servers leave it to this one
                return

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, OWNER: self.owner}

    def _follow(self, process: subprocess.Popen[bytes], result: Path, state: str) -> None:
        """Waits for a process and keeps what it ends with; runs in a thread of its own."""
        code = process.wait()
        try:
            found = _read_result(result.read_bytes())
        except OSError:
            found = {}
        with self._lock:
            self._process = None
            self.error = found.get("error")
            if state == "planning" and "parts" in found:
                self.plan, self.error = found, None  # also one that does not fit
            elif state == "training" and found.get("adapters"):
                self.adapter = found["adapters"][0]
                self._forget_upload()
            elif self.error is None:
                self.error = {"type": KILLED, "message": f"the process ended with {code}", "hint": self._read_line()}
            if self.error and self._folder and self.error.get("type") not in (KILLED, "Interrupted"):
                (self._folder / KEPT_NAME).unlink(missing_ok=True)  # it cannot be resumed
            self.state = "failed" if self.error else "planned" if state == "planning" else "done"

    def _read_line(self) -> str:
        """Returns the last line that the process has said."""
        try:
            with (self._log or Path(os.devnull)).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_BYTES))
                lines = file.read().decode(errors="replace").split("\n")
        except OSError:
            return ""
        return next((hide_paths(line.strip()) for line in reversed(lines) if line.strip()), "")

    def _describe(self) -> dict[str, Any]:
        said = {"state": self.state, "name": self.name, "file": self.upload.name if self.upload else None}
        error = self.error and {key: hide_paths(str(value)) for key, value in self.error.items()}
        found: dict[str, Any] = {"plan": self.plan, "adapter": self.adapter, "error": error, "line": self._read_line()}
        found |= {"upload_id": self.upload_id, "plan_id": self.plan_id}
        versions = Store(self.store).list_versions(self.name) if self.name else []
        found["next_version"] = max(versions, default=0) + 1
        limits = {"base": Path(self.base).name, "max_upload_bytes": self.max_upload_bytes}
        return {**said, **found, **limits, "run": self._find_run() if self.state == "training" else None}

    def _find_run(self) -> str | None:
        for folder in list_runs(self.runs)[:MOST_RUNS]:
            with contextlib.suppress(NotFoundError):
                run = RunReader(folder, has_curves=False)
                if run.description.get("owner") == self.owner and run.status.get("state") == "training":
                    return folder.name
        return None

    @property
    def is_busy(self) -> bool:
        """True while a text is planned or trained on."""
        return self._process is not None

    def tell_to_end(self) -> None:
        """Tells a training, once, to keep a checkpoint and end; a second signal would kill it."""
        process = self._process
        if process is not None and process is not self._told:
            self._told = process
            process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM))

    def close(self) -> None:
        """Waits until a training has kept a checkpoint and ended; it goes on where `offer_interrupted` is asked."""
        self.tell_to_end()
        if (process := self._process) is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(KILL_SECONDS)


def _find_time(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _remove_old(uploads: Path) -> None:
    """Removes what was sent to servers that ended before it was trained on."""
    for folder in uploads.iterdir():
        with contextlib.suppress(OSError):
            if folder.stat().st_mtime < time.time() - KEPT_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def clean_file_name(name: str) -> str:
    """Returns the name under which a file that was sent is kept: no path, no option, no pattern, no label."""
    cleaned = re.sub(r"[^\w. -]", "_", Path(name.replace("\\", "/")).name).lstrip(".- ")
    stem, ending = os.path.splitext(cleaned or "text.txt")
    stem = stem.encode()[:MOST_NAME].decode(errors="ignore")
    is_device = stem.partition(".")[0].upper().rstrip("0123456789") in ("CON", "PRN", "AUX", "NUL", "COM", "LPT")
    return f"{'_' if is_device else ''}{stem}{ending[:MOST_ENDING]}"


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
