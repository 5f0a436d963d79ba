"""Continues prompts, each with its own mix of adapters, seed and settings, through one engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict, Unpack

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import LoraGpt2Error, ResourceError, UsageError
from lora_gpt2.core.interrupt import StopRequest
from lora_gpt2.data.ngram_index import NgramIndex
from lora_gpt2.data.tokenizer import Tokenizer
from lora_gpt2.inference.engine import Engine, Row, TokenLogprobs
from lora_gpt2.inference.session import Mix, Session, describe_mix, parse_mix
from lora_gpt2.model.base import Base
from lora_gpt2.recipe import GenerateSettings

MAX_ROWS = 16
OnText = Callable[[int, str], None]


@dataclass(frozen=True)
class Request:
    """One prompt, the mix that continues it (empty: the base), and the seed of its random choices."""

    prompt: str
    mix: Mix = ()
    seed: int = 0
    settings: GenerateSettings | None = None
    """Its own settings; without them, those of the call."""
    not_to_copy: Sequence[NgramIndex] = ()
    """Texts of which it has no longer run than the size of their indexes, but for what the prompt has of it."""


@dataclass(frozen=True)
class Output:
    """One continuation; `finish_reason` is `stop` (EOS or a stop text), `length`, `interrupted` or `error`.

    `error` says why a continuation could not go on; the others of its batch are not touched.
    """

    prompt: str
    text: str
    adapter: str
    tokens: int
    finish_reason: str
    seed: int
    provenance: dict[str, Any] = field(default_factory=dict)
    logprobs: tuple[TokenLogprobs, ...] = ()
    error: LoraGpt2Error | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the continuation with the key names of `generate --json`; log-probabilities where they were asked."""
        values = {key: value for key, value in vars(self).items() if key not in ("logprobs", "error")}
        values |= {"logprobs": [vars(item) for item in self.logprobs]} if self.logprobs else {}
        return values | ({"error": self.error.message} if self.error else {})


def encode_prompt(
    tokenizer: Tokenizer, prompt: str, context: int, settings: GenerateSettings, truncate_left: bool
) -> tuple[list[int], int]:
    """Returns a prompt's token ids and how many tokens may follow; an empty prompt is EOS, GPT-2's own beginning.

    Raises `UsageError` if the prompt leaves no room, unless `truncate_left` lets its beginning go.
    """
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    if len(ids) >= context:
        if not truncate_left:
            raise UsageError(
                f"the prompt has {len(ids)} tokens, the base has room for {context} with the continuation",
                "shorten it, or use --truncate left to keep its end",
            )
        ids = ids[-keep_tokens(context, settings) :]
    return ids, min(settings.max_new_tokens, context - len(ids))


def keep_tokens(context: int, settings: GenerateSettings) -> int:
    """Returns how many tokens of a prompt that is too long are kept: what the continuation leaves, at least half."""
    return max(context // 2, context - settings.max_new_tokens)


def count_dropped(base: Base, prompt: str, settings: GenerateSettings) -> int:
    """Returns how many tokens of a prompt `truncate_left` leaves out."""
    length, context = len(base.tokenizer.encode(prompt)), base.config.context
    return length - keep_tokens(context, settings) if length >= context else 0


class Options(TypedDict, total=False):
    """What `iter_outputs` takes besides."""

    on_text: OnText | None
    stop: StopRequest | None
    truncate_left: bool


def generate(
    session: Session, requests: Sequence[Request], settings: GenerateSettings, **options: Unpack[Options]
) -> list[Output]:
    """Returns one continuation per request, in their order; see `iter_outputs`.

    Raises the first continuation's error, if one failed, when all have ended.
    """
    outputs = generate_all(session, requests, settings, **options)
    raise_first_error(outputs)
    return outputs


def generate_all(
    session: Session, requests: Sequence[Request], settings: GenerateSettings, **options: Unpack[Options]
) -> list[Output]:
    """Returns one continuation per request, in their order, failed ones with their `error`; see `iter_outputs`."""
    found = dict(iter_outputs(session, requests, settings, **options))
    return [found[index] for index in range(len(requests))]


def raise_first_error(outputs: Sequence[Output]) -> None:
    """Raises the error of the first output that has one."""
    for output in outputs:
        if output.error is not None:
            raise output.error


def build_writer(
    session: Session, reporter: Reporter, stop: StopRequest, seed: int = 0
) -> Callable[[str, Sequence[str], GenerateSettings], list[str]]:
    """Returns a function from an adapter's name, prompts and settings to continuations, with progress.

    It raises `Interrupted` where `stop` was asked for. A prompt that is too long loses its beginning.
    """

    def write(adapter: str, prompts: Sequence[str], settings: GenerateSettings) -> list[str]:
        requests = [
            Request(prompt, parse_mix(adapter.split("+")), seed + place) for place, prompt in enumerate(prompts)
        ]
        texts = [""] * len(requests)
        with reporter.task(f"writing with {adapter}", len(requests), "texts") as task:
            for place, output in iter_outputs(session, requests, settings, stop=stop, truncate_left=True):
                raise_first_error([output])
                texts[place] = output.text
                task.advance(1)
        stop.raise_if_asked("nothing is kept of an unfinished measurement")
        return texts

    return write


def iter_outputs(
    session: Session,
    requests: Sequence[Request],
    settings: GenerateSettings,
    on_text: OnText | None = None,
    stop: StopRequest | None = None,
    truncate_left: bool = False,
) -> Iterator[tuple[int, Output]]:
    """Yields each request's place and continuation as it ends; `on_text(place, piece)` gets the text as it grows.

    When `stop` is asked for, what grows ends as it is, and what has not begun ends empty, as `interrupted`. One that
    fails ends with its `error`, alone.

    Raises:
        UsageError: a prompt does not fit.
        NotFoundError, IntegrityError: an adapter cannot be used.
    """
    rows = _build_rows(session, requests, settings, truncate_left)
    origins = [describe_provenance(session, row) for row in rows]
    if settings.merge_into_base:
        session = _fold(session, rows)
    size = max((len(row.prompt_ids) + row.budget for row in rows), default=1)
    engine = Engine(session, max(1, min(len(rows), MAX_ROWS)), size)
    for row in rows:
        engine.submit(row)
    while engine.is_busy:
        grown = engine.step()
        for row, shown in grown:
            if shown and on_text is not None:
                on_text(row.index, shown)
        ended = [row for row, _ in grown if row.finish_reason]
        if stop is not None and stop.signal_number:
            ended = engine.stop_all("interrupted") + ended
        for row in ended:
            yield row.index, _to_output(requests[row.index], row, origins[row.index])


def _build_rows(
    session: Session, requests: Sequence[Request], settings: GenerateSettings, truncate_left: bool
) -> list[Row]:
    tokenizer, context = session.base.tokenizer, session.base.config.context
    rows = []
    for index, request in enumerate(requests):
        own = request.settings or settings
        if request.not_to_copy and own.num_beams > 1:
            raise UsageError("beams are not kept from copying", "leave --no-verbatim or generate.num_beams out")
        ids, budget = encode_prompt(tokenizer, request.prompt, context, own, truncate_left)
        row = Row(index, session.resolve(request.mix), ids, budget, own, request.seed, tokenizer)
        row.not_to_copy = request.not_to_copy
        rows.append(row)
    for name in dict.fromkeys(name for row in rows for name, _ in row.mix):
        session.open([name])  # all are checked before any is used; where they are many, they are read again in turn
    return rows


def _fold(session: Session, rows: Sequence[Row]) -> Session:
    """Returns a session whose base has the rows' one mix in its weights, and leaves the rows without one."""
    if len({row.mix for row in rows}) > 1:
        raise UsageError(
            "generate.merge_into_base is for one adapter or mix at a time", "leave it out to compare several"
        )
    folded = session.fold(rows[0].mix) if rows and rows[0].mix else session
    for row in rows:
        row.mix = ()
    return folded


def describe_provenance(session: Session, row: Row) -> dict[str, Any]:
    """Returns where a text comes from: the base, the adapters by the sha256 of their weights, seed and settings."""
    base = session.base
    return {
        "base": base.name,
        "base_fingerprint": base.fingerprint,
        "adapters": session.describe_origin(row.mix, row.loaded),
        "seed": row.seed,
        "settings": row.settings.model_dump(mode="json", exclude={"watermark_key"}),
    }


def _to_output(request: Request, row: Row, origin: dict[str, Any]) -> Output:
    return Output(
        request.prompt,
        row.text,
        describe_mix(request.mix),
        len(row.new_ids),
        row.finish_reason,
        request.seed,
        origin,
        tuple(row.logprobs),
        _to_ours(row.error),
    )


def _to_ours(error: Exception | None) -> LoraGpt2Error | None:
    if error is None or isinstance(error, LoraGpt2Error):
        return error
    found = ResourceError(f"the continuation failed: {error}", "change its settings, or use fewer rows at once")
    found.__cause__ = error
    return found
