"""Which documents stay, and in which split: copies go, and no copy or near copy of a document is in another split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_gpt2.data.clean.cleaning import CleaningReport
from lora_gpt2.data.dedup import NUM_HASHES, NearCopyIndex, Signatures, find_near_duplicates
from lora_gpt2.data.rejections import Rejections
from lora_gpt2.data.shards import ShardArrays, load_shard
from lora_gpt2.data.split import split_keys
from lora_gpt2.data.text_sketch import FEW, SEEN_SHARE, Shingles
from lora_gpt2.recipe import DataSettings

MAX_EXAMPLES = 3
MOST_OF_A_PROMPT = 50
"""Documents of one prompt that are held out or trained on together, if that is not more than a split is to have."""
DUPLICATE, NEAR_DUPLICATE, CONTAINED = "duplicate", "near duplicate", "part of a held-out text"
LEAST_SHINGLES = FEW + 1
"""Of documents with fewer kept shingles (under about 80 words), a stock phrase may be most of them."""


@dataclass(kw_only=True)
class Selection:
    """The fate of every document of all shards, in order: `splits` holds a split's name, or "" for a copy."""

    splits: list[str]
    lengths: NDArray[np.int64]
    signatures: Signatures
    shingles: list[Shingles]
    read: int = 0
    kept: int = 0
    rejected: list[dict[str, Any]] = field(default_factory=list)
    cleaning: CleaningReport = field(default_factory=CleaningReport)
    characters: Counter[str] = field(default_factory=Counter)
    near: list[dict[str, str | float]] = field(default_factory=list)
    overlap: int = 0
    has_prompts: bool = False

    def count_seen(self, split: str) -> int:
        """Returns how many documents of a held-out split are, for the most part, in training documents."""
        train = [k for k, found in enumerate(self.splits) if found == "train"]
        held_out = [k for k, found in enumerate(self.splits) if found == split]
        return len(_find_contained(self.shingles, held_out, train))

    def count_rejected(self) -> dict[str, int]:
        """Returns how many documents were rejected for each reason."""
        counts = Counter[str]()
        for entry in self.rejected:
            counts[entry["reason"]] += entry.get("count", 1)
        return dict(counts)


def select_documents(
    folder: Path, num_shards: int, settings: DataSettings, given: Sequence[str], is_sectioned: bool
) -> Selection:
    """Decides over the documents of all shards; `given` are the splits that have sources of their own.

    Where two are copies, the one that comes first stays, and held-out splits come before the training split. What a
    given held-out text contains is not trained on either, though the two be divided differently. Within a split that
    was given as test or validation, all stay: what is measured is the text that was given.
    """
    shards = [load_shard(folder, number, with_ids=False) for number in range(num_shards)]
    kept = [shard for shard, _ in shards]
    origins = [origin for shard in kept for origin in shard.origins]
    shown = [text for shard in kept for text in shard.shown]
    splits = [shard.split for shard in kept for _ in shard.origins]
    signatures = np.concatenate([shard.signatures for shard in kept]) if kept else np.zeros((0, NUM_HASHES), np.uint32)
    lengths = np.concatenate([shard.lengths for shard in kept]) if kept else np.zeros(0, np.int64)
    shingles = [
        each for shard in kept if shard.origins for each in np.split(shard.shingles, np.cumsum(shard.num_shingles)[:-1])
    ]  # of a shard without documents, numpy would make one part
    result = Selection(
        splits=splits,
        lengths=lengths,
        signatures=signatures,
        shingles=shingles,
        has_prompts=any(shard.prompts.any() for shard in kept),
    )
    rejected = Rejections()
    for _, report in shards:
        result.read += report.read
        result.kept += report.kept
        for entry in report.rejected:
            rejected.add(entry)
        result.cleaning.add(report.cleaning)
        result.characters.update(report.characters)
    result.rejected = rejected.entries
    copies = _find_copies(
        [key for shard in kept for key in shard.keys.tolist()], signatures, settings.near_duplicate_threshold
    )
    copies = {i: copy for i, copy in copies.items() if splits[i] == "train" or splits[i] != splits[copy[0]]}
    train = [i for i, split in enumerate(splits) if split == "train" and i not in copies]
    contained = _find_contained(shingles, train, [i for i, split in enumerate(splits) if split != "train"])
    copies |= {index: (first, 0.0) for index, first in contained.items()}
    copies |= _find_copies_of_held_out(signatures, splits, copies, settings.near_duplicate_threshold)
    for index, (first, similarity) in sorted(copies.items()):
        reason = DUPLICATE if similarity == 1 else NEAR_DUPLICATE if similarity else CONTAINED
        entry = {"origin": origins[index], "reason": reason, "text": shown[index], "of": origins[first]}
        result.rejected.append(entry)
        result.overlap += splits[index] == "train" and splits[first] != "train"
        if reason == NEAR_DUPLICATE and len(result.near) < MAX_EXAMPLES:
            result.near.append({**entry, "text_of": shown[first], "similarity": round(similarity, 2)})
    result.kept -= 0 if is_sectioned else len(copies)
    free = [i for i, split in enumerate(splits) if split == "train" and i not in copies]
    shares = [0.0 if split in given else getattr(settings, f"{split}_fraction") for split in ("validation", "test")]
    groups = _choose_groups(kept, free, shares)
    for index, split in zip(free, split_keys(groups, *shares), strict=True):
        splits[index] = split
    for index in copies:
        splits[index] = ""
    return result


def _find_copies_of_held_out(
    signatures: Signatures, splits: Sequence[str], copies: Mapping[int, object], threshold: float
) -> dict[int, tuple[int, float]]:
    """Returns, for each training document that is a near copy of held-out text that stays, that text and how near.

    Copies within a held-out split stay too, and what is like them alone has not been found yet.
    """
    held_out = [i for i, split in enumerate(splits) if split != "train" and i not in copies]
    train = [i for i, split in enumerate(splits) if split == "train" and i not in copies]
    if not (threshold and held_out and train):
        return {}
    found = NearCopyIndex(signatures[held_out], threshold).find(signatures[train])
    nearest = {index: max(near.items(), key=lambda item: (item[1], -item[0])) for index, near in found.items()}
    return {train[index]: (held_out[first], min(near, 0.999)) for index, (first, near) in nearest.items()}


def _choose_groups(shards: Sequence[ShardArrays], free: Sequence[int], shares: Sequence[float]) -> list[bytes]:
    """Returns what is kept together when documents are divided: those of one prompt, unless they are many.

    So neither a genre as the prompt, nor one of few prompts, is held out whole. Where texts are many, each prompt
    decides for itself: others change nothing.
    """
    groups, keys = ([each for shard in shards for each in getattr(shard, name).tolist()] for name in ("groups", "keys"))
    counts = Counter(groups[index] for index in free)
    wanted = min((share for share in shares if share), default=1.0) * len(free)
    most = min(MOST_OF_A_PROMPT, max(1.0, wanted))
    return [groups[index] if counts[groups[index]] <= most else keys[index] for index in free]


def _find_copies(keys: Sequence[bytes], signatures: Signatures, threshold: float) -> dict[int, tuple[int, float]]:
    """Returns, for each copy, the document that stays and their similarity: exactly 1 for the same words."""
    first: dict[bytes, int] = {}
    copies: dict[int, tuple[int, float]] = {}
    for index, key in enumerate(keys):
        if first.setdefault(key, index) != index:
            copies[index] = first[key], 1.0
    if threshold:
        rest = np.array([i for i in range(len(keys)) if i not in copies], dtype=np.int64)
        for index, (other, similarity) in find_near_duplicates(signatures[rest], threshold).items():
            copies[int(rest[index])] = int(rest[other]), min(similarity, 0.999)
    final = {}
    for index, (other, similarity) in copies.items():  # the copy of a near copy
        final[index] = copies.get(other, (other,))[0], similarity
    return final


def _find_contained(shingles: Sequence[Shingles], documents: Sequence[int], others: Sequence[int]) -> dict[int, int]:
    """Returns, by document, one of the others, where most of the document's kept shingles are in these."""
    counts = np.array([len(shingles[k]) for k in others], dtype=np.int64)
    if not counts.sum():
        return {}
    of_others = np.concatenate([shingles[k] for k in others])
    order = np.argsort(of_others, kind="stable")
    known, owners = of_others[order], np.repeat(np.array(others), counts)[order]
    found = {}
    for document in documents:
        at = np.searchsorted(known, shingles[document]).clip(max=len(known) - 1)
        is_known = known[at] == shingles[document]
        if len(at) >= LEAST_SHINGLES and is_known.mean() > SEEN_SHARE:
            found[document] = int(owners[at[is_known][0]])
    return found
