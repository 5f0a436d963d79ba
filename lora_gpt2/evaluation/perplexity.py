"""Perplexity: total negative log-likelihood over all scored tokens, divided by their number; each token scored once.

Two protocols. `document`: every document on its own, its first token predicted from EOS as in training; windows reach
back as far as they can, and with stride = window this is lm-evaluation-harness's rolling log-likelihood. Where a
document has a prompt, that is seen and not scored. `stream`: all text as one sequence, windows at multiples of the
stride, the first token of the text (and, with stride = window, of every window) not scored: the loop of Hugging Face's
documentation.

Windows of all texts and adapters form one list of jobs, sorted by length within each adapter, so that a batch is full
whatever the texts are; the head runs on scored positions only, and nothing waits for the device before the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_gpt2.core.errors import DataError, UsageError
from lora_gpt2.data.read.records import Document
from lora_gpt2.model.base import Base
from lora_gpt2.model.gpt2 import ActiveAdapters
from lora_gpt2.model.loss import score_tokens
from lora_gpt2.model.probe import AdaptersForRows
from lora_gpt2.model.runtime import as_float64, choose_float64_device
from lora_gpt2.recipe import EvaluateSettings

Text = str | Document
Column = int
AdaptersForColumns = Callable[[Sequence[Column]], ActiveAdapters | None]
"""From the adapter of each row, by its place, to what the network adds in such a batch."""


@dataclass(frozen=True)
class Window:
    """Inputs `sequence[begin:end]` predict `sequence[begin + 1 : end + 1]`; targets from `first` on are scored."""

    begin: int
    end: int
    first: int


@dataclass(frozen=True)
class Score:
    """What was measured: nats over `tokens` scored tokens, and the size of the original text that they are.

    `per_document` has the nats and tokens of each document, `[2, documents]`.
    """

    nll_nats: float
    tokens: int
    words: int
    bytes: int
    per_document: NDArray[np.float64] = field(default_factory=lambda: np.zeros((2, 0)), compare=False, repr=False)

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
    """Returns exp of a mean in nats; infinity where no float holds it, NaN of NaN."""
    return math.inf if value >= 700 else math.exp(value)


def split_prompt(text: Text) -> tuple[str, str]:
    """Returns what of a text is only seen, and what is scored."""
    return ("", text) if isinstance(text, str) else (text.prompt, text.text)


def iter_document_windows(length: int, window: int, stride: int, prompt: int = 0) -> Iterator[Window]:
    """Yields the windows of `length` tokens that follow an EOS (targets 1 … length), the first `prompt` not scored."""
    done = 0
    while done < length:
        end = min(done + (stride if done else window), length)
        if end > prompt:
            yield Window(max(0, end - window), end, max(done, prompt) + 1)
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
    documents: Sequence[Text],
    settings: EvaluateSettings,
    adapters_for: AdaptersForRows = lambda rows: None,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> Score:
    """Returns the score of documents; `adapters_for(rows)` gives the adapters of a batch of that many rows.

    `on_tokens` hears how many tokens a batch had.

    Raises:
        DataError: there is nothing to score.
        UsageError: see `choose_window`.
    """
    jobs = Jobs(base, [documents], settings)
    return jobs.measure(lambda columns: adapters_for(len(columns)), on_tokens=on_tokens)[0][0]


class _Job(NamedTuple):
    owner: int  # the document's place among all
    sequence: list[int]
    span: Window


class Jobs:
    """The windows of some sources, each a sequence of texts, ready to be scored under any number of adapters.

    Raises what `measure_perplexity` does.
    """

    def __init__(self, base: Base, sources: Sequence[Sequence[Text]], settings: EvaluateSettings) -> None:
        self.base, self.settings = base, settings
        self.texts: list[list[str]] = []
        self.jobs: list[_Job] = []
        window, stride = choose_window(base, settings)
        for source in sources:
            before = len(self.jobs)
            self._add(source, window, stride)
            if len(self.jobs) == before:
                raise DataError("there is no text to score", "give a file with at least one token")
        self.jobs.sort(key=lambda job: job.span.begin - job.span.end)
        self.num_documents = sum(map(len, self.texts))
        counts = np.zeros(self.num_documents)
        for job in self.jobs:
            counts[job.owner] += job.span.end + 1 - job.span.first
        self.tokens = counts

    def _add(self, source: Sequence[Text], window: int, stride: int) -> None:
        encode, first = self.base.tokenizer.encode_batch, sum(map(len, self.texts))
        if self.settings.protocol == "stream":
            text = "\n\n".join("".join(split_prompt(item)) for item in source)
            sequence = encode([text])[0]
            self.texts.append([text])
            self.jobs += [_Job(first, sequence, span) for span in iter_stream_windows(len(sequence), window, stride)]
            return
        pairs = [split_prompt(item) for item in source]
        self.texts.append([text for _, text in pairs])
        prompts = encode([prompt for prompt, _ in pairs]) if any(prompt for prompt, _ in pairs) else [[]] * len(pairs)
        for place, (prompt, ids) in enumerate(zip(prompts, encode(self.texts[-1]), strict=True)):
            sequence = [self.base.tokenizer.eos_id, *prompt, *ids]
            spans = iter_document_windows(len(sequence) - 1, window, stride, len(prompt))
            self.jobs += [_Job(first + place, sequence, span) for span in spans]

    @property
    def forward_tokens(self) -> int:
        """Tokens that the network reads for one adapter."""
        return sum(job.span.end - job.span.begin for job in self.jobs)

    @torch.inference_mode()
    def measure(
        self,
        adapters_for: AdaptersForColumns,
        num_columns: int = 1,
        mixes: bool = False,
        on_tokens: Callable[[int], None] = lambda tokens: None,
    ) -> list[list[Score]]:
        """Returns the scores `[columns][sources]`; a batch holds rows of several columns only if `mixes`.

        `on_tokens` hears how many tokens a batch had.
        """
        device = choose_float64_device(self.base.runtime.device)
        totals = torch.zeros(num_columns * self.num_documents, dtype=torch.float64, device=device)
        for batch in self._iter_batches(num_columns, mixes):
            nll, owners = self._score(batch, adapters_for([column for column, _ in batch]))
            totals.index_add_(0, owners.to(device), as_float64(nll))
            on_tokens(sum(job.span.end - job.span.begin for _, job in batch))
        nats = totals.view(num_columns, -1).cpu().numpy()
        return [self._collect(column) for column in nats]

    def _iter_batches(self, num_columns: int, mixes: bool) -> Iterator[list[tuple[Column, _Job]]]:
        """Yields batches; every other adapter begins with the short windows, so that neighbours are alike in length."""
        batch: list[tuple[Column, _Job]] = []
        longest = 0
        for column in range(num_columns):
            for job in self.jobs if column % 2 == 0 else reversed(self.jobs):
                length = job.span.end - job.span.begin
                if batch and (len(batch) + 1) * max(longest, length) > self.settings.batch_tokens:
                    yield batch
                    batch, longest = [], 0
                batch.append((column, job))
                longest = max(longest, length)
            if batch and not mixes:
                yield batch
                batch, longest = [], 0
        if batch:
            yield batch

    def _score(self, batch: Sequence[tuple[Column, _Job]], adapters: ActiveAdapters | None) -> tuple[Tensor, Tensor]:
        """Returns the NLL of each scored token of a batch, and its place among the totals."""
        longest = max(job.span.end - job.span.begin for _, job in batch)
        tokens = torch.zeros(len(batch), longest + 1, dtype=torch.long)
        scored = torch.zeros(len(batch), longest, dtype=torch.bool)
        owners = torch.zeros(len(batch), 1, dtype=torch.long)
        for row, (column, (owner, sequence, span)) in enumerate(batch):
            tokens[row, : span.end + 1 - span.begin] = torch.tensor(sequence[span.begin : span.end + 1])
            scored[row, span.first - span.begin - 1 : span.end - span.begin] = True
            owners[row] = column * self.num_documents + owner
        places = scored.flatten().nonzero()[:, 0]
        device = self.base.runtime.device
        hidden = self.base.model(tokens[:, :-1].to(device), adapters)
        targets = tokens[:, 1:].flatten()[places].to(device)
        nll = score_tokens(self.base.model, hidden, adapters, targets, places.to(device))
        return nll, owners.expand(-1, longest).flatten()[places]

    def _collect(self, nats: NDArray[np.float64]) -> list[Score]:
        scores, place = [], 0
        for texts in self.texts:
            part = np.stack([nats[place : place + len(texts)], self.tokens[place : place + len(texts)]])
            place += len(texts)
            words, size = sum(len(text.split()) for text in texts), sum(len(text.encode()) for text in texts)
            scores.append(Score(float(part[0].sum()), int(part[1].sum()), words, size, part))
        return scores
