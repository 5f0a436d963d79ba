"""Decode steps as CUDA graphs: shapes never change, so a GPU replays one graph per batch size, whatever the adapters.

A step of GPT-2 is some 300 small kernels, and launching them takes longer than running them. Here the batch is padded
to a power of two, attention looks at the whole cache behind a mask, and tokens, lengths and adapter weights are copied
into the same memory each time. Padding rows write to a first position that a prompt overwrites before it is read.
On a CPU the same step runs eagerly, which is how it is tested there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lora_gpt2.inference.decoder import Decoder
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.session import Session
from lora_gpt2.model.bank import AdapterBank, InferenceAdapters
from lora_gpt2.model.graphs import capture, on_capture_stream
from lora_gpt2.model.kv_cache import KVCache
from lora_gpt2.model.scoring import next_logits

MAX_GRAPHS = 16
WARM_UP = 2


@dataclass
class _CapturedGraph:
    """The static inputs and outputs of a step, and its graph on a GPU."""

    bank: AdapterBank | None
    tokens: Tensor
    lengths: Tensor
    weights: Tensor | None
    logits: Tensor | None = None
    graph: torch.cuda.CUDAGraph | None = None


class CudaGraphDecoder(Decoder):
    """A decoder whose decode steps are captured once per batch size and replayed."""

    def __init__(self, session: Session, cache: KVCache) -> None:
        super().__init__(session, cache)
        self._captured: dict[tuple[int, bool], _CapturedGraph] = {}

    def step(self, tokens: Sequence[int], lengths: Sequence[int], mixes: Sequence[Mix]) -> Float[Tensor, "batch vocab"]:
        """Returns the logits after one more token in each of the first rows, on the CPU; see `Decoder.step`."""
        num_rows = len(tokens)
        size = min(1 << (num_rows - 1).bit_length(), self.cache.batch_size)
        padding = size - num_rows
        weights = self.session.load_slot_weights([*mixes, *[Mix()] * padding]) if any(mixes) else None
        captured = self._find(size, weights)
        captured.tokens[:num_rows, 0].copy_(torch.tensor(tokens), non_blocking=True)
        captured.lengths.copy_(torch.tensor([*lengths, *[0] * padding]), non_blocking=True)
        if captured.weights is not None and weights is not None:
            captured.weights.copy_(weights, non_blocking=True)
        if captured.graph is None:
            logits = self._compute(captured)
        else:
            captured.graph.replay()
            assert captured.logits is not None
            logits = captured.logits
        result = logits[:num_rows].cpu()
        self.cache.record_replay([length + 1 for length in lengths], size)
        return result

    def _find(self, size: int, weights: Tensor | None) -> _CapturedGraph:
        """Returns the step for a batch size, captured if need be; a bank that was rebuilt is other memory."""
        bank = self.session.slots.bank if weights is not None else None
        key = (size, weights is not None)
        captured = self._captured.get(key)
        if captured is None or captured.bank is not bank:
            if len(self._captured) >= MAX_GRAPHS:
                self._captured.clear()
            device = self.cache.buffer.device
            tokens = torch.full((size, 1), self.session.base.tokenizer.eos_id, device=device)
            lengths = torch.zeros(size, dtype=torch.long, device=device)
            static = None if weights is None or bank is None else weights.to(bank.flat.device)
            captured = self._captured[key] = _CapturedGraph(bank, tokens, lengths, static)
            if device.type == "cuda":
                self._capture(captured)
        return captured

    def _compute(self, step: _CapturedGraph) -> Tensor:
        view = self.cache.view(0, len(step.tokens), has_fixed_keys=True)
        view.lengths.copy_(step.lengths)
        adapters = None
        if step.bank is not None and step.weights is not None:
            adapters = InferenceAdapters(step.bank, step.weights, slice(0, step.bank.num_slots))
        return next_logits(self.session.base.model, step.tokens, adapters, view)[0]

    def _capture(self, step: _CapturedGraph) -> None:
        # the last position, which a row writes itself before it reads it: running sequences are not disturbed
        step.lengths.fill_(self.cache.capacity - 1)
        with on_capture_stream():
            for _ in range(WARM_UP):
                self._compute(step)
        step.graph, step.logits = capture(lambda: self._compute(step))
