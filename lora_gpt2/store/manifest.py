"""What a stored version says about itself (`manifest.json`); never imports torch, nor pydantic, which takes 0.2 s.

The file ends with a sha256 over all its bytes, that digest read as zeros, so that a changed figure is found like a
changed weight. Schema 1 had no such digest; it is still read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

SCHEMA = 2
WEIGHTS, PEFT_CONFIG, MANIFEST, METRICS, CARD = (
    "adapter_model.safetensors", "adapter_config.json", "manifest.json", "metrics.jsonl", "README.md",
)  # fmt: skip
MAX_BYTES = 2**26
NO_DIGEST = "0" * 64
CHECKSUM = re.compile(rb'"checksum": ?"([0-9a-f]{64})"\s*\}\s*$')


@dataclass(frozen=True)
class BaseIdentity:
    """The base an adapter belongs to: its name for people, its fingerprints for machines."""

    name: str
    fingerprint: str
    tokenizer_fingerprint: str


@dataclass(frozen=True)
class Parent:
    """A version that this one was made from, by name for people and by the sha256 of its weights for machines."""

    reference: str
    digest: str
    weight: float = 1.0


@dataclass(frozen=True)
class Manifest:
    """The origin, figures and hashes of one version; `files` has the sha256 of each guarded file.

    `made` says how it came about where it was not trained: merged, copied or imported, and with which settings.
    """

    name: str
    version: int
    created: datetime
    base: BaseIdentity
    files: Mapping[str, str]
    size_bytes: int
    num_parameters: int
    data: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    parents: tuple[Parent, ...] = ()
    made: Mapping[str, Any] = field(default_factory=dict)
    libraries: Mapping[str, str] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """The version's name, such as `legal@3`."""
        return f"{self.name}@{self.version}"

    @property
    def digest(self) -> str:
        """sha256 of the weights: the same adapter under another name has the same."""
        return self.files.get(WEIGHTS, "")

    def to_json(self) -> dict[str, Any]:
        """Returns the manifest as JSON values."""
        return {"schema": SCHEMA, **asdict(self), "created": self.created.isoformat()}

    def to_bytes(self) -> bytes:
        """Returns `manifest.json`, sealed with its checksum."""
        content = (json.dumps({**self.to_json(), "checksum": NO_DIGEST}, indent=1) + "\n").encode()
        match = CHECKSUM.search(content)
        assert match is not None
        return _fill(content, match, hashlib.sha256(content).hexdigest())


KINDS: dict[str, type | tuple[type, ...]] = {
    "name": str, "version": int, "created": str, "base": dict, "files": dict, "size_bytes": int,
    "num_parameters": int, "data": dict, "recipe": dict, "figures": dict, "parents": list, "made": dict,
    "libraries": dict,
}  # fmt: skip
OPTIONAL = frozenset({"data", "recipe", "figures", "parents", "made", "libraries"})


def parse_manifest(content: bytes) -> Manifest:
    """Returns the manifest in a file's bytes; raises `ValueError` if it is none, or was changed.

    Keys of later formats are ignored, not refused.
    """
    values = json.loads(content)
    if not isinstance(values, dict) or values.get("schema") not in (1, SCHEMA):
        raise ValueError("it is not a manifest of a schema that is known")
    if values["schema"] > 1:
        match = CHECKSUM.search(content, max(0, len(content) - 200))
        if match is None or hashlib.sha256(_fill(content, match, NO_DIGEST)).hexdigest().encode() != match[1]:
            raise ValueError("its checksum is not that of its content")
    known = {key: values[key] for key in KINDS if key in values}
    wrong = [key for key, kind in KINDS.items() if key not in known and key not in OPTIONAL]
    wrong += [key for key, value in known.items() if not isinstance(value, KINDS[key]) or isinstance(value, bool)]
    if wrong:
        raise ValueError(f"{wrong[0]} is missing or not what it should be")
    try:
        known["created"] = datetime.fromisoformat(known["created"])
        known["base"] = BaseIdentity(**{key: str(known["base"][key]) for key in BaseIdentity.__dataclass_fields__})
        known["parents"] = tuple(Parent(**parent) for parent in known.get("parents", ()))
    except (TypeError, KeyError) as error:
        raise ValueError("its base or a parent is not what it should be") from error
    return Manifest(**known)


def _fill(content: bytes, match: re.Match[bytes], digest: str) -> bytes:
    return content[: match.start(1)] + digest.encode() + content[match.end(1) :]
