"""Triton kernels that apply the adapters of a packed batch, and gather their gradients: one launch for all tenants.

Each tenant's matrices are read, and gradients added to, where they lie: tables of addresses say where. Ranks may
differ. For CUDA devices; imported where one is used. `adapter_table` makes the tables and calls these.

Shapes: `T` rows of a batch, `I` inputs and `O` outputs of a group of linear layers, `R` ranks of all layers of a group.
Rows come in tiles: tile n is rows `tile_rows[n]` to `tile_ends[n]`, all of adapter `tile_adapters[n]`. A group's
addresses are those of A (the stack of all layers) and of each layer's B, 0 where an adapter has none.
"""

import triton
import triton.language as tl

ADDRESSES = tl.constexpr(4)  # of an adapter in a group: A, and B of up to three layers


@triton.jit
def _rank(ranks_ptr, adapter, ALIGNED: tl.constexpr):
    rank = tl.load(ranks_ptr + adapter)
    if ALIGNED:
        rank = tl.multiple_of(rank, 8)
    return rank


@triton.jit
def _at(address, like_ptr, ALIGNED: tl.constexpr):
    """The address as a pointer to numbers such as `like_ptr`'s."""
    ptr = address.to(tl.pointer_type(like_ptr.dtype.element_ty))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def _part(block, width0, width1, width2, BLOCK: tl.constexpr):
    """(layer, its width, its first column, the block's first column within it) of a block of all layers' columns."""
    blocks0 = tl.cdiv(width0, BLOCK)
    blocks01 = blocks0 + tl.cdiv(width1, BLOCK)
    if block < blocks0:
        part, width, first, within = 0, width0, width0 * 0, block * BLOCK
    elif block < blocks01:
        part, width, first, within = 1, width1, width0, (block - blocks0) * BLOCK
    else:
        part, width, first, within = 2, width2, width0 + width1, (block - blocks01) * BLOCK
    return part, width, first, within


@triton.jit
def shrink(
    x_ptr,
    z_ptr,
    tile_rows_ptr,
    tile_ends_ptr,
    tile_adapters_ptr,
    addresses_ptr,
    ranks_ptr,
    scales_ptr,
    x_stride,
    z_stride,
    width0,
    width1,
    width2,
    OF_A: tl.constexpr,
    ALIGNED: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """z = scale · x Aᵀ of all layers; or, of the gradient in the outputs, z = scale · x B, layer by layer.

    Programs: tiles, blocks of ranks, and layers (one if `OF_A`).
    """
    tile, part = tl.program_id(0), tl.program_id(2)
    adapter = tl.load(tile_adapters_ptr + tile)
    rank = _rank(ranks_ptr, adapter, ALIGNED)
    slot = 0 if OF_A else 1 + part
    address = tl.load(addresses_ptr + adapter * ADDRESSES + slot)
    wanted = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    ranks = rank * PARTS if OF_A else rank
    if (address == 0) | (tl.program_id(1) * RANKS >= ranks):
        return
    width = width0
    first = 0
    if part == 1:
        width = width1
        first = width0
    if part == 2:
        width = width2
        first = width0 + width1
    matrix_ptr = _at(address, x_ptr, ALIGNED)
    row = tl.load(tile_rows_ptr + tile) + tl.arange(0, ROWS)
    inside = (row < tl.load(tile_ends_ptr + tile))[:, None]
    depth = tl.arange(0, DEPTH)
    x_ptrs = x_ptr + row.to(tl.int64)[:, None] * x_stride + first + depth[None, :]
    if OF_A:
        matrix_ptrs = matrix_ptr + wanted[None, :] * width + depth[:, None]
        step = 1
    else:
        matrix_ptrs = matrix_ptr + depth[:, None] * rank + wanted[None, :]
        step = rank
    total = tl.zeros((ROWS, RANKS), tl.float32)
    for start in range(0, width, DEPTH):
        left = width - start
        x = tl.load(x_ptrs + start, inside & (depth[None, :] < left), other=0.0)
        matrix = tl.load(matrix_ptrs + start * step, (wanted[None, :] < ranks) & (depth[:, None] < left), other=0.0)
        total = tl.dot(x, matrix, total)
    total *= tl.load(scales_ptr + adapter)
    columns = wanted + (0 if OF_A else part * rank)
    z_ptrs = z_ptr + row.to(tl.int64)[:, None] * z_stride + columns[None, :]
    tl.store(z_ptrs, total, inside & (wanted[None, :] < ranks))


@triton.jit
def adapted(
    total,
    z_ptr,
    z_stride,
    row,
    inside,
    address,
    ranks,
    column,
    width,
    first_rank,
    row_stride,
    column_stride,
    ALIGNED: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """total [N, C] + z M of N rows, where M [ranks, C] lies at `address` with the given strides."""
    matrix_ptr = _at(address, z_ptr, ALIGNED)
    depth = tl.arange(0, DEPTH)
    for start in range(0, ranks, DEPTH):
        wanted = start + depth
        z_ptrs = z_ptr + row[:, None] * z_stride + first_rank + wanted[None, :]
        z = tl.load(z_ptrs, inside & (wanted[None, :] < ranks), other=0.0)
        matrix_ptrs = matrix_ptr + wanted[:, None] * row_stride + column[None, :] * column_stride
        matrix = tl.load(matrix_ptrs, (wanted[:, None] < ranks) & (column[None, :] < width), other=0.0)
        total = tl.dot(z, matrix, total)
    return total


@triton.jit
def expand(
    y_ptr,
    base_ptr,
    z_ptr,
    tile_rows_ptr,
    tile_ends_ptr,
    tile_adapters_ptr,
    addresses_ptr,
    ranks_ptr,
    y_stride,
    base_stride,
    z_stride,
    width0,
    width1,
    width2,
    OF_A: tl.constexpr,
    ADD: tl.constexpr,
    ALIGNED: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """y = base + z Bᵀ, layer by layer; or, of gradients, y = base + z A. Without `ADD` there is no base.

    Programs: tiles, and blocks of columns, no block of two layers.
    """
    tile = tl.program_id(0)
    adapter = tl.load(tile_adapters_ptr + tile)
    rank = _rank(ranks_ptr, adapter, ALIGNED)
    part, width, first, within = _part(tl.program_id(1), width0, width1, width2, COLUMNS)
    row = tl.load(tile_rows_ptr + tile).to(tl.int64) + tl.arange(0, ROWS)
    inside = (row < tl.load(tile_ends_ptr + tile))[:, None]
    column = within + tl.arange(0, COLUMNS)
    mask = inside & (column[None, :] < width)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if ADD:
        base_ptrs = base_ptr + row[:, None] * base_stride + first + column[None, :]
        total = tl.load(base_ptrs, mask, other=0.0).to(tl.float32)
    address = tl.load(addresses_ptr + adapter * ADDRESSES + (0 if OF_A else 1 + part))
    if address != 0:
        if OF_A:
            total = adapted(
                total, z_ptr, z_stride, row, inside, address, rank * PARTS, column, width, 0, width, 1, ALIGNED, DEPTH
            )
        else:
            total = adapted(
                total, z_ptr, z_stride, row, inside, address, rank, column, width, part * rank, 1, rank, ALIGNED, DEPTH
            )
    tl.store(y_ptr + row[:, None] * y_stride + first + column[None, :], total, mask)


@triton.jit
def gradients(
    x_ptr,
    z_ptr,
    run_rows_ptr,
    run_ends_ptr,
    first_runs_ptr,
    addresses_ptr,
    ranks_ptr,
    x_stride,
    z_stride,
    width0,
    width1,
    width2,
    OF_A: tl.constexpr,
    ALIGNED: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Adds zᵀ x to the fp32 gradient of A; or, where x is the gradient in the outputs, xᵀ z to that of each B.

    Adapter n owns the runs of rows `first_runs[n]` to `first_runs[n + 1]`. Programs: adapters, blocks of ranks, and
    blocks of columns.
    """
    adapter = tl.program_id(0)
    rank = _rank(ranks_ptr, adapter, ALIGNED)
    part, width, first, within = _part(tl.program_id(2), width0, width1, width2, COLUMNS)
    address = tl.load(addresses_ptr + adapter * ADDRESSES + (0 if OF_A else 1 + part))
    ranks = rank * PARTS if OF_A else rank
    if (address == 0) | (tl.program_id(1) * RANKS >= ranks):
        return
    wanted = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    column = within + tl.arange(0, COLUMNS)
    z_column = wanted + (0 if OF_A else part * rank)
    total = tl.zeros((RANKS, COLUMNS), tl.float32)
    for run in range(tl.load(first_runs_ptr + adapter), tl.load(first_runs_ptr + adapter + 1)):
        end = tl.load(run_ends_ptr + run)
        for start in range(tl.load(run_rows_ptr + run), end, ROWS):
            row = (start + tl.arange(0, ROWS)).to(tl.int64)
            z_ptrs = z_ptr + row[None, :] * z_stride + z_column[:, None]
            z = tl.load(z_ptrs, (row[None, :] < end) & (wanted[:, None] < ranks), other=0.0)
            x_ptrs = x_ptr + row[:, None] * x_stride + first + column[None, :]
            x = tl.load(x_ptrs, (row[:, None] < end) & (column[None, :] < width), other=0.0)
            total = tl.dot(z, x, total)
    gradient_ptr = address.to(tl.pointer_type(tl.float32))
    if ALIGNED:
        gradient_ptr = tl.multiple_of(gradient_ptr, 16)
    mask = (wanted[:, None] < ranks) & (column[None, :] < width)
    if OF_A:
        ptrs = gradient_ptr + wanted[:, None] * width + column[None, :]
        tl.store(ptrs, tl.load(ptrs, mask, other=0.0) + total, mask)
    else:
        ptrs = gradient_ptr + column[:, None] * rank + wanted[None, :]
        turned = tl.trans(total)
        mask = (wanted[None, :] < ranks) & (column[:, None] < width)
        tl.store(ptrs, tl.load(ptrs, mask, other=0.0) + turned, mask)


@triton.jit
def adapted_swiglu(
    gate_up_ptr,
    out_ptr,
    z_ptr,
    tile_rows_ptr,
    tile_ends_ptr,
    tile_adapters_ptr,
    addresses_ptr,
    ranks_ptr,
    stride,
    z_stride,
    width,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """silu(gate) · up, after the adapters' shares z Bᵀ have been added to both; they are not stored.

    Programs: tiles, and blocks of columns.
    """
    tile = tl.program_id(0)
    row = tl.load(tile_rows_ptr + tile).to(tl.int64) + tl.arange(0, ROWS)
    inside = (row < tl.load(tile_ends_ptr + tile))[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = inside & (column[None, :] < width)
    adapter = tl.load(tile_adapters_ptr + tile)
    gate, up = _gate_and_up(
        gate_up_ptr,
        z_ptr,
        addresses_ptr,
        ranks_ptr,
        adapter,
        stride,
        z_stride,
        row,
        inside,
        column,
        width,
        ALIGNED,
        DEPTH,
    )
    tl.store(out_ptr + row[:, None] * width + column[None, :], gate * tl.sigmoid(gate) * up, mask)


@triton.jit
def _gate_and_up(
    gate_up_ptr,
    z_ptr,
    addresses_ptr,
    ranks_ptr,
    adapter,
    stride,
    z_stride,
    row,
    inside,
    column,
    width,
    ALIGNED: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """fp32 gate and up [N, C], the adapters' shares included."""
    mask = inside & (column[None, :] < width)
    ptrs = gate_up_ptr + row[:, None] * stride + column[None, :]
    gate = tl.load(ptrs, mask, other=0.0).to(tl.float32)
    up = tl.load(ptrs + width, mask, other=0.0).to(tl.float32)
    rank = _rank(ranks_ptr, adapter, ALIGNED)
    gate_address = tl.load(addresses_ptr + adapter * ADDRESSES + 1)
    up_address = tl.load(addresses_ptr + adapter * ADDRESSES + 2)
    if gate_address != 0:
        gate = adapted(
            gate, z_ptr, z_stride, row, inside, gate_address, rank, column, width, 0, 1, rank, ALIGNED, DEPTH
        )
        up = adapted(up, z_ptr, z_stride, row, inside, up_address, rank, column, width, rank, 1, rank, ALIGNED, DEPTH)
    return gate, up


@triton.jit
def adapted_swiglu_backward(
    gate_up_ptr,
    dout_ptr,
    dgate_up_ptr,
    out_ptr,
    z_ptr,
    dz_ptr,
    tile_rows_ptr,
    tile_ends_ptr,
    tile_adapters_ptr,
    addresses_ptr,
    down_addresses_ptr,
    ranks_ptr,
    stride,
    z_stride,
    dz_stride,
    width,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The gradient in gate and up, and the output once more.

    `z` and `addresses` are of the group of gate and up; `dz` and `down_addresses` of the layer behind, whose adapters'
    share dz A of the output's gradient is added here. Programs: tiles, and blocks of columns.
    """
    tile = tl.program_id(0)
    adapter = tl.load(tile_adapters_ptr + tile)
    row = tl.load(tile_rows_ptr + tile).to(tl.int64) + tl.arange(0, ROWS)
    inside = (row < tl.load(tile_ends_ptr + tile))[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = inside & (column[None, :] < width)
    gate, up = _gate_and_up(
        gate_up_ptr,
        z_ptr,
        addresses_ptr,
        ranks_ptr,
        adapter,
        stride,
        z_stride,
        row,
        inside,
        column,
        width,
        ALIGNED,
        DEPTH,
    )
    flat = row[:, None] * width + column[None, :]
    dout = tl.load(dout_ptr + flat, mask, other=0.0).to(tl.float32)
    address = tl.load(down_addresses_ptr + adapter * ADDRESSES)
    if address != 0:
        rank = _rank(ranks_ptr, adapter, ALIGNED)
        dout = adapted(dout, dz_ptr, dz_stride, row, inside, address, rank, column, width, 0, width, 1, ALIGNED, DEPTH)
    sigmoid = tl.sigmoid(gate)
    active = gate * sigmoid
    tl.store(out_ptr + flat, active * up, mask)
    ptrs = dgate_up_ptr + row[:, None] * stride + column[None, :]
    tl.store(ptrs, dout * up * (sigmoid + active * (1 - sigmoid)), mask)
    tl.store(ptrs + width, dout * active, mask)
