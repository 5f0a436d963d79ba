"""Where caches and the records of a user's work are kept: the usual folders of each system (`platformdirs`)."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import platformdirs

APP_NAME = "lora-gpt2"


def find_cache_dir() -> Path:
    """Returns the folder for things that can be made again: `$LORA_GPT2_CACHE`, else the user's cache folder."""
    configured = os.environ.get("LORA_GPT2_CACHE")
    return Path(configured) if configured else _expand(platformdirs.user_cache_dir(APP_NAME, appauthor=False))


def find_runs_dir() -> Path:
    """Returns the folder in which each training run has its own: checkpoints, metrics, status."""
    return find_cache_dir() / "runs"


def find_trackers_dir() -> Path:
    """Returns the folder in which each run has one for TensorBoard."""
    return find_cache_dir() / "trackers"


def find_state_dir() -> Path:
    """Returns the folder for records of what the user did, such as `$XDG_STATE_HOME/lora-gpt2`."""
    return _expand(platformdirs.user_state_dir(APP_NAME, appauthor=False))


def _expand(folder: str) -> Path:
    """Returns a folder of the user, or without a home directory one for temporary files."""
    return Path(tempfile.gettempdir()) / APP_NAME if folder.startswith("~") else Path(folder)
