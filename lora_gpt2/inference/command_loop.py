"""What is typed at the keyboard, line by line: commands behind a slash, and what an adapter answers or continues.

`CommandLoop` has what every such session has: who writes and how, undo and retry. In `Repl` a text grows, in `ChatLoop`
a chat.
"""

from __future__ import annotations

import math
import re
import shlex
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lora_gpt2.core.errors import ConflictError, UsageError
from lora_gpt2.core.files import wrap_os_errors, write_file
from lora_gpt2.core.interrupt import catch_signals
from lora_gpt2.core.names import AUTO
from lora_gpt2.core.printable import printable
from lora_gpt2.core.suggest import suggest
from lora_gpt2.inference.generate import OnText, Output, Request, generate_all, raise_first_error
from lora_gpt2.inference.history import LocalLog
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.routing import AUTO_MIX
from lora_gpt2.inference.session import Session
from lora_gpt2.recipe import GenerateSettings, build_recipe
from lora_gpt2.recipe_files import load_recipe
from lora_gpt2.store.listing import list_current
from lora_gpt2.store.references import BASE

FIXED = ("dtype", "merge_into_base")
"""Settings that take effect when the base is loaded."""
Help = dict[str, tuple[str, str]]
"""What follows each command, and what it does."""


@dataclass
class _Step:
    """What there was before something was added: what was typed, with what was written, or a file."""

    before: Any
    typed: str
    is_written: bool = True


@dataclass(kw_only=True)
class CommandLoop(ABC):
    """Who writes and how. `on_text` gets what is written as it grows."""

    help: ClassVar[Help] = {
        "use": ("NAME", "let this adapter write (name or name@version); auto: the one that the text belongs to"),
        "mix": ("A:0.6 B:0.4", "let a mix write"),
        "scale": ("X", "multiply the adapter's weights: 0 is the base, 1 as it was trained"),
        "set": ("[KEY VALUE]", "show or change a setting: temperature, top_k, max_new_tokens, …"),
        "retry": ("", "take the last text back and let another be written"),
        "undo": ("", "take the last step back"),
        "adapters": ("", "list the adapters of this base"),
        "help": ("", "this list"),
        "quit": ("", "end (Ctrl-D does, too)"),
    }
    explanation: ClassVar[str]
    """What is done with lines that are no commands."""

    session: Session
    settings: GenerateSettings
    seed: int
    log: LocalLog
    on_text: OnText
    mix: Mix = field(default_factory=Mix)
    """What writes, as it was named; `/scale` multiplies its weights by `scale`."""
    scale: float = 1.0
    is_over: bool = False
    num_tokens: int = 0
    seconds: float = 0.0
    _steps: list[_Step] = field(default_factory=list)
    _saved: set[Path] = field(default_factory=set)
    _said: list[str] = field(default_factory=list)

    @property
    @abstractmethod
    def state(self) -> Any:
        """What was written so far, as undo brings it back."""

    @state.setter
    @abstractmethod
    def state(self, value: Any) -> None: ...

    @property
    @abstractmethod
    def tail(self) -> str:
        """The end of what was written, for people."""

    @abstractmethod
    def go_on(self, typed: str) -> str:
        """Takes what was typed and lets the adapter write; returns what to show besides."""

    @abstractmethod
    def build_request(self, mix: Mix, seed: int) -> Request:
        """Returns the request that goes on from where the session is."""

    @property
    def name(self) -> str:
        """What writes now: `base`, an adapter, a mix."""
        return str(self.scaled_mix)

    @property
    def scaled_mix(self) -> Mix:
        """The mix with its weights scaled."""
        return Mix((name, weight * self.scale) for name, weight in self.mix)

    def list_adapters(self) -> list[str]:
        """Returns the names of the adapters of this base."""
        return [str(row["name"]) for row in self._list_rows()]

    def list_compared(self) -> list[str]:
        """Returns what is compared where nothing is named."""
        return [*self.list_adapters(), BASE]

    def run(self, line: str) -> str:
        """Does one line: a command, or what an adapter is to go on from; returns what to show besides what it writes.

        Raises `UsageError` for an unknown command, and what the command itself raises; all stays as it was.
        """
        if not line.startswith("/"):
            return self.go_on(line)
        name, _, rest = line[1:].partition(" ")
        if name not in self.help:
            raise UsageError(f"there is no command /{name}", suggest(name, self.help))
        command: Callable[[str], str] = getattr(self, f"_do_{name}")
        return command(rest.strip())

    def complete(self, text: str) -> list[str]:
        """Returns the words that may stand at the end of a line: commands, adapters, settings."""
        *before, word = text.split(" ")
        if not before:
            known = [f"/{name}" for name in self.help]
        elif before[0] in ("/use", "/mix", "/compare"):
            more = {"/use": [AUTO], "/compare": [BASE]}
            known = [*self.list_adapters(), *more.get(before[0], [])]
        elif before == ["/set"]:
            known = [*GenerateSettings.model_fields, "seed"]
        else:
            known = []
        return [candidate for candidate in known if candidate.startswith(word)]

    def write(self, requests: Sequence[Request], on_text: OnText | None) -> list[Output]:
        """Returns what is written; Ctrl-C keeps what there is by then. One request that fails raises its error."""
        started = time.monotonic()
        with catch_signals() as stop:
            outputs = generate_all(
                self.session, requests, self.settings, on_text=on_text, stop=stop, truncate_left=True
            )
        if len(outputs) == 1:
            raise_first_error(outputs)
        self.seconds += time.monotonic() - started
        for output in outputs:
            self.num_tokens += output.tokens
            self.log.add(output.to_json())
        return outputs

    def keep(self, before: Any, typed: str, is_written: bool = True) -> None:
        """Remembers a step, so that it can be taken back."""
        self._steps.append(_Step(before, typed, is_written))

    def _do_use(self, rest: str) -> str:
        return self._take(rest.split(), "/use NAME")

    def _do_mix(self, rest: str) -> str:
        return self._take(rest.replace("+", " ").split(), "/mix A:0.6 B:0.4")

    def _take(self, specs: Sequence[str], usage: str) -> str:
        if not specs:
            raise UsageError("name an adapter", usage)
        mix = Mix.parse(specs)
        if mix != AUTO_MIX:
            self.session.load(self.session.resolve(mix).references)
        self.mix, self.scale = mix, 1.0
        return f"{self.name} continues"

    def _do_scale(self, rest: str) -> str:
        try:
            factor = float(rest)
        except ValueError:
            factor = math.nan
        if self.mix in (Mix(), AUTO_MIX) or not math.isfinite(factor):
            raise UsageError("/scale multiplies the weights of the adapter in use", "/use NAME, then /scale 0.5")
        Mix.parse([f"{name}:{weight * factor!r}" for name, weight in self.mix])  # refuses weights that are too large
        self.scale = factor
        return f"{self.name} continues"

    def _do_compare(self, rest: str) -> str:
        names = rest.replace(",", " ").split() or self.list_compared()
        self.seed += 1
        requests = [self.build_request(Mix.parse(name), self.seed) for name in names]
        outputs = self.write(requests, None)
        return "\n\n".join(f"=== {output.adapter}\n{output.error or output.text}" for output in outputs)

    def _do_set(self, rest: str) -> str:
        if not rest:
            shown = self.settings.model_dump(mode="json")
            return "\n".join(f"{key} {value}" for key, value in shown.items())
        key, value = (*re.split(r"[=\s]", rest, maxsplit=1), "")[:2]
        key = key.removeprefix("generate.")
        if key == "seed":
            self.seed = int(value) - 1 if value.strip().isdecimal() else self.seed
            return f"the next seed is {self.seed + 1}"
        if key not in GenerateSettings.model_fields:
            raise UsageError(f"there is no setting '{key}'", suggest(key, GenerateSettings.model_fields))
        if key in FIXED:
            raise UsageError(f"{key} is for the whole session", f"begin it with: --set generate.{key}={value.strip()}")
        changed = load_recipe(None, [f"generate.{key}={value.strip()}"]).generate
        together = {**self.settings.model_dump(), key: getattr(changed, key)}
        self.settings = build_recipe({"generate": together}, "/set").generate
        self.session.prefixes.max_bytes = self.settings.prefix_cache_bytes
        return f"{key} {getattr(self.settings, key)}"

    def _do_retry(self, rest: str) -> str:
        if not (self._steps and self._steps[-1].is_written):
            raise UsageError("there is nothing written to take back", "type something, and let it be gone on with")
        now, last = self.state, self._steps.pop()
        self.state = last.before
        try:
            return self.go_on(last.typed)
        except BaseException:
            self.state = now
            self._steps.append(last)
            raise

    def _do_undo(self, rest: str) -> str:
        if not self._steps:
            raise UsageError("there is nothing to take back", "type something")
        self.state = self._steps.pop().before
        return self.tail

    def save(self, rest: str, content: str) -> str:
        """Writes a file that is not there, or was saved before in this session; returns what to say."""
        path = parse_path(rest, "/save FILE")
        if path.exists() and path not in self._saved:
            raise ConflictError(f"{path} exists", "save under another name")
        with wrap_os_errors(f"write {path}"):
            write_file(path, content.encode())
        self._saved.add(path)
        return f"saved {len(content)} characters to {path}"

    def _do_adapters(self, rest: str) -> str:
        lines = []
        for row in self._list_rows():
            value = row["test_perplexity"] or row["validation_perplexity"]
            figure = f", perplexity {value:.1f}" if value else ""
            lines.append(f"{row['name']}@{row['version']}{figure}  {printable(str(row['description']))}".rstrip())
        return "\n".join(lines) or "the store has no adapter of this base"

    def _list_rows(self) -> list[dict[str, object]]:
        store, fingerprint = self.session.store, self.session.base.fingerprint
        rows = list_current(store)[0] if store is not None else []
        return [row for row in rows if row["base_fingerprint"] == fingerprint]

    def _do_help(self, rest: str) -> str:
        width = max(len(f"/{name} {usage}") for name, (usage, _) in self.help.items())
        lines = [f"{f'/{name} {usage}':{width}}  {what}" for name, (usage, what) in self.help.items()]
        return "\n".join([*lines, self.explanation])

    def _do_quit(self, rest: str) -> str:
        self.is_over = True
        return ""


def parse_path(rest: str, usage: str) -> Path:
    """Returns the one file that is named behind a command."""
    try:
        (name,) = shlex.split(rest)
    except ValueError as error:
        raise UsageError("name one file", usage) from error
    return Path(name).expanduser()
