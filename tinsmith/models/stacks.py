"""The adapters of a decoding pass as batched products: two for all of them instead of two for each.

For few rows of many adapters on a CPU, where a product of eight rows costs little more than the call. The adapters'
matrices are copied into stacks, in fp32, and stay there as long as passes need the same ones.

Shapes: `G` adapters, `n` the most rows of one, `T` rows of the batch, `M` those that have an adapter, `I` inputs, `R`
ranks of all layers of a group, `r` of one, `P` outputs of one, `O` of all.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from tinsmith.models.lora import Adapter, AdapterLayout, AdaptersInTurn, AppliedAdapters, LinearGroup, Segment

STACK_BYTES = 2**28
"""Of one batch's stacks, at most: larger adapters gain nothing, since their products are longer than the calls."""

_WASTE = 4  # cells computed for each row that is wanted, at most
_COMPOSITIONS = 2  # of batches, that are remembered: a step's layers and its head may see different rows

_Composition = tuple[tuple[Adapter | None, int, int], ...]


class AdapterStacks:
    """Keeps the stacks of the adapters that decode now. The adapters must not change: they are snapshots."""

    def __init__(self) -> None:
        self._stacks: dict[AdapterLayout, _Stack] = {}
        self._recent: dict[_Composition, StackedAdapters] = {}

    def of(self, segments: Sequence[Segment]) -> AppliedAdapters:
        """What applies the adapters of these segments, in passes without gradients."""
        composition = tuple((segment.adapter, segment.start, segment.end) for segment in segments)
        if composition in self._recent:
            return self._recent[composition]
        applied = self._of(segments)
        if isinstance(applied, StackedAdapters):  # others are made at once, and would keep adapters of any size
            self._recent = dict([*self._recent.items(), (composition, applied)][-_COMPOSITIONS:])
        return applied

    def _of(self, segments: Sequence[Segment]) -> AppliedAdapters:
        rows: dict[AdapterLayout, dict[Adapter, list[int]]] = defaultdict(lambda: defaultdict(list))
        for segment in segments:
            if segment.adapter is not None:
                rows[segment.adapter.layout][segment.adapter] += range(segment.start, segment.end)
        if not rows:
            return AdaptersInTurn([])
        if not all(_worthwhile(list(by_adapter.values())) for by_adapter in rows.values()):
            return AdaptersInTurn(segments)
        if sum(layout.total * len(by_adapter) for layout, by_adapter in rows.items()) * 4 > STACK_BYTES:
            return AdaptersInTurn(segments)
        self._stacks = {layout: self._stack(layout, by_adapter) for layout, by_adapter in rows.items()}
        batch = segments[-1].end
        return StackedAdapters([_Rows(self._stacks[layout], rows[layout], batch) for layout in rows])

    def _stack(self, layout: AdapterLayout, wanted: dict[Adapter, list[int]]) -> "_Stack":
        """One that holds all wanted adapters, and not many more."""
        stack = self._stacks.get(layout)
        if stack is not None and wanted.keys() <= stack.places.keys() and 2 * len(wanted) >= len(stack.places):
            return stack
        return _Stack(layout, list(wanted))


def _worthwhile(rows: Sequence[Sequence[int]]) -> bool:
    most = max(len(part) for part in rows)
    return len(rows) > 1 and len(rows) * most <= _WASTE * sum(len(part) for part in rows)


class _Stack:
    """A and B of adapters of one layout, for each group of linear layers, as the products like them best."""

    def __init__(self, layout: AdapterLayout, adapters: Sequence[Adapter]) -> None:
        self.places = {adapter: place for place, adapter in enumerate(adapters)}
        self._layout = layout
        self._factors: dict[tuple[int, ...], tuple[Tensor, list[Tensor]] | None] = {}

    def factors(self, linears: tuple[int, ...]) -> tuple[Tensor, list[Tensor]] | None:
        """A [G, I, R] and B times its scale [G, r, P] of each layer, in fp32; None if the adapters have none."""
        if linears not in self._factors:
            parts = [self._layout.factors(adapter.compute, linears) for adapter in self.places]
            found = [
                (adapter.scale, part) for adapter, part in zip(self.places, parts, strict=True) if part is not None
            ]
            self._factors[linears] = (
                None
                if not found
                else (
                    torch.stack([part.stack_a for _, part in found]).float().mT.contiguous(),
                    [
                        torch.stack([part.matrices_b[index].float() * scale for scale, part in found]).mT.contiguous()
                        for index in range(len(linears))
                    ],
                )
            )
        return self._factors[linears]


class _Rows:
    """Which rows of a batch pass through which adapter of a stack, as cells [G, n]."""

    def __init__(self, stack: _Stack, rows: dict[Adapter, list[int]], batch: int) -> None:
        self.stack = stack
        self._count = len(stack.places)
        width = max(len(part) for part in rows.values())
        cells = [0] * (self._count * width)
        places: list[int] = []
        targets: list[int] = []
        for adapter, part in rows.items():
            first = stack.places[adapter] * width
            cells[first : first + len(part)] = part
            places += range(first, first + len(part))
            targets += part
        self._cells = torch.tensor(cells)
        self._places_M = torch.tensor(places)
        self._targets_M = torch.tensor(targets)
        self._in_order = cells == list(range(batch))

    def gather(self, x_TI: Tensor) -> Tensor:
        """fp32 [G, n, I]; what fills up a cell is some row."""
        x = x_TI if self._in_order else x_TI.index_select(0, self._cells)
        return x.float().view(self._count, -1, x.shape[1])

    def add(self, y_TO: Tensor, parts: Sequence[Tensor], matrices_b: Sequence[Tensor]) -> None:
        """Adds [G, n, r] · [G, r, P] of each layer of a group, in every wanted cell, to the cell's row."""
        if self._in_order and len(parts) == 1 and y_TO.dtype == torch.float32:
            y_TO.view(self._count, -1, y_TO.shape[1]).baddbmm_(parts[0], matrices_b[0])
            return
        deltas = [torch.bmm(z_Gnr, matrix_b).flatten(0, 1) for z_Gnr, matrix_b in zip(parts, matrices_b, strict=True)]
        if self._in_order:
            start = 0
            for delta in deltas:  # in turn: one sum for all would cost a pass over memory more, to lay them together
                y_TO.narrow(1, start, delta.shape[1]).add_(delta)
                start += delta.shape[1]
        else:
            delta_MO = (deltas[0] if len(deltas) == 1 else torch.cat(deltas, 1)).index_select(0, self._places_M)
            y_TO.index_copy_(0, self._targets_M, delta_MO.add_(y_TO.index_select(0, self._targets_M)).to(y_TO.dtype))


class StackedAdapters:
    """`AppliedAdapters` for passes without gradients."""

    def __init__(self, parts: Sequence[_Rows]) -> None:
        self._parts = parts

    def add(self, group: LinearGroup, x_TI: Tensor, y_TO: Tensor) -> list[Tensor]:
        """Nothing is kept for a backward pass."""
        for rows in self._parts:
            factors = rows.stack.factors(group.linears)
            if factors is None:
                continue
            matrix_a, matrices_b = factors
            z_GnR = torch.bmm(rows.gather(x_TI), matrix_a)
            rows.add(y_TO, z_GnR.chunk(len(matrices_b), 2), matrices_b)
        return []

    def backward(self, group: LinearGroup, x_TI: Tensor, dy_TO: Tensor, dx_TI: Tensor, saved: Sequence[Tensor]) -> None:
        raise NotImplementedError("stacked adapters are for passes without gradients")
