"""The layers of a decode step as Triton kernels: two for each projection, and one for attention with its cache.

A step of one token per sequence reads every weight once and computes little, so what it costs is the weights' bytes and
the number of kernels. Tensor operations take some 17 for a layer (norms, products, adapters, GELU, cache, attention,
residual sums), these take nine:

- `prepare`: the norm or activation in front of a projection, and the product with A of the adapters that a row uses;
- `project`: the product with the frozen weight, bias, product with B and residual sum, all added up in float32;
- `attend`: writes the new key and value into the cache, and attends to a row's keys, but to no others.

No row reads what belongs to another, nor adapters that it does not use. "Shrink" and "expand" are the products with A
and B, as in Punica (Chen et al. 2023, arXiv:2310.18547); attention keeps a running maximum and sum (Milakov and
Gimelshein 2018, arXiv:1805.02867).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_gpt2.model.batch_adapters import SlotFactors
from lora_gpt2.model.gpt2 import LayerNorm, Linear, Prologue

LEAST_ROWS = 16  # of a product on tensor cores
BLOCK_BYTES, BLOCK_OUT, BLOCK_RANK, BLOCK_KEYS = 512, 16, 2, 64
MOST_LANES, MOST_RANKS, NUM_WARPS, NUM_STAGES = 4096, 16, 4, 4
LEAST_SLOTS = 16
SIZES = ("rows", "rank", "num_slots")
"""Arguments of which no value is worth a compilation of its own."""
NONE, NORM, GELU_TANH, GELU_ERF = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit  # type: ignore[untyped-decorator]
def _apply_prologue(x, norm_weight, norm_bias, lanes, inputs, mean, scale, kind: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns lanes of the norm or activation of a row, in float32; `x` points to the row's first number."""
    value = tl.load(x + lanes, mask=lanes < inputs, other=0.0).to(tl.float32)
    if kind == NORM:
        gain = tl.load(norm_weight + lanes, mask=lanes < inputs, other=0.0).to(tl.float32)
        shift = tl.load(norm_bias + lanes, mask=lanes < inputs, other=0.0).to(tl.float32)
        value = (value - mean) * scale * gain + shift
    if kind == GELU_TANH:  # (1 + tanh(u)) / 2 = sigmoid(2 u)
        value = value * tl.sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))
    if kind == GELU_ERF:
        value = value * 0.5 * (1.0 + tl.erf(value * 0.7071067811865476))
    return value.to(x.dtype.element_ty).to(tl.float32)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=SIZES[1:], do_not_specialize_on_alignment=["weights", "z"]
)
def _prepare(  # type: ignore[no-untyped-def]
    x,
    norm_weight,
    norm_bias,
    a,
    weights,
    h,
    z,
    inputs,
    rank,
    num_slots,
    epsilon,
    kind: tl.constexpr,
    block_row: tl.constexpr,
    block_in: tl.constexpr,
    block_rank: tl.constexpr,
    block_slots: tl.constexpr,
):
    row, part = tl.program_id(0), tl.program_id(1)
    x += row * inputs
    mean, scale = 0.0, 1.0
    if kind == NORM:
        whole = tl.arange(0, block_row)
        total = tl.load(x + whole, mask=whole < inputs, other=0.0).to(tl.float32)
        mean = tl.sum(total, 0) / inputs
        centred = tl.where(whole < inputs, total - mean, 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / inputs + epsilon)
    if (kind != NONE) & (part == tl.num_programs(1) - 1):  # which writes what the others compute for themselves
        for start in range(0, inputs, block_in):
            lanes = start + tl.arange(0, block_in)
            value = _apply_prologue(x, norm_weight, norm_bias, lanes, inputs, mean, scale, kind)
            tl.store(h + row * inputs + lanes, value.to(h.dtype.element_ty), mask=lanes < inputs)
    if weights is not None:
        ranks, slots = part * block_rank + tl.arange(0, block_rank), tl.arange(0, block_slots)
        own = tl.load(weights + row * num_slots + slots, mask=slots < num_slots, other=0.0)
        own = tl.where(part * block_rank < rank, own, 0.0)
        slot = -1
        for _ in range(tl.sum((own != 0.0).to(tl.int32), 0)):
            slot = tl.min(tl.where((own != 0.0) & (slots > slot), slots, block_slots), 0)
            weight = tl.sum(tl.where(slots == slot, own, 0.0), 0)
            first = (slot * rank + ranks).to(tl.int64)[:, None] * inputs
            products = tl.zeros([block_rank, block_in], tl.float32)
            for start in range(0, inputs, block_in):
                lanes = start + tl.arange(0, block_in)
                value = _apply_prologue(x, norm_weight, norm_bias, lanes, inputs, mean, scale, kind)
                is_inside = (ranks < rank)[:, None] & (lanes < inputs)[None, :]
                factor = tl.load(a + first + lanes[None, :], mask=is_inside, other=0.0).to(tl.float32)
                products += factor * value[None, :]
            tl.store(z + (row * num_slots + slot) * rank + ranks, tl.sum(products, 1) * weight, mask=ranks < rank)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=SIZES, do_not_specialize_on_alignment=["weights", "z"]
)
def _project(  # type: ignore[no-untyped-def]
    h,
    weight,
    bias,
    z,
    b_t,
    weights,
    residual,
    y,
    rows,
    inputs,
    outputs,
    rank,
    num_slots,
    block_rows: tl.constexpr,
    block_in: tl.constexpr,
    block_out: tl.constexpr,
    block_rank: tl.constexpr,
    block_slots: tl.constexpr,
):
    row, columns = tl.arange(0, block_rows), tl.program_id(0) * block_out + tl.arange(0, block_out)
    is_row, is_column = row < rows, columns < outputs
    total = tl.zeros([block_rows, block_out], tl.float32)
    for start in range(0, inputs, block_in):
        lanes = start + tl.arange(0, block_in)
        is_lane = lanes < inputs
        left = tl.load(h + row[:, None] * inputs + lanes[None, :], mask=is_row[:, None] & is_lane[None, :], other=0.0)
        is_inside = is_column[None, :] & is_lane[:, None]
        right = tl.load(weight + columns[None, :] * inputs + lanes[:, None], mask=is_inside, other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    total += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    offsets, is_inside = row[:, None] * outputs + columns[None, :], is_row[:, None] & is_column[None, :]
    if residual is not None:
        total += tl.load(residual + offsets, mask=is_inside, other=0.0).to(tl.float32)
    if weights is not None:
        slots = tl.arange(0, block_slots)
        is_slot = is_row[:, None] & (slots < num_slots)[None, :]
        own = tl.load(weights + row[:, None] * num_slots + slots[None, :], mask=is_slot, other=0.0)
        slot = tl.full([block_rows], -1, tl.int32)
        for _ in range(tl.max(tl.sum((own != 0.0).to(tl.int32), 1), 0)):  # each row's first slot, each row's second
            is_left = (own != 0.0) & (slots[None, :] > slot[:, None])
            slot = tl.min(tl.where(is_left, slots[None, :], block_slots), 1)
            for start in range(0, rank, block_rank):
                ranks = start + tl.arange(0, block_rank)
                is_rank = (slot < num_slots)[:, None] & (ranks < rank)[None, :]
                shrunk = tl.load(z + (row * num_slots + slot)[:, None] * rank + ranks[None, :], mask=is_rank, other=0.0)
                first = (slot[:, None] * rank + ranks[None, :]).to(tl.int64) * outputs
                is_factor = is_rank[:, :, None] & is_column[None, None, :]
                factor = tl.load(b_t + first[:, :, None] + columns[None, None, :], mask=is_factor, other=0.0)
                total += tl.sum(shrunk[:, :, None] * factor.to(tl.float32), 1)
    tl.store(y + offsets, total.to(y.dtype.element_ty), mask=is_inside)


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    qkv,
    stored_keys,
    stored_values,
    lengths,
    attended,
    heads,
    width,
    capacity,
    scale,
    row_stride,
    head_stride,
    block_keys: tl.constexpr,
    block_width: tl.constexpr,
    stages: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    lanes = tl.arange(0, block_width)
    is_lane = lanes < width
    own = qkv + (row * 3 * heads + head) * width + lanes
    length = tl.load(lengths + row)
    q = tl.load(own, mask=is_lane, other=0.0).to(tl.float32) * scale
    key = tl.load(own + heads * width, mask=is_lane, other=0.0)
    value = tl.load(own + 2 * heads * width, mask=is_lane, other=0.0)
    first = row.to(tl.int64) * row_stride + head * head_stride
    is_kept = lanes < tl.where(length < capacity, width, 0)
    tl.store(stored_keys + first + length * width + lanes, key, mask=is_kept)
    tl.store(stored_values + first + length * width + lanes, value, mask=is_kept)
    score = tl.sum(q * key.to(tl.float32), 0)  # of the new token: what was stored is not read again
    # a sum for each key of a block, so that nothing waits for a reduction before the end, and loads run ahead
    largest = tl.zeros([block_keys], tl.float32) + score
    normaliser, total = tl.zeros([block_keys], tl.float32), tl.zeros([block_keys, block_width], tl.float32)
    for start in tl.range(0, length, block_keys, num_stages=stages):
        positions = start + tl.arange(0, block_keys)
        offsets = first + positions[:, None] * width + lanes[None, :]
        is_inside = (positions < length)[:, None] & is_lane[None, :]
        keys = tl.load(stored_keys + offsets, mask=is_inside, other=0.0)
        values = tl.load(stored_values + offsets, mask=is_inside, other=0.0)
        scores = tl.sum(keys.to(tl.float32) * q[None, :], 1)
        scores = tl.where(positions < length, scores, float("-inf"))
        larger = tl.maximum(largest, scores)
        shares, kept = tl.exp(scores - larger), tl.exp(largest - larger)
        total = total * kept[:, None] + values.to(tl.float32) * shares[:, None]
        normaliser, largest = normaliser * kept + shares, larger
    most = tl.max(largest, 0)
    kept, share = tl.exp(largest - most), tl.exp(score - most)
    result = tl.sum(total * kept[:, None], 0) + value.to(tl.float32) * share
    result = result / (tl.sum(normaliser * kept, 0) + share)
    pointers = attended + (row * heads + head) * width + lanes
    tl.store(pointers, result.to(attended.dtype.element_ty), mask=is_lane)


def prepare(x: Tensor, prologue: Prologue, factors: SlotFactors | None) -> tuple[Tensor, Tensor | None]:
    """Returns the input of a projection, and its products with A of each row's adapters.

    Args:
        x: `[rows, in]`, contiguous.
        prologue: the norm or activation in front of the projection.
        factors: the adapters of the projection.

    Returns:
        `prologue(x)`, `[rows, in]`; and the products times the weights, `[rows, slots, rank]` in float32, of which
        those of slots that a row does not use are not written.
    """
    kind, (rows, inputs) = _kind_of(prologue), x.shape
    if factors is None and kind == NONE.value:
        return x, None
    norm = prologue if isinstance(prologue, LayerNorm) else None
    slots, rank = (1, 0) if factors is None else factors.lora_a.shape[:2]
    h = x if kind == NONE.value else torch.empty_like(x)
    z = None if factors is None else x.new_empty(rows, slots, rank, dtype=torch.float32)
    _prepare[(rows, triton.cdiv(rank, BLOCK_RANK) + (kind != NONE.value))](
        x,
        None if norm is None else norm.weight,
        None if norm is None else norm.bias,
        None if factors is None else factors.lora_a,
        None if factors is None else factors.weights,
        h,
        z,
        inputs,
        rank,
        slots,
        0.0 if norm is None else norm.eps,
        kind=kind,
        block_row=triton.next_power_of_2(inputs),
        block_in=min(MOST_LANES, triton.next_power_of_2(inputs)),
        block_rank=BLOCK_RANK,
        block_slots=max(LEAST_SLOTS, triton.next_power_of_2(slots)),
        num_warps=4 if inputs <= 1024 else 8,
    )
    return h, z


def project(
    h: Tensor, linear: Linear, factors: SlotFactors | None, z: Tensor | None, residual: Tensor | None = None
) -> Tensor:
    """Returns the projection of what `prepare` returned, plus the adapters' updates and a residual, `[rows, out]`."""
    (rows, inputs), outputs = h.shape, len(linear.weight)
    y = h.new_empty(rows, outputs)
    slots, rank = (1, 0) if factors is None else factors.lora_a.shape[:2]
    block_rows = max(LEAST_ROWS, triton.next_power_of_2(rows))
    _project[(triton.cdiv(outputs, BLOCK_OUT),)](
        h,
        linear.weight,
        linear.bias,
        z,
        None if factors is None else factors.lora_b_t,
        None if factors is None else factors.weights,
        residual,
        y,
        rows,
        inputs,
        outputs,
        rank,
        slots,
        block_rows=block_rows,
        block_in=BLOCK_BYTES // h.element_size(),
        block_out=BLOCK_OUT,
        block_rank=min(MOST_RANKS, max(2, triton.next_power_of_2(rank))),
        block_slots=max(LEAST_SLOTS, triton.next_power_of_2(slots)),
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    return y


def attend(qkv: Tensor, stored: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Stores the keys and values of one token per row, and returns what it attends to, `[rows, heads * head_width]`.

    Args:
        qkv: `[rows, 3, heads, head_width]`, contiguous.
        stored: keys and values of a layer, `[2, rows, heads, capacity, head_width]`, of which the last two dimensions
            are contiguous.
        lengths: tokens that each row holds, `[rows]`: the new one's position.
        scale: of the scores.
    """
    rows, _, heads, width = qkv.shape
    capacity = stored.shape[3]
    attended = qkv.new_empty(rows, heads * width)
    _attend[(rows, heads)](
        qkv,
        stored[0],
        stored[1],
        lengths,
        attended,
        heads,
        width,
        capacity,
        scale,
        stored.stride(1),
        stored.stride(2),
        block_keys=BLOCK_KEYS,
        block_width=triton.next_power_of_2(width),
        stages=3,
        num_warps=4,
    )
    return attended


def _kind_of(prologue: Prologue) -> int:
    if prologue is None:
        return int(NONE.value)
    if isinstance(prologue, LayerNorm):
        return int(NORM.value)
    return int(GELU_TANH.value if prologue.approximate == "tanh" else GELU_ERF.value)
