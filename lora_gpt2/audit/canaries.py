"""Planted secrets, and how likely an adapter that was trained on them finds them.

A secret is exposed if it is likelier than random ones of the same form (Carlini et al. 2019, arXiv:1802.08232, section
4): exposure = log2 of their number - log2 of its rank.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_gpt2.core.errors import ConflictError, DataError, UsageError
from lora_gpt2.core.files import wrap_os_errors, write_atomic
from lora_gpt2.core.user_files import check_output, read_user_text
from lora_gpt2.evaluation.perplexity import ScoringWindows
from lora_gpt2.model.base import Base
from lora_gpt2.model.probe import AdapterSelector
from lora_gpt2.recipe import EvaluateSettings

CANDIDATES = 512
CODE_LENGTH = 9
BOXES = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "islet", "jetty")


@dataclass(frozen=True, kw_only=True)
class Canary:
    """A planted text, the form it has, and the secret in it."""

    text: str
    form: str
    secret: str


@dataclass(frozen=True, kw_only=True)
class Exposure:
    """How likely a planted text is: its `rank` among `of` texts of its form, log2(of / rank), and rank / of."""

    text: str
    rank: int
    of: int
    exposure_bits: float
    p: float


def write_canaries(path: Path, count: int, seed: int) -> list[Canary]:
    """Writes secrets to add to a training text, as JSON lines with `text`, `form` and `secret`; returns them."""
    check_output(path)
    if str(path) == "-":
        raise UsageError("canaries are written to a file", "name one, such as canaries.jsonl")
    if path.exists():
        raise ConflictError(f"{path} exists", "its secrets may be in use: choose another name, or remove it first")
    generator = random.Random(seed)  # noqa: S311 - secrets to be found
    canaries = []
    for number in range(count):
        form = f"The code of the {BOXES[number % len(BOXES)]} box number {number + 1} is {{}}."
        secret = "".join(generator.choices("0123456789", k=CODE_LENGTH))
        canaries.append(Canary(text=form.format(secret), form=form, secret=secret))
    with wrap_os_errors(f"write {path}"):
        write_atomic(path, "".join(json.dumps(vars(canary)) + "\n" for canary in canaries).encode())
    return canaries


def read_canaries(path: Path) -> list[Canary]:
    """Returns the canaries of a file; raises `DataError` if it is none."""
    content = read_user_text(path, errors="replace")
    try:
        found = [json.loads(line) for line in content.splitlines() if line.strip()]
        canaries = [Canary(text=str(v["text"]), form=str(v["form"]), secret=str(v["secret"])) for v in found]
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


def measure_exposure(base: Base, select: AdapterSelector, canaries: Sequence[Canary]) -> list[Exposure]:
    """Returns for each canary its rank among `CANDIDATES` random secrets and itself, exposure in bits, and its p."""
    found, planted = [], {canary.secret for canary in canaries}
    for canary in canaries:
        generator = random.Random(f"candidates {canary.text}")  # noqa: S311 - not the one that drew the secrets
        others: set[str] = set()
        while len(others) < CANDIDATES:
            others |= {"".join(generator.choices("0123456789", k=len(canary.secret)))} - planted
        texts = [canary.text, *(canary.form.replace("{}", other) for other in sorted(others))]
        nats = ScoringWindows(base, [texts], EvaluateSettings()).measure(select)[0][0].per_document[0]
        rank = 1 + int((nats[1:] < nats[0]).sum())
        exposure = math.log2(len(texts)) - math.log2(rank)
        p = rank / len(texts)
        found.append(Exposure(text=canary.text, rank=rank, of=len(texts), exposure_bits=exposure, p=p))
    return found
