"""Read, clean, split, tokenise: from sources to blocks in a folder named after their content.

The folder's name is a fingerprint of the sources' bytes, the settings that matter, the tokenizer and our version, so
`train` finds what an earlier run prepared, and a changed byte prepares anew. Folders are immutable. Work that was
interrupted is kept beside the folder's place and goes on from there.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from lora_gpt2 import __version__
from lora_gpt2.core.console import Reporter
from lora_gpt2.core.dirs import find_cache_dir
from lora_gpt2.core.errors import CorruptError, DataError, Interrupted, LoraGpt2Error
from lora_gpt2.core.files import rename_path, sync_tree, wrap_os_errors
from lora_gpt2.core.fingerprint import fingerprint_json
from lora_gpt2.core.locks import hold_new_folder
from lora_gpt2.core.printable import count_of
from lora_gpt2.data.blocks import EncodedDocument, TokenBlocks, open_blocks, pack_blocks, write_blocks
from lora_gpt2.data.dedup import NearCopyIndex
from lora_gpt2.data.pipeline import ReadSummary, process_sources
from lora_gpt2.data.read.sources import Source, describe_unread, find_sources, find_splits
from lora_gpt2.data.selection import Selection, select_documents
from lora_gpt2.data.shards import load_shard
from lora_gpt2.data.text_sketch import TextSketch
from lora_gpt2.data.tokenizer import Tokenizer
from lora_gpt2.recipe import DataSettings

FORMAT = 12
SPLITS = ("train", "validation", "test")
HELD_OUT_FIRST = ("test", "validation", "train")
MANIFEST, REJECTED, SKETCH = "manifest.json", "rejected.jsonl", "training_text.bin"
FINGERPRINT = re.compile("[0-9a-f]{16,128}")
NOT_FINGERPRINTED = {"sources", "validation", "test", "num_proc"}
FEW_TOKENS, COMFORTABLE_TOKENS = 50_000, 200_000
FEW_VALIDATION_TOKENS = 2_000


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """The blocks of one domain and how they came about."""

    path: Path
    fingerprint: str
    train: TokenBlocks
    validation: TokenBlocks
    test: TokenBlocks
    report: dict[str, Any]

    @property
    def sketch(self) -> TextSketch:
        """What tells whether a text was trained on."""
        return TextSketch.from_bytes((self.path / SKETCH).read_bytes())

    @property
    def rejected(self) -> Path:
        """The file with every rejected document's origin, beginning and reason, one JSON object per line."""
        return self.path / REJECTED


def prepare_data(
    settings: DataSettings, tokenizer: Tokenizer, reporter: Reporter, cache: Path | None = None
) -> PreparedData:
    """Returns the blocks of the sources, from the cache if they are there.

    Raises:
        NotFoundError, DataError: see `sources` and `formats`; also where there is nothing to train or validate on.
        UsageError: a rule or an encoding does not exist.
        ResourceError: the folder cannot be written, a package is missing, or the hub cannot be reached.
    """
    check_sources(settings)
    sources = _find_split_sources(settings)
    with wrap_os_errors("read the sources"):
        hashes = {split: [source.fingerprint() for source in found] for split, found in sorted(sources.items())}
    relevant = settings.model_dump(exclude=NOT_FINGERPRINTED)
    fingerprint = fingerprint_json([FORMAT, __version__, hashes, relevant, tokenizer.fingerprint])
    folder = (cache or find_cache_dir() / "prepared") / fingerprint
    report = _read_report(folder)
    if report is None:
        with wrap_os_errors(f"write prepared data to {folder}"), _hold_work(folder) as work:
            report = _read_report(folder)  # another process may have prepared it meanwhile
            if report is None:
                report = _build(folder, work, sources, settings, tokenizer, reporter)
    data = open_prepared(folder, settings, tokenizer)
    unread = describe_unread([*settings.sources, *settings.validation, *settings.test], settings)
    return replace(data, report=report | {"reading": [*report["reading"], *unread]})


def find_prepared(
    fingerprint: object, settings: DataSettings, tokenizer: Tokenizer, cache: Path | None = None
) -> PreparedData | None:
    """Returns the blocks of that fingerprint if they are still in the cache: what training saw, whatever came after."""
    if not isinstance(fingerprint, str) or not FINGERPRINT.fullmatch(fingerprint):
        return None
    folder = (cache or find_cache_dir() / "prepared") / fingerprint
    report = _read_report(folder)
    if report is None or (report.get("format"), report.get("tokenizer_fingerprint")) != (FORMAT, tokenizer.fingerprint):
        return None
    return open_prepared(folder, settings, tokenizer)


def open_prepared(folder: Path, settings: DataSettings, tokenizer: Tokenizer) -> PreparedData:
    """Returns the blocks in a folder that `prepare_data` made with these settings; else raises `CorruptError`."""
    if (report := _read_report(folder)) is None:
        raise CorruptError(f"{folder} is not whole", "prepare the text again")
    blocks = {split: open_blocks(folder, split, settings.block_size, tokenizer.vocab_size) for split in SPLITS}
    return PreparedData(path=folder, fingerprint=folder.name, report=report, **blocks)


def check_sources(settings: DataSettings) -> None:
    """Raises what `prepare_data` does where there is no text, or a source names nothing; before a base is loaded."""
    if not settings.sources:
        raise DataError("there is no text to train on", "name a file or a folder, or data.sources in the recipe")
    _find_split_sources(settings)


def _find_split_sources(settings: DataSettings) -> dict[str, list[Source]]:
    """Returns the sources of each split, held-out ones first: as the settings name them, or else their own names."""
    if not (settings.validation or settings.test) and (splits := find_splits(settings.sources, settings)):
        return {split: splits[split] for split in HELD_OUT_FIRST}
    given = {"train": settings.sources, "validation": settings.validation, "test": settings.test}
    found = {split: find_sources(given[split], settings) for split in HELD_OUT_FIRST}
    tested = {source.name for source in found["test"]}
    if shared := [source.name for source in found["validation"] if source.name in tested]:
        raise DataError(f"{shared[0]} is both validation and test text", "give each its own; either may be left out")
    return found


def _read_report(folder: Path) -> dict[str, Any] | None:
    """Returns the manifest of a prepared folder, or None if it is missing or its files are not what it says."""
    try:
        report = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if any((folder / name).stat().st_size != size for name, size in report["files"].items()):
            return None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    assert isinstance(report, dict)
    return report


@contextlib.contextmanager
def _hold_work(folder: Path) -> Iterator[Path]:
    """Yields the folder for unfinished work, held against other processes, which wait.

    It is removed when the work is done or cannot be; an interruption leaves it for the next time.
    """
    work = folder.with_name(f".{folder.name}.partial")
    with hold_new_folder(work):
        try:
            yield work
        except Interrupted:
            raise
        except (LoraGpt2Error, OSError):
            shutil.rmtree(work, ignore_errors=True)
            raise
        else:
            shutil.rmtree(work, ignore_errors=True)


def _build(
    folder: Path,
    work: Path,
    sources: Mapping[str, Sequence[Source]],
    settings: DataSettings,
    tokenizer: Tokenizer,
    reporter: Reporter,
) -> dict[str, Any]:
    shards = work / "shards"
    shards.mkdir(exist_ok=True)
    if found := len(list(shards.glob("*.json"))):
        reporter.message(f"going on with the {found} shards that are done")
    summary = process_sources(sources, settings, tokenizer, shards, reporter)
    given = [split for split in SPLITS if sources[split]]
    selection = select_documents(shards, summary.num_shards, settings, given, summary.is_sectioned)
    selection.rejected = [*summary.bad.entries, *selection.rejected]
    _check(selection)
    staging = work / "staging"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    _write_splits(staging, shards, summary, selection, settings, tokenizer)
    lines = [json.dumps(entry) for entry in selection.rejected]  # ASCII: names of files may be no Unicode
    (staging / REJECTED).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
    report = _build_report(staging, selection, settings, tokenizer)
    report["reading"] = [*_describe_splits(sources, settings), *summary.notes]
    report["test_files"] = [source.fingerprint() for source in sources["test"]]
    (staging / MANIFEST).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8", newline="\n")
    sync_tree(staging)
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one
    rename_path(staging, folder)
    return report


def _describe_splits(sources: Mapping[str, Sequence[Source]], settings: DataSettings) -> list[str]:
    """Returns a line where the split was told by the names of files."""
    if settings.validation or settings.test or not (sources["validation"] or sources["test"]):
        return []
    shown = {split: ", ".join(Path(source.name).name for source in sources[split][:3]) for split in SPLITS}
    return [f"split by names: {'; '.join(f'{split}: {files}' for split, files in shown.items() if files)}"]


def _write_splits(
    staging: Path,
    shards: Path,
    summary: ReadSummary,
    selection: Selection,
    settings: DataSettings,
    tokenizer: Tokenizer,
) -> None:
    names = np.array(selection.splits, dtype=object)
    for split in SPLITS:
        documents = _iter_encoded(shards, summary.num_shards, selection.splits, split)
        write_blocks(staging, split, documents, tokenizer.eos_id, tokenizer.vocab_size, selection.has_prompts)
        if settings.layout == "packed" and split != "test":  # which is measured document by document, whole
            pack_blocks(staging, split, settings.block_size, tokenizer.eos_id, tokenizer.vocab_size)
        np.save(staging / f"{split}.signatures.npy", selection.signatures[names == split])
    trained = [each for each, split in zip(selection.shingles, selection.splits, strict=True) if split == "train"]
    (staging / SKETCH).write_bytes(TextSketch.build(trained).to_bytes())


def _iter_encoded(folder: Path, num_shards: int, splits: Sequence[str], wanted: str) -> Iterator[EncodedDocument]:
    index = 0
    for number in range(num_shards):
        shard, _ = load_shard(folder, number)
        offset = 0
        for length, prompt in zip(shard.lengths.tolist(), shard.prompts.tolist(), strict=True):
            if splits[index] == wanted:
                yield EncodedDocument(ids=shard.ids[offset : offset + length], prompt=prompt)
            index, offset = index + 1, offset + length


def _build_report(staging: Path, selection: Selection, settings: DataSettings, tokenizer: Tokenizer) -> dict[str, Any]:
    blocks = {split: open_blocks(staging, split, settings.block_size, tokenizer.vocab_size) for split in SPLITS}
    lengths = selection.lengths[np.array(selection.splits, dtype=object) != ""]
    cells = {split: blocks[split].num_blocks * settings.block_size for split in SPLITS}
    return {
        "format": FORMAT,
        "documents_read": selection.read,
        "documents_kept": selection.kept,
        "documents": {split: selection.splits.count(split) for split in SPLITS},
        "rejected": selection.count_rejected(),
        "tokens": {split: blocks[split].num_tokens for split in SPLITS},
        "loss_tokens": {split: blocks[split].num_targets for split in SPLITS},
        "fill": {split: blocks[split].num_tokens / cells[split] if cells[split] else 0.0 for split in SPLITS},
        "tokens_per_document": {
            "median": float(np.median(lengths)),
            "p95": float(np.percentile(lengths, 95)),
            "longest": int(lengths.max()),
        },
        "characters": {
            "distinct_beyond_ascii": len(selection.characters),
            "most_frequent": dict(selection.characters.most_common(20)),
        },
        "num_train_test_overlaps": selection.overlap,
        "num_held_out_seen": {split: selection.count_seen(split) for split in SPLITS[1:]},
        "near_duplicates": selection.near,
        **selection.cleaning.to_json(),
        "settings": settings.model_dump(mode="json"),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "files": {path.name: path.stat().st_size for path in sorted(staging.iterdir())},
    }


def _check(selection: Selection) -> None:
    reasons = ", ".join(f"{count} {reason}" for reason, count in selection.count_rejected().items()) or "none rejected"
    kept, held_out = sum(map(bool, selection.splits)), sum(split in SPLITS[1:] for split in selection.splits)
    counts = f"{count_of(selection.read, 'document')} read, {min(selection.kept, kept)} kept ({reasons})"
    counts += f", {held_out} of them held out" if held_out else ""
    if "train" not in selection.splits:
        hint = "give more text, or check data.profile"
        if selection.overlap:
            hint = "data.validation or data.test is the text to train on: name others, or leave them out"
        raise DataError(f"0 usable documents to train on: {counts}", hint)
    if "validation" not in selection.splits:
        raise DataError(
            f"no document is left to validate on: {counts}",
            "give more text, or a file of its own: --set data.validation=[FILE]",
        )


def describe_preparation(data: PreparedData) -> list[str]:
    """Returns what a user should know of how a text was prepared: at most a line for each decision and each rule."""
    report = data.report
    lines = [*report["reading"]]
    for name, rule in report["rules"].items():
        removed = (
            f"{count_of(rule['characters_removed'], 'character')} removed" if rule["characters_removed"] else "changed"
        )
        lines.append(f"cleaning rule {name}: {count_of(rule['documents'], 'document')}, {removed}")
    if overlap := report["num_train_test_overlaps"]:
        lines.append(f"{overlap} training documents were copies or parts of held-out ones and were dropped")
    for split, count in report["num_held_out_seen"].items():
        if count:
            of = report["documents"][split]
            lines.append(
                f"{count} of the {of} {split} documents are parts of training documents: their perplexity is too low"
            )
    for reason, count in report["rejected"].items():
        lines.append(f"set aside: {count_of(count, 'document')}, {reason}")
    if advice := describe_amount(report["tokens"]["train"]):
        lines.append(advice)
    if 0 < (tokens := report["tokens"]["validation"]) < FEW_VALIDATION_TOKENS:
        documents = report["documents"]["validation"]
        lines.append(
            f"{tokens:,} tokens in {count_of(documents, 'document')} to validate on: the choice of the best step is "
            "left to chance; name more with data.validation"
        )
    return lines


def describe_amount(tokens: int) -> str:
    """Returns a plain warning where there is too little text to learn a domain from, or nothing."""
    if tokens >= COMFORTABLE_TOKENS:
        return ""
    comfort = f"{COMFORTABLE_TOKENS // 1000}k or more is comfortable"
    shown = f"{tokens / 1000:.0f}k" if tokens >= 1000 else f"{tokens}"
    if tokens < FEW_TOKENS:
        return f"{shown} tokens to train on: expect memorisation, watch the validation loss; {comfort}"
    return f"{shown} tokens to train on: enough to learn the style, too little for the content; {comfort}"


def measure_overlaps(domains: Mapping[str, PreparedData], threshold: float) -> list[tuple[str, str, int, int]]:
    """Returns (held-out of, training split of, documents, of how many) where a domain trains on another's test."""
    names, parts = list(domains), list[Any]()
    for data in domains.values():
        parts.append(np.concatenate([_load_signatures(data, split) for split in ("validation", "test")]))
    sizes = [len(part) for part in parts]
    owners, index = np.repeat(np.arange(len(parts)), sizes), NearCopyIndex(np.concatenate(parts), threshold)
    found: dict[tuple[int, int], set[int]] = {}
    for number, data in enumerate(domains.values()):
        for held in chain.from_iterable(index.find(_load_signatures(data, "train")).values()):
            if owners[held] != number:
                found.setdefault((int(owners[held]), number), set()).add(held)
    return [(names[own], names[other], len(held), sizes[own]) for (own, other), held in sorted(found.items())]


def _load_signatures(data: PreparedData, split: str) -> Any:
    return np.load(data.path / f"{split}.signatures.npy")
