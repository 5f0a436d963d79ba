"""Too little memory, as every library says it, and limits that are found out before a library ends the process.

Under `ulimit -v` or a small container C and Rust code may abort where Python would raise: while libraries are loaded,
threads started, or a small thing allocated. So a limit that torch cannot be loaded under is said before it is loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import mmap
import sys
from typing import Any

from lora_gpt2.core.errors import ResourceError

TORCH_BYTES = 750_000_000
"""Addresses that torch and the libraries beside it take on a machine of two cores, before any base is loaded."""
M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES = -3, 2**20
NUMPY_BYTES = 200_000_000
SIGNS = (
    "allocate memory",
    "ENOMEM",
    "out of memory",
    "ALLOC_FAILED",
    "bad_alloc",
    "failed to map segment",
    "cannot create shared object",
    "can't start new thread",
    "thread pool has not been initialized",
    "PyObject pointer is null",
    "memory allocation of",
)
HINT = "close other programs, raise the limit (ulimit -v), or ask for less: generate -n, train.micro_batch_tokens, evaluate.batch_tokens"  # noqa: E501


def is_out_of_memory(error: BaseException) -> bool:
    """True if an error of any library says that there is not enough memory, or no room for another thread.

    An error that came while another was handled counts by that one: a CUDA graph's capture ends with one of its own.
    """
    if error.__context__ is not None and is_out_of_memory(error.__context__):
        return True
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    is_candidate = isinstance(error, RuntimeError | OSError | ImportError | SystemError)
    is_candidate = is_candidate or type(error).__name__ in ("PanicException", "SafetensorError")
    return is_candidate and any(sign in str(error) for sign in SIGNS)


def release_freed() -> None:
    """Gives memory that was freed back to the system, where the C library (glibc) would keep it for later.

    Between large blocks that come and go, small ones that stay keep it from doing so by itself.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def return_large_blocks() -> None:
    """Lets the C library (glibc) give blocks of a megabyte back to the system at once when they are freed.

    It learns from each that is freed to keep larger ones, and so the heap of what computes large blocks again and
    again grows to twice what it needs.
    """
    if sys.platform == "linux" and (set_option := getattr(ctypes.CDLL(None), "mallopt", None)):
        set_option(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def check_room(num_bytes: int) -> None:
    """Raises `MemoryError` if so many bytes cannot be had: before native code that ends the process in that case."""
    try:
        mmap.mmap(-1, max(1, num_bytes)).close()
    except OSError as error:
        raise MemoryError(f"{num_bytes:,} bytes cannot be had") from error


def check_address_space(needed_bytes: int) -> None:
    """Raises `ResourceError` if this process may not have so many bytes of addresses (`ulimit -v`)."""
    with contextlib.suppress(ImportError):  # there is no such limit on Windows
        resource: Any = importlib.import_module("resource")
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit not in (-1, resource.RLIM_INFINITY) and limit < needed_bytes:
            raise ResourceError(
                f"there is not enough memory: this process may have {limit / 1e6:,.0f} MB of addresses, and needs "
                f"{needed_bytes / 1e6:,.0f} MB or more",
                "raise the limit: ulimit -v unlimited",
            )
