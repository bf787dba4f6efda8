"""Triton kernels that apply the adapters of a packed batch, and gather their gradients: one launch for all tenants.

Each tenant's matrices are read, and gradients added to, where they lie: tables of addresses say where. Ranks may
differ. For CUDA devices; imported where one is used. `adapter_table` makes the tables and calls these.

Shapes: `T` rows of a batch, `I` inputs and `O` outputs of a group of linear layers, `R` ranks of all layers of a group.
Rows come in tiles, of which a table has the first row, the end, the adapter and its rank. A group's addresses are those
of A (the stack of all layers) and of each layer's B, 0 where an adapter has none.
"""

import triton
import triton.language as tl

from tinsmith.models.kernels import gated_gradients

ADDRESSES = tl.constexpr(4)  # of an adapter in a group: A, and B of up to three layers
TILE = tl.constexpr(4)  # numbers in the table of tiles


@triton.jit
def _tile(tiles_ptr, ROWS: tl.constexpr, ALIGNED: tl.constexpr):
    """(rows [ROWS], which of them are the tile's [ROWS, 1], adapter, rank) of the program's tile."""
    entry_ptr = tiles_ptr + tl.program_id(0) * TILE
    row = (tl.load(entry_ptr) + tl.arange(0, ROWS)).to(tl.int64)
    inside = (row < tl.load(entry_ptr + 1))[:, None]
    rank = tl.load(entry_ptr + 3)
    if ALIGNED:
        rank = tl.multiple_of(rank, 8)
    return row, inside, tl.load(entry_ptr + 2), rank


@triton.jit
def at(address, NUMBER: tl.constexpr, ALIGNED: tl.constexpr):
    """The address as a pointer to numbers of this dtype, with `ALIGNED` at a multiple of 16 bytes."""
    ptr = address.to(tl.pointer_type(NUMBER))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def _layer(part, width0, width1, width2):
    """(width, first column) of one of the layers."""
    width = width0
    first = 0
    if part == 1:
        width = width1
        first = width0
    if part == 2:
        width = width2
        first = width0 + width1
    return width, first


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
    tiles_ptr,
    addresses_ptr,
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
    row, inside, adapter, rank = _tile(tiles_ptr, ROWS, ALIGNED)
    part = tl.program_id(2)
    slot = 0 if OF_A else 1 + part
    address = tl.load(addresses_ptr + adapter * ADDRESSES + slot)
    wanted = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    ranks = rank * PARTS if OF_A else rank
    if (address == 0) | (tl.program_id(1) * RANKS >= ranks):
        return
    width, first = _layer(part, width0, width1, width2)
    matrix_ptr = at(address, x_ptr.dtype.element_ty, ALIGNED)
    depth = tl.arange(0, DEPTH)
    x_ptrs = x_ptr + row[:, None] * x_stride + first + depth[None, :]
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
    z_ptrs = z_ptr + row[:, None] * z_stride + columns[None, :]
    tl.store(z_ptrs, total, inside & (wanted[None, :] < ranks))


@triton.jit
def _inner(z_ptr, z_stride, row, inside, first, rank, RANKS: tl.constexpr):
    """z [N, RANKS] of one layer, whose first column is `first`."""
    wanted = tl.arange(0, RANKS)[None, :]
    return tl.load(z_ptr + row[:, None] * z_stride + first + wanted, inside & (wanted < rank), other=0.0)


@triton.jit
def _columns_of_a(matrix_ptr, first, rank, column, width, RANKS: tl.constexpr):
    """[RANKS, N]: columns of A [., width] from row `first` on."""
    wanted = tl.arange(0, RANKS)[:, None]
    ptrs = matrix_ptr + (first + wanted) * width + column[None, :]
    return tl.load(ptrs, (wanted < rank) & (column[None, :] < width), other=0.0)


@triton.jit
def _rows_of_b(matrix_ptr, rank, column, width, RANKS: tl.constexpr):
    """[N, RANKS]: rows of B [width, rank]."""
    wanted = tl.arange(0, RANKS)[None, :]
    return tl.load(matrix_ptr + column[:, None] * rank + wanted, (wanted < rank) & (column[:, None] < width), other=0.0)


@triton.jit
def expand(
    y_ptr,
    base_ptr,
    z_ptr,
    tiles_ptr,
    addresses_ptr,
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
    RANKS: tl.constexpr,
):
    """y = base + z Bᵀ, layer by layer; or, of gradients, y = base + z A. Without `ADD` there is no base.

    Programs: tiles, and blocks of columns, no block of two layers.
    """
    row, inside, adapter, rank = _tile(tiles_ptr, ROWS, ALIGNED)
    part, width, first, within = _part(tl.program_id(1), width0, width1, width2, COLUMNS)
    column = within + tl.arange(0, COLUMNS)
    mask = inside & (column[None, :] < width)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if ADD:
        base_ptrs = base_ptr + row[:, None] * base_stride + first + column[None, :]
        total = tl.load(base_ptrs, mask, other=0.0).to(tl.float32)
    address = tl.load(addresses_ptr + adapter * ADDRESSES + (0 if OF_A else 1 + part))
    if address != 0:
        matrix_ptr = at(address, z_ptr.dtype.element_ty, ALIGNED)
        if OF_A:
            for layer in tl.static_range(PARTS):
                z = _inner(z_ptr, z_stride, row, inside, layer * rank, rank, RANKS)
                total = tl.dot(z, _columns_of_a(matrix_ptr, layer * rank, rank, column, width, RANKS), total)
        else:
            z = _inner(z_ptr, z_stride, row, inside, part * rank, rank, RANKS)
            total = tl.dot(z, tl.trans(_rows_of_b(matrix_ptr, rank, column, width, RANKS)), total)
    tl.store(y_ptr + row[:, None] * y_stride + first + column[None, :], total, mask)


@triton.jit
def _add(matrix_ptr, values, row, rows, column, columns):
    """Adds the values of some rows and columns to a matrix [rows, columns]."""
    ptrs = matrix_ptr + row[:, None] * columns + column[None, :]
    mask = (row[:, None] < rows) & (column[None, :] < columns)
    tl.store(ptrs, tl.load(ptrs, mask, other=0.0) + values, mask)


@triton.jit
def gradients(
    x_ptr,
    z_ptr,
    runs_ptr,
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
    rank = tl.load(ranks_ptr + adapter)
    if ALIGNED:
        rank = tl.multiple_of(rank, 8)
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
        end = tl.load(runs_ptr + 2 * run + 1)
        for start in range(tl.load(runs_ptr + 2 * run), end, ROWS):
            row = (start + tl.arange(0, ROWS)).to(tl.int64)
            z_ptrs = z_ptr + row[None, :] * z_stride + z_column[:, None]
            z = tl.load(z_ptrs, (row[None, :] < end) & (wanted[:, None] < ranks), other=0.0)
            x_ptrs = x_ptr + row[:, None] * x_stride + first + column[None, :]
            x = tl.load(x_ptrs, (row[:, None] < end) & (column[None, :] < width), other=0.0)
            total = tl.dot(z, x, total)
    gradient_ptr = at(address, tl.float32, ALIGNED)
    if OF_A:
        _add(gradient_ptr, total, wanted, ranks, column, width)
    else:
        _add(gradient_ptr, tl.trans(total), column, width, wanted, rank)


@triton.jit
def _gated_adapter(addresses_ptr, down_addresses_ptr, adapter, rank, NUMBER: tl.constexpr, ALIGNED: tl.constexpr):
    """(B of gate, B of up, A of the layer behind, the ranks of both): ranks are 0 where there is none."""
    gate_address = tl.load(addresses_ptr + adapter * ADDRESSES + 1)
    up_address = tl.load(addresses_ptr + adapter * ADDRESSES + 2)
    down_address = tl.load(down_addresses_ptr + adapter * ADDRESSES)
    own = rank * (gate_address != 0).to(tl.int32)
    down = rank * (down_address != 0).to(tl.int32)
    gate_ptr, up_ptr = at(gate_address, NUMBER, ALIGNED), at(up_address, NUMBER, ALIGNED)
    return gate_ptr, up_ptr, at(down_address, NUMBER, ALIGNED), own, down


@triton.jit
def _columns(ptr, row, stride, column, width, inside):
    """[N, C] as they lie in memory."""
    return tl.load(ptr + row[:, None] * stride + column[None, :], inside & (column[None, :] < width), other=0.0)


@triton.jit
def _pair(ptr, row, stride, column, width, inside):
    """Gate and up [N, C] as they lie in memory."""
    mask = inside & (column[None, :] < width)
    ptrs = ptr + row[:, None] * stride + column[None, :]
    return tl.load(ptrs, mask, other=0.0), tl.load(ptrs + width, mask, other=0.0)


@triton.jit(do_not_specialize=["down_z_rows", "splits"])
def adapted_swiglu(
    gate_up_ptr,
    out_ptr,
    z_ptr,
    down_z_ptr,
    tiles_ptr,
    addresses_ptr,
    down_addresses_ptr,
    scales_ptr,
    stride,
    z_stride,
    down_z_stride,
    width,
    down_z_rows,
    splits,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """silu(gate) · up, after the adapters' shares z Bᵀ have been added to both; they are not stored.

    Also scale · out Aᵀ of the layer behind, to which `down_addresses` belong: [splits, T, R], to be summed. Programs:
    tiles, and splits of the columns.
    """
    row, inside, adapter, rank = _tile(tiles_ptr, ROWS, ALIGNED)
    split = tl.program_id(1)
    gate_ptr, up_ptr, down_ptr, own, down = _gated_adapter(
        addresses_ptr, down_addresses_ptr, adapter, rank, gate_up_ptr.dtype.element_ty, ALIGNED
    )
    z_gate = _inner(z_ptr, z_stride, row, inside, 0, own, RANKS)
    z_up = _inner(z_ptr, z_stride, row, inside, rank, own, RANKS)
    total = tl.zeros((ROWS, RANKS), tl.float32)
    blocks = tl.cdiv(tl.cdiv(width, COLUMNS), splits)
    column = split * blocks * COLUMNS + tl.arange(0, COLUMNS)
    next_gate, next_up = _pair(gate_up_ptr, row, stride, column, width, inside)
    for _ in range(blocks):
        raw_gate, raw_up = next_gate, next_up
        next_gate, next_up = _pair(gate_up_ptr, row, stride, column + COLUMNS, width, inside)
        mask = inside & (column[None, :] < width)
        gate_b = tl.trans(_rows_of_b(gate_ptr, own, column, width, RANKS))
        up_b = tl.trans(_rows_of_b(up_ptr, own, column, width, RANKS))
        gate = raw_gate.to(tl.float32) + tl.dot(z_gate, gate_b)
        up = raw_up.to(tl.float32) + tl.dot(z_up, up_b)
        out = (gate * tl.sigmoid(gate) * up).to(gate_up_ptr.dtype.element_ty)
        tl.store(out_ptr + row[:, None] * width + column[None, :], out, mask)
        total = tl.dot(out, tl.trans(_columns_of_a(down_ptr, 0, down, column, width, RANKS)), total)
        column += COLUMNS
    total *= tl.load(scales_ptr + adapter)
    wanted = tl.arange(0, RANKS)[None, :]
    ptrs = down_z_ptr + (split.to(tl.int64) * down_z_rows + row)[:, None] * down_z_stride + wanted
    tl.store(ptrs, total, inside & (wanted < down))


@triton.jit(do_not_specialize=["dz_rows", "splits"])
def adapted_swiglu_backward(
    gate_up_ptr,
    dout_ptr,
    z_ptr,
    dz_ptr,
    down_dz_ptr,
    tiles_ptr,
    addresses_ptr,
    down_addresses_ptr,
    scales_ptr,
    stride,
    z_stride,
    dz_stride,
    down_dz_stride,
    width,
    dz_rows,
    splits,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Overwrites gate and up with their gradients, and the gradient in the output with the output, once more.

    The share dz A that the adapters of the layer behind have in the output's gradient is added here; and dz of gate and
    up themselves is gathered: [splits, T, R], to be summed. Programs: tiles, and splits of the columns.
    """
    row, inside, adapter, rank = _tile(tiles_ptr, ROWS, ALIGNED)
    split = tl.program_id(1)
    gate_ptr, up_ptr, down_ptr, own, down = _gated_adapter(
        addresses_ptr, down_addresses_ptr, adapter, rank, gate_up_ptr.dtype.element_ty, ALIGNED
    )
    z_gate = _inner(z_ptr, z_stride, row, inside, 0, own, RANKS)
    z_up = _inner(z_ptr, z_stride, row, inside, rank, own, RANKS)
    down_dz = _inner(down_dz_ptr, down_dz_stride, row, inside, 0, down, RANKS)
    gate_total = tl.zeros((ROWS, RANKS), tl.float32)
    up_total = tl.zeros((ROWS, RANKS), tl.float32)
    blocks = tl.cdiv(tl.cdiv(width, COLUMNS), splits)
    column = split * blocks * COLUMNS + tl.arange(0, COLUMNS)
    next_gate, next_up = _pair(gate_up_ptr, row, stride, column, width, inside)
    next_dout = _columns(dout_ptr, row, width, column, width, inside)
    for _ in range(blocks):
        raw_gate, raw_up, raw_dout = next_gate, next_up, next_dout
        after = column + COLUMNS
        next_gate, next_up = _pair(gate_up_ptr, row, stride, after, width, inside)
        next_dout = _columns(dout_ptr, row, width, after, width, inside)
        mask = inside & (column[None, :] < width)
        gate_b = _rows_of_b(gate_ptr, own, column, width, RANKS)
        up_b = _rows_of_b(up_ptr, own, column, width, RANKS)
        gate = raw_gate.to(tl.float32) + tl.dot(z_gate, tl.trans(gate_b))
        up = raw_up.to(tl.float32) + tl.dot(z_up, tl.trans(up_b))
        down_a = _columns_of_a(down_ptr, 0, down, column, width, RANKS)
        dout = raw_dout.to(tl.float32) + tl.dot(down_dz, down_a)
        out, dgate, dup = gated_gradients(gate, up, dout)
        tl.store(dout_ptr + row[:, None] * width + column[None, :], out, mask)
        dgate, dup = dgate.to(gate_up_ptr.dtype.element_ty), dup.to(gate_up_ptr.dtype.element_ty)
        ptrs = gate_up_ptr + row[:, None] * stride + column[None, :]
        tl.store(ptrs, dgate, mask)
        tl.store(ptrs + width, dup, mask)
        gate_total = tl.dot(dgate, gate_b, gate_total)
        up_total = tl.dot(dup, up_b, up_total)
        column += COLUMNS
    scale = tl.load(scales_ptr + adapter)
    wanted = tl.arange(0, RANKS)[None, :]
    ptrs = dz_ptr + (split.to(tl.int64) * dz_rows + row)[:, None] * dz_stride + wanted
    tl.store(ptrs, gate_total * scale, inside & (wanted < own))
    tl.store(ptrs + rank, up_total * scale, inside & (wanted < own))
