"""Decode steps as CUDA graphs: shapes never change, so a GPU replays one graph per batch size, whatever the adapters.

A step of GPT-2 is 100 to 300 small kernels; launching them takes longer than running them. Here the batch is padded to
a power of two, attention looks at a fixed number of keys behind a mask (a power of two that holds the longest sequence;
kernels of our own read what there is), and everything that changes is copied into the same memory each time, in one
piece. The next tokens are chosen within the graph. Padding rows write to a first position that is cleared after the
step. On a CPU the same step runs eagerly, which is how it is tested there.

The next step is launched before the tokens of this one are read: it takes them from where they were chosen, so that the
device does not wait for the host. Where it turns out that a sequence has ended, that step was for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_gpt2.inference.decoder import (
    Decoder,
    NextTokens,
    build_sampling_adjustments,
    build_sampling_columns,
    build_sampling_masks,
)
from lora_gpt2.inference.device_penalties import adjust_logits, forbid_tokens, is_adjusted
from lora_gpt2.inference.device_sampling import FORBIDDEN, choose_tokens
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.sequence import SequenceState
from lora_gpt2.inference.session import Session
from lora_gpt2.model import decode_step
from lora_gpt2.model.bank import AdapterBank
from lora_gpt2.model.batch_adapters import BatchAdapters
from lora_gpt2.model.graphs import capture, on_capture_stream
from lora_gpt2.model.kv_cache import KVCache
from lora_gpt2.model.transfer import Readback, Transfer

CHOSEN_BEFORE = -1
MAX_GRAPHS = 32
WARM_UP = 2
FEWEST_KEYS = 64


@dataclass
class _CapturedStep:
    """A step for a batch size and a number of keys: its inputs, its results, and on a GPU its graph.

    `inputs` are the tokens `[batch, 1]`, or `CHOSEN_BEFORE` for what the last step chose, the lengths before and after
    `[batch]`, the sampling columns, the adapters' weights where there are any, what changes the logits, and with
    `is_constrained` which tokens may follow; see `device_penalties`.
    """

    bank: AdapterBank | None
    is_constrained: bool
    num_keys: int
    transfer: Transfer
    inputs: list[Tensor]
    logits: Tensor | None = None
    tokens: Tensor | None = None
    graph: torch.cuda.CUDAGraph | None = None


@dataclass(frozen=True, kw_only=True)
class _Launched:
    """A step of some sequences, whose tokens are on their way to the host; `lengths` are those of the cache before it.

    `previous` holds the tokens that it continues, once they are known.
    """

    sequences: Sequence[SequenceState]
    lengths: Sequence[int]
    weights: object
    step: _CapturedStep
    read: Callable[[], list[int]]
    previous: list[int] = field(default_factory=list)


class CudaGraphDecoder(Decoder):
    """A decoder whose decode steps are captured once for each batch size and number of keys, and replayed."""

    def __init__(self, session: Session, cache: KVCache) -> None:
        super().__init__(session, cache)
        self._captured: dict[tuple[int, int, bool, int, bool], _CapturedStep] = {}
        self._pool = torch.cuda.graph_pool_handle() if cache.buffer.device.type == "cuda" else None
        self._weights: tuple[object, Tensor | None] = (None, None)
        self._readback = Readback(cache.buffer.device, cache.batch_size)
        self._has_kernels: dict[int, bool] = {}
        self._chosen = torch.zeros(cache.batch_size, dtype=torch.long, device=cache.buffer.device)
        self._ahead: _Launched | None = None

    def step(self, sequences: Sequence[SequenceState]) -> NextTokens:
        """Decodes one more token in each of the first rows; see `Decoder.step`."""
        launched = self._take_ahead(sequences) or self._launch(sequences)
        if all(self._may_go_on(sequence) for sequence in sequences):
            self._ahead = self._launch(sequences, ahead=1)
        tokens = launched.read()
        if self._ahead is not None and min(tokens) < 0:  # the logits are needed, which the next step has overwritten
            self._ahead, launched = None, self._launch(sequences)
        elif self._ahead is not None:
            self._ahead.previous[:] = tokens
        self.cache.record_replay([length + 1 for length in launched.lengths], self._pad_size(len(sequences)))
        assert launched.step.logits is not None
        return NextTokens(logits=launched.step.logits, tokens=tokens)

    def reset(self) -> None:
        """Frees every row and forgets the last batch; see `Decoder.reset`."""
        self._ahead = None
        super().reset()

    def _may_go_on(self, sequence: SequenceState) -> bool:
        """True if the token after the next one can be computed before that is known, and will probably be wanted."""
        num_left = sequence.max_new_tokens - len(sequence.new_ids)
        is_known = sequence.is_plain and sequence.constraint is None
        return is_known and num_left > 1 and sequence.num_cached + 2 <= self.cache.capacity

    def _take_ahead(self, sequences: Sequence[SequenceState]) -> _Launched | None:
        """Returns the step that was launched ahead, if it is the one of these sequences as they are now."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or list(ahead.sequences) != list(sequences):
            return None
        now = [(sequence.num_cached, sequence.new_ids[-1]) for sequence in sequences]
        is_same = now == list(zip(ahead.lengths, ahead.previous, strict=True))
        return ahead if is_same and self._find_weights(sequences) is ahead.weights else None

    def _launch(self, sequences: Sequence[SequenceState], ahead: int = 0) -> _Launched:
        """Launches the next step, or with `ahead` the one after it, which continues what that one chooses."""
        lengths = [sequence.num_cached + ahead for sequence in sequences]
        num_keys = self._choose_num_keys(sequences, max(lengths))
        weights = self._find_weights(sequences)
        none = [0] * (self._pad_size(len(sequences)) - len(sequences))
        newest = [CHOSEN_BEFORE if ahead else sequence.new_ids[-1] for sequence in sequences]
        inputs = [
            torch.tensor([*newest, *none])[:, None],
            torch.tensor([*lengths, *none]),
            torch.tensor([*(length + 1 for length in lengths), *none]),
            build_sampling_columns(sequences, len(none), ahead),
        ]
        adjustments = build_sampling_adjustments(sequences, num_keys, lengths, len(none))
        masks = build_sampling_masks(sequences, len(none))
        step = self._find(num_keys, weights, inputs, adjustments, masks)
        if step.graph is None:
            self._compute(step)
        else:
            step.graph.replay()
        self.cache.clear_padding(len(sequences), len(newest) + len(none))
        assert step.tokens is not None
        read = self._readback.begin(step.tokens[: len(sequences)])
        return _Launched(sequences=list(sequences), lengths=lengths, weights=weights, step=step, read=read)

    def _pad_size(self, num_rows: int) -> int:
        return min(1 << (num_rows - 1).bit_length(), self.cache.batch_size)

    def _choose_num_keys(self, sequences: Sequence[SequenceState], longest: int) -> int:
        """Returns the number of keys that a step is captured for.

        The kernels read as many as a row has, whatever the number; penalties read a history of so many tokens.
        """
        num_rows = self._pad_size(len(sequences))
        if num_rows not in self._has_kernels:
            self._has_kernels[num_rows] = decode_step.can_use_kernels(self.session.base.model, num_rows)
        if self._has_kernels[num_rows] and not any(is_adjusted(sequence.params) for sequence in sequences):
            return self.cache.capacity
        return min(max(FEWEST_KEYS, 1 << longest.bit_length()), self.cache.capacity)

    def _find_weights(self, sequences: Sequence[SequenceState]) -> Tensor | None:
        padding = self._pad_size(len(sequences)) - len(sequences)
        return self._reuse_weights([*(sequence.mix for sequence in sequences), *[Mix()] * padding])

    def _reuse_weights(self, mixes: Sequence[Mix]) -> Tensor | None:
        """Returns the weights of a batch's slots, None for the plain base; the same object for the same mixes."""
        key = (list(mixes), self.session.slots.num_loads)
        if self._weights[0] != key:
            weights = self.session.load_slot_weights(mixes) if any(mixes) else None
            self._weights = ((list(mixes), self.session.slots.num_loads), weights)
        return self._weights[1]

    def _find(
        self,
        num_keys: int,
        weights: Tensor | None,
        inputs: list[Tensor],
        adjustments: list[Tensor],
        masks: list[Tensor],
    ) -> _CapturedStep:
        """Returns the step for these shapes with these inputs on the device, captured if need be.

        A bank that was rebuilt is other memory, which no step that was captured before may hold any longer.
        """
        has_adapters = weights is not None
        bank = self.session.slots.bank if has_adapters else None
        num_biases = adjustments[-1].shape[1] if adjustments else 0
        key = (len(inputs[0]), num_keys, has_adapters, num_biases, bool(masks))
        inputs = [*inputs, *([] if weights is None else [weights]), *adjustments, *masks]
        if any(step.bank is not bank for step in self._captured.values() if has_adapters and step.bank is not None):
            self._captured.clear()
        step = self._captured.get(key)
        if step is None:
            if len(self._captured) >= MAX_GRAPHS:
                self._captured.clear()
            transfer = Transfer(self.cache.buffer.device)
            step = _CapturedStep(bank, bool(masks), num_keys, transfer, transfer.copy(inputs))
            self._captured[key] = step
            if transfer.device.type == "cuda":
                self._capture(step)
        step.inputs = step.transfer.copy(inputs)
        return step

    def _compute(self, step: _CapturedStep) -> None:
        tokens, lengths, lengths_after, columns, *rest = step.inputs
        masks = [rest.pop()] if step.is_constrained else []
        weights, adjustments = (rest[:1], rest[1:]) if step.bank is not None else ([], rest)
        chosen = self._chosen[: len(tokens)]
        tokens = torch.where(tokens == CHOSEN_BEFORE, chosen[:, None], tokens)
        view = self.cache.view(0, len(tokens), fixed_keys=step.num_keys)
        view.lengths.copy_(lengths)
        adapters = None
        if step.bank is not None:
            adapters = BatchAdapters(step.bank, weights[0], slice(0, step.bank.num_slots))
        logits = decode_step.decode_logits(self.session.base.model, tokens, adapters, view)
        view.lengths.copy_(lengths_after)
        step.logits = logits
        own = logits[:, : self.session.base.tokenizer.vocab_size]
        if adjustments:
            own = adjust_logits(own, tokens, *adjustments)
        for words in masks:
            own = forbid_tokens(own, words, FORBIDDEN)
        step.tokens = choose_tokens(own, columns)
        chosen.copy_(step.tokens.clamp(min=0))

    def _capture(self, step: _CapturedStep) -> None:
        # the last key, which a row writes itself before it reads it: running sequences are not disturbed
        step.inputs[1].fill_(step.num_keys - 1)
        chosen = self._chosen.clone()
        with on_capture_stream():
            for _ in range(WARM_UP):
                self._compute(step)
        self._chosen.copy_(chosen)
        self.cache.clear_key(len(step.inputs[0]), step.num_keys - 1)
        step.graph, _ = capture(lambda: self._compute(step), self._pool)
