"""A text that grows under the user's hand: type, let an adapter go on, try another, take back.

GPT-2 continues text, so there is one text and no dialogue: what is typed is added to it, and the adapter in use
continues it. Every line that begins with a slash is a command; `Repl.run` does one and returns what to show.
"""

from __future__ import annotations

import math
import re
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lora_gpt2.core.errors import ConflictError, UsageError
from lora_gpt2.core.files import wrap_os_errors, write_file
from lora_gpt2.core.interrupt import catch_signals
from lora_gpt2.core.names import AUTO
from lora_gpt2.core.printable import printable
from lora_gpt2.core.suggest import suggest
from lora_gpt2.core.user_files import read_user_file
from lora_gpt2.inference.generate import OnText, Output, Request, count_dropped, generate_all, raise_first_error
from lora_gpt2.inference.history import LocalLog
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.routing import AUTO_MIX, Router
from lora_gpt2.inference.session import Session
from lora_gpt2.model.runtime import as_float64
from lora_gpt2.model.scoring import token_nll
from lora_gpt2.recipe import GenerateSettings, build_recipe
from lora_gpt2.recipe_files import load_recipe
from lora_gpt2.store.listing import list_current
from lora_gpt2.store.references import BASE

HELP = {
    "use": ("NAME", "continue with this adapter (name or name@version); auto: with the one that the text belongs to"),
    "mix": ("A:0.6 B:0.4", "continue with a mix"),
    "scale": ("X", "multiply the adapter's weights: 0 is the base, 1 as it was trained"),
    "base": ("", "continue with the plain base"),
    "compare": ("[A B …]", "continue the text with each, side by side, and keep none"),
    "set": ("[KEY VALUE]", "show or change a setting: temperature, top_k, max_new_tokens, …"),
    "retry": ("", "take the last continuation back and write another"),
    "undo": ("", "take the last step back"),
    "new": ("", "begin a new text"),
    "show": ("", "show the whole text"),
    "save": ("FILE", "write the text to a file"),
    "load": ("FILE", "continue the text of a file"),
    "adapters": ("", "list the adapters of this base"),
    "stats": ("", "tokens, speed, and the text's perplexity under the adapter in use"),
    "help": ("", "this list"),
    "quit": ("", "end (Ctrl-D does, too)"),
}
MAX_FILE_BYTES = 10_000_000


@dataclass
class _Step:
    """The text before something was added: what was typed, with its continuation, or a file."""

    before: str
    typed: str
    is_continuation: bool = True


@dataclass(kw_only=True)
class Repl:
    """The text, who continues it and how. `on_text` gets a continuation as it grows."""

    session: Session
    settings: GenerateSettings
    seed: int
    log: LocalLog
    on_text: OnText
    mix: Mix = field(default_factory=Mix)
    """What continues the text, as it was named; `/scale` multiplies its weights by `scale`."""
    scale: float = 1.0
    text: str = ""
    is_over: bool = False
    num_tokens: int = 0
    seconds: float = 0.0
    _steps: list[_Step] = field(default_factory=list)
    _saved: set[Path] = field(default_factory=set)
    _said: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What continues the text now: `base`, an adapter, a mix."""
        return str(self.scaled_mix)

    @property
    def scaled_mix(self) -> Mix:
        """The mix with its weights scaled."""
        return Mix((name, weight * self.scale) for name, weight in self.mix)

    def list_adapters(self) -> list[str]:
        """Returns the names of the adapters of this base."""
        return [str(row["name"]) for row in self._list_rows()]

    def run(self, line: str) -> str:
        """Does one line: a command, or text to add and continue; returns what to show besides the continuation.

        Raises `UsageError` for an unknown command, and what the command itself raises; the text stays as it was.
        """
        if not line.startswith("/"):
            return self.go_on(line)
        name, _, rest = line[1:].partition(" ")
        if name not in HELP:
            raise UsageError(f"there is no command /{name}", suggest(name, HELP))
        command: Callable[[str], str] = getattr(self, f"_do_{name}")
        return command(rest.strip())

    def complete(self, text: str) -> list[str]:
        """Returns the words that may stand at the end of a line: commands, adapters, settings."""
        *before, word = text.split(" ")
        if not before:
            known = [f"/{name}" for name in HELP]
        elif before[0] in ("/use", "/mix", "/compare"):
            more = {"/use": [AUTO], "/compare": [BASE]}
            known = [*self.list_adapters(), *more.get(before[0], [])]
        elif before == ["/set"]:
            known = [*GenerateSettings.model_fields, "seed"]
        else:
            known = []
        return [candidate for candidate in known if candidate.startswith(word)]

    def go_on(self, typed: str) -> str:
        """Adds what was typed to the text and continues it; Ctrl-C keeps what was written by then."""
        if not (self.text or typed):
            raise UsageError("there is no text yet", "type its beginning")
        before, prompt = self.text, self.text + typed
        self.seed += 1
        (output,) = self._write(prompt, [self.scaled_mix], self.seed, self.on_text)
        self.text = prompt + output.text
        self._steps.append(_Step(before, typed))
        notes = {"interrupted": "stopped; what was written is kept", "stop": "the text ends here"}
        dropped = count_dropped(self.session.base, prompt, self.settings)
        cut = f"the first {dropped} tokens were left out, to make room" if dropped else ""
        return "\n".join(filter(None, (cut, *self._said, notes.get(output.finish_reason))))

    def _write(self, prompt: str, mixes: Sequence[Mix], seed: int, on_text: OnText | None) -> list[Output]:
        started = time.monotonic()
        self._said = []
        router = Router(self.session, on_choice=lambda choice: self._said.append(str(choice)))
        requests = [Request(prompt, mix, seed, router=router if mix == AUTO_MIX else None) for mix in mixes]
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

    def _do_base(self, rest: str) -> str:
        self.mix, self.scale = Mix(), 1.0
        return "the base continues"

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
        names = rest.replace(",", " ").split() or [*self.list_adapters(), BASE]
        mixes = [Mix.parse(name) for name in names]
        self.seed += 1
        outputs = self._write(self.text, mixes, self.seed, None)
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
        changed = load_recipe(None, [f"generate.{key}={value.strip()}"]).generate
        together = {**self.settings.model_dump(), key: getattr(changed, key)}
        self.settings = build_recipe({"generate": together}, "/set").generate
        return f"{key} {getattr(self.settings, key)}"

    def _do_retry(self, rest: str) -> str:
        if not (self._steps and self._steps[-1].is_continuation):
            raise UsageError("there is no continuation to take back", "type text, or an empty line")
        text, last = self.text, self._steps.pop()
        self.text = last.before
        try:
            return self.go_on(last.typed)
        except BaseException:
            self.text = text
            self._steps.append(last)
            raise

    def _do_undo(self, rest: str) -> str:
        if not self._steps:
            raise UsageError("there is nothing to take back", "type the beginning of a text")
        self.text = self._steps.pop().before
        return f"…{self.text[-200:]}" if self.text else "the text is empty"

    def _do_new(self, rest: str) -> str:
        self.text, self._steps = "", []
        return "a new text"

    def _do_show(self, rest: str) -> str:
        return self.text

    def _do_save(self, rest: str) -> str:
        path = self._parse_path(rest, "/save FILE")
        if path.exists() and path not in self._saved:
            raise ConflictError(f"{path} exists", "save under another name")
        with wrap_os_errors(f"write {path}"):
            write_file(path, self.text.encode())
        self._saved.add(path)
        return f"saved {len(self.text)} characters to {path}"

    def _do_load(self, rest: str) -> str:
        path = self._parse_path(rest, "/load FILE")
        content = read_user_file(path, MAX_FILE_BYTES)
        self._steps.append(_Step(self.text, "", is_continuation=False))
        self.text = content.decode("utf-8-sig", "replace").rstrip("\n")
        return f"…{self.text[-200:]}"

    @staticmethod
    def _parse_path(rest: str, usage: str) -> Path:
        try:
            (name,) = shlex.split(rest)
        except ValueError as error:
            raise UsageError("name one file", usage) from error
        return Path(name).expanduser()

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

    @torch.inference_mode()
    def _do_stats(self, rest: str) -> str:
        base = self.session.base
        ids = base.tokenizer.encode(self.text)[-base.config.n_positions + 1 :]
        lines = [f"{self.num_tokens} tokens written, {self.num_tokens / max(self.seconds, 1e-9):.1f} tokens/s"]
        if ids:
            tokens = torch.tensor([base.tokenizer.eos_id, *ids], device=base.runtime.device)
            used = Router(self.session).route(self.text).mix if self.mix == AUTO_MIX else self.scaled_mix
            for mix in dict.fromkeys([used, Mix()]):
                adapters = self.session.adapters_for([self.session.resolve(mix)])
                nll = as_float64(token_nll(base.model, tokens[None, :-1], tokens[1:], adapters)).mean()
                lines.append(f"perplexity of the text under {mix!s}: {math.exp(nll):.2f} ({len(ids)} tokens)")
        return "\n".join([*lines, f"last seed {self.seed}"])

    def _do_help(self, rest: str) -> str:
        width = max(len(f"/{name} {usage}") for name, (usage, _) in HELP.items())
        lines = [f"{f'/{name} {usage}':{width}}  {what}" for name, (usage, what) in HELP.items()]
        return "\n".join(
            [
                *lines,
                "What does not begin with / is added to the text, which is then continued.",
                "An empty line continues as it is; Ctrl-C stops a continuation and keeps it.",
            ]
        )

    def _do_quit(self, rest: str) -> str:
        self.is_over = True
        return ""
