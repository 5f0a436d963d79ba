"""Every error a user can meet, and the exit code each one has.

    LoraGpt2Error
    ├── UsageError            2   an option, a parameter or a combination of them
    │   └── RecipeError       2   a setting in a recipe file or in --set
    ├── DataError             3   input text that cannot be read or is not enough
    ├── NotFoundError         4   no such adapter, base, version, recipe or file
    ├── IntegrityError        5   an artefact that must not be used
    │   ├── CorruptError      5   damaged: bytes, shapes or values are not what they should be
    │   └── MismatchError     5   sound, but made for another base, tokenizer, data or settings
    ├── ConflictError         6   busy, or it exists already
    │   └── InterruptedRunError 6   training of these adapters was interrupted, and can be resumed
    ├── ResourceError         7   memory, disk, device, permission, network
    │   ├── BusyError         7   a server's queue is full
    │   └── EngineFailed      7   a server's decode step, or one sequence of it
    ├── TrainingDiverged      8   the loss or a gradient is not finite
    ├── CheckFailed           9   a limit set by the user, or a verification
    └── Interrupted         130   Ctrl-C (143 for SIGTERM); what was finished is kept
        └── Waiting         130   waits for other work, and goes on by itself: no command ends with it

The message says what was found, what was expected and where; the hint says what to type next. The domain raises, never
prints and never exits; `cli.py` alone turns errors into text and exit codes. 1 is left for bugs. A traceback, as Python
shows it, ends with the hint in Python's words.
"""

from __future__ import annotations

import re
from typing import Any, Self

SETTING = re.compile(r"--set ([a-z0-9_.]+)=('[^']*'|\[[^\]]*\]|[^\s,;)]+)")
OPTION = re.compile(r"--(base|name|store|forget)\b(?: (?!(?:or|and|is|in|to)\b)([\w./$-]*\w))?")
COMMAND = re.compile(
    r"lora-gpt2 |'(?:adapters|audit|bench|evaluate|generate|merge|plan|prepare|rate|serve|train|tune) "
)
SWITCHES = {
    "--resume": "resume=True",
    "--fresh": "fresh=True",
    "--truncate left": "truncate_left=True",
    "--skip-bad": "settings={'data.skip_bad': True}",
}


class LoraGpt2Error(Exception):
    """Base of the tree. `message` says what is wrong, `hint` what to do next, `exit_code` how the command ends.

    `report` has what was finished all the same: the `TrainReport` of a run of which other adapters are published.
    """

    exit_code: int = 1
    report: Any = None

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.add_note(to_python(hint))

    def with_report(self, report: object) -> Self:
        """Returns this error with a report of what was finished."""
        self.report = report
        return self

    def __reduce__(self) -> tuple[type[LoraGpt2Error], tuple[str, str], dict[str, object]]:
        """Comes whole from another process."""
        return type(self), (self.message, self.hint), self.__dict__


def to_python(hint: str) -> str:
    """Returns a hint with the options of the command line as Python passes them; whole commands stay."""
    if "--" not in hint or COMMAND.search(hint):
        return hint
    hint = OPTION.sub(lambda found: f"{found[1]}={_quote(found[2] or '')}", SETTING.sub(_pass_setting, hint))
    for option, argument in SWITCHES.items():
        hint = hint.replace(option, argument)
    return hint


def _pass_setting(found: re.Match[str]) -> str:
    key, value = found.groups()
    if value in ("true", "false"):
        value = value.title()
    return f"settings={{'{key}': {_quote(value)}}}"


def _quote(value: str) -> str:
    """Returns a word as Python writes it; capitals stand for what is to be put there, and digits are a number."""
    is_word = value[:1].islower() and value not in ("true", "false")
    return repr(value) if is_word else value


class UsageError(LoraGpt2Error):
    """An option, parameter or combination that cannot be carried out."""

    exit_code = 2


class RecipeError(UsageError):
    """A setting that does not exist or has a value outside its bounds."""


class DataError(LoraGpt2Error):
    """Input text that cannot be read, or too little of it."""

    exit_code = 3


class NotFoundError(LoraGpt2Error):
    """A named adapter, base, version, recipe or file that is not there."""

    exit_code = 4


class IntegrityError(LoraGpt2Error):
    """An artefact that must not be used."""

    exit_code = 5


class CorruptError(IntegrityError):
    """An artefact whose bytes, shapes or values are not what they should be."""


class MismatchError(IntegrityError):
    """A sound artefact made for another base, tokenizer, data or settings."""


class ConflictError(LoraGpt2Error):
    """The target is in use by another process, or exists already."""

    exit_code = 6


class InterruptedRunError(ConflictError):
    """Training of the same adapters was interrupted, and it has not been said whether to resume it."""


class ResourceError(LoraGpt2Error):
    """Not enough memory or disk, no such device, no permission, or no network."""

    exit_code = 7


class BusyError(ResourceError):
    """A server's queue is full."""


class EngineFailed(ResourceError):
    """A decode step of a server failed, or one sequence of it; its output is lost."""


class TrainingDiverged(LoraGpt2Error):
    """The loss or a gradient stopped being finite; nothing was published."""

    exit_code = 8


class CheckFailed(LoraGpt2Error):
    """A limit that the user set, or a verification, was not met."""

    exit_code = 9


class Interrupted(LoraGpt2Error):
    """The user or the system asked the work to stop; `signal_number` decides the exit code."""

    exit_code = 130

    def __init__(self, message: str, hint: str, signal_number: int = 2) -> None:
        super().__init__(message, hint)
        self.signal_number, self.exit_code = signal_number, 128 + signal_number


class Waiting(Interrupted):
    """The work waits for other work, and then goes on by itself."""
