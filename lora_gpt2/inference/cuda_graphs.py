"""A decoding step whose shapes never change, so that a GPU replays it: one graph per batch size, whatever the adapters.

A step of GPT-2 is some 300 small kernels, and launching them takes longer than they do. Here the batch is filled up to
a power of two, attention looks at the whole cache behind a mask, and tokens, lengths and the rows' weights are written
into the same memory each time. Idle rows write to a first position that a prompt overwrites before it is read.
On a CPU the same step runs as it is, which is how it is tested there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_gpt2.inference.session import Mix, Session
from lora_gpt2.model.bank import AdapterBank, InferenceAdapters
from lora_gpt2.model.gpt2 import KVCache

MAX_GRAPHS = 16
WARM_UP = 2


@dataclass
class _CapturedGraph:
    """The memory that a step reads and writes, and its graph on a GPU."""

    bank: AdapterBank | None
    tokens: Tensor
    weights: Tensor | None
    logits: Tensor | None = None
    graph: torch.cuda.CUDAGraph | None = None


class CudaGraphDecoder:
    """Grows the first rows of a cache by one token each."""

    def __init__(self, session: Session, cache: KVCache) -> None:
        self.session, self.cache = session, cache
        self._recorded: dict[tuple[int, bool], _CapturedGraph] = {}

    def run(self, tokens: Sequence[int], lengths: Sequence[int], mixes: Sequence[Mix]) -> Tensor:
        """Returns the logits `[rows, vocab]` after `tokens`, one per row, on the CPU; `lengths` are before them."""
        rows = len(tokens)
        size = min(1 << (rows - 1).bit_length(), self.cache.buffer.shape[2])
        weights = self.session.weigh([*mixes, *[()] * (size - rows)]) if any(mixes) else None
        step = self._find_step(size, weights)  # recording touches the lengths, so it comes first
        step.tokens[:rows, 0].copy_(torch.tensor(tokens), non_blocking=True)
        self.cache.lengths[:size].copy_(torch.tensor([*lengths, *[0] * (size - rows)]), non_blocking=True)
        if step.weights is not None and weights is not None:
            step.weights.copy_(weights, non_blocking=True)
        self.cache.view(0, size, 0).note_written(self.cache.capacity)  # a replay runs no Python; see `_record`
        if step.graph is None:
            logits = self._compute(step)
        else:
            step.graph.replay()
            assert step.logits is not None
            logits = step.logits
        return logits[:rows].cpu()

    def _find_step(self, size: int, weights: Tensor | None) -> _CapturedGraph:
        bank = self.session.bank if weights is not None else None
        key = (size, weights is not None)
        step = self._recorded.get(key)
        if step is None or step.bank is not bank:  # a bank that was built anew is other memory
            if len(self._recorded) >= MAX_GRAPHS:
                self._recorded.clear()
            device = self.cache.buffer.device
            eos = self.session.base.tokenizer.eos_id
            tokens = torch.full((size, 1), eos, device=device)
            fixed = None if weights is None or bank is None else weights.to(bank.flat.device)
            step = self._recorded[key] = _CapturedGraph(bank, tokens, fixed)
            if device.type == "cuda":
                self._record(step)
        return step

    def _compute(self, step: _CapturedGraph) -> Tensor:
        size = len(step.tokens)
        view = self.cache.view(0, size, self.cache.capacity - 1)
        adapters = None
        if step.bank is not None and step.weights is not None:
            adapters = InferenceAdapters(step.bank, step.weights, slice(0, step.bank.num_slots))
        model = self.session.base.model
        return model.logits(model(step.tokens, adapters, view), adapters)[:, -1].float()

    def _record(self, step: _CapturedGraph) -> None:
        # the last place, which a row writes itself before it reads it: rows that grow are not disturbed
        self.cache.lengths[: len(step.tokens)] = self.cache.capacity - 1
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            for _ in range(WARM_UP):
                self._compute(step)
        torch.cuda.synchronize()
        step.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(step.graph):
            step.logits = self._compute(step)
