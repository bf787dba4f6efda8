"""Triton kernels of causal attention in which a row's bits depend on its own sequence alone, forward and backward.

Keys go by in blocks of one size from a sequence's first on, and come in chunks of a number of blocks. A row keeps the
maximum, the sum and the weighted values of a chunk, and those of all chunks are merged in order: whether one program
sees all chunks (training, prompts, many sequences) or each sees some (few sequences). What is masked adds exactly zero,
so neither the rows beside it nor what fills up a tile changes a bit. A tile's rows are some positions of one sequence,
in all query heads that share a key/value head. Keys and values lie row by row, or in the blocks of a paged cache.

Shapes: `M` rows of a tile, `K` keys of a block, `d` head dimension. A table has, for each tile, its first row, its
positions, and the row of the table of blocks; positions of the first rows come beside it.
"""

import triton
import triton.language as tl

from tinsmith.models.exact_launching import in_turn

TILE = tl.constexpr(4)
ROWS = tl.constexpr(64)  # of a tile: position by position, the heads of one after the other
KEYS = tl.constexpr(64)
CHUNK = tl.constexpr(512)  # keys
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _dot(left, right, total):
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def _block(ptr, cells, stride, column, inside, WIDTH: tl.constexpr):
    """[N, d] of the rows `cells`; zeros where not `inside`."""
    ptrs = ptr + cells[:, None] * stride + column[None, :]
    return tl.load(ptrs, inside[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def _cells(key, inside, table_ptr, base, BLOCK_SIZE: tl.constexpr):
    """Where the keys of these positions lie."""
    if BLOCK_SIZE == 0:
        return base + key
    block = tl.load(table_ptr + key // BLOCK_SIZE, inside, other=0).to(tl.int64)
    return block * BLOCK_SIZE + key % BLOCK_SIZE


@triton.jit
def _look(
    q,
    keys_ptr,
    values_ptr,
    table_ptr,
    base,
    begin,
    end,
    position,
    key_stride,
    value_stride,
    factor,
    WINDOW: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """(maximum [M], sum of weights [M], weighted values [M, d]) of the keys `begin` to `end`."""
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, COLUMNS), tl.float32)
    column = tl.arange(0, COLUMNS)
    for first in range(begin, end, KEYS):
        key = first + tl.arange(0, KEYS)
        inside = key < end
        cells = _cells(key, inside, table_ptr, base, BLOCK_SIZE)
        k = _block(keys_ptr, cells, key_stride, column, inside, WIDTH)
        v = _block(values_ptr, cells, value_stride, column, inside, WIDTH)
        scores = _dot(q, tl.trans(k), tl.zeros((ROWS, KEYS), tl.float32)) * factor
        seen = inside[None, :] & (key[None, :] <= position[:, None])
        if WINDOW > 0:
            seen = seen & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        peak = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - peak[:, None])
        fading = tl.exp2(most - peak)
        total = total * fading + tl.sum(weights, 1)
        result = _dot(weights.to(v.dtype), v, result * fading[:, None])
        most = higher
    return most, total, result


@triton.jit
def _fadings(most, other):
    """(the higher maximum, the factors of what came with either)."""
    higher = tl.maximum(most, other)
    peak = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, tl.exp2(most - peak), tl.exp2(other - peak)


@triton.jit
def _tile(tiles_ptr, positions_ptr, SHARING: tl.constexpr):
    """(first row, its position, positions, table; of each row the offset of its position, its head, whether it is)."""
    entry_ptr = tiles_ptr + tl.program_id(0) * TILE
    first_row = tl.load(entry_ptr)
    count = tl.load(entry_ptr + 1)
    first = tl.load(positions_ptr + tl.program_id(0)).to(tl.int32)
    index = tl.arange(0, ROWS)
    offset = index // SHARING
    head = tl.program_id(1) * SHARING + index % SHARING
    return first_row, first, count, tl.load(entry_ptr + 2), offset, head, offset < count


@triton.jit(do_not_specialize=["sums_stride"])
def attend(
    q_ptr,
    keys_ptr,
    values_ptr,
    tables_ptr,
    tiles_ptr,
    positions_ptr,
    out_ptr,
    sums_ptr,
    q_stride,
    key_stride,
    value_stride,
    table_stride,
    out_stride,
    sums_stride,
    scaling,
    SHARING: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEEPS: tl.constexpr,
):
    """A tile's rows over their sequence; each row's log2 Σ is kept beside it if `KEEPS`. Programs: tiles, kv heads."""
    in_turn()
    first_row, first, count, table, offset, head, wanted = _tile(tiles_ptr, positions_ptr, SHARING)
    row = (first_row + offset).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    q_ptrs = q_ptr + row[:, None] * q_stride + head[:, None] * WIDTH + column[None, :]
    mask = wanted[:, None] & (column < WIDTH)[None, :]
    q = tl.load(q_ptrs, mask, other=0.0)
    end = first + count
    lowest = 0
    if WINDOW > 0:
        lowest = tl.maximum(0, first - WINDOW + 1)
    keys_ptr += tl.program_id(1) * WIDTH
    values_ptr += tl.program_id(1) * WIDTH
    table_ptr = tables_ptr + table.to(tl.int64) * table_stride
    base = (first_row - first).to(tl.int64)
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, COLUMNS), tl.float32)
    for chunk in range(lowest // CHUNK, tl.cdiv(end, CHUNK)):
        most_c, total_c, result_c = _look(
            q,
            keys_ptr,
            values_ptr,
            table_ptr,
            base,
            tl.maximum(chunk * CHUNK, lowest // KEYS * KEYS),
            tl.minimum(end, (chunk + 1) * CHUNK),
            first + offset,
            key_stride,
            value_stride,
            scaling * _LOG2_E,
            WINDOW,
            WIDTH,
            COLUMNS,
            BLOCK_SIZE,
        )
        most, fading, gain = _fadings(most, most_c)
        total = total * fading + total_c * gain
        result = result * fading[:, None] + result_c * gain[:, None]
    total = tl.where(wanted, total, 1.0)
    out = (result / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * out_stride + head[:, None] * WIDTH + column[None, :], out, mask)
    if KEEPS:
        tl.store(sums_ptr + head * sums_stride + row, most + tl.log2(total), wanted)


@triton.jit
def _heads_of(values, HEADS: tl.constexpr, COLUMNS: tl.constexpr):
    """The first rows [HEADS, COLUMNS] of a tile [M, COLUMNS], which are one position's."""
    rest: tl.constexpr = ROWS // HEADS
    parts = tl.reshape(values, (rest, HEADS, COLUMNS))
    return tl.sum(tl.where((tl.arange(0, rest) == 0)[:, None, None], parts, 0.0), 0)


@triton.jit(do_not_specialize=["chunks"])
def attend_rows(
    q_ptr,
    keys_ptr,
    values_ptr,
    tables_ptr,
    positions_ptr,
    out_ptr,
    sums_ptr,
    q_stride,
    key_stride,
    value_stride,
    table_stride,
    chunks,
    scaling,
    SHARING: tl.constexpr,
    HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SHARED: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One row over its own sequence in the cache, as a tile of which `SHARING` rows are used.

    With one part the output is final; otherwise a part has every `PARTS`th chunk, and stores what `join` takes, of
    `chunks` chunks at most. Programs: rows, key/value heads, parts. `SHARED`: `SHARING`, up to a power of two.
    """
    in_turn()
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    q_ptrs = q_ptr + row * q_stride + (tl.program_id(1) * SHARING + index)[:, None] * WIDTH + column[None, :]
    q = tl.load(q_ptrs, (index < SHARING)[:, None] & (column < WIDTH)[None, :], other=0.0)
    position = tl.load(positions_ptr + row).to(tl.int32)
    lowest = 0
    if WINDOW > 0:
        lowest = tl.maximum(0, position - WINDOW + 1)
    keys_ptr += tl.program_id(1) * WIDTH
    values_ptr += tl.program_id(1) * WIDTH
    used = tl.arange(0, SHARED)[:, None]
    head = tl.program_id(1) * SHARING + used
    mask = (used < SHARING) & (column < WIDTH)[None, :]
    most = tl.full((SHARED, 1), float("-inf"), tl.float32)
    total = tl.zeros((SHARED, 1), tl.float32)
    result = tl.zeros((SHARED, COLUMNS), tl.float32)
    for chunk in range(lowest // CHUNK + tl.program_id(2), tl.cdiv(position + 1, CHUNK), PARTS):
        most_c, total_c, result_c = _look(
            q,
            keys_ptr,
            values_ptr,
            tables_ptr + row * table_stride,
            0,
            tl.maximum(chunk * CHUNK, lowest // KEYS * KEYS),
            tl.minimum(position + 1, (chunk + 1) * CHUNK),
            position + index * 0,
            key_stride,
            value_stride,
            scaling * _LOG2_E,
            WINDOW,
            WIDTH,
            COLUMNS,
            BLOCK_SIZE,
        )
        most_c = _heads_of(most_c[:, None], SHARED, 1)
        total_c = _heads_of(total_c[:, None], SHARED, 1)
        result_c = _heads_of(result_c, SHARED, COLUMNS)
        if PARTS == 1:
            most, fading, gain = _fadings(most, most_c)
            total = total * fading + total_c * gain
            result = result * fading + result_c * gain
        else:
            cell = (row * HEADS + head) * chunks + chunk - lowest // CHUNK
            tl.store(out_ptr + cell * WIDTH + column[None, :], result_c, mask)
            tl.store(sums_ptr + cell * 2, most_c, used < SHARING)
            tl.store(sums_ptr + cell * 2 + 1, total_c, used < SHARING)
    if PARTS == 1:
        out = (result / total).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (row * HEADS + head) * WIDTH + column[None, :], out, mask)


@triton.jit(do_not_specialize=["chunks"])
def join(
    parts_ptr,
    sums_ptr,
    positions_ptr,
    out_ptr,
    chunks,
    HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One head of one row from its chunks. Programs: rows, heads."""
    in_turn()
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + row).to(tl.int32)
    lowest = 0
    if WINDOW > 0:
        lowest = tl.maximum(0, position - WINDOW + 1)
    cell = (row * HEADS + tl.program_id(1)) * chunks
    column = tl.arange(0, COLUMNS)
    most = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    result = tl.zeros((COLUMNS,), tl.float32)
    one = tl.arange(0, 1)
    for chunk in range(position // CHUNK + 1 - lowest // CHUNK):
        most_c = tl.load(sums_ptr + (cell + chunk) * 2 + one)
        total_c = tl.load(sums_ptr + (cell + chunk) * 2 + 1 + one)
        result_c = tl.load(parts_ptr + (cell + chunk) * WIDTH + column, column < WIDTH, other=0.0)
        most, fading, gain = _fadings(most, most_c)
        total = total * fading + total_c * gain
        result = result * fading + result_c * gain
    out = (result / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (row * HEADS + tl.program_id(1)) * WIDTH + column, out, column < WIDTH)


@triton.jit
def _weights(q, k, sums, key, inside, position, factor, WINDOW: tl.constexpr):
    """The weights [M, K] of a block of keys."""
    scores = _dot(q, tl.trans(k), tl.zeros((ROWS, KEYS), tl.float32)) * factor
    seen = inside[None, :] & (key[None, :] <= position[:, None])
    if WINDOW > 0:
        seen = seen & (key[None, :] > position[:, None] - WINDOW)
    return tl.where(seen, tl.exp2(scores - sums[:, None]), 0.0)


@triton.jit(do_not_specialize=["sums_stride"])
def attend_backward_queries(
    q_ptr,
    keys_ptr,
    values_ptr,
    tiles_ptr,
    positions_ptr,
    out_ptr,
    dout_ptr,
    sums_ptr,
    deltas_ptr,
    dq_ptr,
    q_stride,
    key_stride,
    value_stride,
    out_stride,
    sums_stride,
    scaling,
    SHARING: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradient in a tile's queries; and Σ out · dout of its rows, for `attend_backward_keys`."""
    in_turn()
    first_row, first, count, _, offset, head, wanted = _tile(tiles_ptr, positions_ptr, SHARING)
    row = (first_row + offset).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    mask = wanted[:, None] & (column < WIDTH)[None, :]
    place = head[:, None] * WIDTH + column[None, :]
    q = tl.load(q_ptr + row[:, None] * q_stride + place, mask, other=0.0)
    out = tl.load(out_ptr + row[:, None] * out_stride + place, mask, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + row[:, None] * out_stride + place, mask, other=0.0)
    sums = tl.load(sums_ptr + head * sums_stride + row, wanted, other=0.0)
    deltas = tl.sum(out * dout.to(tl.float32), 1)
    tl.store(deltas_ptr + head * sums_stride + row, deltas, wanted)
    keys_ptr += tl.program_id(1) * WIDTH
    values_ptr += tl.program_id(1) * WIDTH
    base = (first_row - first).to(tl.int64)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(0, first - WINDOW + 1) // KEYS * KEYS
    dq = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(begin, first + count, KEYS):
        key = start + tl.arange(0, KEYS)
        inside = key < first + count
        k = _block(keys_ptr, base + key, key_stride, column, inside, WIDTH)
        v = _block(values_ptr, base + key, value_stride, column, inside, WIDTH)
        weights = _weights(q, k, sums, key, inside, first + offset, scaling * _LOG2_E, WINDOW)
        dweights = _dot(dout, tl.trans(v), tl.zeros((ROWS, KEYS), tl.float32))
        dq = _dot((weights * (dweights - deltas[:, None])).to(k.dtype), k, dq)
    tl.store(dq_ptr + row[:, None] * out_stride + place, dq * scaling, mask)


@triton.jit(do_not_specialize=["sums_stride", "dkey_stride"])
def attend_backward_keys(
    q_ptr,
    keys_ptr,
    values_ptr,
    tiles_ptr,
    dout_ptr,
    sums_ptr,
    deltas_ptr,
    dkeys_ptr,
    dvalues_ptr,
    q_stride,
    key_stride,
    value_stride,
    out_stride,
    sums_stride,
    dkey_stride,
    scaling,
    SHARING: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradients in a block of keys, and their values, from all rows that see them, in order.

    The table has each block's first row, its first position, and the length of its sequence. Programs: blocks of keys,
    key/value heads.
    """
    in_turn()
    entry_ptr = tiles_ptr + tl.program_id(0) * TILE
    first_row, first, length = tl.load(entry_ptr), tl.load(entry_ptr + 1), tl.load(entry_ptr + 2)
    base = (first_row - first).to(tl.int64)
    key = first + tl.arange(0, KEYS)
    inside = key < length
    column = tl.arange(0, COLUMNS)
    group = tl.program_id(1)
    k = _block(keys_ptr + group * WIDTH, base + key, key_stride, column, inside, WIDTH)
    v = _block(values_ptr + group * WIDTH, base + key, value_stride, column, inside, WIDTH)
    index = tl.arange(0, ROWS)
    head = group * SHARING + index % SHARING
    place = head[:, None] * WIDTH + column[None, :]
    step: tl.constexpr = ROWS // SHARING
    last = length
    if WINDOW > 0:
        last = tl.minimum(length, first + KEYS - 1 + WINDOW)
    dk = tl.zeros((KEYS, COLUMNS), tl.float32)
    dv = tl.zeros((KEYS, COLUMNS), tl.float32)
    for start in range(first // step * step, last, step):
        position = start + index // SHARING
        wanted = (position < length) & (index < step * SHARING)
        row = base + position
        mask = wanted[:, None] & (column < WIDTH)[None, :]
        q = tl.load(q_ptr + row[:, None] * q_stride + place, mask, other=0.0)
        dout = tl.load(dout_ptr + row[:, None] * out_stride + place, mask, other=0.0)
        sums = tl.load(sums_ptr + head * sums_stride + row, wanted, other=0.0)
        deltas = tl.load(deltas_ptr + head * sums_stride + row, wanted, other=0.0)
        weights = _weights(q, k, sums, key, inside & (key < length), position, scaling * _LOG2_E, WINDOW)
        weights = tl.where(wanted[:, None], weights, 0.0)
        dv = _dot(tl.trans(weights.to(dout.dtype)), dout, dv)
        dweights = _dot(dout, tl.trans(v), tl.zeros((ROWS, KEYS), tl.float32))
        dk = _dot(tl.trans((weights * (dweights - deltas[:, None])).to(q.dtype)), q, dk)
    cells = (base + key)[:, None] * dkey_stride + group * WIDTH + column[None, :]
    mask = inside[:, None] & (column < WIDTH)[None, :]
    tl.store(dkeys_ptr + cells, dk * scaling, mask)
    tl.store(dvalues_ptr + cells, dv, mask)
