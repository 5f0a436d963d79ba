"""CUDA graphs: a computation is captured once and then replayed, without the cost of launching its kernels.

Warm-up and capture of everything share one stream, because cuBLAS keeps a workspace for each stream that it ever ran
on (32 MiB on Hopper), and memory that is freed on a stream is not used on another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@lru_cache(maxsize=1)
def _capture_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


@contextmanager
def on_capture_stream() -> Iterator[None]:
    """Runs what is inside on the capture stream: after all that was launched before, and before all that follows."""
    stream = _capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def capture(compute: Callable[[], T], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, T]:
    """Returns a graph of `compute`, which is not executed, and what it returned: memory that each replay fills.

    Args:
        compute: it must have run on the capture stream before.
        pool: memory that graphs share which are never replayed at the same time, or None.
    """
    graph, stream = torch.cuda.CUDAGraph(), _capture_stream()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):  # a server has threads
        result = compute()
    return graph, result
