"""Where the adapters of one pass lie in memory, and which rows are whose: what the kernels of all tenants are told.

Built once per pass from its segments; then one launch applies everybody's adapters to a group of linear layers.
Nothing is copied or stacked, ranks and targets may differ, and gradients are added to the adapters' own. Knows no
layers beyond their groups. For CUDA devices.

Shapes: `T` rows of the batch, `I` inputs and `O` outputs of a group, `R` ranks of all layers of a group, `P` width of
a feed-forward network.
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton
from torch import Tensor

from tinsmith.models import adapter_kernels as kernels
from tinsmith.models.lora import Adapter, AdapterLayout, LinearGroup, Segment

_MOST_LAYERS = 3  # of a group
_MANY_ROWS = 12_288  # from which on tiles of 64 rows are enough programs
_MOST_RANKS = 128  # of one program
_LEAST = 16  # the smallest side of a matrix product in a kernel


class AdapterPlaces:
    """Where in an adapter's flat buffer the matrices of each group lie, for every layout."""

    def __init__(self, groups: Sequence[LinearGroup]) -> None:
        self._groups = [group.linears for group in groups]
        self.numbers = {group.linears: number for number, group in enumerate(groups)}
        self._known: dict[AdapterLayout, np.ndarray] = {}

    def of(self, layout: AdapterLayout) -> np.ndarray:
        """int64 [groups, 4]: where A and every B begin, in numbers; -1 where there is none."""
        if layout not in self._known:
            self._known[layout] = np.array([_places(layout, linears) for linears in self._groups], np.int64)
        return self._known[layout]


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
        self._numbers = {adapter: number for number, adapter in enumerate(self.adapters)}
        ranks = [adapter.spec.rank for adapter in self.adapters]
        self._max_rank = max(ranks, default=_LEAST)
        self._rows = 64 if segments[-1].end >= _MANY_ROWS else 32
        self._aligned = all(rank % 8 == 0 for rank in ranks) and all(
            not ((place := places.of(adapter.layout))[place >= 0] % 8).any() for adapter in self.adapters
        )
        tiles = [
            (row, segment.end, len(self.adapters) if segment.adapter is None else self._numbers[segment.adapter])
            for segment in segments
            for row in range(segment.start, segment.end, self._rows)
        ]
        self._tiles = self._upload(np.array(tiles, np.int32).T.copy())
        self._ranks = self._upload(np.array([*ranks, 0], np.int32))
        self._scales = self._upload(np.array([*(adapter.scale for adapter in self.adapters), 0], np.float32))
        self._addresses = self._address([adapter.compute for adapter in self.adapters])
        self._runs: tuple[Tensor, Tensor, Tensor] | None = None

    def _upload(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor

    def _address(self, buffers: Sequence[Tensor]) -> Tensor:
        """int64 [groups, adapters and nobody, 4], for one flat buffer of each adapter."""
        table = np.zeros((len(self._places.numbers), len(buffers) + 1, 1 + _MOST_LAYERS), np.int64)
        for number, (adapter, buffer) in enumerate(zip(self.adapters, buffers, strict=True)):
            places = self._places.of(adapter.layout)
            table[:, number] = np.where(places < 0, 0, buffer.data_ptr() + places * buffer.itemsize)
        return self._upload(table)

    def inner_of_inputs(self, group: LinearGroup, x_TI: Tensor) -> Tensor:
        """scale · x Aᵀ [T, R]."""
        return self._shrink(group, x_TI, of_a=True)

    def inner_of_gradient(self, group: LinearGroup, dy_TO: Tensor) -> Tensor:
        """scale · dy B [T, R]."""
        return self._shrink(group, dy_TO, of_a=False)

    def _shrink(self, group: LinearGroup, x: Tensor, *, of_a: bool) -> Tensor:
        count = len(group.linears)
        z_TR = x.new_empty(len(x), triton.cdiv(count * self._max_rank, _LEAST) * _LEAST)
        wanted = self._max_rank * (count if of_a else 1)
        block = min(_power_of_two(wanted), _MOST_RANKS)
        grid = (self._tiles.shape[1], triton.cdiv(wanted, block), 1 if of_a else count)
        kernels.shrink[grid](
            *(x, z_TR, *self._tiles, self._addresses[self._places.numbers[group.linears]], self._ranks, self._scales),
            *(x.stride(0), z_TR.stride(0), *_widths(group, of_a)),
            OF_A=of_a,
            ALIGNED=self._aligned,
            PARTS=count,
            ROWS=self._rows,
            RANKS=block,
            DEPTH=64,
            num_warps=4,
            num_stages=4,
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
        y = z_TR.new_empty(len(z_TR), sum(widths))
        kernels.expand[(self._tiles.shape[1], sum(triton.cdiv(width, 128) for width in widths))](
            *(y, y if base is None else base, z_TR, *self._tiles),
            *(self._addresses[self._places.numbers[group.linears]], self._ranks),
            *(y.stride(0), 0 if base is None else base.stride(0), z_TR.stride(0), *widths),
            OF_A=of_a,
            ADD=base is not None,
            ALIGNED=self._aligned,
            PARTS=len(group.linears),
            ROWS=self._rows,
            COLUMNS=128,
            DEPTH=self._depth,
            num_warps=4,
        )
        return y

    def add_gradients(self, group: LinearGroup, x_TI: Tensor, z_TR: Tensor, dy_TO: Tensor, dz_TR: Tensor) -> None:
        """Adds dzᵀ x to the gradients of A, and dyᵀ z to those of B, of the segments that train."""
        if self._runs is None:
            self._runs = self._training_runs()
        *runs, addresses = self._runs
        for of_a, x, z in ((True, x_TI, dz_TR), (False, dy_TO, z_TR)):
            widths = _widths(group, of_a)
            wanted = self._max_rank * (len(group.linears) if of_a else 1)
            block = min(_power_of_two(wanted), _MOST_RANKS)
            columns = sum(triton.cdiv(width, 64) for width in widths)
            kernels.gradients[(len(self.adapters), triton.cdiv(wanted, block), columns)](
                *(x, z, *runs[0], runs[1], addresses[self._places.numbers[group.linears]], self._ranks),
                *(x.stride(0), z.stride(0), *widths),
                OF_A=of_a,
                ALIGNED=self._aligned,
                PARTS=len(group.linears),
                ROWS=64,
                RANKS=block,
                COLUMNS=64,
                num_warps=4,
                num_stages=3,
            )

    def _training_runs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the segments that train by adapter [2, runs], each adapter's first run, and gradients' addresses."""
        runs: list[tuple[int, int]] = []
        firsts = [0]
        for adapter in self.adapters:
            runs += [(each.start, each.end) for each in self._segments if each.adapter is adapter and each.trains]
            firsts.append(len(runs))
        rows = self._upload(np.array(runs or [(0, 0)], np.int32).T.copy())
        addresses = self._address([adapter.require_grad() for adapter in self.adapters])
        return rows, self._upload(np.array(firsts, np.int32)), addresses

    def swiglu(self, group: LinearGroup, gate_up_TO: Tensor, z_TR: Tensor) -> Tensor:
        """silu(gate) · up [T, P], the adapters' shares z Bᵀ of both included."""
        width = group.outputs[0]
        out_TP = gate_up_TO.new_empty(len(gate_up_TO), width)
        kernels.adapted_swiglu[(self._tiles.shape[1], triton.cdiv(width, 64))](
            *(gate_up_TO, out_TP, z_TR, *self._tiles),
            *(self._addresses[self._places.numbers[group.linears]], self._ranks),
            *(gate_up_TO.stride(0), z_TR.stride(0), width),
            ALIGNED=self._aligned,
            ROWS=self._rows,
            COLUMNS=64,
            DEPTH=self._depth,
            num_warps=4,
        )
        return out_TP

    def swiglu_backward(
        self, groups: tuple[LinearGroup, LinearGroup], gate_up_TO: Tensor, z_TR: Tensor, dout_TP: Tensor, dz_TR: Tensor
    ) -> Tensor:
        """The output once more [T, P]; `gate_up_TO` is overwritten with its gradient.

        `groups` are gate and up, to which z belongs, and the layer behind them, to which dz does: its adapters' share
        dz A is added to the gradient in the output.
        """
        width = groups[0].outputs[0]
        out_TP = torch.empty_like(dout_TP)
        kernels.adapted_swiglu_backward[(self._tiles.shape[1], triton.cdiv(width, 64))](
            *(gate_up_TO, dout_TP, gate_up_TO, out_TP, z_TR, dz_TR, *self._tiles),
            *(self._addresses[self._places.numbers[group.linears]] for group in groups),
            *(self._ranks, gate_up_TO.stride(0), z_TR.stride(0), dz_TR.stride(0), width),
            ALIGNED=self._aligned,
            ROWS=self._rows,
            COLUMNS=64,
            DEPTH=self._depth,
            num_warps=4,
        )
        return out_TP

    @property
    def _depth(self) -> int:
        return min(_power_of_two(self._max_rank), 64)


def _power_of_two(number: int) -> int:
    return max(triton.next_power_of_2(number), _LEAST)


def _widths(group: LinearGroup, of_a: bool) -> list[int]:
    """Of the matrices' columns, by layer, or of the inputs as one."""
    widths = [group.weight_OI.shape[1]] if of_a else group.outputs
    return [*widths, *[0] * (_MOST_LAYERS - len(widths))]
