"""LoRA adapters of any ranks in a decoding step on a GPU: two kernels for all adapters of a group of layers.

With hundreds of decoding rows a product for each adapter costs more in launches than in arithmetic. Rows are cut into
tiles that belong to one adapter each; the first kernel multiplies a tile by the adapter's A, its inputs cut into parts
where tiles are few; the second multiplies the sum of the parts by B. Both run beside the base weight's product, on a
stream of their own, and whoever reads the product adds their share to it. Adapters are found through a table of
addresses, so that a captured graph serves whatever adapters the table holds. Needs Triton.

Shapes: `T` rows of the step, `N` tiles, `I` inputs and `O` outputs of a group of layers, `R` ranks of all layers of a
group, `K` groups of linear layers, `W` addresses for each group (A, and B of each of its layers), `C` blocks of output
columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tinsmith.models.adapter_table import AdapterPlaces, identity
from tinsmith.models.lora import Adapter, LinearGroup, Segment

TILE_ROWS = 16
"""Rows of a tile: the fewest that the matrix units take."""

_MOST_PARTS = 3
_WIDTH = 1 + _MOST_PARTS
_COLUMNS = 256
_DEPTH = 256
_RANK_BLOCK = 32
_NUMBERS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_MOST_SPLITS = 8


@triton.jit(do_not_specialize=["group", "groups"])
def _shrink(
    x_ptr,
    z_ptr,
    tiles_ptr,
    addresses_ptr,
    inputs,
    x_stride,
    z_split_stride,
    z_stride,
    group,
    groups,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """z[split, rows, ranks] = x[rows, a part of the inputs] Aᵀ, in fp32."""
    tile = tl.program_id(0)
    first = tl.load(tiles_ptr + tile * 3)
    count = tl.load(tiles_ptr + tile * 3 + 1)
    ranks = tl.multiple_of(tl.load(tiles_ptr + tile * 3 + 2), 8) * PARTS
    address = tl.load(addresses_ptr + (tile * groups + group) * WIDTH)
    if (count == 0) | (address == 0) | (tl.program_id(1) * RANK_BLOCK >= ranks):
        return
    a_ptr = tl.multiple_of(address.to(tl.pointer_type(x_ptr.dtype.element_ty)), 16)
    row = tl.arange(0, ROWS)
    rank = tl.program_id(1) * RANK_BLOCK + tl.arange(0, RANK_BLOCK)
    depth = tl.arange(0, DEPTH)
    split = tl.program_id(2)
    total = tl.zeros((ROWS, RANK_BLOCK), tl.float32)
    for start in range(split * DEPTH, inputs, SPLITS * DEPTH):
        column = start + depth
        x = tl.load(
            x_ptr + (first + row)[:, None] * x_stride + column[None, :],
            mask=(row < count)[:, None] & (column < inputs)[None, :],
            other=0.0,
        )
        a = tl.load(
            a_ptr + rank[None, :] * inputs + column[:, None],
            mask=(rank < ranks)[None, :] & (column < inputs)[:, None],
            other=0.0,
        )
        total = tl.dot(x, a, total)
    tl.store(
        z_ptr + split * z_split_stride + (first + row)[:, None] * z_stride + rank[None, :],
        total,
        mask=(row < count)[:, None] & (rank < ranks)[None, :],
    )


@triton.jit
def _sum(ptr, inside, stride, SPLITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of tiles that lie so far apart, some read at once: one by one, each would wait until the one before is there."""
    AT_ONCE: tl.constexpr = min(SPLITS, 4)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.static_range(0, SPLITS, AT_ONCE):
        split = first + tl.arange(0, AT_ONCE)[:, None, None]
        total += tl.sum(tl.load(ptr[None] + split * stride, mask=inside[None], other=0.0), 0)
    return total


@triton.jit(do_not_specialize=["group", "groups"])
def _expand(
    z_ptr,
    y_ptr,
    tiles_ptr,
    addresses_ptr,
    scales_ptr,
    blocks_ptr,
    z_split_stride,
    z_stride,
    y_stride,
    group,
    groups,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    NUMBER: tl.constexpr,
    EVEN: tl.constexpr,
    ADD: tl.constexpr,
):
    """y[rows, columns of one layer] = scale · (sum of z over the splits) Bᵀ, and what is there if `ADD`."""
    tile = tl.program_id(0)
    part = tl.load(blocks_ptr + tl.program_id(1) * 4)
    begin = tl.multiple_of(tl.load(blocks_ptr + tl.program_id(1) * 4 + 1), COLUMNS)
    outputs = tl.load(blocks_ptr + tl.program_id(1) * 4 + 2)
    if EVEN:
        outputs = tl.multiple_of(outputs, 8)  # or every number would be stored by itself
    y_begin = tl.multiple_of(tl.load(blocks_ptr + tl.program_id(1) * 4 + 3), 8)
    first = tl.load(tiles_ptr + tile * 3)
    count = tl.load(tiles_ptr + tile * 3 + 1)
    ranks = tl.multiple_of(tl.load(tiles_ptr + tile * 3 + 2), 8)
    scale = tl.load(scales_ptr + tile)
    address = tl.load(addresses_ptr + (tile * groups + group) * WIDTH + 1 + part)
    if (count == 0) | (ADD & (address == 0)):
        return
    ranks = tl.where(address == 0, 0, ranks)
    row = tl.arange(0, ROWS)
    column = begin + tl.arange(0, COLUMNS)
    b_ptr = tl.multiple_of(address.to(tl.pointer_type(NUMBER)), 16)
    target = y_ptr + (first + row)[:, None] * y_stride + (y_begin + tl.arange(0, COLUMNS))[None, :]
    wanted = (row < count)[:, None] & (column < outputs)[None, :]
    if ADD:
        y = tl.load(target, mask=wanted, other=0.0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, ranks, RANK_BLOCK):
        rank = start + tl.arange(0, RANK_BLOCK)
        b = tl.load(
            b_ptr + column[None, :] * ranks + rank[:, None],
            mask=(column < outputs)[None, :] & (rank < ranks)[:, None],
            other=0.0,
        )
        inside = (row < count)[:, None] & (rank < ranks)[None, :]
        place = (first + row)[:, None] * z_stride + part * ranks + rank[None, :]
        z = _sum(z_ptr + place, inside, z_split_stride, SPLITS, ROWS, RANK_BLOCK)
        total = tl.dot(z.to(b.dtype), b, total)
    total *= scale
    if ADD:
        total += y.to(tl.float32)
    tl.store(target, total.to(y_ptr.dtype.element_ty), mask=wanted)


@dataclass(frozen=True, slots=True)
class TileSizes:
    """How many tiles and rows the buffers of a pass have room for, and the largest rank among its adapters."""

    tiles: int
    rows: int
    rank: int


class AdapterTiles:
    """The adapters of a decoding step; its buffers stay where they are when `set` gives them others."""

    def __init__(self, places: AdapterPlaces, sizes: TileSizes, inputs: int, share: Tensor) -> None:
        """`inputs`: the most of a group. `share` has room for all rows' outputs of any; others may write to it, too."""
        device = share.device
        self._places = places
        self.sizes = sizes
        groups = len(places.numbers)
        self._tiles_N3 = torch.zeros(sizes.tiles, 3, dtype=torch.int32, device=device)  # first row, rows, rank
        self._scales_N = torch.zeros(sizes.tiles, dtype=torch.float32, device=device)
        self._addresses_NKW = torch.zeros(sizes.tiles, groups, _WIDTH, dtype=torch.int64, device=device)
        # Streams come from a pool for each priority; the one on which graphs are captured must not be this one again.
        self._side = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        width = _MOST_PARTS * -(-sizes.rank // _RANK_BLOCK) * _RANK_BLOCK
        self._z = torch.zeros(self._splits(inputs), sizes.rows, width, dtype=torch.float32, device=device)
        self._share = share
        self._known: list[tuple[float, ...]] = []  # no adapter itself, which would keep its memory

    def set(self, segments: Sequence[Segment]) -> None:
        """Takes the adapters of these segments, which must fit and be aligned."""
        tiles = _tiles_of(segments)
        if len(tiles) > self.sizes.tiles:
            raise ValueError(f"{len(tiles)} tiles do not fit into {self.sizes}")
        known = [(*identity(adapter), *rows) for adapter, *rows in tiles]
        if known == self._known:
            return
        self._known = known
        rows = [(first, count, adapter.spec.rank if adapter else 0) for adapter, first, count in tiles]
        padding = self.sizes.tiles - len(tiles)
        self._tiles_N3.copy_(torch.tensor([*rows, *[(0, 0, 0)] * padding], dtype=torch.int32))
        scales = [adapter.scale if adapter else 0.0 for adapter, _, _ in tiles]
        self._scales_N[: len(tiles)].copy_(torch.tensor(scales))
        nothing = np.zeros((len(self._places.numbers), _WIDTH), np.int64)
        adapters = {adapter for adapter, _, _ in tiles if adapter}
        addresses = {adapter: self._places.addresses(adapter.layout, adapter.compute) for adapter in adapters}
        stacked = np.stack([addresses[adapter] if adapter else nothing for adapter, _, _ in tiles])
        self._addresses_NKW[: len(tiles)].copy_(torch.from_numpy(stacked))

    def product(self, group: LinearGroup, x_TI: Tensor) -> tuple[Tensor, Tensor]:
        """(what a group of layers makes without adapters, the adapters' share in it), [T, O] both.

        The share is to be read before the next product, on the same stream.
        """
        rows, columns = x_TI.shape[0], group.weight_OI.shape[0]
        share_TO = self._share[: rows * columns].view(rows, columns)
        if self._side is None:
            self._apply(group.linears, group.outputs, x_TI, share_TO, add=False)
            return F.linear(x_TI, group.weight_OI, group.bias_O), share_TO
        current = torch.cuda.current_stream(x_TI.device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            self._apply(group.linears, group.outputs, x_TI, share_TO, add=False)
        y_TO = F.linear(x_TI, group.weight_OI, group.bias_O)
        current.wait_stream(self._side)
        return y_TO, share_TO

    def add(self, linears: tuple[int, ...], outputs: Sequence[int], x_TI: Tensor, y_TO: Tensor) -> None:
        """Adds the adapters' share to `y_TO`, which may be of a wider dtype than `x_TI`."""
        self._apply(linears, outputs, x_TI, y_TO, add=True)

    def _apply(
        self, linears: tuple[int, ...], outputs: Sequence[int], x_TI: Tensor, y_TO: Tensor, *, add: bool
    ) -> None:
        self._shrink(linears, x_TI)
        self._expand(linears, outputs, x_TI, y_TO, add=add)

    def _shrink(self, linears: tuple[int, ...], x_TI: Tensor) -> None:
        sizes, parts, splits = self.sizes, len(linears), self._splits(x_TI.shape[1])
        shrink: Any = _shrink[(sizes.tiles, -(-parts * sizes.rank // _RANK_BLOCK), splits)]
        shrink(
            *(x_TI, self._z, self._tiles_N3, self._addresses_NKW),
            *(x_TI.shape[1], x_TI.stride(0), self._z.stride(0), self._z.stride(1)),
            *(self._places.numbers[linears], len(self._places.numbers)),
            PARTS=parts,
            WIDTH=_WIDTH,
            ROWS=TILE_ROWS,
            RANK_BLOCK=_RANK_BLOCK,
            DEPTH=_DEPTH,
            SPLITS=splits,
            num_warps=4,
            num_stages=3,
        )

    def _expand(
        self, linears: tuple[int, ...], outputs: Sequence[int], x_TI: Tensor, y_TO: Tensor, *, add: bool
    ) -> None:
        sizes = self.sizes
        blocks = _column_blocks(tuple(outputs), x_TI.device)
        expand: Any = _expand[(sizes.tiles, len(blocks))]
        expand(
            *(self._z, y_TO, self._tiles_N3, self._addresses_NKW, self._scales_N, blocks),
            *(self._z.stride(0), self._z.stride(1), y_TO.stride(0)),
            *(self._places.numbers[linears], len(self._places.numbers)),
            WIDTH=_WIDTH,
            ROWS=TILE_ROWS,
            RANK_BLOCK=_RANK_BLOCK,
            COLUMNS=_COLUMNS,
            SPLITS=self._splits(x_TI.shape[1]),
            NUMBER=_NUMBERS[x_TI.dtype],
            EVEN=not any(width % 8 for width in outputs),
            ADD=add,
            num_warps=8,
            num_stages=1,
        )

    def _splits(self, inputs: int) -> int:
        """Into how many parts the inputs are cut, so that few tiles fill the device, too; each part has some depth."""
        splits = 1
        while splits < _MOST_SPLITS and inputs // splits > 3 * _DEPTH:
            splits *= 2
        return splits


def tiles_needed(segments: Sequence[Segment]) -> int:
    return len(_tiles_of(segments))


def _tiles_of(segments: Sequence[Segment]) -> list[tuple[Adapter | None, int, int]]:
    """(adapter, first row, rows) of each tile."""
    return [
        (segment.adapter, first, min(TILE_ROWS, segment.end - first))
        for segment in segments
        for first in range(segment.start, segment.end, TILE_ROWS)
    ]


_BLOCKS: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}


def _column_blocks(outputs: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [C, 4]: a block's layer, its first column in it, the layer's columns, and the first column of all."""
    key = (outputs, device)
    if key not in _BLOCKS:
        rows, before = [], 0
        for part, width in enumerate(outputs):
            rows += [(part, first, width, before + first) for first in range(0, width, _COLUMNS)]
            before += width
        _BLOCKS[key] = torch.tensor(rows, dtype=torch.int32, device=device)
    return _BLOCKS[key]
