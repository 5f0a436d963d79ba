"""What an adapter repeats verbatim of the text it was trained on.

Four questions, each with its control:
- discoverable extraction (Carlini et al. 2023, arXiv:2202.07646, section 3): given 50 tokens of the training text, does
  greedy decoding give the next 50? One pass answers it: it does exactly where each of them is the likeliest after the
  true ones before. Controls: held-out text, and the base.
- copies: which share of sampled texts holds a run of 50 tokens that stands in the training text?
- its drafter: what its table of successors alone gives after the same tokens (`data/successors.py`).
- canaries: is a planted secret likelier than others of its form? See `canaries`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lora_gpt2.audit.canaries import Canary, Exposure, measure_exposure
from lora_gpt2.core.console import Reporter
from lora_gpt2.data.ngram_index import NgramIndex
from lora_gpt2.data.successors import SuccessorTable
from lora_gpt2.evaluation.held_out import OwnText
from lora_gpt2.evaluation.quality import PROMPT_TOKENS, Write
from lora_gpt2.model.base import Base
from lora_gpt2.model.probe import AdapterSelector, select_base
from lora_gpt2.recipe import GenerateSettings

Stream = Sequence[int] | NDArray[Any]
SIGNIFICANT = 0.01
ROUNDING = 1 + 1e-9
BATCH_TOKENS = 8192
WORST = 5
MIN_CONTROL = 20  # prefixes, for a share to compare with
MIN_RUN, MIN_COPY = 8, 12  # tokens, where documents are short


@dataclass(frozen=True, kw_only=True)
class AuditSettings:
    """How much is looked at: runs of `size` tokens, `windows` of each text, `texts` to sample."""

    size: int = 50
    windows: int = 200
    texts: int = 40


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """Of `windows` positions in a text, at how many greedy decoding gave the true continuation, whole; and how far."""

    windows: int
    extracted: int
    mean_tokens: float
    positions: tuple[int, ...] = ()

    @property
    def share(self) -> float | None:
        """The fraction of positions that were extracted whole."""
        return self.extracted / self.windows if self.windows else None

    def to_json(self) -> dict[str, Any]:
        """Returns counts, share, and the mean number of true tokens before the first wrong one."""
        counts = {"windows": self.windows, "extracted": self.extracted}
        return {**counts, "share": self.share, "mean_tokens": self.mean_tokens}


@dataclass(frozen=True, kw_only=True)
class Excerpt:
    """A run of training text that was reproduced, and the document it is in."""

    tokens: int
    source: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Of `texts` sampled texts, how many hold `run_tokens` tokens of the training text; and the longest runs."""

    run_tokens: int
    texts: int
    with_copies: int
    longest_copy_tokens: int
    worst: list[Excerpt] = field(default_factory=list)

    @property
    def share(self) -> float | None:
        """The fraction of texts with a copy."""
        return self.with_copies / self.texts if self.texts else None

    def to_json(self) -> dict[str, Any]:
        """Returns the figures with the keys of `audit memorization --json`."""
        return asdict(self) | {"share": self.share}


@dataclass(frozen=True, kw_only=True)
class MemorizationReport:
    """What an adapter repeats of its training text.

    Args:
        adapter: its version, such as `law@2`.
        run_tokens: length of prefixes and of the continuations that are compared.
        train, held_out, base_on_train: extraction from the training text, and both controls.
        drafter: extraction from the training text by the adapter's drafter alone; None if it has none.
        chance: p of so many more extracted than in the control (Fisher's exact test, one-sided).
        extracted_examples: the first of the runs that were extracted.
        copies: what sampled texts copy; None if none were sampled.
        canaries: planted texts.
        same_text: whether the text is the one of training, prepared in the same way.
        reasons: why it is said to memorise; empty if nothing shows it.
    """

    adapter: str
    run_tokens: int
    train: Extraction
    held_out: Extraction
    base_on_train: Extraction
    chance: float
    extracted_examples: list[Excerpt]
    copies: Copies | None
    canaries: list[Exposure]
    drafter: Extraction | None
    same_text: bool
    reasons: list[str]

    @property
    def extraction(self) -> dict[str, Extraction]:
        """The extraction from each text, by the keys of `to_json`."""
        found = {"train": self.train, "held_out": self.held_out, "base_on_train": self.base_on_train}
        return found | ({} if self.drafter is None else {"drafter": self.drafter})

    @property
    def largest_share(self) -> float:
        """The larger of the fractions that were extracted and copied."""
        return max(self.train.share or 0.0, (self.copies.share if self.copies else None) or 0.0)

    @property
    def verdict(self) -> str:
        """The reasons in a sentence."""
        sampled = " and in the sampled texts" if self.copies else "; no texts were sampled"
        nothing = f"no sign of memorisation after the {self.train.windows} prefixes{sampled}"
        said = "; ".join(self.reasons) or nothing
        return (
            said if self.same_text else f"{said} (but the text may not be that of training: it is prepared otherwise)"
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the report with the keys of `audit memorization --json`."""
        return {
            "adapter": self.adapter,
            "run_tokens": self.run_tokens,
            "extraction": {key: value.to_json() for key, value in self.extraction.items()},
            "chance": self.chance,
            "extracted_examples": [asdict(example) for example in self.extracted_examples],
            "copies": self.copies.to_json() if self.copies else None,
            "canaries": [asdict(canary) for canary in self.canaries],
            "same_text": self.same_text,
            "memorizes": bool(self.reasons),
            "verdict": self.verdict,
        }


def choose_prefixes(stream: Stream, size: int, count: int, eos_id: int) -> list[int]:
    """Returns at most `count` positions of a stream at which a prefix and a suffix of `size` tokens begin.

    Half of them are beginnings of documents, EOS included, which a model knows best; the others are spread evenly.
    """
    room = len(stream) - 2 * size
    if room < 0:
        return []
    beginnings = np.flatnonzero(np.asarray(stream)[: room + 1] == eos_id)
    half = min(len(beginnings), count // 2)
    chosen = beginnings[np.linspace(0, len(beginnings) - 1, half).astype(int)].tolist() if half else []
    return sorted({*chosen, *np.linspace(0, room, min(count - half, room + 1)).astype(int).tolist()})


@torch.inference_mode()
def measure_extraction(base: Base, select: AdapterSelector, stream: Stream, size: int, count: int) -> Extraction:
    """Returns how much of a stream of tokens greedy decoding gives back; see the module's docstring."""
    positions = choose_prefixes(stream, size, count, base.tokenizer.eos_id)
    rows = max(1, BATCH_TOKENS // (2 * size))
    matched: list[int] = []
    for start in range(0, len(positions), rows):
        batch = np.stack(
            [np.asarray(stream[p : p + 2 * size], dtype=np.int64) for p in positions[start : start + rows]]
        )
        tokens = torch.from_numpy(batch).to(base.runtime.device)
        hidden = base.model(tokens[:, :-1], select([0] * len(batch)))[:, size - 1 :]
        for row, states in enumerate(hidden):
            is_right = base.model.logits(states[None], select([0]))[0].argmax(-1) == tokens[row, size:]
            matched.append(int(is_right.cumprod(0).sum()))
    return _count_extracted(positions, matched, size)


def measure_drafter(table: SuccessorTable, stream: Stream, size: int, count: int, eos_id: int) -> Extraction:
    """Returns how much of a stream a drafter gives back by itself, at the positions of `measure_extraction`."""
    positions, matched = choose_prefixes(stream, size, count, eos_id), []
    for position in positions:
        prefix, wanted = (np.asarray(stream[begin : begin + size]) for begin in (position, position + size))
        drafted = table.draft(prefix.tolist(), size)
        is_right = wanted[: len(drafted)] == drafted
        matched.append(int(np.cumprod(is_right).sum()))
    return _count_extracted(positions, matched, size)


def _count_extracted(positions: Sequence[int], matched: Sequence[int], size: int) -> Extraction:
    whole = tuple(position for position, length in zip(positions, matched, strict=True) if length == size)
    return Extraction(
        windows=len(positions),
        extracted=len(whole),
        mean_tokens=float(np.mean(matched)) if matched else 0.0,
        positions=whole,
    )


def choose_control(*controls: Extraction) -> Extraction:
    """Returns the control that gives back most, of those with enough positions; else the one with most positions."""
    enough = [control for control in controls if control.windows >= MIN_CONTROL]
    if not enough:
        return max(controls, key=lambda control: control.windows)
    return max(enough, key=lambda control: (control.extracted / control.windows, control.windows))


def choose_sizes(own: OwnText, most: int, context: int) -> tuple[int, int]:
    """Returns how long runs are: for extraction, two of which fit the usual document, and for copies.

    Documents of a packed text do not see each other, so longer runs would find nothing in short ones.
    """
    lengths = [len(own.tokenizer.encode(d.prompt + d.text)) for d in own.documents["train"][:1000]]
    usual = int(np.median(lengths)) if lengths else most
    size = min(most, context // 2)
    return max(min(size, usual // 2), min(size, MIN_RUN)), max(min(size, usual), min(size, MIN_COPY))


def compare_shares(hits: int, number: int, control_hits: int, control_number: int) -> float:
    """Returns Fisher's exact one-sided p: how likely so many more hits than in the control are by chance."""
    total, all_hits = number + control_number, hits + control_hits
    ways = math.comb(total, all_hits)
    most = min(all_hits, number)
    return sum(math.comb(number, k) * math.comb(control_number, all_hits - k) for k in range(hits, most + 1)) / ways


def count_by_chance(hits: int, number: int, chance: float) -> float:
    """Returns how likely at least so many of a number of independent events are (binomial tail)."""
    logs = (
        math.lgamma(number + 1)
        - math.lgamma(k + 1)
        - math.lgamma(number - k + 1)
        + k * math.log(chance)
        + (number - k) * math.log1p(-chance)
        for k in range(hits, number + 1)
    )
    return min(1.0, math.fsum(map(math.exp, logs)))


def find_copies(index: NgramIndex, held_out: NgramIndex, own: OwnText, texts: Sequence[str]) -> Copies:
    """Returns how many texts hold a copy of the training text, the longest, and the worst with their sources.

    What stands in held-out text as well is common: a copy has a run that does not. Prompts do not count.
    """
    copies = []
    for text in texts:
        tokens = own.tokenizer.encode(text)
        is_common = held_out.find(tokens) >= 0
        length, position = index.find_longest(tokens, ~is_common)
        if length:
            copies.append((length, position))
    return Copies(
        run_tokens=index.size,
        texts=len(texts),
        with_copies=len(copies),
        longest_copy_tokens=max(copies)[0] if copies else 0,
        worst=[cut_excerpt(own, position, n) for n, position in sorted(set(copies), reverse=True)[:WORST]],
    )


def cut_excerpt(own: OwnText, position: int, length: int) -> Excerpt:
    """Returns a piece of the training text and which document it is in."""
    train = own.prepared.train
    if train.sequence_offsets is not None:  # packed: each document is a run
        number = int(np.searchsorted(train.sequence_offsets, position, side="right"))
    else:
        number = int(np.count_nonzero(np.asarray(train.stream[: position + 1]) == own.tokenizer.eos_id))
    text = own.tokenizer.decode(train.stream[position : position + length].tolist())
    return Excerpt(tokens=length, source=f"training document {number}", text=text)


def audit_memorization(
    base: Base,
    select: AdapterSelector,
    name: str,
    own: OwnText,
    settings: AuditSettings,
    *,
    reporter: Reporter,
    write: Write,
    sampling: GenerateSettings,
    canaries: Sequence[Canary] = (),
    drafter: SuccessorTable | None = None,
) -> MemorizationReport:
    """Returns what an adapter repeats, with a verdict."""
    size, copied = choose_sizes(own, settings.size, base.config.n_positions)
    train, held_out = own.prepared.train.stream, [own.prepared.test.stream, own.prepared.validation.stream]
    reporter.message(f"testing up to {settings.windows} prefixes of {len(train):,} training tokens")
    own_hits = measure_extraction(base, select, train, size, settings.windows)
    held_out_hits = measure_extraction(base, select, np.concatenate(held_out), size, settings.windows)
    base_hits = measure_extraction(base, select_base, train, size, settings.windows)
    prompts = _choose_prompts(own, settings.texts)
    indexes = NgramIndex(train, copied), NgramIndex(np.concatenate(held_out), copied)
    copies = find_copies(*indexes, own, write(name, prompts, sampling)) if prompts else None
    trained = {(document.prompt + document.text).strip() for document in own.documents["train"]} if canaries else set()
    planted = [canary for canary in canaries if canary.text.strip() in trained]
    if len(planted) < len(canaries):
        reporter.message(f"{len(planted)} of {len(canaries)} canaries were trained on; the others are left out")
    exposure = measure_exposure(base, select, planted)
    eos_id, drafted = base.tokenizer.eos_id, None
    if drafter is not None:
        drafted = measure_drafter(drafter, train, size, settings.windows, eos_id)
    control = choose_control(held_out_hits, base_hits)
    chance = compare_shares(own_hits.extracted, own_hits.windows, control.extracted, control.windows)
    return MemorizationReport(
        adapter=own.manifest.reference,
        run_tokens=size,
        train=own_hits,
        held_out=held_out_hits,
        base_on_train=base_hits,
        chance=chance,
        extracted_examples=[cut_excerpt(own, position, 2 * size) for position in own_hits.positions[:WORST]],
        copies=copies,
        canaries=exposure,
        drafter=drafted,
        same_text=own.is_same,
        reasons=[*_judge(own_hits, control, chance, copies, exposure, size), *_judge_drafter(drafted, size)],
    )


def _choose_prompts(own: OwnText, count: int) -> list[str]:
    """Returns prompts for sampling: half of them empty, half beginnings of held-out documents."""
    held_out = [*own.documents["test"], *own.documents["validation"]]
    tokenizer = own.tokenizer
    beginnings = [d.prompt or tokenizer.decode(tokenizer.encode(d.text)[:PROMPT_TOKENS]) for d in held_out]
    half = min(len(beginnings), count // 2)
    positions = np.linspace(0, len(beginnings) - 1, half).astype(int).tolist() if half else []
    return [""] * (count - half) + [beginnings[position] for position in positions]


def _judge_drafter(drafted: Extraction | None, size: int) -> list[str]:
    if drafted is None or not drafted.extracted:
        return []
    found = f"{drafted.extracted} of {drafted.windows} prefixes"
    return [f"its drafter alone gives the next {size} tokens after {found}; train.drafter=false leaves it out"]


def _judge(
    train: Extraction,
    control: Extraction,
    chance: float,
    copies: Copies | None,
    exposure: Sequence[Exposure],
    size: int,
) -> list[str]:
    reasons = []
    if chance < SIGNIFICANT:
        reasons.append(
            f"reproduces the next {size} tokens after {train.extracted} of {train.windows} prefixes of its training "
            f"text (control: {control.extracted} of {control.windows})"
        )
    if copies and copies.with_copies:
        reasons.append(
            f"{copies.with_copies} of {copies.texts} sampled texts copy {copies.run_tokens} tokens or more, "
            f"the longest {copies.longest_copy_tokens}"
        )
    known = [canary for canary in exposure if canary.p < SIGNIFICANT]
    if known and count_by_chance(len(known), len(exposure), SIGNIFICANT) <= SIGNIFICANT * ROUNDING:
        reasons.append(f"{len(known)} of {len(exposure)} planted secrets are exposed")
    return reasons
