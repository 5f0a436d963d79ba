import errno
import platform
import resource

import psutil
import pytest
import torch

from lora_gpt2 import cli
from lora_gpt2.core.errors import ResourceError
from lora_gpt2.core.memory import check_address_space, check_room, is_out_of_memory, release_freed


class PanicException(BaseException):  # as pyo3 names it
    pass


class OutOfMemoryError(RuntimeError):  # as torch names it
    pass


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("unable to mmap 8688848 bytes from file <x>: Cannot allocate memory (12)"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("can't start new thread"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        ImportError("libx.so: cannot allocate memory in static TLS block"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        PanicException("The global thread pool has not been initialized.: ThreadPoolBuildError"),
        PanicException("PyObject pointer is null"),
    ],
    ids=lambda error: f"{type(error).__name__}: {error}"[:50],
)
def test_every_library_that_runs_out_of_memory_ends_with_7(error):
    assert is_out_of_memory(error)
    ours = cli.translate(error)
    assert (type(ours), ours.exit_code, ours.message) == (ResourceError, 7, "there is not enough memory")
    assert "generate -n" in ours.hint


@pytest.mark.parametrize(
    "error",
    [RuntimeError("a shape"), ImportError("No module named x"), PanicException("unwrap"), KeyError("bad_alloc")],
)
def test_other_errors_are_not_taken_for_it(error):
    assert not is_out_of_memory(error)
    assert cli.translate(error).exit_code == 1


@pytest.mark.parametrize(("limit", "fits"), [(-1, True), (10**9, True), (10**8, False)])
def test_a_limit_of_addresses_is_said_before_a_library_aborts(monkeypatch, limit, fits):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, -1))
    if fits:
        check_address_space(5 * 10**8)
        return
    with pytest.raises(ResourceError, match="may have 100 MB of addresses, and needs 500 MB") as caught:
        check_address_space(5 * 10**8)
    assert "ulimit -v unlimited" in caught.value.hint


def test_room_is_looked_for_without_taking_it():
    check_room(0)
    check_room(10**9)
    with pytest.raises(MemoryError, match="cannot be had"):
        check_room(2**60)


def test_the_error_of_a_capture_counts_by_the_one_that_ended_it():
    def capture():
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    with pytest.raises(RuntimeError) as caught:
        capture()
    assert is_out_of_memory(caught.value)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library gives memory back by itself")
def test_memory_between_blocks_that_stay_is_given_back():
    process = psutil.Process()
    blocks = [bytearray(100_000) for _ in range(1500)]
    full = process.memory_info().rss
    kept = blocks[::50]
    del blocks
    release_freed()
    assert process.memory_info().rss < full - 100_000_000
    assert len(kept) == 30
