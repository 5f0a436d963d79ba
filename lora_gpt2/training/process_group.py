"""The processes that train together, one per device: `accelerate launch -m lora_gpt2 train …`, or torchrun.

Each takes its share of the rows of every step; the adapters' gradients are summed as one flat buffer, which is small,
so nothing else needs to be split. The first process alone writes and speaks, and its validation losses are
everyone's. A process on its own is a
group of one, and nothing is imported for it.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
LONGEST_WAIT = timedelta(hours=6)
"""How long processes wait for one that prepares a large corpus for all; NCCL's own limit is 10 minutes."""


@dataclass(frozen=True)
class ProcessGroup:
    """This process's rank among `size` of them, and the device it was given (None: choose freely)."""

    rank: int = 0
    size: int = 1
    device: torch.device | None = None

    @property
    def is_main_process(self) -> bool:
        """True for the process that validates, writes and speaks."""
        return self.rank == 0

    def share(self, num_rows: int) -> range:
        """Returns the rows of a batch that are this process's."""
        return range(self.rank, num_rows, self.size)

    def all_reduce(self, *tensors: Tensor) -> None:
        """Replaces each tensor by its sum over the processes."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def broadcast_object(self, value: T) -> T:
        """Returns the first process's value in all of them."""
        if self.size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def main_process_first(self, work: Callable[[], T]) -> T:
        """Runs `work` in the first process, then in the others, which find what it left on disk."""
        first = [work()] if self.is_main_process else []
        self.broadcast_object(None)
        return first[0] if first else work()


def count_processes() -> int:
    """Returns how many processes the launcher started, 1 without one."""
    return max(1, int(os.environ.get("WORLD_SIZE", "1")))


def init_process_group() -> ProcessGroup:
    """Returns the group of the launcher that started this process, else this process alone."""
    if count_processes() == 1:
        return ProcessGroup()
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=LONGEST_WAIT)
    atexit.register(torch.distributed.destroy_process_group)
    return ProcessGroup(state.process_index, state.num_processes, state.device)
