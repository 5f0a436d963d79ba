"""OpenAI's chat completions: a chat becomes the text that the adapter continues, and the continuation a message.

How turns are written is the adapter's, see `inference.chat`. A chat that is too long for the context loses its oldest
messages, those of the system excepted; `provenance` says how many.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError

from lora_gpt2.core.errors import UsageError
from lora_gpt2.inference.chat import Message, build_prompt, find_chat_format, read_messages, route_chat
from lora_gpt2.inference.routing import RoutedMix, Router
from lora_gpt2.inference.sequence import SequenceState, TokenLogprobs
from lora_gpt2.inference.session import Session
from lora_gpt2.recipe import GenerateSettings
from lora_gpt2.serving.answers import ApiError
from lora_gpt2.serving.choices import CompletionChoice
from lora_gpt2.serving.protocol import (
    MAX_SEED,
    SAMPLING,
    CompletionBody,
    RequestBody,
    StreamOptions,
    describe_invalid,
    parse_json,
    parse_model,
)
from lora_gpt2.serving.request import CompletionRequest
from lora_gpt2.serving.structured import StructuredFields

SHARED = (*SAMPLING, *StructuredFields.model_fields, "model", "n", "stream", "stream_options", "seed", "max_tokens")
"""What a request for a chat has in common with one for a completion."""


class ChatBody(RequestBody):
    """The body of a chat completions request; `user` and what follows it change nothing."""

    model: str = Field(min_length=1, max_length=2000)
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)
    n: int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-MAX_SEED - 1, le=MAX_SEED)
    modalities: list[Literal["text"]] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None


def parse_chat(content: bytes) -> ChatBody:
    """Returns a chat completions request; raises `ApiError` that names the parameter and what it may be."""
    values = parse_json(content)
    if any(values.get(name) for name in ("tools", "functions")):
        raise ApiError(400, "tools are not supported: GPT-2 continues text", "tools")
    values = {
        key: value
        for key, value in values.items()
        if key not in ("tools", "functions", "tool_choice", "parallel_tool_calls")
    }
    try:
        body = ChatBody.model_validate(values)
    except ValidationError as error:
        raise describe_invalid(error, ChatBody) from error
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options is for streams", "stream_options")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs goes with logprobs", "top_logprobs")
    return body


def list_messages(body: ChatBody) -> list[Message]:
    """Returns the messages of a request; raises `ApiError` for a role that is none, and for what is no text."""
    try:
        return read_messages(body.messages)
    except UsageError as error:
        raise ApiError(400, error.message, "messages") from error


def route_body(body: ChatBody, router: Router, defaults: GenerateSettings) -> RoutedMix:
    """Returns the adapter that answers where the model is `auto`; see `route_chat`."""
    messages = list_messages(body)
    try:
        return route_chat(messages, router, defaults)
    except UsageError as error:
        raise ApiError(400, error.message, "model", "no_chat_template") from error


def build_completion(
    body: ChatBody, session: Session, defaults: GenerateSettings, route: RoutedMix | None = None
) -> tuple[CompletionBody, int]:
    """Returns the completions request that a chat comes to, and how many messages were left out.

    Raises `ApiError` 400 if nothing says how this model's chats are written, or the last message alone is too long.
    """
    messages, mix = list_messages(body), parse_model(body.model, session) if route is None else route.mix
    try:
        chat_format = find_chat_format(defaults, session.find_manifests(mix), body.model)
    except UsageError as error:
        raise ApiError(400, f"{error.message}; {error.hint}", "model", "no_chat_template") from error
    asked, context = body.max_completion_tokens or body.max_tokens, session.base.config.n_positions
    try:
        prompt = build_prompt(messages, chat_format, session.base.tokenizer, context, asked or defaults.max_new_tokens)
    except UsageError as error:
        raise ApiError(400, error.message, "messages", "context_length_exceeded") from error
    own = [body.stop] if isinstance(body.stop, str) else body.stop or []
    completion = CompletionBody.model_validate(
        {
            **{name: getattr(body, name) for name in SHARED},
            "max_tokens": min(asked, prompt.room) if asked else None,
            "prompt": prompt.text,
            "stop": list(
                dict.fromkeys([*own, *(defaults.stop if body.stop is None else ()), *chat_format.list_stops()])
            ),
            "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
        }
    )
    return completion, prompt.num_dropped


class ChatChoice(CompletionChoice):
    """A choice as a message, or as what a message grew by."""

    def __init__(self, sequence: SequenceState, body: CompletionBody) -> None:
        super().__init__(sequence, body)
        self._has_text = False

    def take_json(self) -> dict[str, Any]:
        """Returns what was added since the last call, without the space that the template left to a free answer."""
        is_begin = not self._has_text and not self.sequence.settings.constraint
        text = self._text.removeprefix(" ") if is_begin else self._text
        message = {"content": text, **({"role": "assistant"} if self._is_first or not self.body.stream else {})}
        logprobs = None
        if self.body.logprobs is not None:
            found = [item for _, item in self._take_logprobs(self._text) if isinstance(item, TokenLogprobs)]
            logprobs = {"content": [self._describe_token(item) for item in found], "refusal": None}
        self._has_text = self._has_text or bool(self._text)
        self._is_first, self._text, self._logprobs = False, "", []
        return {
            "index": self.sequence.index,
            "delta" if self.body.stream else "message": message,
            "logprobs": logprobs,
            "finish_reason": self._finish_reason or None,
        }

    def _describe_token(self, item: TokenLogprobs) -> dict[str, Any]:
        def show(token: int, logprob: float) -> dict[str, Any]:
            tokenizer = self.sequence.tokenizer
            return {
                "token": tokenizer.show(token),
                "logprob": logprob,
                "bytes": list(tokenizer.token_bytes[token]),
            }

        top = item.top[: self.body.logprobs or 0]
        return {**show(item.token, item.logprob), "top_logprobs": [show(token, logprob) for token, logprob in top]}


class ChatRequest(CompletionRequest):
    """A chat completions request: the same work, answered in another shape."""

    prefix, whole, chunk, choice = "chatcmpl", "chat.completion", "chat.completion.chunk", ChatChoice
