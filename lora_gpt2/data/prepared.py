"""Read, clean, split, tokenise: from sources to blocks in a folder named after their content.

The folder's name is a fingerprint of the files' bytes, the settings that matter, the tokenizer and the format, so
`train` finds what an earlier run prepared, and a changed byte prepares anew. Folders are immutable.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import DataError
from lora_gpt2.core.fingerprint import fingerprint_json, hash_file
from lora_gpt2.core.paths import find_cache_dir, os_errors_as_ours, sync_tree, temporary_dir
from lora_gpt2.data.blocks import TokenBlocks, open_stream, token_dtype, write_stream
from lora_gpt2.data.cleaning import CleaningReport
from lora_gpt2.data.sources import find_files, read_file
from lora_gpt2.data.split import FEW_DOCUMENTS, choose_section_size, content_key, iter_sections, split_documents
from lora_gpt2.data.tokenizer import Tokenizer
from lora_gpt2.recipe import DataSettings

FORMAT = 2
PARTS = ("train", "validation", "test")
ENCODE_BATCH = 256


@dataclass(frozen=True)
class PreparedData:
    """The blocks of one domain and how they came about."""

    path: Path
    fingerprint: str
    train: TokenBlocks
    validation: TokenBlocks
    test: TokenBlocks
    report: dict[str, Any]


class _Intake:
    """Collects the documents of one preparation: cleaned, without empty ones and exact copies."""

    def __init__(self, profile: str) -> None:
        self.profile = profile
        self.cleaning = CleaningReport()
        self.rejected: Counter[str] = Counter()
        self.read = 0
        self.seen: set[bytes] = set()

    def take(self, paths: Sequence[Path], settings: DataSettings) -> Iterator[str]:
        """Yields the documents of some files that are worth keeping."""
        for document in (document for path in paths for document in read_file(path, settings)):
            self.read += 1
            text = self.cleaning.clean(document.text, self.profile)
            if not text.strip():
                self.rejected["empty"] += 1
            elif self._is_new(text):
                yield text
            else:
                self.rejected["duplicate"] += 1

    def cut_if_few(self, texts: list[str]) -> list[str]:
        """Returns the documents, or their sections where they are too few to be split."""
        if len(texts) >= FEW_DOCUMENTS:
            return texts
        size = choose_section_size(sum(map(len, texts)))
        sections = [section for text in texts for section in iter_sections(text, size) if section.strip()]
        return list(dict.fromkeys(sections))

    def _is_new(self, text: str) -> bool:
        key = content_key(text)
        is_new = key not in self.seen
        self.seen.add(key)
        return is_new


def prepare_data(
    settings: DataSettings, tokenizer: Tokenizer, reporter: Reporter, cache: Path | None = None
) -> PreparedData:
    """Returns the blocks of the sources, from the cache if they are there.

    Raises:
        NotFoundError, DataError: see `sources`; also where there is nothing to train or validate on.
        ResourceError: the folder cannot be written.
    """
    if not settings.sources:
        raise DataError("there is no text to train on", "name some with --data FILE, or data.sources in the recipe")
    files = {part: find_files(getattr(settings, key)) for part, key in zip(PARTS, ("sources", *PARTS[1:]), strict=True)}
    relevant = settings.model_dump(exclude={"sources", "validation", "test"})
    hashes = {part: [hash_file(path) for path in paths] for part, paths in files.items()}
    fingerprint = fingerprint_json([FORMAT, hashes, relevant, tokenizer.fingerprint])
    folder = (cache or find_cache_dir() / "prepared") / fingerprint
    report = _read_report(folder, tokenizer)
    if report is None:
        with os_errors_as_ours(f"write prepared data to {folder}"):
            shutil.rmtree(folder, ignore_errors=True)
            report = _build(folder, files, settings, tokenizer, reporter)
    train, validation, test = (
        TokenBlocks(open_stream(folder / f"{part}.bin", tokenizer.vocab_size), settings.block_size) for part in PARTS
    )
    return PreparedData(folder, fingerprint, train, validation, test, report)


def _read_report(folder: Path, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Returns the manifest of a prepared folder, or None if it is missing or its streams are not what it says."""
    item = np.dtype(token_dtype(tokenizer.vocab_size)).itemsize
    try:
        report = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for part, count in report["tokens"].items():
            if (folder / f"{part}.bin").stat().st_size != (count + 1) * item * bool(count):
                return None
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    assert isinstance(report, dict)
    return report


def _build(
    folder: Path, files: dict[str, list[Path]], settings: DataSettings, tokenizer: Tokenizer, reporter: Reporter
) -> dict[str, Any]:
    intake = _Intake(settings.profile)
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for part in ("test", "validation"):  # first, so that copies of them are dropped from training
        parts[part] = list(intake.take(files[part], settings))
    held_out = len(intake.seen), intake.rejected["duplicate"]
    texts = list(intake.take(files["train"], settings))
    overlap = intake.rejected["duplicate"] - held_out[1] if held_out[0] else 0
    kept = len(texts) + held_out[0]
    shares = [0.0 if files[p] else getattr(settings, f"{p}_share") for p in ("validation", "test")]
    texts = intake.cut_if_few(texts) if any(shares) else texts
    for text, part in zip(texts, split_documents(texts, *shares), strict=True):
        parts[part].append(text)
    _check(parts, kept, intake)
    if overlap:
        reporter.message(f"{overlap} training documents were copies of held-out or other documents and were dropped")
    with temporary_dir(folder.parent, folder.name) as work:
        tokens, documents = {}, {}
        total = sum(len(texts) for texts in parts.values())
        with reporter.task("tokenising", total, "documents") as task:
            for part in PARTS:
                encoded = _encode(parts[part], tokenizer, task.advance)
                tokens[part] = write_stream(work / f"{part}.bin", encoded, tokenizer.eos_id, tokenizer.vocab_size)
                documents[part] = len(parts[part])
        manifest = {
            "format": FORMAT, "documents_read": intake.read, "documents_kept": kept, "documents": documents,
            "rejected": dict(intake.rejected), "tokens": tokens, "settings": settings.model_dump(mode="json"),
            "rules": {name: asdict(rule) for name, rule in intake.cleaning.rules.items()},
            "tokenizer_fingerprint": tokenizer.fingerprint,
        }  # fmt: skip
        (work / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        sync_tree(work)
        if not folder.exists():
            os.rename(work, folder)
    return manifest


def _encode(texts: Sequence[str], tokenizer: Tokenizer, advance: Any) -> Iterator[list[int]]:
    for start in range(0, len(texts), ENCODE_BATCH):
        batch = texts[start : start + ENCODE_BATCH]
        yield from tokenizer.encode_batch(batch)
        advance(len(batch))


def _check(parts: dict[str, list[str]], kept: int, intake: _Intake) -> None:
    reasons = ", ".join(f"{count} {reason}" for reason, count in intake.rejected.items() if count) or "none rejected"
    counts = f"{intake.read} documents read, {kept} kept ({reasons})"
    if not parts["train"]:
        raise DataError(f"0 usable documents to train on: {counts}", "give more text, or check data.profile")
    if not parts["validation"]:
        raise DataError(
            f"no document is left to validate on: {counts}",
            "give more text, or a file of its own: --set data.validation=[FILE]",
        )
