"""A chat as the text that an adapter was trained on: turns in the words of its recipe, the answer's beginning last.

GPT-2 continues text, so a chat is a text too. How its turns are written is part of an adapter: `generate.chat_turns` of
its recipe, or what its training chats were written by (`data.item_template`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_gpt2.core.errors import UsageError
from lora_gpt2.data.read.layouts import CHATS, has_chats
from lora_gpt2.data.read.records import PLACEHOLDER
from lora_gpt2.recipe import GenerateSettings
from lora_gpt2.store.manifest import Manifest

ROLES = ("system", "user", "assistant")
CONTENT = "{content}"
MOST_CHARACTERS = 200  # of a stop text


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class ChatFormat:
    """How turns are written: for each role a text with `{content}` in it. A role without one is written as it is."""

    turns: Mapping[str, str]

    def render(self, messages: Sequence[Message]) -> str:
        """Returns the prompt of a chat: a line for each message, and the beginning of the assistant's next one."""
        lines = map(self.render_turn, messages)
        return "\n".join([*lines, self._begin("assistant").rstrip(" ")])

    def list_stops(self) -> tuple[str, ...]:
        """Returns the texts before which an answer ends: what its own turn ends with, or the next one begins with."""
        begins = dict.fromkeys(self._begin(role).rstrip() for role in self.turns)
        end = self.turns.get("assistant", CONTENT).partition(CONTENT)[2].rstrip()
        stops = [*([end] if end else []), *(f"\n{begin}" for begin in begins if begin)]
        return tuple(stop[:MOST_CHARACTERS] for stop in stops)

    def render_turn(self, message: Message) -> str:
        """Returns the line of a message."""
        return self.turns.get(message.role, CONTENT).replace(CONTENT, message.content)

    def _begin(self, role: str) -> str:
        return self.turns.get(role, CONTENT).partition(CONTENT)[0]


def find_chat_format(settings: GenerateSettings, manifests: Sequence[Manifest | None], name: str) -> ChatFormat:
    """Returns how chats with a mix are written, by the manifests of its adapters (None for one that has none).

    Raises `UsageError` where no recipe says it, or adapters of the mix do not agree.
    """
    found = [read_turns(manifest) for manifest in manifests]
    own = list({tuple(sorted(turns.items())) for turns in found if turns})
    if len(own) == 1 and all(found):
        return ChatFormat(dict(own[0]))
    if settings.chat_turns:
        return ChatFormat(settings.chat_turns)
    if len(own) > 1:
        raise UsageError(f"the adapters of {name} write chats differently", "use one of them")
    raise UsageError(
        f"{name} was not trained on chats: GPT-2 continues text",
        "POST /v1/completions with a prompt, or train on chats (see the recipe 'dialogue', and generate.chat_turns)",
    )


def read_turns(manifest: Manifest | None) -> dict[str, str]:
    """Returns the templates of the turns that an adapter was trained on, empty if those were no chats."""
    if manifest is None:
        return {}
    generate, data = (manifest.recipe.get(section) for section in ("generate", "data"))
    named = generate.get("chat_turns") if isinstance(generate, Mapping) else None
    if isinstance(named, Mapping) and all(isinstance(text, str) for text in named.values()) and named:
        return {str(role): text for role, text in named.items()}
    data = data if isinstance(data, Mapping) else {}
    item, whole = str(data.get("item_template", "")), PLACEHOLDER.fullmatch(str(data.get("template", "")))
    is_chat = (whole is not None and whole[1] in CHATS) or has_chats(manifest.data.get("reading", ()))
    if not is_chat or item.count(CONTENT) != 1 or "{role}" not in item:
        return {}
    return {role: item.replace("{role}", role) for role in ROLES}
