"""A chat at the keyboard: what is typed is the user's message, and an adapter that was trained on chats answers it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from lora_gpt2.core.errors import DataError, UsageError
from lora_gpt2.core.printable import count_of
from lora_gpt2.core.strict_json import load_json
from lora_gpt2.core.user_files import read_user_text
from lora_gpt2.inference.chat import Message, build_chat_request, list_chatting, read_messages
from lora_gpt2.inference.command_loop import CommandLoop, Help, parse_path
from lora_gpt2.inference.generate import OnText, Output, Request
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.routing import Router


@dataclass(kw_only=True)
class ChatLoop(CommandLoop):
    """The messages, who answers and how; the system's message, if there is one, is the first."""

    help: ClassVar[Help] = {
        **CommandLoop.help,
        "compare": ("[A B …]", "let each answer the last message, side by side, and keep none"),
        "system": ("[TEXT]", "begin a new chat with these instructions, or with none"),
        "new": ("", "begin a new chat, with the same instructions"),
        "show": ("", "show the whole chat"),
        "save": ("FILE", "write the chat to a file, as a line of JSON that can be trained on"),
        "load": ("FILE", "continue the chat of such a file"),
    }
    explanation: ClassVar[str] = (
        "What does not begin with / is a message, which is then answered; Ctrl-C stops an answer and keeps it."
    )

    messages: tuple[Message, ...] = ()

    @property
    def state(self) -> tuple[Message, ...]:
        """The messages."""
        return self.messages

    @state.setter
    def state(self, value: tuple[Message, ...]) -> None:
        self.messages = value

    @property
    def tail(self) -> str:
        """The last message."""
        return _show(self.messages[-1]) if self.messages else "the chat is empty"

    def list_compared(self) -> list[str]:
        """Returns all that can chat."""
        return list_chatting(Router(self.session), self.settings)

    def build_request(self, mix: Mix, seed: int) -> Request:
        """Returns the request that answers the last message of the user."""
        last = max((index for index, message in enumerate(self.messages) if message.role == "user"), default=-1)
        if last < 0:
            raise UsageError("there is no message yet", "type one")
        router = Router(self.session, on_choice=lambda choice: self._said.append(str(choice)))
        asked = self.messages[: last + 1]
        request, dropped = build_chat_request(self.session, asked, mix, seed, self.settings, router)
        if dropped:
            self._said.append(f"the first {count_of(dropped, 'message')} were left out, to make room")
        return request

    def go_on(self, typed: str) -> str:
        """Adds a message and lets it be answered; Ctrl-C keeps what was written by then."""
        if not typed.strip():
            raise UsageError("a message is expected", "type one, or /help")
        before, self._said = self.messages, []
        self.seed += 1
        self.messages = (*before, Message("user", typed))
        try:
            (output,) = self.write([self.build_request(self.scaled_mix, self.seed)], self.on_text)
        except BaseException:
            self.messages = before
            raise
        self.messages = (*self.messages, Message("assistant", output.text))
        self.keep(before, typed)
        cut = "the answer was cut; /set max_new_tokens 300 lets it go on for longer"
        notes = {"interrupted": "stopped; what was written is kept", "length": cut}
        return "\n".join(filter(None, (*self._said, notes.get(output.finish_reason))))

    def write(self, requests: Sequence[Request], on_text: OnText | None) -> list[Output]:
        """Returns the answers, without the space that the assistant's turn begins with; see `CommandLoop.write`."""
        begun = set[int]()

        def show(index: int, piece: str) -> None:
            text = piece if index in begun else piece.removeprefix(" ")
            begun.add(index)
            if on_text is not None:
                on_text(index, text)

        outputs = super().write(requests, show)
        return [replace(output, text=output.text.removeprefix(" ")) for output in outputs]

    def _do_system(self, rest: str) -> str:
        self.keep(self.messages, "", is_written=False)
        self.messages = (Message("system", rest),) if rest else ()
        return "a new chat with these instructions" if rest else "a new chat without instructions"

    def _do_new(self, rest: str) -> str:
        self.messages, self._steps = tuple(m for m in self.messages[:1] if m.role == "system"), []
        return "a new chat"

    def _do_show(self, rest: str) -> str:
        return "\n".join(map(_show, self.messages))

    def _do_save(self, rest: str) -> str:
        return self.save(rest, json.dumps({"messages": list(map(vars, self.messages))}, ensure_ascii=False) + "\n")

    def _do_load(self, rest: str) -> str:
        path = parse_path(rest, "/load FILE")
        try:
            found = load_json(read_user_text(path))
            messages = tuple(read_messages(found["messages"]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{path} holds no chat", "/save FILE writes one") from error
        self.keep(self.messages, "", is_written=False)
        self.messages = messages
        return self.tail


def _show(message: Message) -> str:
    return f"{message.role}: {message.content}"
