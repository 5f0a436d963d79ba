"""Generates continuations of prompts, each with its own mix of adapters, seed and settings, in one engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import LoraGpt2Error, ResourceError, UsageError
from lora_gpt2.core.interrupt import StopRequest
from lora_gpt2.data.ngram_index import NgramIndex
from lora_gpt2.data.tokenizer import Tokenizer
from lora_gpt2.inference.constraint import adopt_constraint
from lora_gpt2.inference.engine import borrow_engine
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.routing import AUTO_MIX, RoutedMix, Router
from lora_gpt2.inference.sequence import SequenceState, SharedSearch, TokenLogprobs
from lora_gpt2.inference.session import Session
from lora_gpt2.inference.slots import VerifiedAdapter
from lora_gpt2.model.base import Base
from lora_gpt2.recipe import GenerateSettings

MAX_NUM_SEQS = 16
BASE_MIX = Mix()
OnText = Callable[[int, str], None]
"""Receives the index of a request and the text that its continuation has grown by."""


@dataclass(frozen=True)
class Request:
    """One prompt and how it is continued.

    Args:
        prompt: the text to continue; "" starts a new one.
        mix: the adapters to continue it with; empty for the base, `AUTO_MIX` for what `router` chooses.
        seed: random seed.
        settings: its own sampling settings; None takes those of the call.
        no_verbatim: texts that the continuation does not copy for longer than the n-grams of their indexes.
        router: chooses the adapter; by default among all of the store.
        route: what a router has chosen already.
        beam_rank: with beams, which of the texts that the search found, 0 for the best; nothing else depends on it.
    """

    prompt: str
    mix: Mix = BASE_MIX
    seed: int = 0
    settings: GenerateSettings | None = None
    no_verbatim: Sequence[NgramIndex] = ()
    router: Router | None = None
    route: RoutedMix | None = None
    beam_rank: int = 0


@dataclass(frozen=True, kw_only=True)
class Output:
    """One continuation.

    Args:
        prompt: the request's prompt.
        text: the continuation, without the prompt.
        adapter: the mix, as people write it.
        tokens: number of generated tokens.
        finish_reason: `stop` (EOS or a stop string), `length`, `interrupted` or `error`.
        seed: the request's seed.
        provenance: base, adapters with the sha256 of their weights, seed and settings.
        logprobs: log-probabilities of the tokens, where they were requested.
        error: the error that finished this continuation; the others of its batch are not affected.
        constraint: which setting constrained it, such as `json_schema`; if it finished for `length`, it is incomplete.
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
    constraint: str = ""

    def __str__(self) -> str:
        """Returns the continuation."""
        return self.text

    def to_json(self) -> dict[str, Any]:
        """Returns the continuation with the keys of `generate --json`."""
        values = {key: value for key, value in vars(self).items() if key not in ("logprobs", "error", "constraint")}
        values |= {"constraint": self.constraint} if self.constraint else {}
        values |= {"logprobs": [vars(item) for item in self.logprobs]} if self.logprobs else {}
        return values | ({"error": self.error.message} if self.error else {})


def encode_prompt(
    tokenizer: Tokenizer, prompt: str, context: int, settings: GenerateSettings, truncate_left: bool
) -> tuple[list[int], int]:
    """Returns a prompt's token ids and how many tokens may follow; an empty prompt becomes EOS, GPT-2's own BOS.

    Raises `UsageError` if the prompt leaves no room, unless `truncate_left` drops its beginning.
    """
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    if len(ids) >= context and not truncate_left:
        raise UsageError(
            f"the prompt has {len(ids)} tokens, which leaves no room for a continuation in a context of {context}",
            "shorten it, or use --truncate left to keep its end",
        )
    return fit_prompt(ids, settings.max_new_tokens, context, truncate_left)


def fit_prompt(ids: list[int], max_new_tokens: int, context: int, truncate_left: bool) -> tuple[list[int], int]:
    """Returns the token ids of a prompt that are kept, and how many may follow.

    With `truncate_left` the prompt loses its beginning until `max_new_tokens` have room, or half of the context is its
    own; else the continuation gets what is left of the context.
    """
    if truncate_left and len(ids) + max_new_tokens > context:
        ids = ids[-min(len(ids), max(context // 2, context - max_new_tokens)) :]
    return ids, min(max_new_tokens, context - len(ids))


def count_dropped(base: Base, prompt: str, settings: GenerateSettings) -> int:
    """Returns how many tokens of a prompt `truncate_left` drops."""
    ids = base.tokenizer.encode(prompt)
    return len(ids) - len(fit_prompt(ids, settings.max_new_tokens, base.config.n_positions, truncate_left=True)[0])


def generate(
    session: Session,
    requests: Sequence[Request],
    settings: GenerateSettings,
    *,
    on_text: OnText | None = None,
    stop: StopRequest | None = None,
    truncate_left: bool = False,
) -> list[Output]:
    """Returns one continuation per request, in their order; see `iter_outputs`.

    Raises the error of the first continuation that failed, after all have finished.
    """
    outputs = generate_all(session, requests, settings, on_text=on_text, stop=stop, truncate_left=truncate_left)
    raise_first_error(outputs)
    return outputs


def generate_all(
    session: Session,
    requests: Sequence[Request],
    settings: GenerateSettings,
    *,
    on_text: OnText | None = None,
    stop: StopRequest | None = None,
    truncate_left: bool = False,
) -> list[Output]:
    """Returns one continuation per request, in their order, failed ones with their `error`; see `iter_outputs`."""
    outputs = dict(iter_outputs(session, requests, settings, on_text=on_text, stop=stop, truncate_left=truncate_left))
    return [outputs[index] for index in range(len(requests))]


def raise_first_error(outputs: Sequence[Output]) -> None:
    """Raises the error of the first output that has one."""
    for output in outputs:
        if output.error is not None:
            raise output.error


def build_writer(
    session: Session, reporter: Reporter, stop: StopRequest, seed: int = 0
) -> Callable[[str, Sequence[str], GenerateSettings], list[str]]:
    """Returns a function from an adapter's name, prompts and settings to continuations, with progress.

    It raises `Interrupted` if a stop was requested. Prompts that are too long lose their beginning.
    """

    def write(adapter: str, prompts: Sequence[str], settings: GenerateSettings) -> list[str]:
        mix = Mix.parse(adapter)
        requests = [Request(prompt, mix, seed + index) for index, prompt in enumerate(prompts)]
        texts = [""] * len(requests)
        with reporter.task(f"generating with {adapter}", len(requests), "texts") as task:
            for index, output in iter_outputs(session, requests, settings, stop=stop, truncate_left=True):
                raise_first_error([output])
                texts[index] = output.text
                task.advance(1)
        stop.raise_if_asked("nothing is kept of an unfinished measurement")
        return texts

    return write


def iter_outputs(
    session: Session,
    requests: Sequence[Request],
    settings: GenerateSettings,
    *,
    on_text: OnText | None = None,
    stop: StopRequest | None = None,
    truncate_left: bool = False,
) -> Iterator[tuple[int, Output]]:
    """Yields each request's index and continuation as it finishes; `on_text` receives text as it is generated.

    For the other arguments and the errors see `iter_pieces`.
    """
    for index, text, output in iter_pieces(session, requests, settings, stop=stop, truncate_left=truncate_left):
        if text and on_text is not None:
            on_text(index, text)
        if output is not None:
            yield index, output


def iter_pieces(
    session: Session,
    requests: Sequence[Request],
    settings: GenerateSettings,
    *,
    stop: StopRequest | None = None,
    truncate_left: bool = False,
) -> Iterator[tuple[int, str, Output | None]]:
    """Yields a request's index, the text that its continuation has grown by, and at its end the continuation.

    Args:
        session: base and adapters.
        requests: what to continue.
        settings: for requests without their own.
        stop: if a stop is requested, running continuations finish as they are, and waiting ones empty, as
            `interrupted`.
        truncate_left: drop the beginning of prompts that are too long, instead of raising.

    Raises:
        UsageError: a prompt does not fit.
        NotFoundError, IntegrityError: an adapter cannot be used.
    """
    sequences = _build_sequences(session, requests, settings, truncate_left)
    provenance = [
        describe_provenance(session, s.mix, s.settings, s.seed, s.loaded) | describe_options(request, truncate_left)
        for request, s in zip(requests, sequences, strict=True)
    ]
    if settings.merge_into_base:
        session = _merge_mix(session, sequences)
    max_tokens = max((len(s.prompt_ids) + s.max_new_tokens for s in sequences), default=1)
    num_seqs = max(1, min(len(sequences), MAX_NUM_SEQS))
    with borrow_engine(session, num_seqs, max_tokens) as engine:
        for sequence in sequences:
            engine.submit(sequence)
        while engine.is_busy:
            outputs = engine.step()
            if stop is not None and stop.signal_number:
                held = dict(engine.stop_all("interrupted"))
                outputs = [(sequence, text + held.pop(sequence, "")) for sequence, text in outputs]
                outputs += held.items()
            for sequence, text in outputs:
                request, origin = requests[sequence.index], provenance[sequence.index]
                yield sequence.index, text, _to_output(request, sequence, origin) if sequence.finish_reason else None


def check_num_texts(count: int, settings: GenerateSettings) -> None:
    """Raises `UsageError` if a beam search is asked for more texts than it has beams."""
    if 1 < settings.num_beams < count:
        raise UsageError(
            f"{count} texts of {settings.num_beams} beams", "a beam search gives as many texts as beams at most"
        )


def _build_sequences(
    session: Session, requests: Sequence[Request], settings: GenerateSettings, truncate_left: bool
) -> list[SequenceState]:
    tokenizer, context = session.base.tokenizer, session.base.config.n_positions
    sequences, router, shared = [], Router(session), dict[tuple[str, Mix, int], SharedSearch]()
    for index, request in enumerate(requests):
        own = request.settings or settings
        check_num_texts(request.beam_rank + 1, own)
        if request.no_verbatim and own.num_beams > 1:
            raise UsageError(
                "--no-verbatim does not work with beam search", "leave --no-verbatim or generate.num_beams out"
            )
        prompt_ids, max_new_tokens = encode_prompt(tokenizer, request.prompt, context, own, truncate_left)
        route = request.route
        if route is None and request.mix == AUTO_MIX:
            route = (request.router or router).route(request.prompt)
        mix = session.resolve(request.mix) if route is None else route.mix
        may_change = route is not None and bool(own.reroute_every)
        sequences.append(
            SequenceState(
                index=index,
                mix=mix,
                prompt_ids=prompt_ids,
                max_new_tokens=max_new_tokens,
                settings=own if may_change else adopt_constraint(own, session.find_manifests(mix)),
                seed=request.seed,
                tokenizer=tokenizer,
                no_verbatim=request.no_verbatim,
                routes=[] if route is None else [route],
                shared_search=shared.setdefault((request.prompt, mix, id(own)), SharedSearch()),
                beam_rank=request.beam_rank,
            )
        )
    for reference in dict.fromkeys(reference for sequence in sequences for reference, _ in sequence.mix):
        session.load([reference])  # all are verified before any is used; where they are many, they are loaded in turn
    return sequences


def _merge_mix(session: Session, sequences: Sequence[SequenceState]) -> Session:
    """Returns a session whose base has the sequences' one mix merged into it, and takes the mix from the sequences."""
    if len({sequence.mix for sequence in sequences}) > 1:
        raise UsageError(
            "generate.merge_into_base is for one adapter or mix at a time", "leave it out to compare several"
        )
    merged = session.merge_into_base(sequences[0].mix) if sequences and sequences[0].mix else session
    for sequence in sequences:
        sequence.mix = Mix()
    return merged


def describe_provenance(
    session: Session,
    mix: Mix,
    settings: GenerateSettings,
    seed: int,
    loaded: Mapping[str, VerifiedAdapter] = MappingProxyType({}),
) -> dict[str, Any]:
    """Returns where a text comes from: the base, the adapters by the sha256 of their weights, seed and settings."""
    base = session.base
    return {
        "base": base.name,
        "base_fingerprint": base.fingerprint,
        "dtype": "float16" if base.model.prepacked_head is not None else base.runtime.dtype_name,
        "adapters": session.describe_adapters(mix, loaded),
        "seed": seed,
        "settings": describe_settings(settings),
    }


def describe_options(request: Request, truncate_left: bool) -> dict[str, Any]:
    """Returns what else a text depends on, where it is used, for its provenance."""
    longest = {"no_verbatim": max(index.size for index in request.no_verbatim) + 1} if request.no_verbatim else {}
    return longest | ({"truncate_left": True} if truncate_left else {})


def describe_settings(settings: GenerateSettings) -> dict[str, Any]:
    """Returns settings for a text's provenance, without the watermark's key."""
    return settings.model_dump(mode="json", exclude={"watermark_key"})


def describe_routes(sequence: SequenceState) -> dict[str, Any]:
    """Returns what `auto` chose, and how sure it was, for a text's provenance; empty for a mix that was named."""
    return {"auto": [route.to_json() for route in sequence.routes]} if sequence.routes else {}


def _to_output(request: Request, sequence: SequenceState, provenance: dict[str, Any]) -> Output:
    return Output(
        prompt=request.prompt,
        text=sequence.text,
        adapter=sequence.routes[-1].choice.adapter if sequence.routes else str(Mix(request.mix)),
        tokens=len(sequence.new_ids),
        finish_reason=sequence.finish_reason,
        seed=request.seed,
        provenance=provenance | describe_routes(sequence),
        logprobs=tuple(sequence.logprobs),
        error=_wrap_error(sequence.error),
        constraint=sequence.settings.constraint,
    )


def _wrap_error(error: Exception | None) -> LoraGpt2Error | None:
    if error is None or isinstance(error, LoraGpt2Error):
        return error
    wrapped = ResourceError(f"the continuation failed: {error}", "change its settings, or generate fewer at once")
    wrapped.__cause__ = error
    return wrapped
