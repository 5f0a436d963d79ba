"""Read, clean, split, tokenise: from sources to blocks in a folder named after their content.

The folder's name is a fingerprint of the files' bytes, the settings that matter, the tokenizer and the format, so
`train` finds what an earlier run prepared, and a changed byte prepares anew. Folders are immutable.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import DataError
from lora_gpt2.core.fingerprint import fingerprint_json, hash_file
from lora_gpt2.core.paths import find_cache_dir, os_errors_as_ours, sync_tree, temporary_dir
from lora_gpt2.data.blocks import TokenBlocks, open_stream, write_stream
from lora_gpt2.data.cleaning import CleaningReport
from lora_gpt2.data.sources import find_files, read_file
from lora_gpt2.data.split import content_key, iter_sections, split_documents
from lora_gpt2.data.tokenizer import Tokenizer
from lora_gpt2.recipe import DataSettings

FORMAT = 1
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

    def take(self, path: Path, settings: DataSettings) -> Iterator[str]:
        """Yields the sections of a file's documents that are worth keeping."""
        for document in read_file(path, settings):
            self.read += 1
            text = self.cleaning.clean(document.text, self.profile)
            if not text.strip():
                self.rejected["empty"] += 1
                continue
            for section in iter_sections(text):
                key = content_key(section)
                if key in self.seen:
                    self.rejected["duplicate"] += 1
                elif section.strip():
                    self.seen.add(key)
                    yield section


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
    if not (folder / "manifest.json").exists():
        with os_errors_as_ours(f"write prepared data to {folder}"):
            _build(folder, files, settings, tokenizer, reporter)
    report = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    train, validation, test = (
        TokenBlocks(open_stream(folder / f"{part}.bin", tokenizer.vocab_size), settings.block_size) for part in PARTS
    )
    return PreparedData(folder, fingerprint, train, validation, test, report)


def _build(
    folder: Path, files: dict[str, list[Path]], settings: DataSettings, tokenizer: Tokenizer, reporter: Reporter
) -> None:
    intake = _Intake(settings.profile)
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for part in ("test", "validation"):  # first, so that copies of them are dropped from training
        parts[part] = [text for path in files[part] for text in intake.take(path, settings)]
    held_out = len(intake.seen), intake.rejected["duplicate"]
    texts = [text for path in files["train"] for text in intake.take(path, settings)]
    overlap = intake.rejected["duplicate"] - held_out[1] if held_out[0] else 0
    shares = [0.0 if files[p] else getattr(settings, f"{p}_share") for p in ("validation", "test")]
    for text, part in zip(texts, split_documents(texts, *shares), strict=True):
        parts[part].append(text)
    _check(parts, intake, settings)
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
            "format": FORMAT, "documents_read": intake.read, "documents_kept": total, "documents": documents,
            "rejected": dict(intake.rejected), "tokens": tokens, "settings": settings.model_dump(mode="json"),
            "rules": {name: asdict(rule) for name, rule in intake.cleaning.rules.items()},
            "tokenizer_fingerprint": tokenizer.fingerprint,
        }  # fmt: skip
        (work / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        sync_tree(work)
        if not folder.exists():
            os.rename(work, folder)


def _encode(texts: Sequence[str], tokenizer: Tokenizer, advance: Any) -> Iterator[list[int]]:
    for start in range(0, len(texts), ENCODE_BATCH):
        batch = texts[start : start + ENCODE_BATCH]
        yield from tokenizer.encode_batch(batch)
        advance(len(batch))


def _check(parts: dict[str, list[str]], intake: _Intake, settings: DataSettings) -> None:
    kept = sum(len(texts) for texts in parts.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in intake.rejected.items() if count) or "none rejected"
    counts = f"{intake.read} documents read, {kept} kept ({reasons})"
    if not parts["train"]:
        raise DataError(f"0 usable documents to train on: {counts}", "give more text, or check data.profile")
    if not parts["validation"]:
        raise DataError(
            f"no document is left to validate on: {counts}",
            "give more documents, a larger data.validation_share, or data.validation with a file of its own",
        )
