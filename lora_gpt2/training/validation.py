"""Losses on held-out text: by blocks during a run, and by the protocol of `evaluate` at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from lora_gpt2.data.blocks import IGNORE, TokenBlocks
from lora_gpt2.data.inspect import list_documents
from lora_gpt2.data.read.records import Document
from lora_gpt2.evaluation.perplexity import ScoringWindows, measure_perplexity
from lora_gpt2.model.bank import AdapterBank
from lora_gpt2.model.base import Base
from lora_gpt2.model.fused import TrainingAdapters
from lora_gpt2.model.gpt2 import ActiveAdapters
from lora_gpt2.model.runtime import as_float64, choose_float64_device
from lora_gpt2.model.scoring import token_nll
from lora_gpt2.model.transfer import Transfer
from lora_gpt2.training.slot import TrainingSlot

OnTokens = Callable[[int], None]
"""Receives the number of tokens of each batch."""


def ignore_tokens(tokens: int) -> None:
    """Shows no progress."""


@torch.no_grad()
def measure_blocks(
    base: Base,
    blocks: TokenBlocks,
    adapters: ActiveAdapters | None,
    *,
    max_tokens: int | None = None,
    batch_tokens: int = 4096,
    on_tokens: OnTokens = lambda tokens: None,
) -> float:
    """Returns the mean NLL in nats per target over `max_tokens` tokens of the blocks (None: all).

    They are spread evenly: blocks lie in the order of the sources, packed ones by the length of their documents. Where
    none of them has a target, as in long prompts, it goes on to the first batch that has some.
    """
    size, device = blocks.block_size, base.runtime.device
    chosen = spread_blocks(blocks, max_tokens)
    count = len(chosen)
    order = chosen + sorted(set(range(blocks.num_blocks)) - set(chosen))
    batch_size = max(1, batch_tokens // size)
    transfer = Transfer(device)
    total, num_targets = torch.zeros((), dtype=torch.float64, device=choose_float64_device(device)), 0
    for start in range(0, blocks.num_blocks, batch_size):
        if start >= count and num_targets:
            break
        batch = blocks.read(order[start : min(start + batch_size, count if start < count else blocks.num_blocks)])
        sides = [batch.inputs, batch.targets, *([] if batch.positions is None else [batch.positions])]
        inputs, targets, *positions = transfer.copy([torch.from_numpy(side) for side in sides])
        nll = token_nll(base.model, inputs, targets.flatten(), adapters, positions=positions[0] if positions else None)
        total += as_float64(nll).sum()
        num_targets += int((batch.targets != IGNORE).sum())
        on_tokens(inputs.numel())
    return total.item() / num_targets


def spread_blocks(blocks: TokenBlocks, max_tokens: int | None) -> list[int]:
    """Returns which blocks are read where so many tokens are wanted: evenly spread, at least one; all for None."""
    count = blocks.num_blocks if max_tokens is None else min(blocks.num_blocks, max(1, max_tokens // blocks.block_size))
    indices: list[int] = np.linspace(0, blocks.num_blocks - 1, count).astype(int).tolist()
    return indices


class HeldOutLosses:
    """The losses of slots and of their base on all held-out text; the base is measured once on the same text."""

    def __init__(self, base: Base, bank: AdapterBank, slots: Sequence[TrainingSlot]) -> None:
        self.base, self.bank, self.slots = base, bank, slots
        self._base_losses: dict[tuple[Any, ...], float] = {}

    def count_tokens(self, slot_ids: Sequence[int]) -> int:
        """Returns how many tokens there are to measure: each text under its adapter, and once under the base."""
        sizes = {}
        for slot_id in slot_ids:
            blocks = self.slots[slot_id].data.validation
            sizes[slot_id, "validation"] = blocks.num_blocks * blocks.block_size
            if documents := self._list_test_documents(slot_id):
                windows = ScoringWindows(self.base, [documents], self.slots[slot_id].recipe.evaluate)
                sizes[slot_id, "test"] = windows.forward_tokens
        of_base = {self._key(*part): size for part, size in sizes.items()}
        return int(sum(sizes.values()) + sum(of_base.values()))

    def measure_validation(self, slot_id: int, on_tokens: OnTokens) -> tuple[float, float]:
        """Returns the mean NLL of the base and of the adapter over the validation blocks, in nats per target."""
        slot, key = self.slots[slot_id], self._key(slot_id, "validation")

        def measure(adapters: TrainingAdapters | None) -> float:
            batch_tokens = slot.recipe.train.micro_batch_tokens
            return measure_blocks(
                self.base, slot.data.validation, adapters, batch_tokens=batch_tokens, on_tokens=on_tokens
            )

        if key not in self._base_losses:
            self._base_losses[key] = measure(None)
        return self._base_losses[key], measure(TrainingAdapters(self.bank, [slot_id]))

    @torch.no_grad()
    def measure_test(self, slot_id: int, on_tokens: OnTokens) -> tuple[float, float] | None:
        """Returns both over the test documents, as `evaluate` measures them; None without any."""
        documents, settings = self._list_test_documents(slot_id), self.slots[slot_id].recipe.evaluate
        if not documents:
            return None
        key = self._key(slot_id, "test")
        if key not in self._base_losses:
            score = measure_perplexity(self.base, documents, settings, on_tokens=on_tokens)
            self._base_losses[key] = score.nll_nats_per_token
        adapters = TrainingAdapters(self.bank, [slot_id])
        score = measure_perplexity(self.base, documents, settings, lambda choices: adapters, on_tokens)
        return self._base_losses[key], score.nll_nats_per_token

    def _key(self, slot_id: int, split: str) -> tuple[Any, ...]:
        slot = self.slots[slot_id]
        return slot.data.fingerprint, split, slot.recipe.evaluate if split == "test" else None

    def _list_test_documents(self, slot_id: int) -> list[Document]:
        """Returns the test documents; none if there is nothing to score in them."""
        data = self.slots[slot_id].data
        return list_documents(data, "test", self.base.tokenizer) if data.test.num_targets else []
