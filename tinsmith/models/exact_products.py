"""Matrix products, norms and gates of an exact pass, and the adapters of its rows.

How a product is cut into programs depends on its size, its bits do not (see `exact_kernels`). For CUDA devices. Knows
neither layers nor requests.

Shapes: `T` rows, `D` hidden size, `I` inputs and `O` outputs of a group of linear layers, `R` ranks of all layers of a
group, `N` tiles, `K` groups, `P` width of a feed-forward network, `V` vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from tinsmith.models import exact_kernels as kernels
from tinsmith.models import exact_row_kernels as row_kernels
from tinsmith.models.adapter_table import AdapterPlaces, identity
from tinsmith.models.launch import Kernel, blocks, power_of_two
from tinsmith.models.lora import Adapter, LinearGroup, Segment

TILE_ROWS = 64
"""Of the tiles of rows with one adapter: what the widest matrix instructions take."""

_RANKS = 32  # of one step
_DEPTH = 128  # inputs of one step of what is computed beside a product
_COLUMNS = 64
_NUMBERS = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_VOCABULARY_BLOCK = 8192
_SOME_ROWS = 512  # up to which smaller tiles are more programs
_WIDE_OUTPUTS, _WIDEST_OUTPUTS, _VOCABULARY = 4096, 8192, 65_536
_ROWS_TOGETHER = 8  # tiles
_HEADS = 16  # that one program turns, of one or several rows


class ExactKernel(Kernel):
    """A kernel that computes what it says: no multiplication is contracted into an addition.

    It begins with `in_turn`, and is launched while the one before it still runs.
    """

    def __init__(self, function: Any, *, warps: int = 4, stages: int = 3) -> None:
        super().__init__(function, warps=warps, stages=stages)
        self._options |= {"enable_fp_fusion": False, "launch_pdl": True}


_LARGE = ExactKernel(kernels.product, warps=8, stages=3)
_WIDE = ExactKernel(kernels.product, warps=8, stages=4)
_SMALL = ExactKernel(kernels.product, stages=4)
_FEW = ExactKernel(kernels.product, stages=3)
_FEW_NARROW = ExactKernel(kernels.product, stages=4)
_SHRINK = ExactKernel(kernels.shrink, stages=4)
_EXPAND = ExactKernel(kernels.expand)
_SWIGLU = ExactKernel(kernels.swiglu)
_NORM = ExactKernel(row_kernels.norm)
_TURN = ExactKernel(row_kernels.turn)
_NORMALIZERS = ExactKernel(row_kernels.normalizers, warps=16)


@dataclass(frozen=True, slots=True)
class _Cut:
    """How a product is cut: rows and columns of a program, inputs of a step."""

    kernel: ExactKernel
    rows: int
    columns: int
    depth: int


@dataclass(frozen=True, slots=True)
class _Beside:
    """What a product's kernel computes beside it: tensors (z, tiles, addresses, scales), and how that is cut."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    tiles: int
    rank_blocks: int
    aligned: bool
    parts: int


def product(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    residual_TO: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x Wᵀ + bias + residual [T, O] in `dtype`, or that of x; accumulated in fp32."""
    y_TO = x_TI.new_empty(x_TI.shape[0], weight_OI.shape[0], dtype=dtype or x_TI.dtype)
    nothing = _Beside((x_TI, x_TI, x_TI, x_TI), 0, 0, False, 1)
    _multiply(x_TI, weight_OI, bias_O, residual_TO, y_TO, nothing)
    return y_TO


def _multiply(
    x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, residual_TO: Tensor | None, y_TO: Tensor, beside: _Beside
) -> None:
    (rows, inputs), outputs = x_TI.shape, weight_OI.shape[0]
    cut = _cut(rows, outputs)
    residual = y_TO if residual_TO is None else residual_TO
    strides = (x_TI.stride(0), weight_OI.stride(0), residual.stride(0), y_TO.stride(0), beside.tensors[0].stride(0))
    programs = beside.tiles * beside.rank_blocks + blocks(rows, cut.rows) * blocks(outputs, cut.columns)
    cut.kernel(
        (programs,),
        (x_TI, weight_OI, x_TI if bias_O is None else bias_O, residual, y_TO, *beside.tensors),
        (*strides, inputs, outputs),
        (rows, beside.tiles),
        (
            *(bias_O is not None, residual_TO is not None, cut.rows, cut.columns, cut.depth),
            *(_ROWS_TOGETHER, inputs % cut.depth == 0, rows < cut.rows),
            *(beside.rank_blocks, beside.aligned, beside.parts, _RANKS, _DEPTH, _NUMBERS[x_TI.dtype]),
        ),
    )


def _cut(rows: int, outputs: int) -> _Cut:
    """As many programs as keep the device busy."""
    if rows <= TILE_ROWS:
        return _Cut(_FEW_NARROW, TILE_ROWS, 32, 128) if outputs < _WIDEST_OUTPUTS else _Cut(_FEW, TILE_ROWS, 64, 128)
    if rows <= _SOME_ROWS:
        return _Cut(_SMALL, TILE_ROWS, 64 if outputs < _WIDE_OUTPUTS else 128, 64)
    if outputs >= _VOCABULARY:
        return _Cut(_WIDE, 128, 256, 64)
    return _Cut(_LARGE, 128, 128, 64)


def norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The RMS norm of every row of the contiguous x."""
    rows, width = x_TD.shape
    y_TD = torch.empty_like(x_TD)
    _NORM((rows,), (x_TD, weight_D, y_TD), (width,), (eps,), (power_of_two(width),))
    return y_TD


def normalizers(logits_RV: Tensor, inverse_R: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 (largest logit [R], log Σ exp((logit − it) · inverse) [R]) of fp32 logits."""
    rows, width = logits_RV.shape
    most_R, log_total_R = (logits_RV.new_empty(rows) for _ in range(2))
    block = min(power_of_two(width), _VOCABULARY_BLOCK)
    _NORMALIZERS((rows,), (logits_RV, inverse_R, most_R, log_total_R), (logits_RV.stride(0), width), (), (block,))
    return most_R, log_total_R


@dataclass(frozen=True, slots=True)
class Turning:
    """How heads are turned: cosines and sines [T, d]; weights and epsilon of the queries' and keys' norms, if any."""

    cos_Td: Tensor
    sin_Td: Tensor
    weights: tuple[Tensor, Tensor] | None
    eps: float


@dataclass(frozen=True, slots=True)
class CacheRows:
    """Keys and values [S, G · d] of a cache, and in which of its rows those of a pass belong (int64 [T])."""

    keys: Tensor
    values: Tensor
    slots_T: Tensor


def turned(
    heads_TO: Tensor, counts: tuple[int, int], width: int, turning: Turning, cache: CacheRows | None = None
) -> Tensor:
    """Queries and keys [T, (H + G) · d], normalised and rotated; of `counts` heads and key/value heads.

    With a cache that takes keys and values, queries alone: [T, H · d].
    """
    rows, (heads, kv_heads), cos_Td = len(heads_TO), counts, turning.cos_Td
    out_TO = heads_TO.new_empty(rows, (heads + (kv_heads if cache is None else 0)) * width)
    share = (heads | kv_heads | _HEADS) & -(heads | kv_heads | _HEADS)
    keys, values = (heads_TO, heads_TO) if cache is None else (cache.keys, cache.values)
    _TURN(
        (blocks(rows, _HEADS // share), (heads + kv_heads * (1 if cache is None else 2)) // share),
        (
            *(heads_TO, out_TO, cos_Td, turning.sin_Td, *(turning.weights or (heads_TO, heads_TO))),
            *(keys, values, cos_Td if cache is None else cache.slots_T),
        ),
        (heads_TO.stride(0), out_TO.stride(0), cos_Td.stride(0), keys.stride(0), values.stride(0)),
        (rows, turning.eps),
        (
            *(turning.weights is not None, cache is not None, heads, kv_heads),
            *(share, _HEADS, width // 2, power_of_two(width // 2)),
        ),
    )
    return out_TO


class ExactAdapters:
    """The adapters of a pass's rows, of any ranks; rows without one have tiles, too.

    Its buffers stay where they are when `set` gives them other adapters and tiles.
    """

    def __init__(self, places: AdapterPlaces, *, tiles: int, rank: int, device: torch.device) -> None:
        """With room for so many tiles, and for adapters of a rank up to `rank` (0: there are none)."""
        self._places, self._rank, self._device = places, rank, device
        self._tiles_N4 = torch.zeros(tiles, 4, dtype=torch.int32, device=device)
        self._scales_N = torch.zeros(tiles, dtype=torch.float32, device=device)
        self._addresses_KN4 = torch.zeros(len(places.numbers), tiles, 4, dtype=torch.int64, device=device)
        self._aligned = True
        self._known: list[tuple[object, ...]] = []  # no adapter itself, which would keep its memory

    def set(self, segments: Sequence[Segment]) -> None:
        """Takes the adapters of these segments. Raises ValueError if they do not fit."""
        parts = [(each.adapter, each.start, each.end) for each in segments]
        known: list[tuple[object, ...]] = [(*identity(adapter), start, end) for adapter, start, end in parts]
        if known == self._known:
            return
        firsts = [np.arange(start, end, TILE_ROWS) for _, start, end in parts]
        counts = [len(first) for first in firsts]
        room = len(self._scales_N)
        ranks = [adapter.spec.rank if adapter else 0 for adapter, _, _ in parts]
        if sum(counts) > room or max(ranks) > self._rank:
            raise ValueError(f"{sum(counts)} tiles of ranks up to {max(ranks)} do not fit: {room}, {self._rank}")
        self._aligned = all(adapter is None or self._places.are_aligned(adapter) for adapter, _, _ in parts)
        tiles = np.zeros((room, 4), np.int32)
        used = slice(0, sum(counts))
        tiles[used, 0] = np.concatenate(firsts)
        tiles[used, 1] = np.repeat([end for _, _, end in parts], counts)
        tiles[used, 2] = np.repeat(ranks, counts)
        scales = np.zeros(room, np.float32)
        scales[used] = np.repeat([adapter.scale if adapter else 0.0 for adapter, _, _ in parts], counts)
        addresses = np.zeros((len(self._places.numbers), room, 4), np.int64)
        addresses[:, used] = np.repeat([self._addresses(adapter) for adapter, _, _ in parts], counts, 0).swapaxes(0, 1)
        for target, source in ((self._tiles_N4, tiles), (self._scales_N, scales), (self._addresses_KN4, addresses)):
            target.copy_(torch.from_numpy(source))
        self._known = known

    def _addresses(self, adapter: Adapter | None) -> np.ndarray:
        """int64 [K, 4]: of A and every B; 0 for what there is not."""
        if adapter is None:
            return np.zeros((len(self._places.numbers), 4), np.int64)
        return self._places.addresses(adapter.layout, adapter.compute)

    def _of(self, linears: tuple[int, ...]) -> Tensor:
        return self._addresses_KN4[self._places.numbers[linears]]

    def inner(self, linears: tuple[int, ...], x_TI: Tensor) -> Tensor:
        """scale · x Aᵀ [T, R], an adapter's layers one behind the other; undefined where a row has no adapter."""
        parts = len(linears)
        z_TR = self._room(parts, x_TI)
        if self._rank == 0:
            return z_TR
        _SHRINK(
            (len(self._scales_N), blocks(parts * self._rank, _RANKS)),
            (x_TI, z_TR, self._tiles_N4, self._of(linears), self._scales_N),
            (x_TI.stride(0), z_TR.stride(0), x_TI.shape[1]),
            (),
            (self._aligned, parts, TILE_ROWS, _RANKS, 64, _NUMBERS[x_TI.dtype]),
        )
        return z_TR

    def _room(self, parts: int, x_TI: Tensor) -> Tensor:
        return x_TI.new_empty(x_TI.shape[0], blocks(max(parts * self._rank, 1), 16) * 16)

    def product(self, group: LinearGroup, x_TI: Tensor, residual_TO: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x Wᵀ + b + the residual [T, O], what `inner` computes): of few rows at once."""
        if self._rank == 0 or x_TI.shape[0] > _SOME_ROWS:
            z_TR = self.inner(group.linears, x_TI)
            return product(x_TI, group.weight_OI, group.bias_O, residual_TO), z_TR
        parts = len(group.linears)
        z_TR = self._room(parts, x_TI)
        y_TO = x_TI.new_empty(x_TI.shape[0], group.weight_OI.shape[0])
        tensors = (z_TR, self._tiles_N4, self._of(group.linears), self._scales_N)
        beside = _Beside(tensors, len(self._scales_N), blocks(parts * self._rank, _RANKS), self._aligned, parts)
        _multiply(x_TI, group.weight_OI, group.bias_O, residual_TO, y_TO, beside)
        return y_TO, z_TR

    def add(self, linears: tuple[int, ...], outputs: Sequence[int], z_TR: Tensor, y_TO: Tensor) -> None:
        """y += z Bᵀ, in place; y may be of a wider dtype."""
        if self._rank == 0:
            return
        columns = 2 * _COLUMNS
        _EXPAND(
            (len(self._scales_N), sum(blocks(width, columns) for width in outputs)),
            (z_TR, y_TO, self._tiles_N4, self._of(linears)),
            (z_TR.stride(0), y_TO.stride(0), *outputs, *[0] * (3 - len(outputs))),
            (),
            (self._aligned, TILE_ROWS, columns, _RANKS, _NUMBERS[z_TR.dtype]),
        )

    def swiglu(self, linears: tuple[int, ...], gate_up_TP: Tensor, z_TR: Tensor) -> Tensor:
        """silu(gate) · up [T, P], the adapters' shares z Bᵀ of gate and up included."""
        rows, width = gate_up_TP.shape[0], gate_up_TP.shape[1] // 2
        out_TP = gate_up_TP.new_empty(rows, width)
        _SWIGLU(
            (len(self._scales_N), blocks(width, _COLUMNS)),
            (gate_up_TP, out_TP, z_TR, self._tiles_N4, self._of(linears)),
            (gate_up_TP.stride(0), z_TR.stride(0), width),
            (),
            (self._aligned, TILE_ROWS, _COLUMNS, _RANKS, _NUMBERS[z_TR.dtype]),
        )
        return out_TP


def adapters_of(places: AdapterPlaces, segments: Sequence[Segment], device: torch.device) -> ExactAdapters:
    """The adapters of these segments, which are all of a pass's."""
    tiles = sum(blocks(each.end - each.start, TILE_ROWS) for each in segments)
    rank = max(each.adapter.spec.rank if each.adapter else 0 for each in segments)
    made = ExactAdapters(places, tiles=tiles, rank=rank, device=device)
    made.set(segments)
    return made
