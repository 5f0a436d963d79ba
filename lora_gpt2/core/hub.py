"""The one door to the Hugging Face hub: what is cached is taken from there, the network only where it must be."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_gpt2.core.errors import NotFoundError, ResourceError
from lora_gpt2.core.files import translate_os_error
from lora_gpt2.core.printable import shorten

LOG = logging.getLogger("lora_gpt2")
UNREACHABLE = "the hub cannot be reached"
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def wrap_hub_errors(identifier: str, action: str, hint: str) -> Iterator[None]:
    """Turns the hub's errors inside the block into ours; `hint` is what to do where it cannot be reached."""
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, RepositoryNotFoundError

    try:
        yield
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise NotFoundError(f"the hub has no '{identifier}'", "check the spelling, or log in: hf auth login") from error
    except Exception as error:  # offline mode, and whatever the installed HTTP library raises without a network
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403) or isinstance(error, LocalTokenNotFoundError):
            raise ResourceError(f"the hub does not let you {action}", "log in: hf auth login") from error
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise translate_os_error(error, action) from error
        if type(error) is ValueError or (status is not None and 400 <= status < 500):
            raise ResourceError(f"the hub refuses to {action}: {shorten(str(error), 300)}", "correct it") from error
        raise ResourceError(f"{UNREACHABLE} to {action}", hint) from error


def download(
    identifier: str, patterns: Sequence[str], needed: Sequence[str], what: str, hint: str, refresh: bool = False
) -> Path:
    """Returns the folder with a repository's files.

    It comes from the cache if one that matches each of `needed` is there; with `refresh`, only where the hub cannot be
    reached.

    Raises:
        NotFoundError: the hub has no such repository.
        ResourceError: it cannot be reached.
    """
    from huggingface_hub import snapshot_download

    def find_cached() -> Path | None:
        with suppress(Exception):  # what is not in the cache, or no identifier at all: the hub will say so
            cached = Path(snapshot_download(identifier, allow_patterns=list(patterns), local_files_only=True))
            if all(any(cached.glob(pattern)) for pattern in needed):
                return cached
        return None

    if not refresh and (cached := find_cached()):
        return cached
    try:
        with wrap_hub_errors(identifier, f"fetch {what} '{identifier}'", hint):
            return Path(snapshot_download(identifier, allow_patterns=list(patterns)))
    except ResourceError as error:
        if error.message.startswith(UNREACHABLE) and (cached := find_cached()):
            LOG.warning("%s: '%s' is taken from the cache, commit %s", UNREACHABLE, identifier, cached.name[:7])
            return cached
        raise
