"""The text that an adapter in the store was trained on, and what was held out of it."""

from __future__ import annotations

from dataclasses import dataclass

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import NotFoundError
from lora_gpt2.data.documents import iter_documents
from lora_gpt2.data.prepared import PARTS, PreparedData, prepare_data
from lora_gpt2.data.records import Document
from lora_gpt2.data.tokenizer import Tokenizer
from lora_gpt2.model.locate import load_base_tokenizer
from lora_gpt2.recipe import build_recipe
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.manifest import Manifest


@dataclass(frozen=True)
class OwnText:
    """The version, its blocks, and its documents by part: `train`, `validation` and `test`."""

    manifest: Manifest
    prepared: PreparedData
    tokenizer: Tokenizer
    documents: dict[str, list[Document]]

    @property
    def is_same(self) -> bool:
        """True if it is prepared exactly as it was for training; else it changed, or our version did."""
        return self.prepared.fingerprint == self.manifest.data.get("fingerprint")


def read_held_out(store: Store, reference: str, reporter: Reporter, base: str | None = None) -> list[Document]:
    """Returns what was held out of an adapter's training: the test part, or without one what it was validated on."""
    own = read_own_text(store, reference, reporter, base)
    return own.documents["test"] or own.documents["validation"]


def read_own_text(store: Store, reference: str, reporter: Reporter, base: str | None = None) -> OwnText:
    """Returns the text of an adapter as training saw it, from the cache or prepared again; `base` for one that moved.

    Raises `NotFoundError` where the version does not say what it was trained on, or its sources are no longer there.
    """
    manifest = store.read_manifest(reference)
    sources = manifest.recipe.get("data", {}).get("sources")
    if not sources:
        raise NotFoundError(f"{manifest.reference} does not say which text it was trained on", "name a file instead")
    tokenizer = load_base_tokenizer(base or manifest.base.name)
    settings = build_recipe({"data": manifest.recipe["data"]}, manifest.reference).data
    try:
        prepared = prepare_data(settings, tokenizer, reporter)
    except NotFoundError as error:
        raise NotFoundError(
            f"the text of {manifest.reference} is not where it was: {error.message}",
            "run this in the folder of training",
        ) from error
    found: dict[str, list[Document]] = {}
    for part in PARTS:
        documents = enumerate(iter_documents(getattr(prepared, part), tokenizer.eos_id), start=1)
        found[part] = [
            Document(tokenizer.decode(ids[prompt:]), f"{part}#{number}", tokenizer.decode(ids[:prompt]))
            for number, (ids, carries) in documents
            for prompt in [carries.index(True) if True in carries else len(ids)]
        ]
    own = OwnText(manifest, prepared, tokenizer, found)
    if not own.is_same:
        reporter.message(f"the text of {manifest.reference} is not prepared as it was: it was changed, or our version")
    return own
