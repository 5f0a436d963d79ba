"""A file of prompts becomes a file of continuations, line by line, and goes on where it was stopped.

Prompts: JSON lines with `prompt` and, if wanted, `adapter` and `seed` of their own; or plain text, a prompt a line.
Results: JSON lines with the keys of `generate --json` and `index`, the prompt's index, in the order of finishing. A
line is written when its continuation is finished, so an interruption loses none; a half line is written again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.dirs import find_cache_dir
from lora_gpt2.core.errors import ConflictError, DataError
from lora_gpt2.core.files import wrap_os_errors
from lora_gpt2.core.fingerprint import fingerprint_json, flatten_json
from lora_gpt2.core.interrupt import StopRequest
from lora_gpt2.core.locks import hold_lock
from lora_gpt2.core.user_files import check_output, read_user_text
from lora_gpt2.inference.constraint import adopt_constraint
from lora_gpt2.inference.generate import (
    Output,
    Request,
    describe_options,
    describe_provenance,
    iter_outputs,
    raise_first_error,
)
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.routing import AUTO_MIX
from lora_gpt2.inference.session import Session
from lora_gpt2.recipe import GenerateSettings

JSON_LINES = (".jsonl", ".ndjson")
MOST_SHOWN = 3  # differences from the results that are there


def read_prompts(path: Path, mix: Mix, seed: int) -> list[Request]:
    """Returns a request for each line of a file; `mix` and `seed` (plus the line's index) are for lines without own.

    Raises `DataError`, which names the line, for one that is no prompt; for the file itself what `read_user_text` does.
    """
    lines = read_user_text(path).split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if path.suffix.lower() == ".json":
        raise DataError(f"{path}: prompts are JSON lines, or plain text", "name it .jsonl, with a prompt on each line")
    if path.suffix.lower() not in JSON_LINES:
        return [Request(line.rstrip("\r"), mix, seed + index) for index, line in enumerate(lines)]
    return [_parse_line(line, f"{path}:{index + 1}", mix, seed + index) for index, line in enumerate(lines)]


def _parse_line(line: str, where: str, mix: Mix, seed: int) -> Request:
    try:
        values: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON", 'write {"prompt": "..."} on each line') from error
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise DataError(f"{where} has no field 'prompt' with a text", 'write {"prompt": "..."} on each line')
    adapter, own = values.get("adapter"), values.get("seed", seed)
    if not isinstance(adapter, str | None) or not isinstance(own, int) or isinstance(own, bool) or own < 0:
        raise DataError(f"{where}: adapter is a text such as law:0.6+code:0.4, seed a whole number", "fix the line")
    return Request(values["prompt"], Mix.parse(adapter) if adapter else mix, own)


Check = Callable[[int, Mapping[str, Any]], None]
"""Receives the index of a prompt and the result that is there for it."""


def find_done(out: Path, requests: Sequence[Request], check: Check = lambda index, result: None) -> set[int]:
    """Returns the indices whose results are in `out`; a last half line is cut off.

    Raises `ConflictError` if `out` holds anything else, `UsageError` if it is a pipe or a device; and as `check` does.
    """
    check_output(out)
    if not out.exists():
        return set()
    done = set()
    with wrap_os_errors(f"read {out}"):
        content = out.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for line in whole.splitlines():
            try:
                values = json.loads(line)
                index, prompt = values["index"], values["prompt"]
            except (ValueError, KeyError, TypeError, RecursionError):
                index, prompt = -1, None
            if not (isinstance(index, int) and 0 <= index < len(requests) and requests[index].prompt == prompt):
                raise ConflictError(f"{out} holds something else than results of these prompts", "choose another file")
            check(index, values)
            done.add(index)
        if len(whole) < len(content):
            with out.open("r+b") as file:
                file.truncate(len(whole))
    return done


def generate_file(
    session: Session,
    requests: Sequence[Request],
    out: Path,
    settings: GenerateSettings,
    stop: StopRequest,
    *,
    reporter: Reporter,
    truncate_left: bool = False,
) -> int:
    """Continues the prompts whose results are not yet in `out`; returns how many it has now.

    Raises:
        ConflictError: see `find_done`; results in `out` come from another base, other adapters or settings; or another
            process is writing to it.
        UsageError: a prompt does not fit.
        CorruptError: an adapter's logits are not finite after a prompt; all other results are kept.
    """
    with hold_output(out):
        return _generate_missing(session, requests, out, settings, stop, reporter=reporter, truncate_left=truncate_left)


def hold_output(out: Path) -> AbstractContextManager[None]:
    """Keeps other processes of this user from writing to the same file; raises `ConflictError` if one does."""
    lock = find_cache_dir() / "locks" / fingerprint_json(str(out.absolute()))
    return hold_lock(lock, str(out), hint="wait until it ends, or choose another --out")


def _generate_missing(
    session: Session,
    requests: Sequence[Request],
    out: Path,
    settings: GenerateSettings,
    stop: StopRequest,
    *,
    reporter: Reporter,
    truncate_left: bool,
) -> int:
    done = find_done(out, requests, _build_check(session, requests, settings, out, truncate_left))
    pending = [index for index in range(len(requests)) if index not in done]
    with (
        wrap_os_errors(f"write {out}"),
        out.open("a", encoding="utf-8") as file,
        reporter.task("continuing", len(pending), "prompts") as task,
    ):
        for index in _write_outputs(
            session, [requests[p] for p in pending], pending, file, settings, stop=stop, truncate_left=truncate_left
        ):
            done.add(index)
            task.advance(1)
    return len(done)


def _build_check(
    session: Session, requests: Sequence[Request], settings: GenerateSettings, out: Path, truncate_left: bool
) -> Check:
    """Returns a check that raises `ConflictError` for a result that these requests would not give."""
    expected: dict[tuple[Mix, int], dict[str, Any]] = {}

    def check(index: int, result: Mapping[str, Any]) -> None:
        request, found = requests[index], {**result.get("provenance", {})}
        mix, own = request.mix, request.settings or settings
        is_routed = found.pop("auto", None) is not None and mix == AUTO_MIX
        if is_routed:
            mix = Mix((item["adapter"], item["weight"]) for item in found.get("adapters", ()))
        if (mix, id(own)) not in expected:
            resolved = session.resolve(mix)
            session.load(list(resolved.references))  # which also finds their manifests
            may_change = is_routed and bool(own.reroute_every)
            adopted = own if may_change else adopt_constraint(own, session.find_manifests(resolved))
            values = describe_provenance(session, resolved, adopted, 0)
            expected[mix, id(own)] = flatten_json(json.loads(json.dumps(values)))
        options = describe_options(request, truncate_left)
        wanted, found = {**expected[mix, id(own)], **options, "seed": request.seed}, flatten_json(found)
        if different := sorted(key for key in wanted | found if wanted.get(key) != found.get(key)):
            telling = [key for key in different if not key.endswith("sha256")] or different
            shown = "; ".join(f"{key} {found.get(key)} then, {wanted.get(key)} now" for key in telling[:MOST_SHOWN])
            raise ConflictError(
                f"{out} holds results of other settings (prompt {index + 1}: {shown})",
                "choose another --out, or restore these to go on",
            )

    return check


def _write_outputs(
    session: Session,
    requests: Sequence[Request],
    pending: Sequence[int],
    file: IO[str],
    settings: GenerateSettings,
    *,
    stop: StopRequest,
    truncate_left: bool,
) -> Iterator[int]:
    failed: list[Output] = []
    for index, output in iter_outputs(session, requests, settings, stop=stop, truncate_left=truncate_left):
        if output.error is not None:
            failed.append(output)
        elif output.finish_reason != "interrupted":
            file.write(json.dumps({"index": pending[index], **output.to_json()}, ensure_ascii=False) + "\n")
            file.flush()
            yield pending[index]
    raise_first_error(failed)
