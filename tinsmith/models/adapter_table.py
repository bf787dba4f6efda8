"""Where the adapters of one pass lie in memory, and which rows are whose: what the kernels of all tenants are told.

Built once per pass from its segments; then one launch applies everybody's adapters to a group of linear layers.
Nothing is copied or stacked, ranks and targets may differ, and gradients are added to the adapters' own. Knows no
layers beyond their groups. For CUDA devices.

Shapes: `T` rows of the batch, `I` inputs and `O` outputs of a group, `R` ranks of all layers of a group, `P` width of
a feed-forward network.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinsmith.models import adapter_kernels as kernels
from tinsmith.models.launch import Kernel, blocks, power_of_two
from tinsmith.models.lora import Adapter, AdapterLayout, LinearGroup, Segment
from tinsmith.models.transfer import on_device

MOST_RANKS = 128
"""The largest rank for which the kernels are made."""

_ROOM = 160 * 2**10
"""Bytes of shared memory that a program may need in backward, for ranks above half of the largest; else 64 KiB."""

_MOST_LAYERS = 3  # of a group
_ROWS = 64  # of a tile
_MANY_ROWS = 12_288  # from which on tiles of that size are enough programs; of fewer rows, half of it
_SWIGLU_COLUMNS = 64  # of one step of its programs
_SWIGLU_PROGRAMS = 256  # what fills a device
_ALIGNED = 8  # numbers; what loads of 16 bytes need
_LEAST = 16  # the smallest side of a matrix product in a kernel

_SHRINK = Kernel(kernels.shrink, stages=4)
_EXPAND = Kernel(kernels.expand)
_GRADIENTS = Kernel(kernels.gradients)
_SWIGLU = Kernel(kernels.adapted_swiglu, stages=2)
_SWIGLU_BACKWARD = Kernel(kernels.adapted_swiglu_backward, stages=2)


def trainable_ranks(device: torch.device) -> int:
    """The largest rank for which the device has room for the backward kernels: many give a program 99 KiB."""
    if device.type != "cuda":
        return MOST_RANKS
    properties: Any = torch.cuda.get_device_properties(device)
    return MOST_RANKS if properties.shared_memory_per_block_optin >= _ROOM else MOST_RANKS // 2


class AdapterPlaces:
    """Where in an adapter's flat buffer the matrices of each group lie, for every layout."""

    def __init__(self, groups: Sequence[tuple[int, ...]]) -> None:
        """`groups` has the indices of each group's linear layers; `numbers` says which group is which."""
        if any(len(linears) > _MOST_LAYERS for linears in groups):
            raise ValueError(f"a group has more than {_MOST_LAYERS} linear layers")
        self._groups = list(groups)
        self.numbers = {linears: number for number, linears in enumerate(groups)}
        self._known: dict[AdapterLayout, np.ndarray] = {}
        self._even: dict[AdapterLayout, bool] = {}

    def of(self, layout: AdapterLayout) -> np.ndarray:
        """int64 [groups, 4]: where A and every B begin, in numbers; -1 where there is none."""
        if layout not in self._known:
            self._known[layout] = np.array([_places(layout, linears) for linears in self._groups], np.int64)
        return self._known[layout]

    def addresses(self, layout: AdapterLayout, buffer: Tensor) -> np.ndarray:
        """int64 [groups, 4]: where they begin in this flat buffer; 0 where there is none."""
        places = self.of(layout)
        return np.where(places < 0, 0, buffer.data_ptr() + places * buffer.itemsize)

    def are_aligned(self, adapter: Adapter) -> bool:
        """Whether kernels can load 16 bytes of any of the adapter's matrices at once."""
        layout = adapter.layout
        if layout not in self._even:
            places = self.of(layout)
            self._even[layout] = adapter.spec.rank % _ALIGNED == 0 and not (places[places >= 0] % _ALIGNED).any()
        return self._even[layout] and adapter.compute.data_ptr() % 16 == 0


def identity(adapter: Adapter | None) -> tuple[float, ...]:
    """What kernels go by, of an adapter that is told apart without being kept in memory."""
    return () if adapter is None else (adapter.compute.data_ptr(), id(adapter.layout), adapter.scale)


def _places(layout: AdapterLayout, linears: tuple[int, ...]) -> list[int]:
    places = [-1] * (1 + _MOST_LAYERS)
    for part, linear in enumerate(linears):
        positions = [position for position, other in enumerate(layout.linears) if other == linear]
        if positions:
            first, second = positions
            places[0] = layout.starts[first] if part == 0 else places[0]
            places[1 + part] = layout.starts[second]
    return places


class AdapterTable:
    """The adapters of a pass (perhaps none), and how they are applied to all its rows."""

    def __init__(self, segments: Sequence[Segment], places: AdapterPlaces, device: torch.device) -> None:
        self._segments, self._places, self._device = segments, places, device
        self.adapters: list[Adapter] = list(dict.fromkeys(each.adapter for each in segments if each.adapter))
        ranks = [*(adapter.spec.rank for adapter in self.adapters), 0]
        scales = [*(adapter.scale for adapter in self.adapters), 0.0]
        self._max_rank = max(*ranks, 8)
        self._block = power_of_two(self._max_rank, _LEAST)
        self._rows = _ROWS if segments[-1].end >= _MANY_ROWS else _ROWS // 2
        self._aligned = all(places.are_aligned(adapter) for adapter in self.adapters)
        numbers = {adapter: number for number, adapter in enumerate(self.adapters)}
        owners = [len(numbers) if each.adapter is None else numbers[each.adapter] for each in segments]
        known = [(*each, ranks[each[2]]) for each in zip(*_bounds(segments), owners, strict=True)]
        self._tiles = self._upload(_tiles(known, self._rows))
        self._large_tiles = self._tiles if self._rows == _ROWS else self._upload(_tiles(known, _ROWS))
        self._ranks = self._upload(np.array(ranks, np.int32))
        self._scales = self._upload(np.array(scales, np.float32))
        self._addresses = self._address([adapter.compute for adapter in self.adapters])
        self._runs: tuple[Tensor, Tensor, Sequence[Tensor]] | None = None

    def _upload(self, array: np.ndarray) -> Tensor:
        return on_device(array, self._device)

    def _address(self, buffers: Sequence[Tensor]) -> Sequence[Tensor]:
        """int64 [adapters and nobody, 4] of every group, for one flat buffer of each adapter."""
        groups = len(self._places.numbers)
        table = np.zeros((groups, _aligned_up(len(buffers) + 1), 1 + _MOST_LAYERS), np.int64)
        for number, (adapter, buffer) in enumerate(zip(self.adapters, buffers, strict=True)):
            table[:, number] = self._places.addresses(adapter.layout, buffer)
        return self._upload(table).unbind()

    def _of(self, group: LinearGroup) -> Tensor:
        return self._addresses[self._places.numbers[group.linears]]

    def _inner(self, group: LinearGroup, like: Tensor) -> Tensor:
        """Room for [T, R], of rows that begin at multiples of 16 bytes."""
        return like.new_empty(like.shape[0], _aligned_up(len(group.linears) * self._max_rank))

    def inner_of_inputs(self, group: LinearGroup, x_TI: Tensor) -> Tensor:
        """scale · x Aᵀ [T, R]."""
        return self._shrink(group, x_TI, of_a=True)

    def inner_of_gradient(self, group: LinearGroup, dy_TO: Tensor) -> Tensor:
        """scale · dy B [T, R]."""
        return self._shrink(group, dy_TO, of_a=False)

    def _shrink(self, group: LinearGroup, x: Tensor, *, of_a: bool) -> Tensor:
        count = len(group.linears)
        z_TR = self._inner(group, x)
        wanted = self._max_rank * (count if of_a else 1)
        block = min(power_of_two(wanted, _LEAST), MOST_RANKS)
        _SHRINK(
            (self._tiles.shape[0], blocks(wanted, block), 1 if of_a else count),
            (x, z_TR, self._tiles, self._of(group), self._scales),
            (x.stride(0), z_TR.stride(0), *_widths(group, of_a)),
            (),
            (of_a, self._aligned, count, self._rows, block, 64),
        )
        return z_TR

    def outputs(self, group: LinearGroup, z_TR: Tensor, base: Tensor | None = None) -> Tensor:
        """z Bᵀ [T, O], added to `base` [T, O] (rows of which may be the same one)."""
        return self._expand(group, z_TR, base, of_a=False)

    def gradient_of_inputs(self, group: LinearGroup, dz_TR: Tensor) -> Tensor:
        """dz A [T, I]."""
        return self._expand(group, dz_TR, None, of_a=True)

    def _expand(self, group: LinearGroup, z_TR: Tensor, base: Tensor | None, *, of_a: bool) -> Tensor:
        widths = _widths(group, of_a)
        y = z_TR.new_empty(z_TR.shape[0], sum(widths))
        _EXPAND(
            (self._tiles.shape[0], sum(blocks(width, 128) for width in widths)),
            (y, y if base is None else base, z_TR, self._tiles, self._of(group)),
            (y.stride(0), 0 if base is None else base.stride(0), z_TR.stride(0), *widths),
            (),
            (of_a, base is not None, self._aligned, len(group.linears), self._rows, 128, self._block),
        )
        return y

    def add_gradients(self, group: LinearGroup, x_TI: Tensor, z_TR: Tensor, dy_TO: Tensor, dz_TR: Tensor) -> None:
        """Adds dzᵀ x to the gradients of A, and dyᵀ z to those of B, of the segments that train."""
        if self._runs is None:
            self._runs = self._training_runs()
        runs, firsts, addresses = self._runs
        for of_a, x, z in ((True, x_TI, dz_TR), (False, dy_TO, z_TR)):
            widths = _widths(group, of_a)
            wanted = self._max_rank * (len(group.linears) if of_a else 1)
            block = min(power_of_two(wanted, _LEAST), MOST_RANKS)
            columns = sum(blocks(width, 64) for width in widths)
            _GRADIENTS(
                (len(self.adapters), blocks(wanted, block), columns),
                (x, z, runs, firsts, addresses[self._places.numbers[group.linears]], self._ranks),
                (x.stride(0), z.stride(0), *widths),
                (),
                (of_a, self._aligned, len(group.linears), 64, block, 64),
            )

    def _training_runs(self) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Rows of the segments that train by adapter [runs, 2], each adapter's first run, and gradients' addresses."""
        runs: list[tuple[int, int]] = []
        firsts = [0]
        for adapter in self.adapters:
            runs += [(each.start, each.end) for each in self._segments if each.adapter is adapter and each.trains]
            firsts.append(len(runs))
        rows = self._upload(np.array(runs or [(0, 0)], np.int32))
        addresses = self._address([adapter.require_grad() for adapter in self.adapters])
        return rows, self._upload(np.array(firsts, np.int32)), addresses

    def swiglu(
        self, groups: tuple[LinearGroup, LinearGroup], gate_up_TO: Tensor, z_TR: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(silu(gate) · up [T, P], scale · that Aᵀ [T, R]), the adapters' shares z Bᵀ of gate and up included.

        `groups` are gate and up, to which z belongs, and the layer behind them, of whose input the second result is.
        """
        width = groups[0].outputs[0]
        out_TP = gate_up_TO.new_empty(gate_up_TO.shape[0], width)
        inner = self._partial(groups[1], gate_up_TO)
        _SWIGLU(
            (self._large_tiles.shape[0], inner.shape[0]),
            (
                gate_up_TO,
                out_TP,
                z_TR,
                inner,
                self._large_tiles,
                self._of(groups[0]),
                self._of(groups[1]),
                self._scales,
            ),
            (gate_up_TO.stride(0), z_TR.stride(0), inner.stride(1), width),
            (gate_up_TO.shape[0], inner.shape[0]),
            (self._aligned, _ROWS, _SWIGLU_COLUMNS, self._block),
        )
        return out_TP, _summed(inner, gate_up_TO)

    def swiglu_backward(
        self,
        groups: tuple[LinearGroup, LinearGroup],
        gate_up_TO: Tensor,
        z_TR: Tensor,
        dout_TP: Tensor,
        down_dz_TR: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """(the output once more [T, P], scale · dy B [T, R]); gate and up are overwritten with their gradient dy.

        The output takes the place of the gradient in it, to which the share dz A of the layer behind is added before.
        """
        width = groups[0].outputs[0]
        inner = self._partial(groups[0], gate_up_TO)
        tables = (self._large_tiles, self._of(groups[0]), self._of(groups[1]), self._scales)
        _SWIGLU_BACKWARD(
            (self._large_tiles.shape[0], inner.shape[0]),
            (gate_up_TO, dout_TP, z_TR, inner, down_dz_TR, *tables),
            (gate_up_TO.stride(0), z_TR.stride(0), inner.stride(1), down_dz_TR.stride(0), width),
            (gate_up_TO.shape[0], inner.shape[0]),
            (self._aligned, _ROWS, _SWIGLU_COLUMNS, self._block),
        )
        return dout_TP, _summed(inner, gate_up_TO)

    def _partial(self, group: LinearGroup, like: Tensor) -> Tensor:
        """Room for the parts [splits, T, R] of a sum: in fp32, unless there is only one."""
        splits = max(1, _SWIGLU_PROGRAMS // self._large_tiles.shape[0])
        columns = _aligned_up(len(group.linears) * self._max_rank)
        return like.new_empty(splits, like.shape[0], columns, dtype=like.dtype if splits == 1 else torch.float32)


def _bounds(segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
    return [each.start for each in segments], [each.end for each in segments]


def _tiles(segments: Sequence[tuple[int, int, int, int]], rows: int) -> np.ndarray:
    """int32 [tiles, 4]: first row, end, adapter and rank, of (start, end, adapter, rank)."""
    tiles = [(row, *others) for start, *others in segments for row in range(start, others[0], rows)]
    return np.array(tiles, np.int32)


def _summed(parts_STR: Tensor, like: Tensor) -> Tensor:
    return parts_STR[0] if parts_STR.shape[0] == 1 else parts_STR.sum(0).to(like.dtype)


def _aligned_up(number: int) -> int:
    return blocks(number, _LEAST) * _LEAST


def _widths(group: LinearGroup, of_a: bool) -> list[int]:
    """Of the matrices' columns, by layer, or of the inputs as one."""
    widths = [group.weight_OI.shape[1]] if of_a else group.outputs
    return [*widths, *[0] * (_MOST_LAYERS - len(widths))]
