"""What audits found out about a version, kept beside its folder, which is immutable; never imports torch.

`<name>/audit-<version>.json` holds a result per kind of audit and which weights, scaled how, it is about.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_gpt2.core.files import read_regular, wrap_os_errors, write_atomic
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.manifest import MAX_BYTES, Manifest


def read_audits(store: Store, manifest: Manifest) -> dict[str, Any]:
    """Returns the results by kind; none where there was no audit, or its file is of other weights or damaged."""
    try:
        values = json.loads(read_regular(_path(store, manifest), MAX_BYTES))
        is_own = values["pin"] == manifest.pin if "pin" in values else values["digest"] == manifest.digest  # of before
        return dict(values["audits"]) if is_own else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def write_audit(store: Store, manifest: Manifest, kind: str, result: Mapping[str, Any]) -> None:
    """Keeps a result, in the place of an earlier one of its kind.

    Raises what `Store.change` does, or `NotFoundError` if the version is gone, or another one by now.
    """
    with store.change(manifest.name, f"keep the audit in {store.root}"), wrap_os_errors("keep the audit"):
        store.read_manifest(f"{manifest.reference}#{manifest.pin}")
        audits = {**read_audits(store, manifest), kind: dict(result)}
        content = json.dumps({"pin": manifest.pin, "audits": audits}, indent=1) + "\n"
        write_atomic(_path(store, manifest), content.encode())


def list_audits(store: Store, name: str) -> list[Path]:
    """Returns the files with the results about the versions of an adapter."""
    return sorted(store.folder_of(name).glob("audit-*.json"))


def _path(store: Store, manifest: Manifest) -> Path:
    return store.folder_of(manifest.name) / f"audit-{manifest.version}.json"
