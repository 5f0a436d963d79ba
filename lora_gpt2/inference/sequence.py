"""One sequence while it is generated: its tokens, its text, its stop strings, and the reason why it finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from lora_gpt2.core.errors import LoraGpt2Error, UsageError
from lora_gpt2.data.ngram_index import NgramIndex
from lora_gpt2.data.tokenizer import TextStream, Tokenizer
from lora_gpt2.inference.constraint import ends_text, start_constraint
from lora_gpt2.inference.device_sampling import can_choose
from lora_gpt2.inference.drafting import Drafter
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.sampling import SamplingParams, adjust_row, draw_uniform
from lora_gpt2.inference.session import check_logits
from lora_gpt2.inference.slots import VerifiedAdapter
from lora_gpt2.recipe import GenerateSettings

if TYPE_CHECKING:
    from lora_gpt2.inference.beam import BeamSearch
    from lora_gpt2.inference.routing import RoutedMix


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """A token, its log-probability before sampling, and those of the most likely tokens."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]

    @classmethod
    def from_logits(cls, logits: Tensor, token: int, count: int, vocab_size: int) -> TokenLogprobs:
        """Returns the log-probabilities of a token and of the `count` most likely ones, from logits `[rows]`.

        A head may have more rows than there are tokens, which take their part of the probability, as in `evaluate`.
        """
        logprobs = logits.float().log_softmax(0)[:vocab_size]
        values, ids = logprobs.topk(count)
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return cls(token=token, logprob=float(logprobs[token]), top=top)


class StopStringMatcher:
    """Passes text on until one of the stop strings appears; a possible beginning of one is held back."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self.stop_strings, self.pending, self.is_matched = stop_strings, "", False

    def push(self, text: str) -> str:
        """Returns the text that is certainly not part of a stop string."""
        self.pending += text
        offsets = [offset for stop in self.stop_strings if (offset := self.pending.find(stop)) >= 0]
        if offsets:
            self.is_matched = True
            passed, self.pending = self.pending[: min(offsets)], ""
            return passed
        held = max((self._count_begun(stop) for stop in self.stop_strings), default=0)
        split = len(self.pending) - held
        passed, self.pending = self.pending[:split], self.pending[split:]
        return passed

    def finish(self) -> str:
        """Returns the text that was held back, which did not become a stop string."""
        rest, self.pending = self.pending, ""
        return rest

    def _count_begun(self, stop: str) -> int:
        lengths = range(min(len(stop) - 1, len(self.pending)), 0, -1)
        return next((length for length in lengths if self.pending.endswith(stop[:length])), 0)


@dataclass(eq=False)
class SharedSearch:
    """One beam search whose texts several sequences take; the engine opens it for the first of them."""

    search: BeamSearch | None = None


@dataclass(kw_only=True, eq=False)
class SequenceState:
    """A sequence that is being generated.

    Args:
        index: the caller's number for it.
        mix: the adapters that it is generated with, resolved.
        prompt_ids: token ids of the prompt; at least one.
        max_new_tokens: the most tokens that may follow; 0 only reads the prompt.
        settings: sampling settings.
        seed: of the sequence's own random numbers.
        tokenizer: of the base.
        loaded: adapters of the mix that were fetched beforehand, so that admission waits for no disk.
        scores_prompt: also compute the log-probabilities of the prompt's tokens, except for the first.
        no_verbatim: texts that are not copied for longer than their index's n-grams.
        routes: what `auto` chose, so far; empty for a mix that was named.
        shared_search: with beams, the search, which sequences of the same prompt, mix and settings may have in common.
        beam_rank: which of its texts this sequence takes, 0 for the best.

    `constraint` is what the continuation may become, None for anything. One that cannot be compiled is a `UsageError`.
    `finish_reason` is empty while the sequence is running; then `stop`, `length`, `error`, or what `Engine.stop` gave.
    """

    index: int
    mix: Mix
    prompt_ids: list[int]
    max_new_tokens: int
    settings: GenerateSettings
    seed: int
    tokenizer: Tokenizer
    loaded: Mapping[str, VerifiedAdapter] = field(default_factory=dict)
    scores_prompt: bool = False
    no_verbatim: Sequence[NgramIndex] = ()
    routes: list[RoutedMix] = field(default_factory=list)
    shared_search: SharedSearch = field(default_factory=SharedSearch)
    beam_rank: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    error: Exception | None = None
    new_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stream, self._matcher = TextStream(self.tokenizer), StopStringMatcher(self.settings.stop)
        self.params = SamplingParams.from_settings(self.settings)
        if unknown := [token for token in self.params.logit_bias if not 0 <= token < self.tokenizer.vocab_size]:
            raise UsageError(
                f"logit_bias: there is no token {unknown[0]}", f"this base's are below {self.tokenizer.vocab_size}"
            )
        self.constraint = start_constraint(self.settings, self.tokenizer)
        self.drafter: Drafter | None = None  # comes with the adapters' slots

    @property
    def ids(self) -> list[int]:
        """The prompt's tokens and the generated ones."""
        return self.prompt_ids + self.new_ids

    @property
    def searches(self) -> bool:
        """True if it takes its text from a beam search."""
        return self.settings.num_beams > 1 and self.max_new_tokens > 0

    @property
    def is_due(self) -> bool:
        """True if the adapter is to be chosen again before the next token."""
        every, count = self.settings.reroute_every, len(self.new_ids)
        return bool(self.routes and every and count and count % every == 0 and self.routes[-1].num_tokens < count)

    def draft(self, most: int) -> list[int]:
        """Returns up to `most` tokens that may follow, fewer than are wanted."""
        room = min(most, self.max_new_tokens - len(self.new_ids) - 1)
        if self.drafter is None or room < 1 or (self.routes and self.settings.reroute_every):
            return []
        return self.drafter.draft(self.ids, room)

    @property
    def num_cached(self) -> int:
        """Number of tokens in the KV cache: all but the newest."""
        return len(self.prompt_ids) + max(0, len(self.new_ids) - 1)

    @property
    def is_plain(self) -> bool:
        """True if the next token can be chosen on the device: no logits are needed here."""
        return can_choose(self.params) and not self.no_verbatim and not self.settings.logprobs

    def draw_uniform(self, ahead: int = 0) -> float:
        """Returns the random number of the next token, or of the one that comes `ahead` tokens after it."""
        return draw_uniform(self.seed, len(self.new_ids) + ahead)

    def adjust_logits(self, logits: Tensor) -> Tensor:
        """Returns the logits `[vocab]` of the next token after everything that looks at the sequence's own tokens.

        Raises `CorruptError` if the logits are not finite.
        """
        check_logits(logits, self.mix)
        ids = self.ids
        banned = [token for index in self.no_verbatim for token in index.find_followers(ids)]
        allowed = self.constraint.find_allowed() if self.constraint else None
        num_prompt_tokens = len(self.prompt_ids)
        return adjust_row(logits, ids, self.params, num_prompt_tokens=num_prompt_tokens, banned=banned, allowed=allowed)

    def find_words(self) -> Tensor | None:
        """Returns which tokens may follow, as `Constraint.find_words` does; None for all, or if that fails."""
        try:
            return self.constraint.find_words() if self.constraint else None
        except LoraGpt2Error as error:
            self.fail(error)
            return None

    def accept(self, token: int, logits: Tensor | None) -> str:
        """Takes the next token, chosen from these logits `[rows]` (None if it `is_plain`); returns its text."""
        if ends_text(token, self.tokenizer, self.constraint):
            return self.finish("stop")
        if logits is not None and self.settings.logprobs:
            count, vocab_size = self.settings.logprobs, self.tokenizer.vocab_size
            self.logprobs.append(TokenLogprobs.from_logits(logits, token, count, vocab_size))
        text = self.append(token)
        if self.constraint is not None and not self.finish_reason:
            self.constraint.accept(token)
            text += self.finish("stop") if self.constraint.is_finished else ""
        is_full = not self.finish_reason and len(self.new_ids) >= self.max_new_tokens
        return text + (self.finish("length") if is_full else "")

    def append(self, token: int) -> str:
        """Appends a token; returns the text that it completes. A stop string finishes the sequence."""
        self.new_ids.append(token)
        return self._emit(self._matcher.push(self._stream.push(token)))

    def finish(self, reason: str) -> str:
        """Finishes the sequence; returns the text that was held back."""
        text = "" if self._matcher.is_matched else self._emit(self._matcher.push(self._stream.finish()))
        self.finish_reason = self.finish_reason or reason
        return text + ("" if self._matcher.is_matched else self._emit(self._matcher.finish()))

    def fail(self, error: Exception) -> str:
        """Finishes the sequence with an error; returns no text."""
        self.error, self.finish_reason = error, "error"
        return ""

    def _emit(self, text: str) -> str:
        self.text += text
        if self._matcher.is_matched:
            self.finish_reason = "stop"
        return text
