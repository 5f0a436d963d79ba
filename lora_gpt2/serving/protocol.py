"""The protocol of the completions API: a request's body becomes sequences, their outputs become OpenAI's JSON.

Names and shapes are those of OpenAI's `/v1/completions`; what GPT-2 adds (`top_k`, `min_p`, `repetition_penalty`,
`no_repeat_ngram_size`, `num_beams`, `length_penalty`, `watermark`, `truncate`, and `provenance` in the answer) goes
through the official client as `extra_body`. Parameters that a request leaves out are those of the server's recipe.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from lora_gpt2.core.errors import LoraGpt2Error, UsageError
from lora_gpt2.core.names import is_name
from lora_gpt2.core.suggest import suggest
from lora_gpt2.data.tokenizer import Tokenizer
from lora_gpt2.inference.constraint import adopt_constraint
from lora_gpt2.inference.generate import describe_provenance, describe_settings, fit_prompt
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.routing import RoutedMix
from lora_gpt2.inference.sequence import SequenceState, SharedSearch
from lora_gpt2.inference.session import Session
from lora_gpt2.inference.slots import VerifiedAdapter
from lora_gpt2.recipe import GenerateSettings, ServeSettings
from lora_gpt2.serving.answers import ApiError, translate_error
from lora_gpt2.serving.structured import StructuredFields, read_constraint

SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "no_repeat_ngram_size",
    "logit_bias",
    "num_beams",
    "length_penalty",
    "watermark",
)
"""The settings `generate.*` that a request may have, by the same names."""
JSON_TYPES = {"logit_bias": dict[str, float]}  # whose keys JSON makes texts
MAX_SEED = 2**63 - 1
MAX_MIX = 8


if TYPE_CHECKING:
    SamplingFields = StructuredFields
else:
    SamplingFields = create_model(
        "SamplingFields",
        __base__=StructuredFields,
        __module__=__name__,
        **{n: (JSON_TYPES.get(n, GenerateSettings.model_fields[n].annotation) | None, None) for n in SAMPLING},
    )


class RequestBody(SamplingFields):
    """What bodies have in common: a parameter that is null is one that was left out, as for OpenAI."""

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        if isinstance(options := values.get("stream_options"), dict):
            values = {**values, "stream_options": {key: value for key, value in options.items() if value is not None}}
        required = cls.model_fields.keys() - optional
        return {name: value for name, value in values.items() if value is not None or name in required}


class StreamOptions(BaseModel):
    """What a stream may have besides the text; none of it is obfuscated."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class CompletionBody(RequestBody):
    """The body of a completions request; numbers are numbers, not texts or truth values."""

    model: str = Field(min_length=1, max_length=2000)
    prompt: Any = ""
    max_tokens: int | None = Field(None, ge=0, le=1_000_000)
    n: int = Field(1, ge=1)
    best_of: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-MAX_SEED - 1, le=MAX_SEED)
    suffix: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    truncate: Literal["left"] | None = None


def parse_json(content: bytes) -> dict[str, Any]:
    """Returns a JSON object; raises `ApiError` for anything else, keys given twice, NaN, and lone surrogates."""
    try:
        text = content.decode(json.detect_encoding(content))
        values = json.loads(text, object_pairs_hook=_refuse_twice, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not JSON in UTF-8: byte {error.start} is wrong") from error
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}") from error
    if not isinstance(values, dict):
        raise ApiError(400, "the body is not a JSON object")
    if "\\u" in text:  # an escape may be half of a surrogate pair, which no answer could repeat
        _refuse_halves(values)
    return values


def _refuse_halves(values: dict[str, Any]) -> None:
    for key, value in values.items():
        try:
            json.dumps({key: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            name = key.encode("utf-8", "replace").decode()
            raise ApiError(400, f"{name}: half of a surrogate pair is no character", name) from error


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key is given twice")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def parse_body(content: bytes) -> CompletionBody:
    """Returns a completions request; raises `ApiError` that names the parameter and what it may be."""
    values = parse_json(content)
    try:
        body = CompletionBody.model_validate(values)
    except ValidationError as error:
        raise describe_invalid(error, CompletionBody) from error
    if body.best_of not in (None, body.n):
        raise ApiError(400, "best_of is not supported, except as n", "best_of")
    if body.suffix:
        raise ApiError(400, "suffix is not supported: GPT-2 continues text", "suffix")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options is for streams", "stream_options")
    return body


def describe_invalid(error: ValidationError, model: type[BaseModel]) -> ApiError:
    """Returns the answer to a body that is not one of `model`'s."""
    first = error.errors(include_url=False, include_context=False)[0]
    reason = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return ApiError(400, reason)
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"there is no parameter '{name}'; {suggest(name, model.model_fields)}", name)
    return ApiError(400, f"{name}: {reason}, found {json.dumps(first['input'])[:100]}", name)


def build_settings(body: CompletionBody, defaults: GenerateSettings) -> GenerateSettings:
    """Returns the sampling settings of a request; raises `ApiError` for a value outside its bounds."""
    values = {key: getattr(body, key) for key in SAMPLING if getattr(body, key) is not None}
    if body.max_tokens is not None:
        values["max_new_tokens"] = max(1, body.max_tokens)
    if body.stop is not None:
        values["stop"] = [body.stop] if isinstance(body.stop, str) else body.stop
    try:
        values |= read_constraint(body)
    except ValueError as error:
        raise ApiError(400, str(error), str(error).partition(":")[0]) from error
    values["logprobs"] = 0 if body.logprobs is None else max(1, body.logprobs)
    try:
        return GenerateSettings.model_validate({**defaults.model_dump(), **values})
    except ValidationError as error:
        raise describe_invalid(error, CompletionBody) from error


def list_prompts(prompt: Any, name: str = "prompt") -> list[str | list[int]]:
    """Returns the prompts of a request, each a text or token ids; raises `ApiError` for parameter `name` if neither."""
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(map(_is_id, prompt))):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(item, str) for item in prompt):
            return list(prompt)
        if all(isinstance(item, list) and item and all(map(_is_id, item)) for item in prompt):
            return list(prompt)
    raise ApiError(400, f"{name} is a text, a list of texts, or of token ids", name)


def encode_prompt(prompt: str | list[int], tokenizer: Tokenizer, name: str = "prompt") -> list[int]:
    """Returns the token ids of a prompt, EOS for an empty one; raises `ApiError` for parameter `name`."""
    if isinstance(prompt, list):
        if max(prompt) >= tokenizer.vocab_size:
            raise ApiError(400, f"token ids are below {tokenizer.vocab_size}", name)
        return prompt
    try:
        return tokenizer.encode(prompt) or [tokenizer.eos_id]
    except LoraGpt2Error as error:
        raise ApiError(400, f"{error.message}; {error.hint}", name) from error


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def parse_model(model: str, session: Session) -> Mix:
    """Returns the resolved mix that `model` names: an adapter, `name@version`, `a:0.6+b:0.4`, or the base.

    Raises `ApiError` 404 for a name without adapter.
    """
    is_own = model == session.base.name and not (session.store and is_name(model) and session.store.has_adapter(model))
    with _model_errors():
        mix = Mix() if is_own else Mix.parse(model)
        if len(mix) > MAX_MIX:
            raise ApiError(400, f"a mix of {len(mix)} adapters, at most {MAX_MIX} are allowed", "model")
        return session.resolve(mix)


def parse_names(model: str) -> list[str]:
    """Returns the names and versions that `model` mixes; raises `ApiError` 404 for what is no name."""
    with _model_errors():
        return Mix.parse(model).references


def fetch_model(model: str, session: Session) -> tuple[Mix, dict[str, VerifiedAdapter]]:
    """Returns the mix that `model` names and its adapters, fetched and verified; raises `ApiError` 404 or 503."""
    return fetch_mix(parse_model(model, session), session)


def fetch_mix(mix: Mix, session: Session) -> tuple[Mix, dict[str, VerifiedAdapter]]:
    """Returns a resolved mix and its adapters, fetched and verified; raises `ApiError` 404 or 503."""
    with _model_errors():
        return mix, {name: session.fetch(name) for name, _ in mix}


@contextmanager
def _model_errors() -> Iterator[None]:
    try:
        yield
    except UsageError as error:  # an invalid name names no adapter
        raise ApiError(404, f"{error.message}; {error.hint}", "model", "model_not_found") from error
    except LoraGpt2Error as error:
        raise translate_error(error, "model") from error


def count_cut(body: CompletionBody, session: Session, defaults: GenerateSettings) -> list[int]:
    """Returns how many tokens of each prompt are not read, where the request allows that."""
    if body.truncate != "left":
        return []
    base, settings = session.base, build_settings(body, defaults)
    found = []
    for prompt in list_prompts(body.prompt):
        ids = encode_prompt(prompt, base.tokenizer)
        kept = fit_prompt(ids, _count_wanted(body, settings), base.config.n_positions, truncate_left=True)[0]
        found.append(len(ids) - len(kept))
    return found


def check_choices(body: CompletionBody, settings: GenerateSettings, limits: ServeSettings) -> list[str | list[int]]:
    """Returns the prompts of a request; raises `ApiError` if they are too many."""
    prompts, setting = list_prompts(body.prompt), " (serve.max_choices)"
    if len(prompts) * body.n > limits.max_choices:
        raise ApiError(400, f"{len(prompts)} prompts times n={body.n} are more than {limits.max_choices}{setting}", "n")
    if settings.num_beams > 1 and (
        body.n > settings.num_beams or len(prompts) * settings.num_beams > limits.max_choices
    ):
        text = f"n is at most num_beams, and prompts times num_beams are at most {limits.max_choices}{setting}"
        raise ApiError(400, text, "num_beams")
    return prompts


def build_sequences(
    body: CompletionBody,
    session: Session,
    defaults: GenerateSettings,
    limits: ServeSettings,
    seed: int,
    routes: Sequence[RoutedMix] = (),
) -> list[SequenceState]:
    """Returns a sequence for each prompt and each of its `n` continuations, with their adapters fetched from disk.

    The k-th sequence samples with `seed` + k, so that equal prompts have different continuations. `routes` are what was
    chosen for each prompt, where the model is `auto`. Raises `ApiError`.
    """
    asked = build_settings(body, defaults)
    prompts = check_choices(body, asked, limits)
    sequences: list[SequenceState] = []
    for index, prompt in enumerate(prompts):
        mix, loaded = fetch_mix(routes[index].mix, session) if routes else fetch_model(body.model, session)
        may_change = bool(routes) and bool(asked.reroute_every)
        settings = asked if may_change else adopt_constraint(asked, session.find_manifests(mix))
        prompt_ids, max_new_tokens = _fit_prompt(prompt, body, session, settings)
        shared = SharedSearch()
        for rank in range(body.n):
            with _sampling_errors():
                sequence = SequenceState(
                    index=len(sequences),
                    mix=mix,
                    prompt_ids=prompt_ids,
                    max_new_tokens=max_new_tokens,
                    settings=settings,
                    seed=(seed + len(sequences)) % (MAX_SEED + 1),
                    tokenizer=session.base.tokenizer,
                    loaded=loaded,
                    scores_prompt=body.echo and body.logprobs is not None,
                    routes=list(routes[index : index + 1]),
                    shared_search=shared,
                    beam_rank=rank,
                )
            sequences.append(sequence)
    return sequences


@contextmanager
def _sampling_errors() -> Iterator[None]:
    try:
        yield
    except UsageError as error:  # a setting that does not fit this base
        name = error.message.partition(":")[0]
        raise ApiError(400, f"{error.message}; {error.hint}", name if name in SAMPLING else None) from error


def describe_sequences(session: Session, sequences: Sequence[SequenceState]) -> dict[str, Any]:
    """Returns where the texts of a request come from; `auto` may have chosen another adapter for each prompt."""
    one = sequences[0]
    found = describe_provenance(session, one.mix, one.settings, one.seed, one.loaded)
    found["seeds"] = [sequence.seed for sequence in sequences]
    each = [session.describe_adapters(sequence.mix, sequence.loaded) for sequence in sequences]
    if len(set(map(str, each))) > 1:
        found["adapters"] = [item for index, some in enumerate(each) if some not in each[:index] for item in some]
    if any(sequence.settings != one.settings for sequence in sequences):
        found["settings_by_choice"] = [describe_settings(sequence.settings) for sequence in sequences]
    return found


def cut_prompt(prompt: str | list[int], session: Session) -> str:
    """Returns the end of a prompt that fits into the context, as a text; raises `ApiError`."""
    ids = encode_prompt(prompt, session.base.tokenizer)
    return session.base.tokenizer.decode(ids[-session.base.config.n_positions :])


def _count_wanted(body: CompletionBody, settings: GenerateSettings) -> int:
    """Returns how many tokens are to follow a prompt; a setting is at least 1, and 0 only reads the prompt."""
    return 0 if body.max_tokens == 0 else settings.max_new_tokens


def _fit_prompt(
    prompt: str | list[int], body: CompletionBody, session: Session, settings: GenerateSettings
) -> tuple[list[int], int]:
    """Returns a prompt's token ids and how many tokens may follow."""
    ids, context = encode_prompt(prompt, session.base.tokenizer), session.base.config.n_positions
    wanted = _count_wanted(body, settings)
    asked = wanted if body.max_tokens is not None else 1
    if len(ids) + asked > context and not body.truncate:
        raise ApiError(
            400,
            f"the prompt has {len(ids)} tokens and {asked} are to follow; the context is {context}. "
            "Shorten it, lower max_tokens, or send truncate='left'",
            "prompt",
            "context_length_exceeded",
        )
    return fit_prompt(ids, wanted, context, truncate_left=bool(body.truncate))
