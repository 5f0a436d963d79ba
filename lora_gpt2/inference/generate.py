"""Continues prompts, each with its own mix of adapters and its own seed, in one batch with one KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_gpt2.core.errors import UsageError
from lora_gpt2.core.interrupt import StopRequest
from lora_gpt2.data.tokenizer import TextStream, Tokenizer
from lora_gpt2.inference.sampling import choose_token
from lora_gpt2.inference.session import Mix, Session, describe_mix
from lora_gpt2.model.base import Base
from lora_gpt2.model.gpt2 import KVCache
from lora_gpt2.recipe import GenerateSettings

OnText = Callable[[int, str], None]


@dataclass(frozen=True)
class Request:
    """One prompt, the mix that continues it (empty: the base), and the seed of its random choices."""

    prompt: str
    mix: Mix = ()
    seed: int = 0


@dataclass(frozen=True)
class Output:
    """One continuation; `finish_reason` is `stop` (EOS), `length`, or `interrupted`."""

    prompt: str
    text: str
    adapter: str
    tokens: int
    finish_reason: str
    seed: int


@dataclass
class _Row:
    index: int
    request: Request
    prompt_ids: list[int]
    budget: int
    stream: TextStream
    generator: torch.Generator
    new_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""

    def accept(self, token: int, eos_id: int) -> str:
        """Takes a token; returns the text that it completes."""
        if token == eos_id:
            self.finish_reason = "stop"
            return self._finish()
        self.new_ids.append(token)
        shown = self.stream.push(token)
        self.text += shown
        if len(self.new_ids) >= self.budget:
            self.finish_reason = "length"
            shown += self._finish()
        return shown

    def _finish(self) -> str:
        rest = self.stream.finish()
        self.text += rest
        return rest

    def to_output(self) -> Output:
        """Returns the finished row."""
        mix = describe_mix(self.request.mix)
        return Output(self.request.prompt, self.text, mix, len(self.new_ids), self.finish_reason, self.request.seed)


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


class _Batch:
    """The rows that are still growing, with their shared cache."""

    def __init__(self, session: Session, rows: Sequence[_Row]) -> None:
        self.session, self.active = session, list(rows)
        base = session.base
        self.device = base.runtime.device
        lengths = [len(row.prompt_ids) for row in rows]
        size = min(max(lengths) + max(row.budget for row in rows), base.config.context)
        self.cache = KVCache(base.config, len(rows), size, base.model.wte.weight)
        padded = [row.prompt_ids + [base.tokenizer.eos_id] * (max(lengths) - len(row.prompt_ids)) for row in rows]
        self.tokens = torch.tensor(padded, device=self.device)
        self.grown = torch.tensor(lengths, device=self.device)

    def step(self) -> Tensor:
        """Runs the network on the newest tokens; returns the logits `[rows, vocab]` of the next ones, on the CPU."""
        model = self.session.base.model
        hidden = model(self.tokens, self.session.rows([row.request.mix for row in self.active]), self.cache)
        self.cache.lengths += self.grown
        self.cache.used = int(self.cache.lengths.max())
        places = torch.arange(len(self.active), device=self.device)
        return model.logits(hidden[places, self.grown - 1]).float().cpu()

    def advance(self) -> None:
        """Drops the rows that are finished and puts the others' last tokens in front of the network."""
        kept = [place for place, row in enumerate(self.active) if not row.finish_reason]
        if len(kept) < len(self.active):
            self.cache.keep_rows(torch.tensor(kept, dtype=torch.long, device=self.device))
            self.active = [self.active[place] for place in kept]
        if self.active:
            self.tokens = torch.tensor([[row.new_ids[-1]] for row in self.active], device=self.device)
            self.grown = torch.ones(len(self.active), dtype=torch.long, device=self.device)


@torch.inference_mode()
def generate(
    session: Session,
    requests: Sequence[Request],
    settings: GenerateSettings,
    on_text: OnText | None = None,
    stop: StopRequest | None = None,
    truncate_left: bool = False,
) -> list[Output]:
    """Returns one continuation per request; `on_text(index, piece)` gets the text as it grows.

    Raises:
        UsageError: a prompt does not fit.
        NotFoundError, IntegrityError: an adapter cannot be used.
    """
    tokenizer = session.base.tokenizer
    rows = []
    for index, request in enumerate(requests):
        ids, budget = encode_prompt(tokenizer, request.prompt, session.base.config.context, settings, truncate_left)
        rows.append(
            _Row(index, request, ids, budget, TextStream(tokenizer), torch.Generator().manual_seed(request.seed))
        )
    batch = _Batch(session, rows)
    while batch.active:
        for row, logits in zip(batch.active, batch.step(), strict=True):
            seen = torch.tensor(row.prompt_ids + row.new_ids)
            shown = row.accept(choose_token(logits, seen, settings, row.generator), tokenizer.eos_id)
            if shown and on_text is not None:
                on_text(row.index, shown)
            if stop is not None and stop.signal_number and not row.finish_reason:
                row.finish_reason = "interrupted"
        batch.advance()
    return [row.to_output() for row in rows]
