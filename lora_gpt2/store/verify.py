"""Whether stored adapters are sound: bytes, base, format, and the numbers of an independent implementation.

transformers' GPT-2 with PEFT on top is that implementation: it loads the same base and the version's own folder, and
must give our logits to rounding. An adapter whose logits are the base's is reported too: it does nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_gpt2.core.errors import LoraGpt2Error, MismatchError
from lora_gpt2.model.base import Base
from lora_gpt2.model.probe import (
    build_probe,
    check_finite_logits,
    compute_logits,
    measure_difference,
    rounding_tolerance,
    select_adapter,
)
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.files import check_base, identify, read_adapter, read_drafter
from lora_gpt2.store.manifest import PEFT_CONFIG, Manifest
from lora_gpt2.store.peft.config import parse_peft_config
from lora_gpt2.store.version import Version

CHECKS = ("files", "base", "format", "logits", "effect")


@dataclass(kw_only=True)
class VerificationResult:
    """What was checked of a version: `passed` in order, and the first `failure`, "" if there is none."""

    reference: str
    passed: list[str] = field(default_factory=list)
    failure: str = ""
    max_logit_difference: float | None = None
    effect: float | None = None

    @property
    def is_sound(self) -> bool:
        """True if nothing failed."""
        return not self.failure


def verify_files(store: Store, reference: str) -> tuple[VerificationResult, Manifest | None]:
    """Returns whether every byte of a version is as it was published; needs no base."""
    verdict = VerificationResult(reference=reference)
    try:
        with store.open(reference) as version:
            version.read_files()
    except LoraGpt2Error as error:
        verdict.failure = f"files: {error.message}"
        return verdict, None
    verdict.passed.append("files")
    return VerificationResult(reference=version.manifest.reference, passed=["files"]), version.manifest


def verify_on_base(store: Store, manifests: Sequence[Manifest], base: Base) -> Iterator[VerificationResult]:
    """Yields whether each version, whose files are sound, does on its base what transformers + PEFT does."""
    reference = _Reference(base)
    for manifest in manifests:
        verdict = VerificationResult(reference=manifest.reference, passed=["files"])
        try:
            with store.open(manifest.reference) as version:
                _verify_one(verdict, version, base, reference)
        except LoraGpt2Error as error:
            verdict.failure = error.message
        yield verdict


def _verify_one(verdict: VerificationResult, version: Version, base: Base, reference: _Reference) -> None:
    manifest = version.manifest
    check_base(manifest, identify(base), base.tokenizer.fingerprints)
    verdict.passed.append("base")
    adapter = read_adapter(version, base.config)
    if not parse_peft_config(version.read_file(PEFT_CONFIG), manifest.reference).is_plain:
        raise MismatchError(f"{manifest.reference}: its configuration holds expressions", "import it again")
    read_drafter(version, base.tokenizer.vocab_size)
    verdict.passed.append("format")
    check_finite_logits(base, adapter, manifest.reference)
    ours = compute_logits(base, select_adapter(base, adapter))
    verdict.max_logit_difference = measure_difference(ours, reference.compute(version.folder))
    limit = rounding_tolerance(ours)
    if not verdict.max_logit_difference <= limit:
        verdict.failure = f"logits: they differ by {verdict.max_logit_difference:.2e} from PEFT's, allowed {limit:.1e}"
        return
    verdict.passed.append("logits")
    verdict.effect = measure_difference(ours, reference.plain)
    if not verdict.effect > limit:
        verdict.failure = "effect: it changes nothing"
        return
    verdict.passed.append("effect")


class _Reference:
    """transformers' model of a base in float32, which takes adapters through PEFT."""

    def __init__(self, base: Base) -> None:
        from transformers import GPT2LMHeadModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.base = base
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model: Any = GPT2LMHeadModel.from_pretrained(base.folder, dtype=torch.float32, local_files_only=True)
        self.model.eval()
        self.plain = self._run(self.model)

    def compute(self, folder: Path) -> Tensor:
        """Returns the logits with the adapter in a folder."""
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model = PeftModel.from_pretrained(self.model, str(folder), local_files_only=True).eval()
            except Exception as error:  # PEFT raises of every kind
                raise MismatchError(f"PEFT cannot load {folder}: {error}", "import it again") from error
            logits = self._run(model)
            self.model = model.unload()
        return logits

    @torch.inference_mode()
    def _run(self, model: Any) -> Tensor:
        logits: Tensor = model(input_ids=build_probe(self.base).cpu(), use_cache=False).logits
        return logits.to(self.base.runtime.device)
