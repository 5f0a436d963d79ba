"""Model objects as OpenAI lists them: the base, adapters, versions and mixes."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from lora_gpt2.inference.session import Session
from lora_gpt2.serving.protocol import parse_model

CREATED = 1_546_300_800  # what OpenAI's list says of a base: when it came out; GPT-2's year, 2019


def describe_model(name: str, created: int = CREATED, **more: Any) -> dict[str, Any]:
    """Returns a model object; `created` in seconds since 1970."""
    return {"id": name, "object": "model", "created": created, "owned_by": "lora-gpt2", **more}


def describe_mix(name: str, session: Session) -> dict[str, Any]:
    """Returns the object of a version or a mix, as old as its newest adapter; raises `ApiError` 404 for no such."""
    known = [manifest for manifest in session.find_manifests(parse_model(name, session)) if manifest is not None]
    return describe_model(name, max((int(manifest.created.timestamp()) for manifest in known), default=CREATED))


def parse_time(text: str) -> int:
    """Returns the seconds since 1970 of a time in ISO 8601."""
    return int(datetime.fromisoformat(text).timestamp())
