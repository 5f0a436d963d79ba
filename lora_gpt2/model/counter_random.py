"""Random numbers that are counted, not drawn: a number for each seed, stream and index, the same on any device.

So masks and noise are functions of tensors: they are computed again instead of stored, do not depend on the rest of a
batch, and a CUDA graph replays them with other seeds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
3"). The bits are a 32-bit integer hash of the index, offset by one of seed and stream: the finaliser of MurmurHash3
with the constants of C. Wellons' search ("lowbias32", 2018). Arithmetic is int32, which wraps around.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lora_gpt2.model.kernels import has_triton

GOLDEN, FIRST, SECOND = 0x9E3779B1, 0x7FEB352D, 0x846CA68B


def as_int32(value: int) -> int:
    """Returns the signed number with the same 32 bits."""
    return (value + 2**31) % 2**32 - 2**31


def _hash_(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Hashes in place."""
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= as_int32(FIRST)
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= as_int32(SECOND)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def offset_of(seeds: Int[Tensor, " rows"], stream: int) -> Int[Tensor, " rows"]:
    """Returns where each row's numbers begin: int32, a hash of its seed and the stream."""
    return _hash_(_hash_(seeds.to(torch.int32, copy=True)).bitwise_xor_(as_int32(stream)))


def draw_bits(seeds: Int[Tensor, " rows"], stream: int, count: int) -> Int[Tensor, "rows {count}"]:
    """Returns `count` random int32 of each row."""
    index = torch.arange(count, dtype=torch.int32, device=seeds.device) * as_int32(GOLDEN)
    return _hash_(index + offset_of(seeds, stream)[:, None])


def threshold_of(rate: float) -> int:
    """Returns the int32 that a share `rate` of all int32 is below."""
    return min(int(rate * 2**32), 2**32 - 1) - 2**31


def draw_dropout_mask(
    seeds: Int[Tensor, " rows"], stream: int, like: Float[Tensor, "rows time width"], rate: float
) -> Float[Tensor, "rows time width"]:
    """Returns 0 with probability `rate` and 1 / (1 - rate) otherwise, in the dtype of `like`."""
    if like.device.type == "cuda" and has_triton():
        from lora_gpt2.model.dropout_kernel import fill_dropout_mask

        return fill_dropout_mask(torch.empty_like(like), offset_of(seeds, stream), rate)
    mask = torch.empty_like(like)
    for row in range(len(like)):  # of which one at a time fits a CPU's cache
        bits = draw_bits(seeds[row : row + 1], stream, like[0].numel())
        mask[row] = (bits >= threshold_of(rate)).view(like[0].shape)
    return mask.mul_(1 / (1 - rate))


def draw_noise(seeds: Int[Tensor, " rows"], stream: int, time: int, width: int) -> Float[Tensor, "rows time width"]:
    """Returns uniform noise in [-1, 1), float32."""
    return draw_bits(seeds, stream, time * width).view(len(seeds), time, width) * 2.0**-31
