"""Causal attention of an exact pass: over the rows of packed sequences, forward and backward, or over a paged cache.

Makes the tables of tiles and calls the kernels; how many programs share a sequence is free, and never changes a bit.
For CUDA devices. Knows no layers and no requests.

Shapes: `T` rows, `N` tiles, `H` query heads, `G` key/value heads, `d` head dimension, `W` blocks of the longest
sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinsmith.models import exact_attention_kernels as kernels
from tinsmith.models.exact_products import ExactKernel
from tinsmith.models.launch import blocks, power_of_two
from tinsmith.models.transfer import on_device

TILE_ROWS = kernels.ROWS.value
_KEYS, _CHUNK = kernels.KEYS.value, kernels.CHUNK.value
_PROGRAMS = 512  # that fill a large GPU
_MOST_PARTS = 32

_ATTEND = ExactKernel(kernels.attend, stages=2)
_ATTEND_ROWS = ExactKernel(kernels.attend_rows, stages=5)  # of which tables of blocks take two
_JOIN = ExactKernel(kernels.join, warps=2)
_BACKWARD_QUERIES = ExactKernel(kernels.attend_backward_queries, stages=2)
_BACKWARD_KEYS = ExactKernel(kernels.attend_backward_keys, stages=2)

Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class HeadCounts:
    """Of one layer. `window`: how many rows a row sees, its own included; 0 means all."""

    heads: int
    kv_heads: int
    width: int
    scaling: float
    window: int

    @property
    def sharing(self) -> int:
        return self.heads // self.kv_heads

    @property
    def constants(self) -> tuple[int, int, int]:
        return self.window, self.width, max(16, power_of_two(self.width))


@dataclass(frozen=True, slots=True)
class RowTiles:
    """Which rows belong together: int32 [N, 4] (first row, positions, table), and the first rows' positions [N]."""

    tiles: Tensor
    positions_N: Tensor


@dataclass(frozen=True, slots=True)
class SingleRows:
    """One row of each sequence, whose table has the row's number; no row is at position `end`."""

    positions_N: Tensor
    end: int


@dataclass(frozen=True, slots=True)
class Paging:
    """A cache's blocks of `block_size` tokens: int32 [·, W], those of one sequence in a row."""

    tables: Tensor
    block_size: int


def row_tiles(spans: Sequence[tuple[int, int, int]], sharing: int, device: torch.device) -> RowTiles:
    """Tiles of (first row, rows, position of the first) of each sequence; the sequence's number is its table."""
    step = TILE_ROWS // sharing
    tiles, positions = [], []
    for table, (row, count, position) in enumerate(spans):
        offsets = np.arange(0, count, step)
        part = np.zeros((len(offsets), 4), np.int32)
        part[:, 0], part[:, 1], part[:, 2] = row + offsets, np.minimum(step, count - offsets), table
        tiles.append(part)
        positions.append(position + offsets)
    return RowTiles(
        on_device(np.concatenate(tiles), device), on_device(np.concatenate(positions, dtype=np.int32), device)
    )


def key_tiles(lengths: Sequence[int], device: torch.device) -> Tensor:
    """int32 [·, 4]: first row, its position and the sequence's length, of each block of keys of packed sequences."""
    parts, begin = [], 0
    for length in lengths:
        firsts = np.arange(0, length, _KEYS)
        part = np.zeros((len(firsts), 4), np.int32)
        part[:, 0], part[:, 1], part[:, 2] = begin + firsts, firsts, length
        parts.append(part)
        begin += length
    return on_device(np.concatenate(parts), device)


def attend(
    q_TO: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: RowTiles | SingleRows,
    counts: HeadCounts,
    paging: Paging | None = None,
    sums_HT: Tensor | None = None,
) -> Tensor:
    """[T, H · d], of queries that come first in `q_TO`, and keys and values [·, G · d] of any row stride.

    Takes fp32 log2 Σ of each row's weights to `sums_HT`.
    """
    if isinstance(rows, SingleRows):
        if paging is None or sums_HT is not None:
            raise ValueError("single rows look at a cache, and keep nothing for backward")
        return _attend_rows(q_TO, keys, values, rows, counts, paging)
    out_TO = q_TO.new_empty(q_TO.shape[0], counts.heads * counts.width)
    tables, sums = rows.tiles if paging is None else paging.tables, out_TO if sums_HT is None else sums_HT
    _ATTEND(
        (rows.tiles.shape[0], counts.kv_heads),
        (q_TO, keys, values, tables, rows.tiles, rows.positions_N, out_TO, sums),
        (q_TO.stride(0), keys.stride(0), values.stride(0), tables.stride(0), out_TO.stride(0)),
        (sums.stride(0), counts.scaling),
        (counts.sharing, *counts.constants, 0 if paging is None else paging.block_size, int(sums_HT is not None)),
    )
    return out_TO


def _attend_rows(
    q_TO: Tensor, keys: Tensor, values: Tensor, rows: SingleRows, counts: HeadCounts, paging: Paging
) -> Tensor:
    count, width, heads = q_TO.shape[0], counts.width, counts.heads
    out_TO = q_TO.new_empty(count, heads * width)
    chunks = blocks(rows.end, _CHUNK)
    parts = _parts(count * counts.kv_heads, chunks)
    target, sums = out_TO, out_TO
    if parts > 1:
        target = torch.empty(count, heads, chunks, width, dtype=torch.float32, device=q_TO.device)
        sums = torch.empty(count, heads, chunks, 2, dtype=torch.float32, device=q_TO.device)
    _ATTEND_ROWS(
        (count, counts.kv_heads, parts),
        (q_TO, keys, values, paging.tables, rows.positions_N, target, sums),
        (q_TO.stride(0), keys.stride(0), values.stride(0), paging.tables.stride(0)),
        (chunks, counts.scaling),
        (counts.sharing, heads, *counts.constants, paging.block_size, power_of_two(counts.sharing), parts),
    )
    if parts > 1:
        constants = (heads, *counts.constants)
        _JOIN((count, heads), (target, sums, rows.positions_N, out_TO), (), (chunks,), constants)
    return out_TO


def _parts(programs: int, chunks: int) -> int:
    """How many programs share a sequence, so that few of them fill the device, too."""
    parts = 1
    while parts < min(_MOST_PARTS, chunks) and programs * parts < _PROGRAMS:
        parts *= 2
    return parts


def attend_backward(
    q_TO: Tensor,
    keys: Tensor,
    values: Tensor,
    out_TO: Tensor,
    dout_TO: Tensor,
    sums_HT: Tensor,
    tiles: RowTiles,
    blocks: Tensor,
    counts: HeadCounts,
) -> Gradients:
    """The gradients in queries [T, H, d], keys and values [T, G, d] of packed sequences; `blocks` are `key_tiles`."""
    rows, (window, width, columns) = q_TO.shape[0], counts.constants
    dq_TO = torch.empty_like(out_TO)
    dkeys, dvalues = (out_TO.new_empty(rows, counts.kv_heads * width) for _ in range(2))
    deltas_HT = torch.empty_like(sums_HT)
    strides = (q_TO.stride(0), keys.stride(0), values.stride(0), out_TO.stride(0))
    constants = (counts.sharing, window, width, columns)
    _BACKWARD_QUERIES(
        (tiles.tiles.shape[0], counts.kv_heads),
        (q_TO, keys, values, tiles.tiles, tiles.positions_N, out_TO, dout_TO, sums_HT, deltas_HT, dq_TO),
        strides,
        (sums_HT.stride(0), counts.scaling),
        constants,
    )
    _BACKWARD_KEYS(
        (blocks.shape[0], counts.kv_heads),
        (q_TO, keys, values, blocks, dout_TO, sums_HT, deltas_HT, dkeys, dvalues),
        (*strides,),
        (sums_HT.stride(0), dkeys.stride(0), counts.scaling),
        constants,
    )
    return dq_TO.view(rows, -1, width), dkeys.view(rows, -1, width), dvalues.view(rows, -1, width)
