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
from tinsmith.models.launch import power_of_two

TILE_ROWS = kernels.ROWS.value
_KEYS, _CHUNK = kernels.KEYS.value, kernels.CHUNK.value
_PROGRAMS = 512  # that fill a large GPU
_MOST_PARTS = 32

_ATTEND = ExactKernel(kernels.attend, stages=2)
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
    """Which rows belong together: int32 [N, 4] (first row, positions, table), and the first rows' positions [N].

    No row is at position `end`. `single`: every tile is one row, tile n row n.
    """

    tiles: Tensor
    positions_N: Tensor
    end: int
    single: bool = False


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
    end = max(position + count for _, count, position in spans)
    return RowTiles(
        upload(np.concatenate(tiles), device), upload(np.concatenate(positions, dtype=np.int32), device), end
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
    return upload(np.concatenate(parts), device)


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def attend(
    q_TO: Tensor,
    keys: Tensor,
    values: Tensor,
    tiles: RowTiles,
    counts: HeadCounts,
    paging: Paging | None = None,
    sums_HT: Tensor | None = None,
) -> Tensor:
    """[T, H · d], of queries that come first in `q_TO`, and keys and values [·, G · d] of any row stride.

    Takes fp32 log2 Σ of each row's weights to `sums_HT`.
    """
    rows, width, heads = q_TO.shape[0], counts.width, counts.heads
    out_TO = q_TO.new_empty(rows, heads * width)
    parts = _parts(tiles, counts) if sums_HT is None else 1
    chunks = -(-tiles.end // _CHUNK)
    target, sums = out_TO, out_TO if sums_HT is None else sums_HT
    if parts > 1:
        target = torch.empty(rows, heads, chunks, width, dtype=torch.float32, device=q_TO.device)
        sums = torch.empty(rows, heads, chunks, 2, dtype=torch.float32, device=q_TO.device)
    tables = tiles.tiles if paging is None else paging.tables
    _ATTEND(
        (tiles.tiles.shape[0], counts.kv_heads, parts),
        (q_TO, keys, values, tables, tiles.tiles, tiles.positions_N, target, sums),
        (q_TO.stride(0), keys.stride(0), values.stride(0), tables.stride(0), out_TO.stride(0)),
        (sums.stride(0), chunks, counts.scaling),
        (
            *(counts.sharing, heads, *counts.constants),
            *(0 if paging is None else paging.block_size, parts, int(sums_HT is not None)),
        ),
    )
    if parts > 1:
        constants = (heads, *counts.constants)
        _JOIN((rows, heads), (target, sums, tiles.positions_N, out_TO), (), (chunks,), constants)
    return out_TO


def _parts(tiles: RowTiles, counts: HeadCounts) -> int:
    """How many programs share a sequence, so that few of them fill the device, too."""
    if not tiles.single:
        return 1
    parts, chunks = 1, -(-tiles.end // _CHUNK)
    while parts < min(_MOST_PARTS, chunks) and tiles.tiles.shape[0] * counts.kv_heads * parts < _PROGRAMS:
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
