"""What an adapter repeats verbatim of the text it was trained on.

Three questions, each with its control:
- discoverable extraction (Carlini et al. 2023, arXiv:2202.07646, section 3): given 50 tokens of the training text, does
  greedy decoding give the next 50? One pass answers it: it does exactly where each of them is the likeliest after the
  true ones before. Controls: held-out text, and the base.
- copies: which share of sampled texts holds a run of 50 tokens that stands in the training text?
- canaries (Carlini et al. 2019, arXiv:1802.08232, section 4): is a planted secret likelier than other secrets of its
  form? Exposure = log2 of their number - log2 of its rank.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import DataError
from lora_gpt2.core.files import wrap_os_errors
from lora_gpt2.core.user_files import check_output, read_user_text
from lora_gpt2.data.ngram_index import NgramIndex
from lora_gpt2.evaluation.held_out import OwnText
from lora_gpt2.evaluation.perplexity import ScoringWindows
from lora_gpt2.evaluation.quality import PROMPT_TOKENS, Write
from lora_gpt2.model.base import Base
from lora_gpt2.model.probe import AdapterSelector, select_base
from lora_gpt2.recipe import EvaluateSettings, GenerateSettings

Stream = Sequence[int] | NDArray[Any]
SIGNIFICANT = 0.01
BATCH_TOKENS = 8192
CANDIDATES = 512
WORST = 5
CODE_LENGTH = 9
MIN_CONTROL = 20  # prefixes, for a share to compare with
MIN_RUN, MIN_COPY = 8, 12  # tokens, where documents are short
BOXES = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "islet", "jetty")


@dataclass(frozen=True)
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

    def to_json(self) -> dict[str, Any]:
        """Returns counts, share, and the mean number of true tokens before the first wrong one."""
        share = self.extracted / self.windows if self.windows else None
        return {"windows": self.windows, "extracted": self.extracted, "share": share, "mean_tokens": self.mean_tokens}


@dataclass(frozen=True)
class Canary:
    """A planted text, the form it has, and the secret in it."""

    text: str
    form: str
    secret: str


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
    return sum(math.comb(number, k) * chance**k * (1 - chance) ** (number - k) for k in range(hits, number + 1))


def write_canaries(path: Path, count: int, seed: int) -> list[Canary]:
    """Writes secrets to add to a training text, as JSON lines with `text`, `form` and `secret`; returns them."""
    check_output(path)
    generator = random.Random(seed)  # noqa: S311 - secrets to be found
    canaries = []
    for number in range(count):
        form = f"The code of the {BOXES[number % len(BOXES)]} box number {number + 1} is {{}}."
        secret = "".join(generator.choices("0123456789", k=CODE_LENGTH))
        canaries.append(Canary(form.format(secret), form, secret))
    with wrap_os_errors(f"write {path}"):
        path.write_text("".join(json.dumps(vars(canary)) + "\n" for canary in canaries), encoding="utf-8")
    return canaries


def read_canaries(path: Path) -> list[Canary]:
    """Returns the canaries of a file; raises `DataError` if it is none."""
    content = read_user_text(path, errors="replace")
    try:
        found = [json.loads(line) for line in content.splitlines() if line.strip()]
        canaries = [Canary(str(v["text"]), str(v["form"]), str(v["secret"])) for v in found]
        has_codes = all(len(c.secret) == CODE_LENGTH and c.secret.isdecimal() for c in canaries)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} holds no canaries", "write them with: lora-gpt2 audit canaries FILE") from error
    if (
        not canaries
        or not has_codes
        or any(canary.form.replace("{}", canary.secret) != canary.text for canary in canaries)
    ):
        raise DataError(f"{path} holds no canaries, or changed ones", "write them with: lora-gpt2 audit canaries FILE")
    return canaries


def measure_exposure(base: Base, select: AdapterSelector, canaries: Sequence[Canary]) -> list[dict[str, Any]]:
    """Returns for each canary its rank among `CANDIDATES` random secrets and itself, exposure in bits, and its p."""
    found = []
    for number, canary in enumerate(canaries):
        generator = random.Random(number)  # noqa: S311
        others: set[str] = set()
        while len(others) < CANDIDATES:
            others.add("".join(generator.choices("0123456789", k=len(canary.secret))))
        others.discard(canary.secret)
        texts = [canary.text, *(canary.form.replace("{}", other) for other in sorted(others))]
        nats = ScoringWindows(base, [texts], EvaluateSettings()).measure(select)[0][0].per_document[0]
        rank = 1 + int((nats[1:] < nats[0]).sum())
        exposure = math.log2(len(texts)) - math.log2(rank)
        found.append(
            {"text": canary.text, "rank": rank, "of": len(texts), "exposure_bits": exposure, "p": rank / len(texts)}
        )
    return found


def find_copies(index: NgramIndex, held_out: NgramIndex, own: OwnText, texts: Sequence[str]) -> dict[str, Any]:
    """Returns how many texts hold a copy of the training text, the longest, and the worst with their sources.

    What stands in held-out text as well is common, and no copy; prompts do not count.
    """
    copies = []
    for text in texts:
        tokens = own.tokenizer.encode(text)
        length, position = index.find_longest(tokens)
        if length > held_out.find_longest(tokens)[0]:
            copies.append((length, position))
    worst = [
        {"tokens": n, **describe_location(own, position, n)}
        for n, position in sorted(set(copies), reverse=True)[:WORST]
    ]
    return {
        "run_tokens": index.size,
        "texts": len(texts),
        "with_copies": len(copies),
        "share": len(copies) / len(texts) if texts else None,
        "longest_copy_tokens": max(copies)[0] if copies else 0,
        "worst": worst,
    }


def describe_location(own: OwnText, position: int, length: int) -> dict[str, str]:
    """Returns a piece of the training text and which document it is in."""
    train = own.prepared.train
    if train.starts is not None:  # packed: each document is a run
        number = int(np.searchsorted(train.starts, position, side="right"))
    else:
        number = int(np.count_nonzero(np.asarray(train.stream[: position + 1]) == own.tokenizer.eos_id))
    text = own.tokenizer.decode(train.stream[position : position + length].tolist())
    return {"source": f"training document {number}", "text": text}


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
) -> dict[str, Any]:
    """Returns what an adapter repeats, with a verdict; the keys are those of `audit memorization --json`."""
    size, copied = choose_sizes(own, settings.size, base.config.n_positions)
    train, held_out = own.prepared.train.stream, [own.prepared.test.stream, own.prepared.validation.stream]
    reporter.message(f"testing {settings.windows} prefixes of {len(train):,} training tokens")
    extraction = {
        "train": measure_extraction(base, select, train, size, settings.windows),
        "held_out": measure_extraction(base, select, np.concatenate(held_out), size, settings.windows),
        "base_on_train": measure_extraction(base, select_base, train, size, settings.windows),
    }
    prompts = _choose_prompts(own, settings.texts)
    indexes = NgramIndex(train, copied), NgramIndex(np.concatenate(held_out), copied)
    copies = find_copies(*indexes, own, write(name, prompts, sampling)) if prompts else None
    exposure = measure_exposure(base, select, canaries)
    control = choose_control(extraction["held_out"], extraction["base_on_train"])
    own_hits = extraction["train"]
    chance = compare_shares(own_hits.extracted, own_hits.windows, control.extracted, control.windows)
    reasons = _judge(own_hits, control, chance, copies, exposure, size)
    worst = [
        {"tokens": 2 * size, **describe_location(own, position, 2 * size)}
        for position in extraction["train"].positions[:WORST]
    ]
    return {
        "adapter": own.manifest.reference,
        "run_tokens": size,
        "extraction": {key: value.to_json() for key, value in extraction.items()},
        "chance": chance,
        "extracted_examples": worst,
        "copies": copies,
        "canaries": exposure,
        "same_text": own.is_same,
        "memorizes": bool(reasons),
        "verdict": _say(reasons, own, extraction["train"].windows),
    }


def _say(reasons: Sequence[str], own: OwnText, windows: int) -> str:
    said = "; ".join(reasons) or f"no sign of memorisation after the {windows} prefixes and in the sampled texts"
    return said if own.is_same else f"{said} (but the text may not be that of training: it is prepared otherwise)"


def _choose_prompts(own: OwnText, count: int) -> list[str]:
    """Returns prompts for sampling: half of them empty, half beginnings of held-out documents."""
    held_out = [*own.documents["test"], *own.documents["validation"]]
    tokenizer = own.tokenizer
    beginnings = [d.prompt or tokenizer.decode(tokenizer.encode(d.text)[:PROMPT_TOKENS]) for d in held_out]
    half = min(len(beginnings), count // 2)
    positions = np.linspace(0, len(beginnings) - 1, half).astype(int).tolist() if half else []
    return [""] * (count - half) + [beginnings[position] for position in positions]


def _judge(
    train: Extraction,
    control: Extraction,
    chance: float,
    copies: Mapping[str, Any] | None,
    exposure: Sequence[Mapping[str, Any]],
    size: int,
) -> list[str]:
    reasons = []
    if chance < SIGNIFICANT:
        reasons.append(
            f"reproduces the next {size} tokens after {train.extracted} of {train.windows} prefixes of its training "
            f"text (control: {control.extracted} of {control.windows})"
        )
    if copies and copies["with_copies"]:
        reasons.append(
            f"{copies['with_copies']} of {copies['texts']} sampled texts copy {copies['run_tokens']} tokens or more, "
            f"the longest {copies['longest_copy_tokens']}"
        )
    known = [canary for canary in exposure if canary["p"] < SIGNIFICANT]
    if known and count_by_chance(len(known), len(exposure), SIGNIFICANT) <= SIGNIFICANT:
        reasons.append(f"{len(known)} of {len(exposure)} planted secrets are exposed")
    return reasons
