"""Constrained decoding: which tokens may follow, such that the whole continuation is what was asked for.

That is one of some choices, a match of a regular expression, what a grammar derives, or JSON that a schema accepts.
The library is llguidance: exact (it refuses a keyword of a schema that it does not implement), and a mask takes tens of
microseconds. JSON is written on one line, as Python's `json.dumps` does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from pydantic import ValidationError
from torch import Tensor

from lora_gpt2.core.errors import UsageError
from lora_gpt2.data.tokenizer import EOS, Tokenizer
from lora_gpt2.recipe import CONSTRAINTS, GenerateSettings
from lora_gpt2.store.manifest import Manifest

JSON_OPTIONS: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
WORD_BITS = 32
MOST_STATES = 2**16  # of the lexer of one continuation, at 0.7 kB
MOST_REFERENCES = 256
"""References of a schema and rules of a grammar: the library's stack ends with the process at a chain of 1,500."""


class Constraint:
    """What one continuation may still become; `copy` it for another one."""

    def __init__(self, matcher: Any, tokenizer: Tokenizer) -> None:
        self._matcher, self._tokenizer = matcher, tokenizer

    def copy(self) -> Constraint:
        """Returns one in the same state."""
        return Constraint(self._matcher.deep_copy(), self._tokenizer)

    def accept(self, token: int) -> None:
        """Takes the next token, which must be an allowed one, or one that ends the text."""
        self._matcher.consume_token(self._tokenizer.eos_id if self.ends_with(token) else token)
        self._check()

    def ends_with(self, token: int) -> bool:
        """True if a token that would be the next one ends the text; one that stops, such as a line end, may be text."""
        return token in self._tokenizer.stop_ids and bool(self._matcher.is_accepting())

    @property
    def is_finished(self) -> bool:
        """True if nothing but the end may follow."""
        return bool(self._matcher.is_stopped())

    def find_words(self) -> Int[Tensor, " words"]:
        """Returns a bit for each token that may follow, 32 of them in an int32, the lowest first."""
        words = np.zeros(-(-self._tokenizer.vocab_size // WORD_BITS), dtype=np.int32)
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._check()
        word, bit = divmod(self._tokenizer.eos_id, WORD_BITS)
        if words[word] >> bit & 1:
            for end in self._tokenizer.stop_ids:
                words[end // WORD_BITS] |= np.int32(np.uint32(1 << end % WORD_BITS).view(np.int32))
        return torch.from_numpy(words)

    def find_allowed(self) -> Bool[Tensor, " vocab"]:
        """Returns which tokens may follow; at least one may, EOS where the continuation is complete."""
        return unpack_words(self.find_words(), self._tokenizer.vocab_size)

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = _first_line(self._matcher.get_error())
            raise UsageError(f"the constraint cannot go on: {reason}", "make it simpler")


def ends_text(token: int, tokenizer: Tokenizer, constraint: Constraint | None) -> bool:
    """True if a token that would be the next one ends the text."""
    return token in tokenizer.stop_ids if constraint is None else constraint.ends_with(token)


def unpack_words(words: Int[Tensor, "*batch words"], vocab_size: int) -> Bool[Tensor, "*batch vocab"]:
    """Returns the bits of `Constraint.find_words` as truth values, on the device of the words."""
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & 1).flatten(-2)[..., :vocab_size].bool()


def start_constraint(settings: GenerateSettings, tokenizer: Tokenizer) -> Constraint | None:
    """Returns the constraint of some settings at the beginning of a continuation, None if they have none.

    Copies of a matcher share what its lexer has seen, up to a limit; so each continuation gets a matcher of its own, in
    a few milliseconds, and whether it can go on depends on no other. Raises `UsageError` if it cannot be compiled.
    """
    if not (kind := settings.constraint):
        return None
    grammar = _compile(tokenizer, kind, json.dumps(getattr(settings, kind)))
    return Constraint(_build_matcher(tokenizer, grammar), tokenizer)


def adopt_constraint(settings: GenerateSettings, manifests: Sequence[Manifest | None]) -> GenerateSettings:
    """Returns settings with the constraint of the recipe that the only adapter was trained with, where they have none.

    `manifests` are those of a mix; see `Session.find_manifests`. Raises `UsageError` if the recipe's cannot be used.
    """
    only = manifests[0] if len(manifests) == 1 else None
    own = only.recipe.get("generate", {}) if only is not None else {}
    if settings.constraint or not settings.constrained or not isinstance(own, Mapping):
        return settings
    found = {name: own[name] for name in CONSTRAINTS if own.get(name) not in (None, "", [], ())}
    if not found or own.get("constrained") is False:
        return settings
    try:
        return GenerateSettings.model_validate({**settings.model_dump(), **found})
    except ValidationError as error:
        raise UsageError(
            f"the adapter's own constraint cannot be used: generate.{', '.join(found)} of its recipe",
            "leave it out with --set generate.constrained=false",
        ) from error


@lru_cache(maxsize=64)
def _compile(tokenizer: Tokenizer, kind: str, content: str) -> str:
    """Returns a grammar as the library has it; raises `UsageError` if it cannot be used."""
    from llguidance import LLMatcher, grammar_from

    value = json.loads(content)
    if max(content.count('"$ref"'), value.count(":") if kind == "grammar" else 0) > MOST_REFERENCES:
        raise UsageError(f"generate.{kind} has more than {MOST_REFERENCES} references or rules", "make it smaller")
    try:
        if kind == "json_schema":
            grammar = LLMatcher.grammar_from_json_schema(value, defaults=JSON_OPTIONS)
        else:
            grammar = grammar_from(kind, content if kind == "choice" else value)  # type: ignore[arg-type]
        problem = _build_matcher(tokenizer, grammar).get_error()
    except ValueError as error:
        problem = str(error)
    if problem:
        hint = "see https://github.com/guidance-ai/llguidance for what is supported"
        raise UsageError(f"generate.{kind} cannot be used: {_first_line(problem)}", hint)
    return grammar


def _build_matcher(tokenizer: Tokenizer, grammar: str) -> Any:
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(max_lexer_states=MOST_STATES)
    return LLMatcher(_wrap_tokenizer(tokenizer), grammar, log_level=0, limits=limits)


@lru_cache(maxsize=4)
def _wrap_tokenizer(tokenizer: Tokenizer) -> Any:
    from llguidance import LLTokenizer, TokenizerWrapper

    pieces = list(tokenizer.token_bytes)
    special = sorted({tokenizer.eos_id, *(tokenizer.stop_ids & tokenizer.backend.get_added_tokens_decoder().keys())})
    pieces[tokenizer.eos_id] = EOS.encode()  # the other one that stops, if there is one, has its text already

    class Vocabulary:
        """A vocabulary as llguidance wants it."""

        eos_token_id = tokenizer.eos_id
        bos_token_id = None
        special_token_ids = tuple(special)
        tokens = tuple(pieces)

        def __call__(self, text: str) -> list[int]:
            """Returns the token ids of a text."""
            return tokenizer.encode(text)

    return LLTokenizer(TokenizerWrapper(Vocabulary()))


def _first_line(problem: str) -> str:
    """Returns what a message of the library says, without the excerpts below it."""
    lines = [line.strip() for line in problem.splitlines() if line.strip()]
    wanted = next((line for line in lines if line.startswith("error:")), lines[0] if lines else "")
    return wanted.removeprefix("error:").strip()[:300]
