"""Pairs of texts as rows of tokens: the chosen and the rejected one in turn, with the prompt before each."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lora_gpt2.data.blocks import IGNORE, Ints
from lora_gpt2.data.tokenizer import Tokenizer
from lora_gpt2.model.fused import TrainingAdapters
from lora_gpt2.model.gpt2 import GPT2
from lora_gpt2.model.scoring import token_nll
from lora_gpt2.rating.preferences import Preference

ROUNDED_TO = 32  # tokens; few shapes
HELD_OUT, FEWEST_HELD_OUT = 0.1, 4


@dataclass(frozen=True, kw_only=True)
class PairRows:
    """`inputs` and `targets` `[2 * pairs, time]`; targets of prompts and padding are `IGNORE`.

    `num_cut` texts were cut to fit.
    """

    inputs: Ints
    targets: Ints
    num_cut: int

    @property
    def num_pairs(self) -> int:
        """Number of pairs."""
        return len(self.inputs) // 2

    @property
    def lengths(self) -> Ints:
        """Number of scored tokens of each text, `[pairs, 2]`: chosen and rejected."""
        counts: Ints = (self.targets != IGNORE).sum(1).reshape(-1, 2)
        return counts

    def read(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns inputs and targets of some rows, `[rows, time]`, without the padding that all of them have."""
        targets = self.targets[list(rows)]
        used = int(np.flatnonzero((targets != IGNORE).any(0)).max(initial=0)) + 1
        time = min(targets.shape[1], -(-used // ROUNDED_TO) * ROUNDED_TO)
        return torch.from_numpy(self.inputs[list(rows), :time]), torch.from_numpy(targets[:, :time])

    def rows_of(self, pairs: Sequence[int]) -> list[int]:
        """Returns the rows of some pairs."""
        return [row for pair in pairs for row in (2 * pair, 2 * pair + 1)]


def encode_pairs(pairs: Sequence[Preference], tokenizer: Tokenizer, max_tokens: int) -> PairRows:
    """Returns pairs as rows of at most `max_tokens`: of a long prompt its end is kept, of a long text its beginning."""
    rows, num_cut = [], 0
    for pair in pairs:
        prompt = list(tokenizer.encode(pair.prompt)) or [tokenizer.eos_id]
        for text in (pair.chosen, pair.rejected):
            ids = [*tokenizer.encode(text), *([tokenizer.eos_id] if pair.is_whole else [])]
            num_cut += len(ids) > max_tokens
            ids = ids[:max_tokens]
            kept = prompt[-max(1, max_tokens + 1 - len(ids)) :]
            rows.append((kept, ids))
    longest = max(len(prompt) + len(ids) - 1 for prompt, ids in rows)
    time = min(max_tokens, -(-longest // ROUNDED_TO) * ROUNDED_TO)
    inputs = np.zeros((len(rows), time), dtype=np.int64)
    targets = np.full((len(rows), time), IGNORE, dtype=np.int64)
    for row, (prompt, ids) in enumerate(rows):
        whole = [*prompt, *ids]
        inputs[row, : len(whole) - 1] = whole[:-1]
        targets[row, len(prompt) - 1 : len(whole) - 1] = ids
    return PairRows(inputs=inputs, targets=targets, num_cut=num_cut)


def split_pairs(pairs: Sequence[Preference]) -> tuple[list[int], list[int]]:
    """Returns the pairs to train on and those that are held out: whole prompts, chosen by their hash."""
    prompts = sorted({pair.prompt for pair in pairs}, key=lambda prompt: zlib.crc32(prompt.encode("utf-8", "replace")))
    of_prompt = Counter(pair.prompt for pair in pairs)
    wanted, chosen, count = max(FEWEST_HELD_OUT, round(HELD_OUT * len(pairs))), set[str](), 0
    for prompt in prompts[: len(prompts) - 1]:
        if count >= wanted:
            break
        chosen.add(prompt)
        count += of_prompt[prompt]
    if not chosen:  # one prompt for all
        return list(range(wanted, len(pairs))), list(range(wanted))
    trained = [index for index, pair in enumerate(pairs) if pair.prompt not in chosen]
    return trained, [index for index, pair in enumerate(pairs) if pair.prompt in chosen]


def iter_groups(rows: Sequence[int], time: int, most_tokens: int) -> Iterator[list[int]]:
    """Yields rows in groups of whole pairs that hold at most so many tokens, one pair at least."""
    size = 2 * max(1, most_tokens // (2 * time))
    for start in range(0, len(rows), size):
        yield list(rows[start : start + size])


@torch.no_grad()
def score_rows(
    model: GPT2, adapters: TrainingAdapters, pairs: PairRows, rows: Sequence[int], most_tokens: int
) -> Float[Tensor, " rows"]:
    """Returns the log-likelihood of each row in nats, on the host."""
    device, found = model.wte.weight.device, []
    for group in iter_groups(rows, pairs.inputs.shape[1], most_tokens):
        inputs, targets = (side.to(device) for side in pairs.read(group))
        found.append(-token_nll(model, inputs, targets.flatten(), adapters).view(len(group), -1).sum(1))
    return torch.cat(found).cpu()
