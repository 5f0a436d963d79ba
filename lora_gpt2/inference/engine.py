"""Continuous batching over one static cache: requests join at any step, finished ones leave, each with its own mix.

Active rows are the first of the cache, so a pass computes no idle ones; when a row ends, the last one takes its place
(one copy). A step first reads the prompts of those who join, together, then grows everybody else by one token. Each
row draws with its own generator, so what it writes does not depend on the other rows (but for rounding of the logits),
nor on what its part of the cache held before; a row whose logits are not finite ends alone, with an error.
Gives up: paging of the cache (a sequence of GPT-2 S is 38 MB) and prompts in pieces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_gpt2.core.errors import LoraGpt2Error
from lora_gpt2.data.ngram_index import NgramIndex
from lora_gpt2.data.tokenizer import TextStream, Tokenizer
from lora_gpt2.inference.beam import BeamSearch
from lora_gpt2.inference.cuda_graphs import CudaGraphDecoder
from lora_gpt2.inference.sampling import choose_token
from lora_gpt2.inference.session import Loaded, Mix, Session, check_logits
from lora_gpt2.model.bank import InferenceAdapters
from lora_gpt2.model.gpt2 import KVCache
from lora_gpt2.recipe import GenerateSettings


@dataclass(frozen=True)
class TokenLogprobs:
    """A token of the continuation, its log-probability before sampling, and those of the likeliest tokens."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class StopStringMatcher:
    """Lets text through until one of some stop texts appears; what may become one waits."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.held, self.is_hit = stops, "", False

    def push(self, text: str) -> str:
        """Returns the text that is certainly not part of a stop text."""
        self.held += text
        places = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if places:
            self.is_hit = True
            shown, self.held = self.held[: min(places)], ""
            return shown
        longest = max((self._count_begun(stop) for stop in self.stops), default=0)
        shown, self.held = self.held[: len(self.held) - longest], self.held[len(self.held) - longest :]
        return shown

    def finish(self) -> str:
        """Returns what was waiting, which became nothing."""
        rest, self.held = self.held, ""
        return rest

    def _count_begun(self, stop: str) -> int:
        return next((n for n in range(min(len(stop) - 1, len(self.held)), 0, -1) if self.held.endswith(stop[:n])), 0)


@dataclass
class Row:
    """One continuation while it grows; `finish_reason` is empty until it ends.

    A row that cannot grow ends with `error`; a budget of 0 only reads the prompt. `loaded` has adapters of the mix that
    were read beforehand, so that joining waits for no disk. With `scores_prompt` the prompt's own tokens get
    log-probabilities, the first excepted. What stands in `not_to_copy` is not copied beyond an index's run.
    """

    index: int
    mix: Mix
    prompt_ids: list[int]
    budget: int
    settings: GenerateSettings
    seed: int
    tokenizer: Tokenizer
    loaded: Mapping[str, Loaded] = field(default_factory=dict)
    scores_prompt: bool = False
    not_to_copy: Sequence[NgramIndex] = ()
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    error: Exception | None = None
    new_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stream, self._watch = TextStream(self.tokenizer), StopStringMatcher(self.settings.stop)
        self._generator = torch.Generator().manual_seed(self.seed)

    @property
    def num_cached(self) -> int:
        """Tokens that are in the cache: all but the newest."""
        return len(self.prompt_ids) + max(0, len(self.new_ids) - 1)

    def grow(self, logits: Tensor) -> str:
        """Chooses a token by its logits `[vocab]`; returns the text that it completes."""
        if not self.budget:
            return self.finish("length")
        logits = logits[: self.tokenizer.vocab_size]  # a padded head has rows that are no tokens
        check_logits(logits, self.mix)
        written = self.prompt_ids + self.new_ids
        copied = [token for index in self.not_to_copy for token in index.find_followers(written)]
        seen, num_prompt = torch.tensor(written), len(self.prompt_ids)
        token = choose_token(logits, seen, self.settings, self._generator, num_prompt, copied)
        if self.settings.logprobs and token != self.tokenizer.eos_id:
            self.logprobs.append(_describe_choice(logits, token, self.settings.logprobs))
        if token == self.tokenizer.eos_id:
            return self.finish("stop")
        shown = self.take(token)
        return shown + (self.finish("length") if not self.finish_reason and len(self.new_ids) >= self.budget else "")

    def take(self, token: int) -> str:
        """Adds a token; returns the text that it completes. A stop text ends the row."""
        self.new_ids.append(token)
        return self._show(self._watch.push(self._stream.push(token)))

    def finish(self, reason: str) -> str:
        """Ends the row; returns the text that was held back."""
        shown = "" if self._watch.is_hit else self._show(self._watch.push(self._stream.finish()))
        self.finish_reason = self.finish_reason or reason
        return shown + ("" if self._watch.is_hit else self._show(self._watch.finish()))

    def fail(self, error: Exception) -> str:
        """Ends the row with an error."""
        self.error, self.finish_reason = error, "error"
        return ""

    def _show(self, text: str) -> str:
        self.text += text
        if self._watch.is_hit:
            self.finish_reason = "stop"
        return text


def _describe_choice(logits: Tensor, token: int, count: int) -> TokenLogprobs:
    logprobs = logits.float().log_softmax(0)
    values, ids = logprobs.topk(count)
    return TokenLogprobs(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def _grow(row: Row, logits: Tensor) -> str:
    """Grows a row; what goes wrong in choosing its token is its own error and nobody else's."""
    try:
        return row.grow(logits)
    except ROW_ERRORS as error:
        return row.fail(error)


ROW_ERRORS = (LoraGpt2Error, RuntimeError, ValueError, IndexError)
SCORED_ROWS = 128
"""Positions of a prompt whose logits exist at the same time: 26 MB in float32 for GPT-2's vocabulary."""


class Engine:
    """Grows rows together, at most `max_num_seqs` at a time, each of at most `max_tokens` with its prompt."""

    def __init__(self, session: Session, max_num_seqs: int, max_tokens: int) -> None:
        base = session.base
        self.session, self.max_num_seqs = session, max_num_seqs
        self.device = base.runtime.device
        self.cache = KVCache(base.config, max_num_seqs, min(max_tokens, base.config.context), base.model.wte.weight)
        self.static = CudaGraphDecoder(session, self.cache) if self.device.type == "cuda" else None
        self.waiting: deque[Row] = deque()
        self.rows: list[Row] = []
        self.searches: list[tuple[Row, BeamSearch]] = []
        self._adapters: tuple[object, InferenceAdapters | None] = (None, None)

    @property
    def is_busy(self) -> bool:
        """True while a row waits or grows."""
        return bool(self.waiting or self.num_running)

    @property
    def num_running(self) -> int:
        """Sequences that grow: a search counts once for each beam."""
        return len(self.rows) + sum(row.settings.num_beams for row, _ in self.searches)

    def submit(self, row: Row) -> None:
        """Lets a row join at the next step that has room."""
        self.waiting.append(row)

    def stop(self, row: Row, reason: str) -> None:
        """Ends a row where it is; it leaves at the next step."""
        row.finish_reason = row.finish_reason or reason

    def stop_all(self, reason: str) -> list[Row]:
        """Ends every row, growing or waiting; returns them."""
        ended = [*self.rows, *(row for row, _ in self.searches), *self.waiting]
        for row in ended:
            self.stop(row, reason)
        self.waiting.clear()
        self._drop_finished()
        return ended

    @torch.inference_mode()
    def step(self) -> list[tuple[Row, str]]:
        """Grows every row by one token; returns the rows with the text that each completed, finished ones included."""
        self._drop_finished()
        grown = [(row, _grow(row, logits)) for row, logits in zip(self.rows, self._decode(), strict=True)]
        grown += [(row, self._search(row, search)) for row, search in self.searches]
        sampled, searched, refused = self._admit()
        grown += [(row, "") for row in refused]
        for row, logits in zip(sampled, self._read_prompts(sampled), strict=True):
            grown.append((row, "" if row.finish_reason else _grow(row, logits)))
        self.rows += sampled
        for row in searched:
            search = BeamSearch(self.session, row.prompt_ids, row.mix, row.budget, row.settings)
            self.searches.append((row, search))
        self._drop_finished()
        return grown

    def reset(self) -> None:
        """Forgets every row, without a word to them; the memory of the cache is kept."""
        self.rows, self.searches, self._adapters = [], [], (None, None)
        self.waiting.clear()
        for row in range(self.max_num_seqs):
            self.cache.truncate(row, 0)

    def _admit(self) -> tuple[list[Row], list[Row], list[Row]]:
        """Takes those from the queue for whom there is room; returns the rows to sample and those to search for.

        The third list has those whose adapters cannot be loaded, which have ended with that error. A search that is
        wider than the engine begins when nothing else grows.
        """
        sampled: list[Row] = []
        searched: list[Row] = []
        refused: list[Row] = []
        num_running = self.num_running
        while self.waiting:
            row = self.waiting[0]
            width = row.settings.num_beams if row.budget else 1
            if num_running and num_running + width > self.max_num_seqs:
                break
            self.waiting.popleft()
            if row.finish_reason:  # somebody stopped it while it waited
                continue
            try:
                self.session.put({name: row.loaded.get(name) or self.session.read(name) for name, _ in row.mix})
            except ROW_ERRORS as error:
                row.fail(error)
                refused.append(row)
                continue
            self.session.hold(row.mix)
            num_running += width
            (sampled if width == 1 else searched).append(row)
        return sampled, searched, refused

    def _search(self, row: Row, search: BeamSearch) -> str:
        """Makes a search one token longer; returns the text of the best continuation once there is one."""
        try:
            search.advance()
        except ROW_ERRORS as error:
            return row.fail(error)
        if not search.is_done:
            return ""
        best, shown = search.kept[0], ""
        for token in best.ids:
            if not row.finish_reason:
                shown += row.take(token)
        return shown + (row.finish(best.finish_reason) if not row.finish_reason else "")

    def _find_adapters(self, rows: Sequence[Row]) -> InferenceAdapters | None:
        """Returns the adapters of these rows; a batch that stays the same keeps its own."""
        key = ([row.mix for row in rows], self.session.num_loads)
        if self._adapters[0] != key:
            self._adapters = (key, self.session.rows(key[0]))
        return self._adapters[1]

    def _decode(self) -> Tensor:
        """Returns the logits `[rows, vocab]` after the newest token of each row, on the CPU."""
        if not self.rows:
            return torch.empty(0)
        if self.static is not None:
            rows = self.rows
            return self.static.run([r.new_ids[-1] for r in rows], [r.num_cached for r in rows], [r.mix for r in rows])
        used = max(row.num_cached for row in self.rows)
        view = self.cache.view(0, len(self.rows), used)
        tokens = torch.tensor([[row.new_ids[-1]] for row in self.rows], device=self.device)
        model = self.session.base.model
        adapters = self._find_adapters(self.rows)
        hidden = model(tokens, adapters, view)
        view.lengths += 1
        return model.logits(hidden, adapters)[:, 0].float().cpu()

    def _read_prompts(self, rows: Sequence[Row]) -> Tensor:
        """Puts prompts into the cache behind the active rows; returns the logits `[rows, vocab]` that follow each."""
        if not rows:
            return torch.empty(0)
        first, model, eos = len(self.rows), self.session.base.model, self.session.base.tokenizer.eos_id
        longest = max(len(row.prompt_ids) for row in rows)
        padded = [row.prompt_ids + [eos] * (longest - len(row.prompt_ids)) for row in rows]
        lengths = torch.tensor([len(row.prompt_ids) for row in rows], device=self.device)
        view = self.cache.view(first, first + len(rows), 0)
        view.lengths.zero_()
        adapters = self.session.rows([row.mix for row in rows])
        hidden = model(torch.tensor(padded, device=self.device), adapters, view)
        view.lengths += lengths
        for place, (row, states) in enumerate(zip(rows, hidden, strict=True), start=first):
            self.cache.truncate(place, len(row.prompt_ids))  # the padding, which another row's prompt made as long
            if row.scores_prompt:
                self._score_prompt(row, states[None])
        last = hidden[torch.arange(len(rows), device=self.device), lengths - 1]
        return model.logits(last[:, None], adapters)[:, 0].float().cpu()

    def _score_prompt(self, row: Row, states: Tensor) -> None:
        """Gives each token of the prompt but the first its log-probability, from the states `[1, time, width]`."""
        adapters = self.session.rows([row.mix])
        for start in range(0, len(row.prompt_ids) - 1, SCORED_ROWS):
            targets = row.prompt_ids[start + 1 : start + 1 + SCORED_ROWS]
            logits = self.session.base.model.logits(states[:, start : start + len(targets)], adapters)[0].float().cpu()
            try:
                check_logits(logits, row.mix)
            except ROW_ERRORS as error:
                row.fail(error)
                return
            row.prompt_logprobs += [
                _describe_choice(line, token, row.settings.logprobs)
                for line, token in zip(logits, targets, strict=True)
            ]

    def _drop_finished(self) -> None:
        for row, _ in self.searches:
            if row.finish_reason:
                self.session.release(row.mix)
        self.searches = [(row, search) for row, search in self.searches if not row.finish_reason]
        for row in self.rows:
            if row.finish_reason:
                self.session.release(row.mix)
        for place in range(len(self.rows) - 1, -1, -1):
            if self.rows[place].finish_reason:
                last = self.rows.pop()
                if place < len(self.rows):
                    self.rows[place] = last
                    self.cache.move(len(self.rows), place, last.num_cached)
                else:
                    self.cache.truncate(place, 0)
