"""Log-probabilities token by token, and what they add up to: which words an adapter knows better than the base."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lora_gpt2.core.errors import UsageError
from lora_gpt2.data.tokenizer import TextStream, Tokenizer
from lora_gpt2.evaluation.matrix import Cell, EvaluationText
from lora_gpt2.evaluation.perplexity import split_prompt
from lora_gpt2.recipe import EvaluateSettings

if TYPE_CHECKING:
    import pandas

WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]+")
NEW, AGAIN, NUMBER, MARK, SPACE = KINDS = (
    "words, first time in the document",
    "words, again",
    "numbers",
    "punctuation",
    "spaces and line ends",
)


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """The log-probability of each token of a text, given what stands before it.

    Args:
        source: the text's label.
        origin: where the document stood: of a list of texts, `FILE.jsonl:3` is the third. Those that cleaning leaves
            nothing of are missing.
        prompt: what was seen and not scored.
        text: what was scored, after cleaning.
        token_ids, tokens: its tokens; one that is part of a character is shown as `bytes:\\xe2\\x82`.
        text_offset: index in `text` of the character with which each token begins, or whose part it is.
        logprobs: natural logarithms, float32 `[tokens]`, by adapter, mix or `base`; the first token follows EOS, or
            the prompt.
    """

    source: str
    origin: str
    prompt: str
    text: str
    token_ids: list[int]
    tokens: list[str]
    text_offset: list[int]
    logprobs: Mapping[str, NDArray[np.float32]]

    def to_json(self) -> dict[str, Any]:
        """Returns a line of `evaluate --tokens`; a log-probability that is not finite is null."""
        keys = ("source", "origin", "prompt", "text", "token_ids", "tokens", "text_offset")
        shown = {name: round_finite(values) for name, values in self.logprobs.items()}
        return {key: getattr(self, key) for key in keys} | {"logprobs": shown}

    def to_pandas(self) -> pandas.DataFrame:
        """Returns a row for each token, with a column for each adapter."""
        import pandas

        columns = {"token_id": self.token_ids, "token": self.tokens, "text_offset": self.text_offset}
        return pandas.DataFrame({**columns, **self.logprobs})

    @cached_property
    def pieces(self) -> list[str]:
        """The text that each token adds: together they are `text`; that of a part of a character may be empty."""
        ends = [*self.text_offset, None][1:]
        return [self.text[start:end] for start, end in zip(self.text_offset, ends, strict=True)]

    @cached_property
    def words(self) -> list[tuple[str, str, slice]]:
        """Kind, text and tokens of each word, number, run of marks, and token of spaces alone, in their order."""
        spans = [match.span() for match in WORD.finditer(self.text)]
        starts, owners = [start for start, _ in spans], list[int | None]()
        for offset, piece in zip(self.text_offset, self.pieces, strict=True):
            begin = offset + len(piece) - len(piece.lstrip())
            is_space = (piece or self.text[offset : offset + 1]).isspace()
            owners.append(None if is_space else bisect_right(starts, begin) - 1)
        found, seen = list[tuple[str, str, slice]](), set[str]()
        first = 0
        for index, owner in enumerate(owners):
            if owner is not None and owner == next(iter(owners[index + 1 : index + 2]), None):
                continue
            text = self.pieces[index] if owner is None else self.text[slice(*spans[owner])]
            found.append((SPACE if owner is None else _find_kind(text, seen), text, slice(first, index + 1)))
            seen.add(text.lower())
            first = index + 1
        return found


def _find_kind(text: str, seen: set[str]) -> str:
    if not any(map(str.isalpha, text)):
        return NUMBER if any(map(str.isdigit, text)) else MARK
    return AGAIN if text.lower() in seen else NEW


def round_finite(values: NDArray[np.floating[Any]], digits: int = 5) -> list[float | None]:
    """Returns numbers for JSON: rounded, None where they are not finite."""
    return [round(value, digits) if math.isfinite(value) else None for value in values.tolist()]


def check_protocol(settings: EvaluateSettings) -> None:
    """Raises `UsageError` where tokens are not scored document by document."""
    if settings.protocol != "document":
        raise UsageError("tokens are scored document by document", "leave evaluate.protocol at 'document'")


def iter_token_scores(
    tokenizer: Tokenizer, texts: Sequence[EvaluationText], cells: Sequence[Cell]
) -> Iterator[TokenScores]:
    """Yields the scores of each document of each text; `cells` are those of all rows, measured with their tokens."""
    for source in texts:
        own = [cell for cell in cells if cell.source == source.label]
        parts = [split_prompt(document) for document in source.documents]
        encoded = tokenizer.encode_batch([text for _, text in parts])
        for index, ((prompt, text), ids) in enumerate(zip(parts, encoded, strict=True)):
            stream = TextStream(tokenizer)
            offsets = [stream.locate(token) for token in ids]
            extra = stream.length - len(text)  # a tokenizer may begin every text with a space
            yield TokenScores(
                source=source.label,
                origin=getattr(source.documents[index], "origin", ""),
                prompt=prompt,
                text=text,
                token_ids=ids,
                tokens=[tokenizer.show(token) for token in ids],
                text_offset=[max(0, offset - extra) for offset in offsets],
                logprobs={cell.adapter: -cell.score.per_token[index] for cell in own},
            )


@dataclass(kw_only=True)
class Gain:
    """What some tokens cost under an adapter and under the base, in nats."""

    count: int = 0
    tokens: int = 0
    base_nats: float = 0.0
    adapter_nats: float = 0.0

    @property
    def nats(self) -> float:
        """By how much the adapter is better."""
        return self.base_nats - self.adapter_nats

    def add(self, tokens: int, base_nats: float, adapter_nats: float) -> None:
        """Adds one word."""
        self.count, self.tokens = self.count + 1, self.tokens + tokens
        self.base_nats, self.adapter_nats = self.base_nats + base_nats, self.adapter_nats + adapter_nats


def sum_gains(documents: Iterable[TokenScores], adapter: str, base: str) -> tuple[dict[str, Gain], dict[str, Gain]]:
    """Returns an adapter's gain over the base by kind of token, and by word, number or run of marks."""
    kinds, words = {kind: Gain() for kind in KINDS}, dict[str, Gain]()
    for document in documents:
        starts = np.array([tokens.start for *_, tokens in document.words], np.int64)
        nats = [-np.add.reduceat(document.logprobs[name].astype(np.float64), starts) for name in (base, adapter)]
        for (kind, text, tokens), *both in zip(document.words, *(each.tolist() for each in nats), strict=True):
            kinds[kind].add(tokens.stop - tokens.start, *both)
            if kind != SPACE:
                words.setdefault(text, Gain()).add(tokens.stop - tokens.start, *both)
    return kinds, words
