"""What a stored version says about itself (`manifest.json`); never imports torch.

The file ends with a sha256 over all its bytes, that digest read as zeros, so that a changed figure is found like a
changed weight. Schema 1 had no such digest; it is still read.
"""

from __future__ import annotations

import hashlib
import re
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA: Literal[2] = 2
WEIGHTS, PEFT_CONFIG, MANIFEST, METRICS, CARD = (
    "adapter_model.safetensors", "adapter_config.json", "manifest.json", "metrics.jsonl", "README.md",
)  # fmt: skip
MAX_BYTES = 2**26
NO_DIGEST = "0" * 64
CHECKSUM = re.compile(rb'"checksum": ?"([0-9a-f]{64})"\s*\}\s*$')


class BaseIdentity(BaseModel):
    """The base an adapter belongs to: its name for people, its fingerprints for machines."""

    model_config = ConfigDict(frozen=True)

    name: str
    fingerprint: str
    tokenizer_fingerprint: str


class Parent(BaseModel):
    """A version that this one was made from, by name for people and by the sha256 of its weights for machines."""

    model_config = ConfigDict(frozen=True)

    reference: str
    digest: str
    weight: float = 1.0


class Manifest(BaseModel):
    """The origin, figures and hashes of one version. Keys of later formats are ignored, not refused."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    schema_version: Literal[1, 2] = Field(alias="schema")
    name: str
    version: int = Field(ge=1)
    created: datetime
    base: BaseIdentity
    data: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    figures: dict[str, Any] = {}
    parents: tuple[Parent, ...] = ()
    made: dict[str, Any] = {}
    """How it came about where it was not trained: merged, copied or imported, and with which settings."""
    libraries: dict[str, str] = {}
    files: dict[str, str]
    """sha256 of each guarded file."""
    size_bytes: int = Field(ge=0)
    num_parameters: int = Field(ge=0)
    checksum: str = NO_DIGEST

    @property
    def reference(self) -> str:
        """The version's name, such as `legal@3`."""
        return f"{self.name}@{self.version}"

    @property
    def digest(self) -> str:
        """sha256 of the weights: the same adapter under another name has the same."""
        return self.files.get(WEIGHTS, "")

    def to_bytes(self) -> bytes:
        """Returns `manifest.json`, sealed with its checksum."""
        blank = self.model_copy(update={"checksum": NO_DIGEST, "schema_version": SCHEMA})
        content = (blank.model_dump_json(by_alias=True, indent=1) + "\n").encode()
        return _seal(content, hashlib.sha256(content).hexdigest())


def parse_manifest(content: bytes) -> Manifest:
    """Returns the manifest in a file's bytes; raises `ValueError` if it is none, or was changed."""
    manifest = Manifest.model_validate_json(content)
    if manifest.schema_version > 1:
        match = CHECKSUM.search(content)
        if match is None or hashlib.sha256(_seal(content, NO_DIGEST)).hexdigest().encode() != match[1]:
            raise ValueError("its checksum is not that of its content")
    return manifest


def _seal(content: bytes, digest: str) -> bytes:
    match = CHECKSUM.search(content)
    assert match is not None
    return content[: match.start(1)] + digest.encode() + content[match.end(1) :]
