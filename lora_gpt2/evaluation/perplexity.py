"""Perplexity: total negative log-likelihood over all scored tokens, divided by their number; each token scored once.

Two protocols. `document`: every document on its own, its first token predicted from EOS as in training; windows reach
back as far as they can, and with stride = window this is lm-evaluation-harness's rolling log-likelihood. Where a
document has a prompt, that is seen and not scored. `stream`: all text as one sequence, windows at multiples of the
stride, the first token of the text (and, with stride = window, of every window) not scored: the loop of Hugging Face's
documentation.

The windows of all texts and adapters form one list, sorted by length within each adapter, so that batches are full
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
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.gpt2 import ActiveAdapters
from lora_gpt2.model.probe import AdapterSelector, select_base
from lora_gpt2.model.runtime import as_float64, choose_float64_device
from lora_gpt2.model.scoring import token_nll
from lora_gpt2.model.transfer import Transfer
from lora_gpt2.recipe import EvaluateSettings

Text = str | Document


@dataclass(frozen=True)
class Window:
    """Inputs `sequence[begin:end]` predict `sequence[begin + 1 : end + 1]`; targets from `first` on are scored."""

    begin: int
    end: int
    first: int


@dataclass(frozen=True, kw_only=True)
class Score:
    """What was measured: nats over `tokens` scored tokens, and the size of the original text that they are.

    `per_document` has the nats and tokens of each document, `[2, documents]`; `per_token` the nats of each of its
    tokens, `[documents][tokens]`, where that was asked for.
    """

    nll_nats: float
    tokens: int
    words: int | float
    bytes: int | float
    per_document: NDArray[np.float64] = field(default_factory=lambda: np.zeros((2, 0)), compare=False, repr=False)
    per_token: Sequence[NDArray[np.float32]] = field(default=(), compare=False, repr=False)

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


def choose_window(config: GPT2Config, settings: EvaluateSettings) -> tuple[int, int]:
    """Returns window and stride in tokens; raises `UsageError` if they do not fit the base or each other."""
    context = config.n_positions
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
    select: AdapterSelector = select_base,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> Score:
    """Returns the score of documents under the adapter or mix of a selector.

    `on_tokens` receives the number of tokens of each batch.

    Raises:
        DataError: there is nothing to score.
        UsageError: see `choose_window`.
    """
    windows = ScoringWindows(base, [documents], settings)
    return windows.measure(select, on_tokens=on_tokens)[0][0]


class _ScoringWindow(NamedTuple):
    document: int  # index among the documents of all sources
    ids: list[int]
    span: Window

    @property
    def num_scored(self) -> int:
        return self.span.end + 1 - self.span.first


class ScoringWindows:
    """The windows of some sources, each a list of texts, ready to be scored under any number of adapters.

    Raises what `measure_perplexity` does.
    """

    def __init__(self, base: Base, sources: Sequence[Sequence[Text]], settings: EvaluateSettings) -> None:
        self.base, self.settings, self.transfer = base, settings, Transfer(base.runtime.device)
        self.texts: list[list[str]] = []
        self.windows: list[_ScoringWindow] = []
        window, stride = choose_window(base.config, settings)
        for source in sources:
            before = len(self.windows)
            self._add(source, window, stride)
            if len(self.windows) == before:
                raise DataError("there is no text to score", "give a file with at least one token")
        self.windows.sort(key=lambda scored: scored.span.begin - scored.span.end)
        self.num_documents = sum(map(len, self.texts))
        counts = np.zeros(self.num_documents)
        for scored in self.windows:
            counts[scored.document] += scored.num_scored
        self.tokens = counts
        is_stream = settings.protocol == "stream"
        self.shares = {
            document: self._find_scored_share(document) for document in range(self.num_documents) if is_stream
        }

    def _add(self, source: Sequence[Text], window: int, stride: int) -> None:
        encode, first = self.base.tokenizer.encode_batch, sum(map(len, self.texts))
        if self.settings.protocol == "stream":
            text = "\n\n".join("".join(split_prompt(item)) for item in source)
            ids = encode([text])[0]
            self.texts.append([text])
            spans = iter_stream_windows(len(ids), window, stride)
            self.windows += [_ScoringWindow(first, ids, span) for span in spans]
            return
        pairs = [split_prompt(item) for item in source]
        self.texts.append([text for _, text in pairs])
        prompts = encode([prompt for prompt, _ in pairs]) if any(prompt for prompt, _ in pairs) else [[]] * len(pairs)
        for index, (prompt, scored) in enumerate(zip(prompts, encode(self.texts[-1]), strict=True), start=first):
            ids = [self.base.tokenizer.eos_id, *prompt, *scored]
            spans = iter_document_windows(len(ids) - 1, window, stride, len(prompt))
            self.windows += [_ScoringWindow(index, ids, span) for span in spans]

    @property
    def forward_tokens(self) -> int:
        """Tokens that the network reads for one adapter."""
        return sum(window.span.end - window.span.begin for window in self.windows)

    @torch.inference_mode()
    def measure(
        self,
        select: AdapterSelector,
        num_choices: int = 1,
        can_mix: bool = False,
        on_tokens: Callable[[int], None] = lambda tokens: None,
        keep_tokens: bool = False,
    ) -> list[list[Score]]:
        """Returns the scores `[choices][sources]`.

        Args:
            select: the adapters or mixes to measure.
            num_choices: how many the selector has.
            can_mix: a batch may have windows of several choices.
            on_tokens: receives the number of tokens of each batch.
            keep_tokens: also keep the figure of each token, which takes 4 bytes; of protocol `document` alone.
        """
        device = choose_float64_device(self.base.runtime.device)
        totals = torch.zeros(num_choices * self.num_documents, dtype=torch.float64, device=device)
        kept = [[np.zeros(int(count), np.float32) for count in self.tokens] for _ in range(num_choices * keep_tokens)]
        for batch in self._iter_batches(num_choices, can_mix):
            nll, indices = self._score(batch, select([choice for choice, _ in batch]))
            totals.index_add_(0, indices.to(device), as_float64(nll))
            if keep_tokens:
                self._keep(batch, nll, kept)
            on_tokens(sum(window.span.end - window.span.begin for _, window in batch))
        nats = totals.view(num_choices, -1).cpu().numpy()
        return [self._collect(nats[choice], kept[choice] if kept else []) for choice in range(num_choices)]

    def _keep(
        self, batch: Sequence[tuple[int, _ScoringWindow]], nll: Tensor, kept: Sequence[Sequence[NDArray[np.float32]]]
    ) -> None:
        """Puts the NLL of a batch's tokens into those of their documents."""
        figures, done = nll.float().cpu().numpy(), 0
        for choice, window in batch:
            own = kept[choice][window.document]
            end = len(own) - (len(window.ids) - 1 - window.span.end)  # a document is scored to its end
            own[end - window.num_scored : end] = figures[done : done + window.num_scored]
            done += window.num_scored

    def _iter_batches(self, num_choices: int, can_mix: bool) -> Iterator[list[tuple[int, _ScoringWindow]]]:
        """Yields batches of similar lengths: every other choice begins with the short windows."""
        batch: list[tuple[int, _ScoringWindow]] = []
        longest = 0
        for choice in range(num_choices):
            for window in self.windows if choice % 2 == 0 else reversed(self.windows):
                length = window.span.end - window.span.begin
                if batch and (len(batch) + 1) * max(longest, length) > self.settings.batch_tokens:
                    yield batch
                    batch, longest = [], 0
                batch.append((choice, window))
                longest = max(longest, length)
            if batch and not can_mix:
                yield batch
                batch, longest = [], 0
        if batch:
            yield batch

    def _score(
        self, batch: Sequence[tuple[int, _ScoringWindow]], adapters: ActiveAdapters | None
    ) -> tuple[Tensor, Tensor]:
        """Returns the NLL of each scored token of a batch, and the index of its document in the totals."""
        longest = max(window.span.end - window.span.begin for _, window in batch)
        tokens = torch.zeros(len(batch), longest + 1, dtype=torch.long)
        scored = torch.zeros(len(batch), longest, dtype=torch.bool)
        indices = torch.zeros(len(batch), 1, dtype=torch.long)
        for row, (choice, (document, ids, span)) in enumerate(batch):
            tokens[row, : span.end + 1 - span.begin] = torch.tensor(ids[span.begin : span.end + 1])
            scored[row, span.first - span.begin - 1 : span.end - span.begin] = True
            indices[row] = choice * self.num_documents + document
        positions = scored.flatten().nonzero()[:, 0]
        chosen = [tokens[:, 1:].flatten()[positions], indices.expand(-1, longest).flatten()[positions]]
        inputs, targets, documents, select = self.transfer.copy([tokens[:, :-1], *chosen, positions])
        return token_nll(self.base.model, inputs, targets, adapters, select=select), documents

    def _find_scored_share(self, document: int) -> float:
        """Returns the fraction of a stream's bytes whose tokens are scored: windows without overlap leave some out."""
        own = [scored for scored in self.windows if scored.document == document]
        lengths = np.array([len(piece) for piece in self.base.tokenizer.token_bytes])[own[0].ids]
        return float(sum(lengths[span.first : span.end + 1].sum() for *_, span in own) / lengths.sum())

    def _collect(self, nats: NDArray[np.float64], kept: Sequence[NDArray[np.float32]]) -> list[Score]:
        scores, first = [], 0
        for texts in self.texts:
            share = self.shares.get(first, 1)
            documents = slice(first, first + len(texts))
            per_document = np.stack([nats[documents], self.tokens[documents]])
            first = documents.stop
            scores.append(
                Score(
                    nll_nats=float(per_document[0].sum()),
                    tokens=int(per_document[1].sum()),
                    words=sum(len(text.split()) for text in texts) * share,
                    bytes=sum(len(text.encode()) for text in texts) * share,
                    per_document=per_document,
                    per_token=kept[documents],
                )
            )
        return scores
