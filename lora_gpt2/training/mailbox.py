"""What comes back from tasks on other machines: adapters, progress, messages, and the state that another goes on from.

Nothing here knows Ray.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_gpt2.core.errors import CorruptError
from lora_gpt2.core.files import wrap_os_errors

STATE = "state"
Files = dict[str, bytes]
"""The files of a folder by their paths, which begin with its name; or of a version, by their names."""


@dataclass(frozen=True, kw_only=True)
class Mail:
    """What has come since the driver last asked: the files of versions, and lines to show.

    `tokens` are those that adapters have been trained on from the beginning, padding included, by name.
    """

    versions: list[Files] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)


class Mailbox:
    """Where tasks leave what the driver is to have, in a process beside it; what they go on from is in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mail = Mail()

    def find_state(self, key: str) -> Files:
        """Returns the files of the last folder that a task left, none if it has not begun."""
        found = _list_states(self.folder, key)
        return read_folder(found[-1] / STATE) if found else {}

    def keep_state(self, key: str, step: int, state: Files) -> None:
        """Replaces the files of a task's folder, as a whole, unless it has left those of a later step.

        A machine that was given up for lost may still be at work, behind the one that took over.
        """
        before = _list_states(self.folder, key)
        number, last_step = map(int, before[-1].name.split(".")[-2:]) if before else (0, 0)
        if step < last_step:
            return
        partial = self.folder / f".{key}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with wrap_os_errors(f"keep the state of a task in {self.folder}"):
            write_folder(state, partial)
            partial.rename(self.folder / f"{key}.{number + 1:09d}.{step:09d}")
        for folder in before:
            shutil.rmtree(folder, ignore_errors=True)

    def forget_state(self, key: str) -> None:
        """Drops the files of a task's folder."""
        for folder in _list_states(self.folder, key):
            shutil.rmtree(folder, ignore_errors=True)

    def deliver(self, files: Files) -> None:
        """Leaves the files of a version to be published."""
        self._mail.versions.append(files)

    def say(self, message: str) -> None:
        """Leaves a line to be shown."""
        self._mail.messages.append(message)

    def report(self, tokens: Mapping[str, int]) -> None:
        """Says how many tokens adapters have been trained on; see `Mail`."""
        self._mail.tokens.update(tokens)

    def collect(self) -> Mail:
        """Returns what has come since the last call."""
        mail, self._mail = self._mail, Mail(tokens=dict(self._mail.tokens))
        return mail


def has_state(folder: Path, key: str) -> bool:
    """True if a task has left something to go on from in the folder of a mailbox."""
    return bool(_list_states(folder, key))


def _list_states(folder: Path, key: str) -> list[Path]:
    return sorted(folder.glob(f"{key}.*"))


def read_folder(folder: Path) -> Files:
    """Returns every file of a folder but locks by its path, which begins with the folder's name."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("lock"))
    return {path.relative_to(folder.parent).as_posix(): path.read_bytes() for path in found}


def write_folder(files: Files, parent: Path) -> Path:
    """Writes the files of a folder into `parent`; returns it. Raises `CorruptError` for a path that leads out of it."""
    for name, content in files.items():
        target = parent / name
        if not target.resolve().is_relative_to(parent.resolve()):
            raise CorruptError(f"{name} leads out of its folder", "train it again")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return parent / next(iter(files)).partition("/")[0]
