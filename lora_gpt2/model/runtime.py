"""Which device and which numbers to compute with, and how much memory was really used.

CUDA: bfloat16 where the GPU has it, else float16. CPU: bfloat16 only where the instruction set has it (AVX512-BF16 or
AMX); PyTorch also runs it emulated, four times slower than float32, and float16 slower still.
"""

from __future__ import annotations

import platform
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_gpt2.core.errors import UsageError

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
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.machine() == "arm64" and sys.platform == "darwin"
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", "avx_ne_convert", " bf16"))


def choose_runtime(precision: str, device: torch.device | None = None) -> Runtime:
    """Returns the device and dtype for a `precision` setting; raises `UsageError` for float16 on a CPU."""
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if precision != "auto":
        if device.type == "cpu" and precision == "float16":
            raise UsageError("float16 is hundreds of times slower than float32 on a CPU", "use float32, or auto")
        return Runtime(device, DTYPES[precision])
    if device.type == "cuda":
        return Runtime(device, torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16)
    return Runtime(device, torch.bfloat16 if has_native_bfloat16() else torch.float32)


def raise_file_limit() -> None:
    """Lets this process have as many open connections as the system allows, 65,536 at most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def measure_peak_memory(device: torch.device) -> int:
    """Returns the largest memory in bytes: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
