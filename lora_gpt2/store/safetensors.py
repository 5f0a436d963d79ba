"""Tensors as safetensors, piece by piece: the bytes that `safetensors.torch.save` gives, without a second copy of them.

`save` builds the whole file in Rust, which ends the process where memory runs out; here Python raises `MemoryError`,
and a file may be written and hashed one tensor at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from lora_gpt2.core.strict_json import load_json

NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""Names of the numbers, in the order in which safetensors lays tensors out from the last to the first."""
ORDER = list(NAMES)
DTYPES = {name: dtype for dtype, name in NAMES.items()}
METADATA = "__metadata__"
ALIGNMENT, LENGTH_BYTES, MAX_HEADER_BYTES = 8, 8, 100_000_000


def iter_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Iterator[memoryview]:
    """Yields a safetensors file in pieces: the header, then each tensor's bytes, copied only from another device."""
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    names = sorted(tensors, key=lambda name: (-ORDER.index(tensors[name].dtype), name.encode()))
    offset = 0
    for name in names:
        end = offset + tensors[name].numel() * tensors[name].element_size()
        shape = list(tensors[name].shape)
        header[name] = {"dtype": NAMES[tensors[name].dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    yield memoryview(len(text).to_bytes(LENGTH_BYTES, "little") + text)
    for name in names:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def pack_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Returns a safetensors file; raises `MemoryError` where it does not fit into memory."""
    return b"".join(iter_safetensors(tensors, metadata))


def read_own_safetensors(file: BinaryIO) -> dict[str, Tensor]:
    """Returns the tensors in a file of ours, whose hash was checked, from where it stands to its end.

    Raises `ValueError`, `KeyError` or `TypeError` for an invalid one.
    """
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length:,} bytes")
    header = load_json(file.read(length))
    header.pop(METADATA, None)
    found: dict[str, Tensor] = {}
    for name, entry in sorted(header.items(), key=lambda pair: tuple(pair[1]["data_offsets"])):
        begin, end = entry["data_offsets"]
        content = np.fromfile(file, np.uint8, end - begin)
        if len(content) < end - begin:
            raise ValueError(f"the bytes of {name} are missing")
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        flat = torch.from_numpy(content).view(dtype) if len(content) else torch.empty(0, dtype=dtype)
        found[name] = flat.reshape(shape)
    return found
