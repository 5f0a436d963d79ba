"""Continues prompts, each with its own mix of adapters and its own seed, in one batch with one KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from lora_gpt2.core.errors import UsageError
from lora_gpt2.core.interrupt import StopRequest
from lora_gpt2.data.tokenizer import TextStream, Tokenizer
from lora_gpt2.inference.sampling import choose_token
from lora_gpt2.inference.session import Mix, Session, describe_mix
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
        ids = ids[-max(1, context - settings.max_new_tokens) :]
    return ids, min(settings.max_new_tokens, context - len(ids))


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
    base = session.base
    context = base.config.context
    rows = []
    for request in requests:
        ids, budget = encode_prompt(base.tokenizer, request.prompt, context, settings, truncate_left)
        generator = torch.Generator().manual_seed(request.seed)
        rows.append(_Row(request, ids, budget, TextStream(base.tokenizer), generator))
    active = list(range(len(rows)))
    longest = max(len(row.prompt_ids) for row in rows)
    tokens = torch.full((len(rows), longest), base.tokenizer.eos_id)
    for index, row in enumerate(rows):
        tokens[index, : len(row.prompt_ids)] = torch.tensor(row.prompt_ids)
    size = min(longest + max(row.budget for row in rows), context)
    cache = KVCache(base.config, len(rows), size, base.model.wte.weight)
    grown = torch.tensor([len(row.prompt_ids) for row in rows], device=base.runtime.device)
    last = grown - 1
    while active:
        adapters = session.rows([rows[index].request.mix for index in active])
        hidden = base.model(tokens.to(base.runtime.device), adapters, cache)
        cache.lengths += grown
        cache.used = int(cache.lengths.max())
        logits = base.model.logits(hidden[torch.arange(len(active)), last]).float().cpu()
        for index, scores in zip(active, logits, strict=True):
            row = rows[index]
            seen = torch.tensor(row.prompt_ids + row.new_ids)
            shown = row.accept(choose_token(scores, seen, settings, row.generator), base.tokenizer.eos_id)
            if shown and on_text is not None:
                on_text(index, shown)
            if stop is not None and stop.signal_number and not row.finish_reason:
                row.finish_reason = "interrupted"
        kept = [place for place, index in enumerate(active) if not rows[index].finish_reason]
        if len(kept) < len(active):
            cache.keep_rows(torch.tensor(kept, dtype=torch.long, device=base.runtime.device))
            active = [active[place] for place in kept]
        if active:
            tokens = torch.tensor([[rows[index].new_ids[-1]] for index in active])
            grown = torch.ones(len(active), dtype=torch.long, device=base.runtime.device)
            last = torch.zeros(len(active), dtype=torch.long)
    return [
        Output(
            row.request.prompt,
            row.text,
            describe_mix(row.request.mix),
            len(row.new_ids),
            row.finish_reason,
            row.request.seed,
        )
        for row in rows
    ]
