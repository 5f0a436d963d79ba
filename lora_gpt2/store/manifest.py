"""What a stored version says about itself (`manifest.json`); never imports torch."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA: Literal[1] = 1
WEIGHTS, PEFT_CONFIG, MANIFEST, METRICS, CARD = (
    "adapter_model.safetensors", "adapter_config.json", "manifest.json", "metrics.jsonl", "README.md",
)  # fmt: skip


class BaseIdentity(BaseModel):
    """The base an adapter belongs to: its name for people, its fingerprints for machines."""

    model_config = ConfigDict(frozen=True)

    name: str
    fingerprint: str
    tokenizer_fingerprint: str


class Manifest(BaseModel):
    """The origin, figures and hashes of one version. Keys of later formats are ignored, not refused."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    schema_version: Literal[1] = Field(alias="schema")
    name: str
    version: int = Field(ge=1)
    created: datetime
    base: BaseIdentity
    data: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    figures: dict[str, Any] = {}
    parents: tuple[str, ...] = ()
    libraries: dict[str, str] = {}
    files: dict[str, str]
    """sha256 of each guarded file."""
    size_bytes: int = Field(ge=0)
    num_parameters: int = Field(ge=0)

    @property
    def reference(self) -> str:
        """The version's name, such as `legal@3`."""
        return f"{self.name}@{self.version}"
