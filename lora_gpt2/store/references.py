"""References to adapters: `law`, `law@3`, and `law@3#9f86d081884c7d65`, which stays what it is whatever is published.

The digest (see `Manifest.pin`) matters where an adapter was removed and another one was published under its name and
version. Never imports torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from lora_gpt2.core.errors import UsageError
from lora_gpt2.core.names import check_name

BASE = "base"
"""The name of the model without adapters; no adapter can have it."""
DIGEST_DIGITS = 16
MAX_VERSION_DIGITS = 9


@dataclass(frozen=True)
class AdapterRef:
    """An adapter, optionally one version of it, optionally with the digest of what it is."""

    name: str
    version: int | None = None
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> AdapterRef:
        """Returns the reference that a text spells; raises `UsageError` if it is not one."""
        label, _, digest = text.partition("#")
        name, separator, version = label.partition("@")
        if "/" in name or os.sep in name:
            hint = "bring a folder that PEFT saved into the store: lora-gpt2 adapters import FOLDER --name N"
            raise UsageError(f"'{name[:80]}' is a path, and no adapter of the store", hint)
        check_name(name)
        is_number = version.isdecimal() and version.isascii() and len(version) <= MAX_VERSION_DIGITS
        if separator and not is_number:
            raise UsageError(f"'{text}' is not an adapter", "write name or name@version, for example legal@2")
        return cls(name, int(version) if separator else None, digest)

    @property
    def label(self) -> str:
        """The reference without its digest."""
        return self.name if self.version is None else f"{self.name}@{self.version}"

    def __str__(self) -> str:
        return f"{self.label}#{self.digest}" if self.digest else self.label


def label_of(reference: str) -> str:
    """Returns a reference without its digest."""
    return reference.partition("#")[0]


def name_of(reference: str) -> str:
    """Returns the name in a reference, without version and digest."""
    return label_of(reference).partition("@")[0]
