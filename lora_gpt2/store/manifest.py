"""What a stored version says about itself (`manifest.json`); never imports torch, nor pydantic, which takes 0.2 s.

The file ends with a sha256 over all its bytes, that digest read as zeros, so that a changed figure is found like a
changed weight. Schema 1 had no such digest; it is still read.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from lora_gpt2.core.names import is_name
from lora_gpt2.core.strict_json import load_json
from lora_gpt2.store.references import DIGEST_DIGITS

SCHEMA = 2
WEIGHTS, PEFT_CONFIG, MANIFEST, METRICS, CARD = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "manifest.json",
    "metrics.jsonl",
    "README.md",
)
PROVENANCE = "made"
MAX_BYTES = 2**26
MAX_FILE_BYTES = 2**33
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
DIGEST = re.compile(r"[0-9a-f]{64}")
NUMBERS = (
    "train_tokens",
    "trained_parameters",
    "base_perplexity",
    "validation_perplexity",
    "base_test_perplexity",
    "test_perplexity",
)
"""Metrics used in listings and comparisons."""
MAX_DEPTH, LARGEST = 32, 2**63
NO_DIGEST = "0" * 64
CHECKSUM = re.compile(rb'"checksum": ?"([0-9a-f]{64})"\s*\}\s*$')


@dataclass(frozen=True, kw_only=True)
class BaseIdentity:
    """The base an adapter belongs to: its name for people, its fingerprints for machines."""

    name: str
    fingerprint: str
    tokenizer_fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Parent:
    """A version that this one was made from, by name for people and by the sha256 of its weights for machines."""

    reference: str
    digest: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The origin, figures and hashes of one version; `files` has the sha256 of each guarded file.

    `provenance` (`made` in the file) is how it was made if not trained: merged, copied or imported, with the settings.
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
    provenance: Mapping[str, Any] = field(default_factory=dict)
    libraries: Mapping[str, str] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """The version's name, such as `legal@3`."""
        return f"{self.name}@{self.version}"

    @property
    def digest(self) -> str:
        """sha256 of the weights: the same adapter under another name has the same."""
        return self.files.get(WEIGHTS, "")

    @property
    def pin(self) -> str:
        """What stands behind `#` in a reference: of the weights and of the configuration, which has their scaling."""
        both = f"{self.digest}{self.files.get(PEFT_CONFIG, '')}"
        return hashlib.sha256(both.encode()).hexdigest()[:DIGEST_DIGITS]

    def is_pinned_by(self, digest: str) -> bool:
        """True if a reference with this digest means this version; the digits of the weights' sha256 mean it too."""
        return self.pin.startswith(digest) or self.digest.startswith(digest)

    def to_json(self) -> dict[str, Any]:
        """Returns the manifest as JSON values."""
        values = {PROVENANCE if key == "provenance" else key: value for key, value in asdict(self).items()}
        return {"schema": SCHEMA, **values, "created": self.created.isoformat()}

    def to_bytes(self) -> bytes:
        """Returns `manifest.json`, sealed with its checksum."""
        content = (json.dumps({**self.to_json(), "checksum": NO_DIGEST}, indent=1) + "\n").encode()
        match = CHECKSUM.search(content)
        assert match is not None
        return _fill(content, match, hashlib.sha256(content).hexdigest())


KINDS: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "version": int,
    "created": str,
    "base": dict,
    "files": dict,
    "size_bytes": int,
    "num_parameters": int,
    "data": dict,
    "recipe": dict,
    "figures": dict,
    "parents": list,
    PROVENANCE: dict,
    "libraries": dict,
}
OPTIONAL = frozenset({"data", "recipe", "figures", "parents", PROVENANCE, "libraries"})


def parse_manifest(content: bytes) -> Manifest:
    """Returns the manifest in a file's bytes; raises `ValueError` if it is invalid or was changed.

    Keys of later formats are ignored, not refused.
    """
    values = load_json(content)
    if not isinstance(values, dict) or values.get("schema") not in (1, SCHEMA):
        raise ValueError("it is not a manifest of a schema that is known")
    if values["schema"] > 1:
        match = CHECKSUM.search(content, max(0, len(content) - 200))
        if match is None or hashlib.sha256(_fill(content, match, NO_DIGEST)).hexdigest().encode() != match[1]:
            raise ValueError("its checksum is not that of its content")
    known: dict[str, Any] = {key: values[key] for key in KINDS if key in values}
    _check_values(known)
    if wrong := _find_wrong(known):
        raise ValueError(f"{wrong} is missing or not what it should be")
    try:
        created = datetime.fromisoformat(known["created"])
        known["created"] = created if created.tzinfo else created.replace(tzinfo=UTC)
        known["base"] = BaseIdentity(**{key: str(known["base"][key]) for key in BaseIdentity.__dataclass_fields__})
        known["parents"] = tuple(_parse_parent(parent) for parent in known.get("parents", ()))
        known["provenance"] = known.pop(PROVENANCE, {})
    except (TypeError, KeyError, OverflowError) as error:
        raise ValueError("its base or a parent is not what it should be") from error
    return Manifest(**known)


def _find_wrong(values: Mapping[str, Any]) -> str:
    """Returns the first key whose value cannot be used, or that is missing; "" if there is none."""
    for key, kind in KINDS.items():
        if key in values and (not isinstance(values[key], kind) or isinstance(values[key], bool)):
            return key
        if key not in values and key not in OPTIONAL:
            return key
    figures, sources = values.get("figures", {}), values.get("data", {}).get("sources", [])
    bad = [key for key in NUMBERS if isinstance(figures.get(key, 0), bool | str | list | dict)]
    bad += [] if isinstance(sources, list) and all(isinstance(source, str) for source in sources) else ["data.sources"]
    bad += [f"files: {str(name)[:60]}" for name in values["files"] if not FILE_NAME.fullmatch(name)]
    bad += [f"the hash of {name}" for name, digest in values["files"].items() if not _is_digest(digest)]
    bad += [f"figures.{key}" for key in BY_TEXT if not isinstance(figures.get(key) or {}, dict)]
    trained = figures.get("trained_parameters") or 0
    bad += [] if isinstance(trained, int | float) and 0 <= trained <= LARGEST else ["figures.trained_parameters"]
    bad += [f"data.{key}" for key, fits in TEXT_VALUES.items() if not fits(values.get("data", {}).get(key))]
    bad += ["version"] if values["version"] < 1 else []
    return bad[0] if bad else ""


def _is_reading(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(line, str) for line in value))


def _is_counts(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(isinstance(count, int) for count in value.values()))


def _is_rules(value: Any) -> bool:
    needed = {"documents", "characters_removed"}
    return value is None or (
        isinstance(value, dict)
        and all(isinstance(rule, dict) and needed <= rule.keys() and _is_counts(rule) for rule in value.values())
    )


BY_TEXT = ("perplexity", "base_perplexities", "documents_trained_on")
"""Figures of a merge, which are mappings."""
TEXT_VALUES = {"reading": _is_reading, "set_aside": _is_counts, "rules": _is_rules}
"""What is said of a text, by key of `data`."""


def _check_values(values: Any) -> None:
    """Raises `ValueError` for a value that could not be written again, wherever it is."""
    level = [values]
    for _ in range(MAX_DEPTH):
        for value in level:
            if isinstance(value, str) and not value.isascii():
                value.encode()  # UnicodeEncodeError, a ValueError, for half of a surrogate pair
            elif isinstance(value, int) and abs(value) > LARGEST:
                raise ValueError("a number in it is too large")
        inner = [[*value, *value.values()] if isinstance(value, dict) else value for value in level]
        level = [item for items in inner if isinstance(items, list) for item in items]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and DIGEST.fullmatch(value) is not None


def _parse_parent(values: Mapping[str, Any]) -> Parent:
    name, _, version = str(values["reference"]).partition("@")
    if not (is_name(name) and version.isdecimal() and _is_digest(values["digest"])):
        raise TypeError("a parent is not name@version with a digest")
    weight = float(values.get("weight", 1.0))
    if not math.isfinite(weight):
        raise TypeError("a parent's weight is not finite")
    return Parent(reference=str(values["reference"]), digest=values["digest"], weight=weight)


def _fill(content: bytes, match: re.Match[bytes], digest: str) -> bytes:
    return content[: match.start(1)] + digest.encode() + content[match.end(1) :]
