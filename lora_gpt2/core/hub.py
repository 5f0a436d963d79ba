"""The one door to the Hugging Face hub: what is cached is taken from there, the network only where it must be."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lora_gpt2.core.errors import NotFoundError, ResourceError


@contextmanager
def hub_errors_as_ours(identifier: str, action: str, hint: str) -> Iterator[None]:
    """Turns the hub's errors inside the block into ours; `hint` is what to do where it cannot be reached."""
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        yield
    except LocalTokenNotFoundError as error:
        raise ResourceError(f"the hub wants to know who asks to {action}", "huggingface-cli login") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise NotFoundError(f"the hub has no '{identifier}'", "check the spelling, or give a folder") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ResourceError(f"the hub cannot be reached to {action}", hint) from error


def download(identifier: str, patterns: Sequence[str], needed: Sequence[str], what: str, hint: str) -> Path:
    """Returns the folder with a repository's files, from the cache if one that matches each of `needed` is there.

    Raises:
        NotFoundError: the hub has no such repository.
        ResourceError: it cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(identifier, allow_patterns=list(patterns), local_files_only=True))
        if all(any(cached.glob(pattern)) for pattern in needed):
            return cached
    except (LocalEntryNotFoundError, FileNotFoundError, HFValidationError):
        pass
    with hub_errors_as_ours(identifier, f"fetch {what} '{identifier}'", hint):
        return Path(snapshot_download(identifier, allow_patterns=list(patterns)))
