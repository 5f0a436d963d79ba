"""A text that grows under the user's hand: type, let an adapter go on, try another, take back.

GPT-2 continues text, so there is one text and no dialogue: what is typed is added to it, and the adapter in use
continues it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from lora_gpt2.core.errors import UsageError
from lora_gpt2.core.user_files import read_user_file
from lora_gpt2.inference.command_loop import CommandLoop, Help, parse_path
from lora_gpt2.inference.generate import Request, count_dropped
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.routing import AUTO_MIX, Router
from lora_gpt2.model.runtime import as_float64
from lora_gpt2.model.scoring import token_nll

MAX_FILE_BYTES = 10_000_000


@dataclass(kw_only=True)
class Repl(CommandLoop):
    """The text, who continues it and how."""

    help: ClassVar[Help] = {
        **CommandLoop.help,
        "base": ("", "let the plain base write"),
        "compare": ("[A B …]", "continue the text with each, side by side, and keep none"),
        "new": ("", "begin a new text"),
        "show": ("", "show the whole text"),
        "save": ("FILE", "write the text to a file"),
        "load": ("FILE", "continue the text of a file"),
        "stats": ("", "tokens, speed, and the text's perplexity under the adapter in use"),
    }
    explanation: ClassVar[str] = (
        "What does not begin with / is added to the text, which is then continued.\n"
        "An empty line continues as it is; Ctrl-C stops a continuation and keeps it."
    )

    text: str = ""

    @property
    def state(self) -> str:
        """The text."""
        return self.text

    @state.setter
    def state(self, value: str) -> None:
        self.text = value

    @property
    def tail(self) -> str:
        """The end of the text."""
        return f"…{self.text[-200:]}" if self.text else "the text is empty"

    def build_request(self, mix: Mix, seed: int) -> Request:
        """Returns the request that continues the text."""
        router = Router(self.session, on_choice=lambda choice: self._said.append(str(choice)))
        return Request(self.text, mix, seed, router=router if mix == AUTO_MIX else None)

    def go_on(self, typed: str) -> str:
        """Adds what was typed to the text and continues it; Ctrl-C keeps what was written by then."""
        before, prompt = self.text, self.text + typed
        if not prompt:
            raise UsageError("there is no text yet", "type its beginning")
        self.seed += 1
        self._said = []
        self.text = prompt
        try:
            (output,) = self.write([self.build_request(self.scaled_mix, self.seed)], self.on_text)
        except BaseException:
            self.text = before
            raise
        self.text = prompt + output.text
        self.keep(before, typed)
        notes = {"interrupted": "stopped; what was written is kept", "stop": "the text ends here"}
        dropped = count_dropped(self.session.base, prompt, self.settings)
        cut = f"the first {dropped} tokens were left out, to make room" if dropped else ""
        return "\n".join(filter(None, (cut, *self._said, notes.get(output.finish_reason))))

    def _do_base(self, rest: str) -> str:
        self.mix, self.scale = Mix(), 1.0
        return "the base continues"

    def _do_new(self, rest: str) -> str:
        self.text, self._steps = "", []
        return "a new text"

    def _do_show(self, rest: str) -> str:
        return self.text

    def _do_save(self, rest: str) -> str:
        return self.save(rest, self.text)

    def _do_load(self, rest: str) -> str:
        content = read_user_file(parse_path(rest, "/load FILE"), MAX_FILE_BYTES)
        self.keep(self.text, "", is_written=False)
        self.text = content.decode("utf-8-sig", "replace").rstrip("\n")
        return self.tail

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
