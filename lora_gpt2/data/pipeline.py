"""From sources to finished shards: reads ahead, decides what the whole set needs, and deals the work out.

One process reads; the others clean and tokenise. Only a few shards are under way at a time, so memory does not grow
with the text.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import chain
from multiprocessing import get_context, parent_process
from pathlib import Path

from lora_gpt2.core.console import ProgressTask, Reporter
from lora_gpt2.core.errors import DataError, ResourceError
from lora_gpt2.data.clean.boilerplate import find_boilerplate
from lora_gpt2.data.clean.cleaning import CleaningReport
from lora_gpt2.data.clean.filters import find_reason
from lora_gpt2.data.clean.rules import BOILERPLATE, choose_rules
from lora_gpt2.data.read.formats import ReadingLog, read_source
from lora_gpt2.data.read.records import Document
from lora_gpt2.data.read.sources import Source, describe_unread, find_sources, find_splits
from lora_gpt2.data.rejections import UNREADABLE, Rejections, UnreadableRows
from lora_gpt2.data.shards import (
    TOO_SLOW,
    Shard,
    ShardContext,
    clean_within_timeout,
    is_boilerplate_checked,
    process_shard,
)
from lora_gpt2.data.split import FEW_DOCUMENTS, choose_section_length
from lora_gpt2.data.tokenizer import Tokenizer
from lora_gpt2.recipe import DataSettings

PIECE_CHARACTERS = 4 * 2**20
BATCH_CHARACTERS, BATCH_DOCUMENTS = 2**20, 20_000
SAMPLE_DOCUMENTS, SAMPLE_CHARACTERS = 200, 4 * 2**20
WORTH_PROCESSES_BYTES = 8_000_000
MENTIONED = 0.01
_context: ShardContext | None = None


@dataclass(kw_only=True)
class ReadSummary:
    """What reading found besides documents: what could not be read, and the shards there are."""

    bad: Rejections = field(default_factory=Rejections)
    num_shards: int = 0
    is_sectioned: bool = False
    notes: list[str] = field(default_factory=list)


def process_sources(
    splits: Mapping[str, Sequence[Source]],
    settings: DataSettings,
    tokenizer: Tokenizer,
    folder: Path,
    reporter: Reporter,
) -> ReadSummary:
    """Cleans and tokenises all sources into shard files in a folder; shards that are there are kept.

    Raises:
        DataError: a source cannot be read, and bad ones are not to be set aside.
        ResourceError: a process died.
    """
    summary, log = ReadSummary(), ReadingLog()
    total = sum(source.num_bytes for sources in splits.values() for source in sources)
    held_out = chain.from_iterable(
        _iter_documents(splits[split], settings, summary, log, split) for split in splits if split != "train"
    )
    training = _iter_documents(splits["train"], settings, summary, log, "train")
    context = _build_context(settings, tokenizer, folder)
    ahead, is_whole = _read_ahead(training)
    context = replace(context, boilerplate=_find_boilerplate([document for _, document in ahead], context))
    wants_split = any(not splits[p] and getattr(settings, f"{p}_fraction") for p in ("validation", "test"))
    characters = sum(len(document.text) for _, document in ahead)
    rest = 0 if is_whole else max(0, sum(source.num_bytes for source in splits["train"]) - characters)
    count = sum(not document.continues for _, document in ahead)
    summary.is_sectioned = wants_split and count * (1 + rest / max(1, characters)) < FEW_DOCUMENTS
    if summary.is_sectioned:
        context = replace(context, section_length=choose_section_length(characters + rest))
    shards = _iter_shards(chain(held_out, ahead, training))
    processes = settings.num_proc or (count_cores() if total > WORTH_PROCESSES_BYTES else 1)
    with reporter.task("cleaning", max(1, total // 1000), "kB") as task:
        _run(shards, context, processes, _Progress(task, log), summary)
    summary.notes = list_notes(log)
    return summary


def _build_context(settings: DataSettings, tokenizer: Tokenizer | None, folder: Path) -> ShardContext:
    of_code = "code" if settings.profile == "prose" else settings.profile
    return ShardContext(
        settings=settings,
        rules=choose_rules(settings.profile, settings.rules),
        code_rules=choose_rules(of_code, settings.rules),
        tokenizer=tokenizer,
        boilerplate=frozenset(),
        section_length=0,
        folder=folder,
    )


def _find_boilerplate(documents: Sequence[Document], context: ShardContext) -> frozenset[str]:
    """Returns the lines that the documents have in common at their edges, of those in which they are looked for."""
    if BOILERPLATE not in context.rules:
        return frozenset()
    chosen = [document for document in documents if is_boilerplate_checked(document, context)]
    cleaned = (clean_within_timeout(document, context, CleaningReport()) for document in chosen)
    return find_boilerplate([document.text for document in cleaned if document])


def list_notes(log: ReadingLog) -> list[str]:
    """Returns what reading decided by itself, a line each."""
    return [f"{text} ({count:,} times)" if count > 1 else text for text, count in log.notes.items()]


@dataclass(frozen=True, kw_only=True)
class CleanText:
    """Documents as training would see them, and the sha256 of each file that they are from."""

    documents: list[Document]
    files: list[list[str]]


def read_clean(specs: Sequence[str], settings: DataSettings, reporter: Reporter) -> CleanText:
    """Returns documents to measure or look at: read, cleaned and set aside exactly as training does it.

    Of sources that have splits, those of the test split, or without one of the validation split. Says what reading
    decided by itself, and where cleaning changed more than a hundredth of the characters. Copies stay.

    Raises:
        DataError: a source cannot be read, and bad ones are not to be set aside.
    """
    log, summary = ReadingLog(), ReadSummary()
    splits = find_splits(specs, settings)
    sources = splits.get("test") or splits.get("validation") or find_sources(specs, settings)
    if splits:
        log.note(f"{', '.join(specs)}: the {'test' if splits['test'] else 'validation'} split is measured")
    documents = [document for _, document in _iter_documents(sources, settings, summary, log, "test")]
    for line in (*list_notes(log), *describe_unread(specs, settings)):
        reporter.message(line)
    kept = clean_documents(documents, settings, reporter, len(summary.bad))
    return CleanText(documents=kept, files=[source.fingerprint() for source in sources])


def clean_documents(
    documents: Sequence[Document], settings: DataSettings, reporter: Reporter, unreadable: int = 0
) -> list[Document]:
    """Returns documents cleaned, without those that training sets aside; says what that changed; see `read_clean`."""
    context = _build_context(settings, None, Path())
    context = replace(context, boilerplate=_find_boilerplate(documents[:SAMPLE_DOCUMENTS], context))
    report, kept, rejected = CleaningReport(), list[Document](), Counter({UNREADABLE: unreadable} if unreadable else {})
    for document in documents:
        cleaned = clean_within_timeout(document, context, report)
        reason = find_reason(cleaned.text, settings) if cleaned else TOO_SLOW
        if cleaned is None or reason:
            rejected[str(reason)] += 1
        else:
            kept.append(cleaned)
    for line in describe_cleaning(report, documents, rejected):
        reporter.message(line)
    if not kept and set(rejected) - {"empty"}:
        hint = "data.min_characters, data.max_repetition and data.languages say which documents are good enough"
        raise DataError(f"all documents are set aside, as training does: {_list_reasons(rejected)}", hint)
    return kept


def _list_reasons(rejected: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(rejected.items()))


def describe_cleaning(report: CleaningReport, documents: Sequence[Document], rejected: Mapping[str, int]) -> list[str]:
    """Returns a line where cleaning changed more than a hundredth of some documents, or set some of them aside."""
    removed = sum(rule.characters_removed for rule in report.rules.values())
    total = sum(len(document.text) + len(document.prompt) for document in documents)
    lines = []
    if rejected:
        reasons, total_rejected = _list_reasons(rejected), sum(rejected.values())
        count = len(documents) + rejected.get(UNREADABLE, 0)
        lines = [f"{total_rejected:,} of {count:,} documents are set aside, as training does: {reasons}"]
    if abs(removed) > MENTIONED * total:
        rules = ", ".join(report.rules)
        hint = "--set data.profile=raw measures the text as it is"
        lines.append(f"cleaning ({rules}) took {removed / total:.1%} of the characters away, as in training; {hint}")
    return lines


def count_cores() -> int:
    """Returns how many cores this process may use; on macOS, where that cannot be limited, how many there are."""
    import psutil

    process = psutil.Process()
    return len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else os.cpu_count() or 1


def _iter_documents(
    sources: Sequence[Source], settings: DataSettings, summary: ReadSummary, log: ReadingLog, split: str
) -> Iterator[tuple[str, Document]]:
    count = 0
    for item in chain.from_iterable(read_source(source, settings, log, PIECE_CHARACTERS) for source in sources):
        if isinstance(item, DataError):
            if not settings.skip_bad:
                raise item
            counted = {"count": item.count} if isinstance(item, UnreadableRows) else {}
            summary.bad.add({"origin": "", "reason": UNREADABLE, "text": item.message, **counted})
            continue
        count += not item.continues
        if settings.max_documents and count > settings.max_documents:
            return
        yield split, item


def _read_ahead(documents: Iterator[tuple[str, Document]]) -> tuple[list[tuple[str, Document]], bool]:
    """Returns the first documents, from which boilerplate is known, and whether they are all."""
    ahead, characters = [], 0
    for split, document in documents:
        ahead.append((split, document))
        characters += len(document.text)
        if len(ahead) >= SAMPLE_DOCUMENTS or (characters >= SAMPLE_CHARACTERS and len(ahead) >= FEW_DOCUMENTS):
            return ahead, False
        if characters >= 4 * SAMPLE_CHARACTERS:
            return ahead, False
    return ahead, True


def _iter_shards(documents: Iterable[tuple[str, Document]]) -> Iterator[Shard]:
    """Yields documents in shards of about the same size, each of one split."""
    number, characters, run, current = 0, 0, list[Document](), ""
    for split, document in documents:
        if run and (split != current or characters >= BATCH_CHARACTERS or len(run) >= BATCH_DOCUMENTS):
            yield Shard(number=number, split=current, documents=run)
            number, characters, run = number + 1, 0, []
        current = split
        run.append(document)
        characters += len(document.text) + len(document.prompt)
    if run:
        yield Shard(number=number, split=current, documents=run)


@dataclass
class _Progress:
    task: ProgressTask
    log: ReadingLog
    shown: int = 0

    def update(self) -> None:
        now = self.log.offset() // 1000
        self.task.advance(now - self.shown)
        self.shown = now


def _run(
    shards: Iterator[Shard], context: ShardContext, processes: int, progress: _Progress, summary: ReadSummary
) -> None:
    if processes == 1:
        for shard in shards:
            process_shard(shard, context)
            summary.num_shards += 1
            progress.update()
        return
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _start_worker, (context,))
    try:
        waiting: set[Future[None]] = set()
        for shard in shards:
            waiting.add(pool.submit(_work, shard))
            summary.num_shards += 1
            if len(waiting) > 2 * processes:
                waiting = _collect(waiting)
            progress.update()
        while waiting:
            waiting = _collect(waiting)
    except BrokenProcessPool as error:
        hint = "use --set data.num_proc=1; a script needs: if __name__ == '__main__'"
        raise ResourceError("a process that prepares text died", hint) from error
    finally:
        pool.shutdown(cancel_futures=True)
    progress.update()


def _collect(waiting: set[Future[None]]) -> set[Future[None]]:
    done, rest = wait(waiting, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
    return rest


def _start_worker(context: ShardContext) -> None:
    global _context  # noqa: PLW0603 - the one thing a worker keeps
    for name in ("SIGINT", "SIGBREAK"):  # Ctrl-C, and Ctrl-Break on Windows, are for the process that reads
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _context = context


def _end_with_parent() -> None:
    """Ends this process when the one that reads has gone, however it went."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(shard: Shard) -> None:
    assert _context is not None
    process_shard(shard, _context)
