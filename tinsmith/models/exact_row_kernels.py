"""Triton kernels in which a row's bits depend on that row alone: norms, rotated heads, normalizers of logits.

As in `exact_kernels`, a sum has one order, and no multiplication is contracted into an addition. Knows tensors only.
"""

import triton
import triton.language as tl

from tinsmith.models.exact_launching import in_turn


@triton.jit
def norm(x_ptr, weight_ptr, y_ptr, width, eps, BLOCK: tl.constexpr):
    """The RMS norm of a row."""
    in_turn()
    start = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + start + column, inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / width + eps)
    weight = tl.load(weight_ptr + column, inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + start + column, x * scale * weight, inside)


@triton.jit
def normalizers(logits_ptr, inverse_ptr, most_ptr, log_total_ptr, stride, width, BLOCK: tl.constexpr):
    """The largest logit of a row, and log Σ exp((logit − it) · inverse)."""
    in_turn()
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    column = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, width, BLOCK):
        logits = tl.load(logits_ptr + start + column, start + column < width, other=float("-inf"))
        highest = tl.maximum(highest, logits)
    most = tl.max(highest)
    inverse = tl.load(inverse_ptr + row)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        inside = start + column < width
        logits = tl.load(logits_ptr + start + column, inside, other=0.0)
        total += tl.where(inside, tl.exp((logits - most) * inverse), 0.0)
    tl.store(most_ptr + row, most)
    tl.store(log_total_ptr + row, tl.log(tl.sum(total)))


@triton.jit
def _halves(ptr, place, HALF: tl.constexpr, column, mask):
    """fp32 of both halves of heads."""
    low = tl.load(ptr + place + column, mask, other=0.0).to(tl.float32)
    return low, tl.load(ptr + place + HALF + column, mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def turn(
    heads_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    query_weight_ptr,
    key_weight_ptr,
    keys_ptr,
    values_ptr,
    slots_ptr,
    heads_stride,
    out_stride,
    angle_stride,
    key_stride,
    value_stride,
    rows,
    eps,
    NORMED: tl.constexpr,
    STORES: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Queries and keys, normalised if `NORMED`, and rotated; if `STORES`, keys and values go to their rows of caches.

    Programs: rows, `TILE_HEADS` / `SHARE` of them, and their heads, `SHARE` of them, of queries, then of keys, then (if
    `STORES`) of values.
    """
    in_turn()
    index = tl.arange(0, TILE_HEADS)
    row = (tl.program_id(0) * (TILE_HEADS // SHARE) + index // SHARE).to(tl.int64)[:, None]
    head = tl.program_id(1) * SHARE
    within = (index % SHARE)[:, None] * (2 * HALF)
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < HALF)
    low, high = _halves(heads_ptr, row * heads_stride + head * (2 * HALF) + within, HALF, column, mask)
    if head < HEADS + KV_HEADS:
        cos = tl.load(cos_ptr + row * angle_stride + column, mask, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + row * angle_stride + column, mask, other=0.0).to(tl.float32)
        if NORMED:
            if head < HEADS:
                low_weight, high_weight = _halves(query_weight_ptr, within * 0, HALF, column, mask)
            else:
                low_weight, high_weight = _halves(key_weight_ptr, within * 0, HALF, column, mask)
            scale = tl.rsqrt(tl.sum(low * low + high * high, 1) / (2 * HALF) + eps)[:, None]
            low = low * scale * low_weight
            high = high * scale * high_weight
        turned_low, turned_high = low * cos - high * sin, high * cos + low * sin
        place = row * out_stride + head * (2 * HALF) + within + column
        if STORES:
            if head >= HEADS:
                slot = tl.load(slots_ptr + row, row < rows, other=0)
                place = slot * key_stride + (head - HEADS) * (2 * HALF) + within + column
                tl.store(keys_ptr + place, turned_low, mask)
                tl.store(keys_ptr + place + HALF, turned_high, mask)
            else:
                tl.store(out_ptr + place, turned_low, mask)
                tl.store(out_ptr + place + HALF, turned_high, mask)
        else:
            tl.store(out_ptr + place, turned_low, mask)
            tl.store(out_ptr + place + HALF, turned_high, mask)
    elif STORES:
        slot = tl.load(slots_ptr + row, row < rows, other=0)
        place = slot * value_stride + (head - HEADS - KV_HEADS) * (2 * HALF) + within + column
        tl.store(values_ptr + place, low, mask)
        tl.store(values_ptr + place + HALF, high, mask)
