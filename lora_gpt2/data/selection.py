"""Which documents stay, and in which part: copies go, and no copy or near copy of a document is in another part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_gpt2.data.cleaning import CleaningReport
from lora_gpt2.data.dedup import NUM_HASHES, Signatures, find_near_copies
from lora_gpt2.data.intake import load_batch
from lora_gpt2.data.rejected import Rejections
from lora_gpt2.data.split import split_keys
from lora_gpt2.data.training_text import Runs
from lora_gpt2.recipe import DataSettings

MAX_EXAMPLES = 3
DUPLICATE, NEAR_DUPLICATE = "duplicate", "near duplicate"


@dataclass
class Selection:
    """The fate of every document of all batches, in order: `parts` holds a part's name, or "" for a copy."""

    parts: list[str]
    lengths: NDArray[np.int64]
    signatures: Signatures
    runs: list[Runs]
    read: int = 0
    kept: int = 0
    rejected: list[dict[str, Any]] = field(default_factory=list)
    cleaning: CleaningReport = field(default_factory=CleaningReport)
    characters: Counter[str] = field(default_factory=Counter)
    near: list[dict[str, str | float]] = field(default_factory=list)
    overlap: int = 0
    has_prompts: bool = False

    def count_rejected(self) -> dict[str, int]:
        """Returns how many documents were rejected for each reason."""
        counts = Counter[str]()
        for entry in self.rejected:
            counts[entry["reason"]] += entry.get("count", 1)
        return dict(counts)


def select_documents(
    folder: Path, num_batches: int, settings: DataSettings, given: Sequence[str], is_cut: bool
) -> Selection:
    """Decides over the documents of all batches; `given` are the parts that have sources of their own.

    Where two are copies, the one that comes first stays, and held-out parts come before the training part. Within a
    part that was given as test or validation, all stay: what is measured is the text that was given.
    """
    batches = [load_batch(folder, number, with_ids=False) for number in range(num_batches)]
    kept = [batch for batch, _ in batches]
    origins = [origin for batch in kept for origin in batch.origins]
    shown = [text for batch in kept for text in batch.shown]
    parts = [batch.part for batch in kept for _ in batch.origins]
    signatures = np.concatenate([batch.signatures for batch in kept]) if kept else np.zeros((0, NUM_HASHES), np.uint32)
    lengths = np.concatenate([batch.lengths for batch in kept]) if kept else np.zeros(0, np.int64)
    runs = [run for batch in kept for run in np.split(batch.runs, np.cumsum(batch.num_runs)[:-1])]
    result = Selection(parts, lengths, signatures, runs, has_prompts=any(batch.prompts.any() for batch in kept))
    rejected = Rejections()
    for _, report in batches:
        result.read += report.read
        result.kept += report.kept
        for entry in report.rejected:
            rejected.add(entry)
        result.cleaning.add(report.cleaning)
        result.characters.update(report.characters)
    result.rejected = rejected.entries
    copies = _find_copies([key for batch in kept for key in batch.keys.tolist()], signatures, settings.near_duplicates)
    copies = {i: copy for i, copy in copies.items() if parts[i] == "train" or parts[i] != parts[copy[0]]}
    for index, (first, likeness) in sorted(copies.items()):
        reason = DUPLICATE if likeness == 1 else NEAR_DUPLICATE
        entry = {"origin": origins[index], "reason": reason, "text": shown[index], "of": origins[first]}
        result.rejected.append(entry)
        result.overlap += parts[index] == "train" and parts[first] != "train"
        if reason == NEAR_DUPLICATE and len(result.near) < MAX_EXAMPLES:
            result.near.append({**entry, "text_of": shown[first], "likeness": round(likeness, 2)})
    result.kept -= 0 if is_cut else len(copies)
    groups = [group for batch in kept for group in batch.groups.tolist()]
    free = [i for i, part in enumerate(parts) if part == "train" and i not in copies]
    shares = [0.0 if part in given else getattr(settings, f"{part}_share") for part in ("validation", "test")]
    for index, part in zip(free, split_keys([groups[i] for i in free], *shares), strict=True):
        parts[index] = part
    for index in copies:
        parts[index] = ""
    return result


def _find_copies(keys: Sequence[bytes], signatures: Signatures, threshold: float) -> dict[int, tuple[int, float]]:
    """Returns, for each copy, the document that stays and their likeness: exactly 1 for the same words."""
    first: dict[bytes, int] = {}
    copies: dict[int, tuple[int, float]] = {}
    for index, key in enumerate(keys):
        if first.setdefault(key, index) != index:
            copies[index] = first[key], 1.0
    if threshold:
        rest = np.array([i for i in range(len(keys)) if i not in copies], dtype=np.int64)
        for index, (other, likeness) in find_near_copies(signatures[rest], threshold).items():
            copies[int(rest[index])] = int(rest[other]), min(likeness, 0.999)
    final = {}
    for index, (other, likeness) in copies.items():  # the copy of a near copy
        final[index] = copies.get(other, (other,))[0], likeness
    return final
