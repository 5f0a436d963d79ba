"""Which device and which numbers to compute with, and how much memory was really used.

CUDA: bfloat16 where the GPU has it, else float16. CPU: bfloat16 only where the instruction set has it (AVX512-BF16 or
AMX); PyTorch also runs it emulated, four times slower than float32, and float16 slower still. MPS (Apple's GPUs):
float32, see `choose_runtime`. `$LORA_GPT2_CPU_DTYPE` names one for all CPUs, for the same figures on each.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_gpt2.core.errors import UsageError

NOFILE_LIMIT = 65536
CPU_DTYPE = "LORA_GPT2_CPU_DTYPE"
CPU_FLAGS = Path("/proc/cpuinfo")  # Linux
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """A device and the dtype of the frozen base on it."""

    device: torch.device
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        """The dtype's name in recipes and manifests."""
        return str(self.dtype).removeprefix("torch.")


def has_native_bfloat16() -> bool:
    """True if this CPU multiplies bfloat16 in hardware; the emulation that PyTorch offers everywhere does not count."""
    try:
        flags = CPU_FLAGS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        found = torch.cpu.get_capabilities()  # Windows, macOS
        return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"))
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", "avx_ne_convert", " bf16"))


def choose_device() -> torch.device:
    """Returns the fastest kind of device there is: `cuda`, else `mps`, else `cpu`."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_float64_device(device: torch.device) -> torch.device:
    """Returns the device for float64 sums of what this one computed: itself, or the CPU for `mps` (it has none)."""
    return torch.device("cpu") if device.type == "mps" else device


def as_float64(values: Tensor) -> Tensor:
    """Returns numbers in float64, moved where their device has none; see `choose_float64_device`."""
    return values.to(choose_float64_device(values.device)).double()


def choose_runtime(dtype: str, device: torch.device | None = None) -> Runtime:
    """Returns the device and dtype for a `dtype` setting; raises `UsageError` for float16 on a CPU.

    `auto` on a CPU is what `$LORA_GPT2_CPU_DTYPE` says, else bfloat16 where the CPU multiplies it in hardware.
    `auto` on `mps` is float32: neither bfloat16, which older versions of macOS lack, nor the loss scaling of float16
    has been tried there. Both can be asked for by name.
    """
    device = device or choose_device()
    if dtype != "auto":
        if device.type == "cpu" and dtype == "float16":
            raise UsageError("float16 is hundreds of times slower than float32 on a CPU", "use float32, or auto")
        return Runtime(device, DTYPES[dtype])
    if device.type == "cuda":
        return Runtime(device, torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16)
    return Runtime(device, _choose_cpu_dtype() if device.type == "cpu" else torch.float32)


def _choose_cpu_dtype() -> torch.dtype:
    name = os.environ.get(CPU_DTYPE) or ("bfloat16" if has_native_bfloat16() else "float32")
    if name not in ("float32", "bfloat16"):
        raise UsageError(f"${CPU_DTYPE} is '{name}'", "set it to float32 or bfloat16, or not at all")
    return DTYPES[name]


def raise_file_limit() -> None:
    """Lets this process have as many open connections as the system allows, 65,536 at most; Windows has no limit."""
    resource = _find_resource()
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = NOFILE_LIMIT if hard == resource.RLIM_INFINITY else min(hard, NOFILE_LIMIT)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # macOS says "unlimited" and allows less
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def measure_peak_memory(device: torch.device) -> int:
    """Returns the largest memory in bytes: allocated on a GPU, resident in this process on a CPU.

    On `mps`, which keeps no peak, what the driver holds now (freed memory stays in its cache, so it rarely shrinks).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    with contextlib.suppress(OSError):  # on Linux, where `ru_maxrss` begins at that of the parent
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    resource = _find_resource()
    if resource is None:
        import psutil

        found = psutil.Process().memory_info()
        return int(getattr(found, "peak_wset", found.rss))
    peak = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak if sys.platform == "darwin" else peak * 1024


def _find_resource() -> Any:
    """Returns the module with a process's limits and peak memory, or None where the system has none (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    return resource
