"""Triton kernels in which a row's bits depend on that row alone: matrix products, adapters, gates.

A sum runs in one order, over all inputs, within one program: nothing is split by how many rows there are, nothing is
added atomically, and no multiplication is contracted into an addition (`exact_products` launches them so). How many
rows and columns a program has is free: a product's element is one chain of matrix instructions over the inputs, 16 at
a time, whatever lies beside it. That is no promise of the maker, so `exact` tries it on the device. Knows tensors only.

Shapes: `T` rows, `I` inputs, `O` outputs, `R` ranks of all layers of a group, `P` width of a feed-forward network.
Rows with adapters come in tiles: a table has the first row, the end and the rank of each, and addresses
beside it (A, and B of up to three layers; 0 where there is none).
"""

import triton
import triton.language as tl

from tinsmith.models.adapter_kernels import ADDRESSES, TILE, at
from tinsmith.models.exact_launching import in_turn


@triton.jit
def _dot(left, right, total):
    """total + left · right: fp32 factors as they are, not rounded to fewer bits."""
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def _product(
    program,
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    x_stride,
    weight_stride,
    residual_stride,
    y_stride,
    inputs,
    outputs,
    rows,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    FEW: tl.constexpr,
):
    """y = x Wᵀ + bias + residual, rounded once: one tile. Neighbouring programs share rows, `GROUP` tiles of them.

    With `FEW` rows those that are not there are not read; else the last stands in for them, which is faster.
    """
    row_tiles, column_tiles = tl.cdiv(rows, ROWS), tl.cdiv(outputs, COLUMNS)
    in_group = GROUP * column_tiles
    first_tile = program // in_group * GROUP
    height = tl.minimum(row_tiles - first_tile, GROUP)
    row = (first_tile + program % in_group % height) * ROWS + tl.arange(0, ROWS)
    column = program % in_group // height * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    inside_row, inside_column = row < rows, column < outputs
    x_ptrs = x_ptr + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * x_stride + depth[None, :]
    weight_ptrs = weight_ptr + tl.minimum(column, outputs - 1)[None, :] * weight_stride + depth[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, inputs, DEPTH):
        if EVEN:
            if FEW:
                x = tl.load(x_ptrs, inside_row[:, None], other=0.0)
            else:
                x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            x = tl.load(x_ptrs, depth[None, :] < inputs - start, other=0.0)
            weight = tl.load(weight_ptrs, depth[:, None] < inputs - start, other=0.0)
        total = _dot(x, weight, total)
        x_ptrs += DEPTH
        weight_ptrs += DEPTH
    if BIAS:
        total += tl.load(bias_ptr + column, inside_column, other=0.0).to(tl.float32)[None, :]
    wanted = inside_row[:, None] & inside_column[None, :]
    wide_row = row.to(tl.int64)[:, None]
    if RESIDUAL:
        residual_ptrs = residual_ptr + wide_row * residual_stride + column[None, :]
        total += tl.load(residual_ptrs, wanted, other=0.0).to(tl.float32)
    tl.store(y_ptr + wide_row * y_stride + column[None, :], total, wanted)


@triton.jit
def _tile(tiles_ptr, tile, ROWS: tl.constexpr, ALIGNED: tl.constexpr):
    """(rows [ROWS], which of them are the tile's [ROWS, 1], rank) of a tile."""
    entry_ptr = tiles_ptr + tile * TILE
    row = (tl.load(entry_ptr) + tl.arange(0, ROWS)).to(tl.int64)
    rank = tl.load(entry_ptr + 2)
    if ALIGNED:
        rank = tl.multiple_of(rank, 8)
    return row, (row < tl.load(entry_ptr + 1))[:, None], rank


@triton.jit
def _shrink(
    tile,
    block,
    x_ptr,
    z_ptr,
    tiles_ptr,
    addresses_ptr,
    scales_ptr,
    x_stride,
    z_stride,
    inputs,
    ALIGNED: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    DEPTH: tl.constexpr,
    NUMBER: tl.constexpr,
):
    """z = scale · x Aᵀ of all layers: of one tile, a block of ranks."""
    row, inside, rank = _tile(tiles_ptr, tile, ROWS, ALIGNED)
    address = tl.load(addresses_ptr + tile * ADDRESSES)
    ranks = rank * PARTS
    if (address != 0) & (block * RANKS < ranks):
        wanted = block * RANKS + tl.arange(0, RANKS)
        depth = tl.arange(0, DEPTH)
        x_ptrs = x_ptr + row[:, None] * x_stride + depth[None, :]
        a_ptrs = at(address, NUMBER, ALIGNED) + wanted[None, :] * inputs + depth[:, None]
        total = tl.zeros((ROWS, RANKS), tl.float32)
        for start in range(0, inputs, DEPTH):
            left = inputs - start
            x = tl.load(x_ptrs + start, inside & (depth[None, :] < left), other=0.0)
            a = tl.load(a_ptrs + start, (wanted[None, :] < ranks) & (depth[:, None] < left), other=0.0)
            total = _dot(x, a, total)
        total *= tl.load(scales_ptr + tile)
        tl.store(z_ptr + row[:, None] * z_stride + wanted[None, :], total, inside & (wanted[None, :] < ranks))


@triton.jit
def shrink(
    x_ptr,
    z_ptr,
    tiles_ptr,
    addresses_ptr,
    scales_ptr,
    x_stride,
    z_stride,
    inputs,
    ALIGNED: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    DEPTH: tl.constexpr,
    NUMBER: tl.constexpr,
):
    """`_shrink`. Programs: tiles, and blocks of ranks."""
    in_turn()
    _shrink(
        tl.program_id(0),
        tl.program_id(1),
        x_ptr,
        z_ptr,
        tiles_ptr,
        addresses_ptr,
        scales_ptr,
        x_stride,
        z_stride,
        inputs,
        ALIGNED,
        PARTS,
        ROWS,
        RANKS,
        DEPTH,
        NUMBER,
    )


@triton.jit(do_not_specialize=["rows", "tiles"])
def product(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    z_ptr,
    tiles_ptr,
    addresses_ptr,
    scales_ptr,
    x_stride,
    weight_stride,
    residual_stride,
    y_stride,
    z_stride,
    inputs,
    outputs,
    rows,
    tiles,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    FEW: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PARTS: tl.constexpr,
    RANKS: tl.constexpr,
    SHRINK_DEPTH: tl.constexpr,
    NUMBER: tl.constexpr,
):
    """y = x Wᵀ + bias + residual; if there are `RANK_BLOCKS`, what `shrink` does beside it, whose chains come first."""
    in_turn()
    program = tl.program_id(0)
    if program < tiles * RANK_BLOCKS:
        if RANK_BLOCKS > 0:
            _shrink(
                program // RANK_BLOCKS,
                program % RANK_BLOCKS,
                x_ptr,
                z_ptr,
                tiles_ptr,
                addresses_ptr,
                scales_ptr,
                x_stride,
                z_stride,
                inputs,
                ALIGNED,
                PARTS,
                ROWS,
                RANKS,
                SHRINK_DEPTH,
                NUMBER,
            )
    else:
        _product(
            program - tiles * RANK_BLOCKS,
            x_ptr,
            weight_ptr,
            bias_ptr,
            residual_ptr,
            y_ptr,
            x_stride,
            weight_stride,
            residual_stride,
            y_stride,
            inputs,
            outputs,
            rows,
            BIAS,
            RESIDUAL,
            ROWS,
            COLUMNS,
            DEPTH,
            GROUP,
            EVEN,
            FEW,
        )


@triton.jit
def _plus_share(
    total,
    z_ptr,
    z_stride,
    first,
    address,
    row,
    inside,
    rank,
    column,
    width,
    RANKS: tl.constexpr,
    NUMBER: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """total [N, C] + z Bᵀ of one layer, whose part of z begins at column `first`."""
    b_ptr = at(address, NUMBER, ALIGNED)
    for start in range(0, rank, RANKS):
        wanted = start + tl.arange(0, RANKS)
        known = wanted < rank
        z = tl.load(z_ptr + row[:, None] * z_stride + (first + wanted)[None, :], inside & known[None, :], other=0.0)
        b_ptrs = b_ptr + column[None, :] * rank + wanted[:, None]
        total = _dot(z, tl.load(b_ptrs, known[:, None] & (column < width)[None, :], other=0.0), total)
    return total


@triton.jit
def expand(
    z_ptr,
    y_ptr,
    tiles_ptr,
    addresses_ptr,
    z_stride,
    y_stride,
    width0,
    width1,
    width2,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    NUMBER: tl.constexpr,
):
    """y += z Bᵀ, layer by layer. Programs: tiles, and blocks of columns, none of two layers."""
    in_turn()
    row, inside, rank = _tile(tiles_ptr, tl.program_id(0), ROWS, ALIGNED)
    blocks0 = tl.cdiv(width0, COLUMNS)
    blocks01 = blocks0 + tl.cdiv(width1, COLUMNS)
    block = tl.program_id(1)
    if block < blocks0:
        part, width, first, within = 0, width0, width0 * 0, block * COLUMNS
    elif block < blocks01:
        part, width, first, within = 1, width1, width0, (block - blocks0) * COLUMNS
    else:
        part, width, first, within = 2, width2, width0 + width1, (block - blocks01) * COLUMNS
    address = tl.load(addresses_ptr + tl.program_id(0) * ADDRESSES + 1 + part)
    if address == 0:
        return
    column = within + tl.arange(0, COLUMNS)
    mask = inside & (column < width)[None, :]
    y_ptrs = y_ptr + row[:, None] * y_stride + (first + column)[None, :]
    total = tl.load(y_ptrs, mask, other=0.0).to(tl.float32)
    total = _plus_share(
        total, z_ptr, z_stride, part * rank, address, row, inside, rank, column, width, RANKS, NUMBER, ALIGNED
    )
    tl.store(y_ptrs, total, mask)


@triton.jit
def swiglu(
    gate_up_ptr,
    out_ptr,
    z_ptr,
    tiles_ptr,
    addresses_ptr,
    stride,
    z_stride,
    width,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    NUMBER: tl.constexpr,
):
    """silu(gate) · up, with the adapters' shares z Bᵀ added to both. Programs: tiles, and blocks of columns."""
    in_turn()
    row, inside, rank = _tile(tiles_ptr, tl.program_id(0), ROWS, ALIGNED)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = inside & (column < width)[None, :]
    ptrs = gate_up_ptr + row[:, None] * stride + column[None, :]
    gate = tl.load(ptrs, mask, other=0.0).to(tl.float32)
    up = tl.load(ptrs + width, mask, other=0.0).to(tl.float32)
    gate_address = tl.load(addresses_ptr + tl.program_id(0) * ADDRESSES + 1)
    up_address = tl.load(addresses_ptr + tl.program_id(0) * ADDRESSES + 2)
    if gate_address != 0:
        gate = _plus_share(
            gate, z_ptr, z_stride, 0, gate_address, row, inside, rank, column, width, RANKS, NUMBER, ALIGNED
        )
        up = _plus_share(
            up, z_ptr, z_stride, rank, up_address, row, inside, rank, column, width, RANKS, NUMBER, ALIGNED
        )
    tl.store(out_ptr + row[:, None] * width + column[None, :], gate / (1 + tl.exp(-gate)) * up, mask)
