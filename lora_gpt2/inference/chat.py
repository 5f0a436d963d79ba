"""A chat as the text that an adapter was trained on: turns in the words of its recipe, the answer's beginning last.

GPT-2 continues text, so a chat is a text too. How its turns are written is part of an adapter: `generate.chat_turns` of
its recipe, or what its training chats were written by (`data.item_template`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_gpt2.core.errors import UsageError
from lora_gpt2.data.read.layouts import CHATS, has_chats
from lora_gpt2.data.read.records import PLACEHOLDER
from lora_gpt2.data.tokenizer import Tokenizer
from lora_gpt2.inference.generate import Output, Request
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.routing import AUTO_MIX, RoutedMix, Router
from lora_gpt2.inference.session import Session
from lora_gpt2.recipe import GenerateSettings
from lora_gpt2.store.manifest import Manifest

ROLES = ("system", "user", "assistant")
ALIASES = {"developer": "system"}
CONTENT = "{content}"
MOST_CHARACTERS = 200  # of a stop text


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


def read_messages(items: Sequence[Any]) -> list[Message]:
    """Returns messages as OpenAI's API has them: mappings with `role` and `content`, a text or parts of one.

    Raises `UsageError` for a role that is none, and for what is no text.
    """
    messages, hint = [], "a message is {'role': 'user', 'content': 'text'}"
    if not items:
        raise UsageError("there is no message to answer", hint)
    for index, item in enumerate(items):
        name = f"messages[{index}]"
        if not isinstance(item, Mapping):
            raise UsageError(f"{name}: it is no message", hint)
        role, content = ALIASES.get(str(item.get("role")), item.get("role")), item.get("content")
        if role not in ROLES:
            raise UsageError(f"{name}: its role is {', '.join(ROLES)}", hint)
        if isinstance(content, list) and all(map(_is_text, content)):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise UsageError(f"{name}: its content is a text", hint)
        messages.append(Message(str(role), content))
    return messages


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


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
        "continue a text with it, or train on chats (see the recipe 'dialogue', and generate.chat_turns)",
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


@dataclass(frozen=True, kw_only=True)
class ChatPrompt:
    """A chat as a prompt.

    Args:
        text: ends with the beginning of the assistant's turn.
        num_dropped: how many of the oldest messages had no room.
        room: how many tokens may follow.
    """

    text: str
    num_dropped: int
    room: int


def build_prompt(
    messages: Sequence[Message], chat_format: ChatFormat, tokenizer: Tokenizer, context: int, max_new_tokens: int
) -> ChatPrompt:
    """Returns the prompt of a chat, without the oldest messages that leave the answer no room, the system's excepted.

    Raises `UsageError` if what has to stay is too long for the context.
    """
    lines = [f"{chat_format.render_turn(message)}\n" for message in messages]
    sizes = [len(ids) for ids in tokenizer.encode_batch([*lines, chat_format.render([])])]
    kept, total = list(range(len(messages))), sum(sizes)
    for index in [index for index, message in enumerate(messages[:-1]) if message.role != "system"]:
        if total <= context - min(max_new_tokens, context // 4):
            break
        kept.remove(index)
        total -= sizes[index]
    text = chat_format.render([messages[index] for index in kept])
    room = context - len(tokenizer.encode(text))
    if room < 1:
        message = f"the last message and the system's leave no room for an answer in a context of {context} tokens"
        raise UsageError(message, "shorten them")
    return ChatPrompt(text=text, num_dropped=len(messages) - len(kept), room=room)


def list_chatting(router: Router, settings: GenerateSettings) -> list[str]:
    """Returns the adapters trained on chats, and all where the settings say how turns are written.

    Raises `UsageError` if there is none.
    """
    manifests = {name: router.find_manifest(name) for name in router.list_names()}
    names = [name for name, manifest in manifests.items() if settings.chat_turns or read_turns(manifest)]
    if not names:
        hint = "train on chats (see the recipe 'dialogue'), or set generate.chat_turns"
        raise UsageError("no adapter of the store was trained on chats", hint)
    return names


def route_chat(messages: Sequence[Message], router: Router, settings: GenerateSettings) -> RoutedMix:
    """Returns the adapter under which what was said is most likely, of those that chat; used by the session's thread.

    Raises what `list_chatting` does.
    """
    return router.among(list_chatting(router, settings)).route(
        "\n".join(message.content for message in messages)
    )  # the base could not answer


def build_chat_request(
    session: Session, messages: Sequence[Message], mix: Mix, seed: int, settings: GenerateSettings, router: Router
) -> tuple[Request, int]:
    """Returns the request that answers a chat, and how many of its oldest messages were left out.

    Raises `UsageError` if nothing says how chats are written under this mix, or the last message is too long.
    """
    route = route_chat(messages, router, settings) if mix == AUTO_MIX else None
    used = session.resolve(mix if route is None else route.mix)
    chat_format = find_chat_format(settings, session.find_manifests(used), str(used))
    context = session.base.config.n_positions
    prompt = build_prompt(messages, chat_format, session.base.tokenizer, context, settings.max_new_tokens)
    stops = tuple(dict.fromkeys([*settings.stop, *chat_format.list_stops()]))
    own = settings.model_copy(update={"stop": stops, "max_new_tokens": min(settings.max_new_tokens, prompt.room)})
    return Request(prompt.text, mix, seed, settings=own, route=route), prompt.num_dropped


def strip_answer(output: Output) -> Output:
    """Returns an answer without the space that its turn begins with, unless what it may be was constrained."""
    return output if output.constraint else replace(output, text=output.text.removeprefix(" "))
