"""One shard of documents: cleaned, judged, signed and tokenised, by one process, into files that outlive it.

A shard is a pure function of its documents and the context, and is written whole or not at all, so work that was
interrupted goes on where it was. A document that takes too long is set aside, and the others go on.
"""

from __future__ import annotations

import json
import re
import signal
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_gpt2.core.files import write_atomic
from lora_gpt2.data.clean.boilerplate import drop_edges
from lora_gpt2.data.clean.cleaning import CleaningReport, clean_text
from lora_gpt2.data.clean.filters import find_reason
from lora_gpt2.data.clean.html import looks_like_page
from lora_gpt2.data.clean.rules import BOILERPLATE
from lora_gpt2.data.dedup import Signatures, content_key, sign_records
from lora_gpt2.data.read.records import Document
from lora_gpt2.data.rejections import Rejections
from lora_gpt2.data.split import iter_sections
from lora_gpt2.data.text_sketch import hash_shingles
from lora_gpt2.data.tokenizer import Tokenizer
from lora_gpt2.recipe import DataSettings

MIN_TIMEOUT_SECONDS, SECONDS_PER_MEGABYTE, MAX_TIMEOUT_SECONDS = 2.0, 4.0, 300.0
TOO_SLOW = "too slow to clean"
RETRY_SECONDS = 0.5  # between tries to stop what did not stop
SHOWN_CHARACTERS = 200
BEYOND_ASCII = re.compile(r"[^\x00-\x7f]")


@dataclass(frozen=True, kw_only=True)
class ShardContext:
    """The settings that all shards of a preparation share.

    `section_length` is the length in characters that training documents are cut to; 0 leaves them whole. Without a
    tokenizer, a context is for cleaning only.
    """

    settings: DataSettings
    rules: dict[str, str]
    code_rules: dict[str, str]
    tokenizer: Tokenizer | None
    boilerplate: frozenset[str]
    section_length: int
    folder: Path

    def rules_for(self, document: Document) -> Mapping[str, str]:
        """Returns the rules that clean a document: source code has its own, unless the profile was chosen for it."""
        return self.code_rules if document.is_code else self.rules


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Documents of one split, in reading order."""

    number: int
    split: str
    documents: Sequence[Document]


@dataclass(kw_only=True)
class ShardArrays:
    """What became of the documents of one shard that were kept; arrays are in their order.

    `shingles` are those of `text_sketch.hash_shingles`, `num_shingles` of each document.
    """

    split: str
    origins: list[str]
    shown: list[str]
    lengths: NDArray[np.int64]
    prompts: NDArray[np.int64]
    keys: NDArray[np.void]
    groups: NDArray[np.void]
    signatures: Signatures
    shingles: NDArray[np.uint32]
    num_shingles: NDArray[np.int64]
    ids: NDArray[Any]


@dataclass(kw_only=True)
class ShardReport:
    """What happened to the documents of one shard; `characters` counts those that are not ASCII."""

    read: int = 0
    kept: int = 0
    rejected: list[dict[str, Any]] = field(default_factory=list)
    cleaning: CleaningReport = field(default_factory=CleaningReport)
    characters: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        """Returns the report as JSON values."""
        counted = {"cleaning": self.cleaning.to_json(), "characters": dict(self.characters)}
        return {"read": self.read, "kept": self.kept, "rejected": self.rejected, **counted}


class _TooSlowError(Exception):
    """A document exceeds its time."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Interrupts a block that takes too long, where a process can: in its main thread, by SIGALRM.

    Windows has no such signal: there the block ends in its own time, and what took too long fails afterwards.
    """
    alarm = _find_alarm()
    if alarm is None:
        started = time.monotonic()
        yield
        if time.monotonic() - started > seconds:
            raise _TooSlowError
        return
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_: int, frame: FrameType | None) -> None:
        if frame is not None and frame.f_code.co_filename == weakref.__file__:
            return  # called by the parser, which would take an exception for a fault of its own: a moment later
        raise _TooSlowError

    before = alarm.signal(alarm.SIGALRM, stop)
    alarm.setitimer(alarm.ITIMER_REAL, seconds, RETRY_SECONDS)
    try:
        yield
    finally:
        try:
            alarm.setitimer(alarm.ITIMER_REAL, 0)
        finally:
            alarm.signal(alarm.SIGALRM, before)


def _find_alarm() -> Any:
    """Returns the module with SIGALRM and its timer, or None where the system has neither (Windows)."""
    return signal if hasattr(signal, "setitimer") else None


def clean_within_timeout(document: Document, context: ShardContext, report: CleaningReport) -> Document | None:
    """Returns a document cleaned, or None if that takes too long."""
    try:
        seconds = MIN_TIMEOUT_SECONDS + SECONDS_PER_MEGABYTE * len(document.text) / 1e6
        with _time_limit(min(seconds, MAX_TIMEOUT_SECONDS)):
            return clean_document(document, context, report)
    except _TooSlowError:
        return None


def clean_document(document: Document, context: ShardContext, report: CleaningReport) -> Document:
    """Returns a document with text and prompt cleaned; where a prompt stands before it, the space between stays."""
    if not document.prompt:
        return replace(document, text=_clean(document, context, report))
    pieces, reports = [], []
    for text in (document.prompt, document.text):
        core = text.strip()
        begin = len(text) - len(text.lstrip())
        part = CleaningReport(whole=report.whole or report)
        pieces.append(f"{text[:begin]}{clean_text(core, context.rules_for(document), part)}{text[begin + len(core) :]}")
        reports.append(part)
    report.add_parts(reports)
    return replace(document, prompt=pieces[0], text=pieces[1])


def _clean(document: Document, context: ShardContext, report: CleaningReport) -> str:
    takes_edges = is_boilerplate_checked(document, context)
    text = clean_text(document.text, context.rules_for(document), report)
    return report.note(BOILERPLATE, text, drop_edges(text, context.boilerplate)) if takes_edges else text


def is_boilerplate_checked(document: Document, context: ShardContext) -> bool:
    """True if the lines that documents have in common are looked for in one: by default in web pages alone.

    A template's own lines are meant.
    """
    mode = "" if context.settings.template else context.rules_for(document).get(BOILERPLATE)
    return mode == "all" or (mode == "pages" and looks_like_page(document.text))


def process_shard(shard: Shard, context: ShardContext) -> None:
    """Writes what becomes of a shard to the context's folder; does nothing if it is there."""
    done = context.folder / f"{shard.number:06d}.json"
    if done.exists():
        return
    report, kept, rejected = ShardReport(), list[Document](), Rejections()
    for document in shard.documents:
        report.read += not document.continues
        cleaning = CleaningReport(whole=report.cleaning)
        cleaned = clean_within_timeout(document, context, cleaning)
        reason = find_reason(cleaned.text, context.settings) if cleaned else TOO_SLOW
        if reason or cleaned is None:
            shown = document.text[:SHOWN_CHARACTERS]
            rejected.add({"origin": document.origin, "reason": str(reason), "text": shown})
            continue
        report.kept += not document.continues
        report.cleaning.add(cleaning)
        report.characters.update(BEYOND_ASCII.findall(cleaned.text))
        kept += _cut(cleaned, context.section_length if shard.split == "train" else 0)
    report.rejected = rejected.entries
    assert context.tokenizer is not None
    arrays = _measure(kept, context.tokenizer)
    content = {
        "split": shard.split,
        "origins": [document.origin for document in kept],
        "shown": [document.text[:SHOWN_CHARACTERS] for document in kept],
        "report": report.to_json(),
    }
    with (context.folder / f"{shard.number:06d}.npz").open("wb") as file:
        np.savez(file, **arrays)
    write_atomic(done, json.dumps(content).encode())


def _cut(document: Document, section_length: int) -> list[Document]:
    if not section_length or document.prompt:
        return [document]
    sections = [text for text in iter_sections(document.text, section_length) if text.strip()]
    return [replace(document, text=text, origin=f"{document.origin}§{i}") for i, text in enumerate(sections, start=1)]


def _measure(documents: Sequence[Document], tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns tokens, lengths, identities and signatures; documents with one prompt are one group."""
    wholes = [document.prompt + document.text for document in documents]
    prompts = tokenizer.encode_batch([document.prompt for document in documents])
    texts = tokenizer.encode_batch([document.text for document in documents])
    keys = [content_key(whole) for whole in wholes]
    groups = [content_key(d.prompt) if d.prompt else k for d, k in zip(documents, keys, strict=True)]
    lengths = [len(prompt) + len(text) for prompt, text in zip(prompts, texts, strict=True)]
    shingles = [hash_shingles(whole) for whole in wholes]
    tokens = chain.from_iterable(chain.from_iterable(zip(prompts, texts, strict=True)))
    return {
        "ids": np.fromiter(tokens, np.uint32, sum(lengths)),
        "lengths": np.array(lengths, dtype=np.int64),
        "prompts": np.array([len(prompt) for prompt in prompts], dtype=np.int64),
        "keys": np.frombuffer(b"".join(keys), dtype="V16"),
        "groups": np.frombuffer(b"".join(groups), dtype="V16"),
        "signatures": sign_records([document.prompt for document in documents], [d.text for d in documents]),
        "shingles": np.concatenate([np.zeros(0, np.uint32), *shingles]),
        "num_shingles": np.array([len(each) for each in shingles], dtype=np.int64),
    }


def load_shard(folder: Path, number: int, with_ids: bool = True) -> tuple[ShardArrays, ShardReport]:
    """Returns what `process_shard` wrote; without the tokens, all shards fit into memory."""
    content = json.loads((folder / f"{number:06d}.json").read_bytes())
    report = content["report"]
    report["cleaning"] = CleaningReport.from_json(report["cleaning"])
    report["characters"] = Counter(report["characters"])
    with np.load(folder / f"{number:06d}.npz", allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in arrays if name != "ids" or with_ids}
        kept = ShardArrays(
            split=content["split"], origins=content["origins"], shown=content["shown"], **{"ids": np.zeros(0), **found}
        )
    return kept, ShardReport(**report)
