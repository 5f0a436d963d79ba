"""The text that an adapter in the store was trained on, and what was held out of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import NotFoundError
from lora_gpt2.data.inspect import list_documents
from lora_gpt2.data.prepared import SKETCH, SPLITS, PreparedData, find_prepared, prepare_data
from lora_gpt2.data.read.records import Document
from lora_gpt2.data.text_sketch import TextSketch
from lora_gpt2.data.tokenizer import Tokenizer
from lora_gpt2.evaluation.matrix import Cell, EvaluationText
from lora_gpt2.model.checkpoint import Checkpoint
from lora_gpt2.recipe import build_recipe
from lora_gpt2.renamed_settings import upgrade_section
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.manifest import Manifest

SAME_NATS = 1e-3
COMPARED = ("documents", "profile", "protocol", "window", "stride", "dtype")


@dataclass(frozen=True, kw_only=True)
class OwnText:
    """The version, its blocks, and its documents by split: `train`, `validation` and `test`."""

    manifest: Manifest
    prepared: PreparedData
    tokenizer: Tokenizer
    documents: dict[str, list[Document]]

    @property
    def test_files(self) -> list[list[str]]:
        """What names the files that the test split is from, where it has some of its own."""
        return list(self.prepared.report["test_files"]) or [["test split", self.prepared.fingerprint]]

    @property
    def held_out(self) -> list[Document]:
        """The test split, or without one what training was validated on."""
        return self.documents["test"] or self.documents["validation"]

    @property
    def is_same(self) -> bool:
        """True if it is prepared exactly as it was for training; else it changed, or our version did."""
        return self.prepared.fingerprint == self.manifest.data.get("fingerprint")


def read_sketch(store: Store, reference: str) -> TextSketch | None:
    """Returns what tells whether a text was trained on, or None where a version does not have it."""
    with store.open(reference) as version:
        if SKETCH not in version.manifest.files:
            return None
        is_whole = version.manifest.data.get("sketch_is_whole", True) is not False
        return replace(TextSketch.from_bytes(version.read_file(SKETCH)), is_whole=is_whole)


def read_sketches(store: Store | None, rows: Mapping[str, Iterable[str]]) -> dict[str, TextSketch]:
    """Returns what tells whether an adapter of a row was trained on a text, for rows of which that is known.

    Where only some adapters of a row have a sketch, theirs is not the whole.
    """
    if store is None:
        return {}
    found = {name: [read_sketch(store, reference) for reference in references] for name, references in rows.items()}
    return {name: TextSketch.join(sketches) for name, sketches in found.items() if any(sketches)}


def read_own_text(store: Store, reference: str, reporter: Reporter, base: str | None = None) -> OwnText:
    """Returns the text of an adapter as training saw it, from the cache or prepared again; `base` for one that moved.

    Raises `NotFoundError` where the version does not say what it was trained on, or where the text is not in the cache
    and its sources are no longer there.
    """
    manifest = store.read_manifest(reference)
    sources = manifest.recipe.get("data", {}).get("sources")
    if not sources:
        raise NotFoundError(f"{manifest.reference} does not say which text it was trained on", "name a file instead")
    tokenizer = Checkpoint.open(base or manifest.base.name).load_tokenizer()
    stored = upgrade_section("data", manifest.recipe["data"])
    settings = build_recipe({"data": stored}, manifest.reference).data
    try:
        kept = find_prepared(manifest.data.get("fingerprint"), settings, tokenizer)
        prepared = kept or prepare_data(settings, tokenizer, reporter)
    except NotFoundError as error:
        raise NotFoundError(
            f"the text of {manifest.reference} is not where it was: {error.message}",
            "run this in the folder of training",
        ) from error
    found = {split: list_documents(prepared, split, tokenizer) for split in SPLITS}
    own = OwnText(manifest=manifest, prepared=prepared, tokenizer=tokenizer, documents=found)
    if not own.is_same:
        reporter.message(f"the text of {manifest.reference} is not prepared as it was: it was changed, or our version")
    return own


def list_differences(
    manifests: Mapping[str, Manifest],
    sources: Sequence[EvaluationText],
    cells: Sequence[Cell],
    how: Mapping[str, Any],
) -> list[str]:
    """Returns a line for each adapter whose figure on its own test text is not the one that training stored, and why.

    `manifests` are those of what was measured, by row; `how` has protocol, window, stride and dtype of the cells.
    """
    lines = []
    for source in sources:
        for name, manifest in manifests.items():
            stored, then = (manifest.figures.get(key) for key in ("test_perplexity", "test"))
            if not stored or not isinstance(then, dict) or not source.files:
                continue
            own = then.get("files") or [["test split", manifest.data.get("fingerprint")]]
            cell = next(c for c in cells if c.source == source.label and c.adapter == name)
            nats = cell.score.nll_nats_per_token - math.log(stored)
            if list(map(list, source.files)) == own and not abs(nats) <= SAME_NATS:
                now = {**how, "profile": source.profile, "documents": len(source.documents)}
                changed = [f"{k} {then[k]} then, {now[k]} now" for k in COMPARED if then.get(k) != now.get(k)]
                lines.append(
                    f"{manifest.reference} on {source.label}: perplexity {cell.score.perplexity:.2f} here, "
                    f"{stored:.2f} when it was trained ({'; '.join(changed) or 'rounding, or another version'})"
                )
    return lines
