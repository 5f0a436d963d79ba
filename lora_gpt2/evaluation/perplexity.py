"""Perplexity: total negative log-likelihood over all scored tokens, divided by their number; each token scored once.

Two protocols. `document`: every document on its own, its first token predicted from EOS as in training; windows reach
back as far as they can, and with stride = window this is lm-evaluation-harness's rolling log-likelihood. `stream`: all
text as one sequence, windows at multiples of the stride, the first token of the text (and, with stride = window, of
every window) not scored: the loop of Hugging Face's documentation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lora_gpt2.core.errors import DataError, UsageError
from lora_gpt2.model.base import Base
from lora_gpt2.model.loss import measure_nll
from lora_gpt2.model.probe import AdaptersForRows
from lora_gpt2.recipe import EvaluateSettings


@dataclass(frozen=True)
class Window:
    """Inputs `sequence[begin:end]` predict `sequence[begin + 1 : end + 1]`; targets from `first` on are scored."""

    begin: int
    end: int
    first: int


@dataclass(frozen=True)
class Score:
    """What was measured: nats over `tokens` scored tokens, and the size of the original text."""

    nll_nats: float
    tokens: int
    words: int
    bytes: int

    @property
    def nll_nats_per_token(self) -> float:
        """Mean negative log-likelihood of a token."""
        return self.nll_nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Exp of the mean per token."""
        return to_perplexity(self.nll_nats_per_token)

    @property
    def word_perplexity(self) -> float:
        """Exp of the total per whitespace-separated word of the original text."""
        return to_perplexity(self.nll_nats / self.words) if self.words else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Total in bits per UTF-8 byte of the original text; comparable between tokenizers."""
        return self.nll_nats / math.log(2) / self.bytes


def to_perplexity(value: float) -> float:
    """Returns exp of a mean in nats; infinity where no float holds it."""
    return math.exp(value) if value < 700 else math.inf


def iter_document_windows(length: int, window: int, stride: int) -> Iterator[Window]:
    """Yields the windows of a document of `length` tokens that follow an EOS (so targets are 1 … length)."""
    done = 0
    while done < length:
        end = min(done + (stride if done else window), length)
        yield Window(max(0, end - window), end, done + 1)
        done = end


def iter_stream_windows(length: int, window: int, stride: int) -> Iterator[Window]:
    """Yields the windows of one sequence of `length` tokens, as Hugging Face's documentation cuts them."""
    done = 0
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        if end - begin > 1:
            yield Window(begin, end - 1, max(begin + 1, done))
        done = end
        if end == length:
            break


def choose_window(base: Base, settings: EvaluateSettings) -> tuple[int, int]:
    """Returns window and stride in tokens; raises `UsageError` if they do not fit the base or each other."""
    context = base.config.context
    window = settings.window or context
    stride = settings.stride or max(1, window // 2)
    if window > context or stride > window or window < 2:
        raise UsageError(
            f"window {window} and stride {stride} do not fit: 2 <= window <= {context} (the context), stride <= window",
            "use --set evaluate.window=N --set evaluate.stride=M",
        )
    return window, stride


def measure_perplexity(
    base: Base,
    documents: Sequence[str],
    settings: EvaluateSettings,
    adapters_for: AdaptersForRows = lambda rows: None,
) -> Score:
    """Returns the score of documents; `adapters_for(rows)` gives the adapters of a batch of that many rows.

    Raises:
        DataError: there is nothing to score.
        UsageError: see `choose_window`.
    """
    window, stride = choose_window(base, settings)
    texts = list(documents) if settings.protocol == "document" else ["\n\n".join(documents)]
    encoded = base.tokenizer.encode_batch(texts)
    if settings.protocol == "document":
        sequences = [[base.tokenizer.eos_id, *ids] for ids in encoded if ids]
        spans = [list(iter_document_windows(len(ids) - 1, window, stride)) for ids in sequences]
    else:
        sequences = encoded
        spans = [list(iter_stream_windows(len(ids), window, stride)) for ids in sequences]
    jobs = [(sequence, span) for sequence, group in zip(sequences, spans, strict=True) for span in group]
    if not jobs:
        raise DataError("there is no text to score", "give a file with at least one token")
    jobs.sort(key=lambda job: job[1].begin - job[1].end)
    rows = max(1, settings.batch_tokens // window)
    total, tokens = 0.0, 0
    for start in range(0, len(jobs), rows):
        nll, count = _score_batch(base, jobs[start : start + rows], adapters_for)
        total += nll
        tokens += count
    return Score(total, tokens, sum(len(text.split()) for text in texts), sum(len(text.encode()) for text in texts))


@torch.inference_mode()
def _score_batch(
    base: Base, jobs: Sequence[tuple[list[int], Window]], adapters_for: AdaptersForRows
) -> tuple[float, int]:
    """Returns total NLL and number of scored tokens of a batch; the head runs on scored positions only."""
    longest = max(span.end - span.begin for _, span in jobs)
    tokens = torch.zeros(len(jobs), longest + 1, dtype=torch.long)
    scored = torch.zeros(len(jobs), longest, dtype=torch.bool)
    for row, (sequence, span) in enumerate(jobs):
        piece = sequence[span.begin : span.end + 1]
        tokens[row, : len(piece)] = torch.tensor(piece)
        scored[row, span.first - span.begin - 1 : span.end - span.begin] = True
    tokens, scored = tokens.to(base.runtime.device), scored.to(base.runtime.device)
    hidden = base.model(tokens[:, :-1], adapters_for(len(jobs)))
    nll = measure_nll(hidden[scored], base.model.head, tokens[:, 1:][scored])
    return nll.double().sum().item(), nll.numel()
