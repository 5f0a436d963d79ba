"""Between the host and a GPU: the small tensors of a step in one copy there, and its results in one back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

ALIGNMENT = 256


class Transfer:
    """Copies tensors from the host to a device.

    Two pinned buffers take turns, so that the host fills one while the other is copied. The copies lie in the same
    memory each time for as long as shapes and dtypes stay the same, so a CUDA graph may read them; they are valid until
    the next call.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._layout: list[tuple[torch.dtype, torch.Size]] = []
        self._turn = 0

    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns the tensors on the device; on a CPU these tensors themselves."""
        if self.device.type != "cuda":
            return [tensor.to(self.device) for tensor in tensors]
        layout = [(tensor.dtype, tensor.shape) for tensor in tensors]
        if layout != self._layout:
            self._allocate(tensors)
            self._layout = layout
        self._turn = 1 - self._turn
        done = self._done[self._turn]
        done.synchronize()  # what this buffer held is on the device
        for view, tensor in zip(self._host_views[self._turn], tensors, strict=True):
            view.copy_(tensor)
        self._buffer.copy_(self._hosts[self._turn], non_blocking=True)
        done.record()
        return self._views

    def _allocate(self, tensors: Sequence[Tensor]) -> None:
        """Makes room for these tensors, here twice and on the device once."""
        ends = torch.tensor([-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors]).cumsum(0).tolist()

        def view(buffer: Tensor) -> list[Tensor]:
            starts = [0, *ends[:-1]]
            return [
                buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                for start, tensor in zip(starts, tensors, strict=True)
            ]

        self._hosts = [torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._host_views = [view(host) for host in self._hosts]
        self._buffer = torch.empty(ends[-1], dtype=torch.uint8, device=self.device)
        self._views = view(self._buffer)
        self._done = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]


class Readback:
    """Copies integers from a device to the host while the device goes on.

    Two pinned buffers take turns, so what `begin` returns must be called before the second `begin` after it.
    """

    def __init__(self, device: torch.device, capacity: int) -> None:
        self.device, self._turn = device, 0
        if device.type == "cuda":
            self._hosts = [torch.empty(capacity, dtype=torch.long, pin_memory=True) for _ in range(2)]
            self._done = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]

    def begin(self, values: Int[Tensor, " values"]) -> Callable[[], list[int]]:
        """Launches a copy; returns a function that waits for it and returns the values."""
        if self.device.type != "cuda":
            return values.tolist
        self._turn = 1 - self._turn
        host, done = self._hosts[self._turn][: len(values)], self._done[self._turn]
        host.copy_(values, non_blocking=True)
        done.record()

        def read() -> list[int]:
            done.synchronize()
            return list(host.tolist())

        return read
