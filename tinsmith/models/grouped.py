"""The adapters of a whole training pass as grouped products: one kernel for all tenants instead of some for each.

For GPUs, where applying one adapter after the other would start thousands of small kernels. The mathematics are those
of `lora.AdaptersInTurn`. Gradients are gathered aside and added to the adapters' in the end, all or none.

Shapes: as in `lora`, and `G` segments of a bucket, `N` their rows.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.models.lora import Adapter, AdapterLayout, Factors, LinearGroup, Segment

_ALIGNMENT = 16  # bytes; what grouped_mm asks of row strides and addresses


class GroupedAdapters:
    """Implements `lora.AppliedAdapters` for the segments of one pass."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        """Neighbours whose adapters have the same layout share a product."""
        runs = groupby(segments, key=lambda segment: segment.adapter.layout if segment.adapter else None)
        self._buckets = [_Bucket(layout, list(run)) for layout, run in runs if layout is not None]

    def add(self, group: LinearGroup, x_TI: Tensor, y_TO: Tensor) -> list[Tensor]:
        """Returns scale · x Aᵀ [N, R] of every bucket that has adapters here."""
        inner = []
        for bucket in self._buckets:
            factors = bucket.factors(group.linears)
            if factors is None:
                continue
            z_NR = F.grouped_mm(x_TI[bucket.rows], factors.stack_a.transpose(1, 2), offs=bucket.ends_G)
            z_NR.mul_(bucket.scale_N1)
            parts = zip(group.columns(y_TO[bucket.rows]), group.ranks(z_NR), factors.matrices_b, strict=True)
            for y_NP, z_Nr, b_GPr in parts:
                y_NP.add_(F.grouped_mm(z_Nr, b_GPr.transpose(1, 2), offs=bucket.ends_G))
            inner.append(z_NR)
        return inner

    def backward(self, group: LinearGroup, x_TI: Tensor, dy_TO: Tensor, dx_TI: Tensor, saved: Sequence[Tensor]) -> None:
        """The adapters' gradients wait for `add_gradients`."""
        remaining = iter(saved)
        for bucket in self._buckets:
            factors = bucket.factors(group.linears)
            if factors is None:
                continue
            dy_NO, z_NR, ends_G = dy_TO[bucket.rows], next(remaining), bucket.ends_G
            parts = zip(group.columns(dy_NO), factors.matrices_b, strict=True)
            dz_NR = torch.cat([F.grouped_mm(dy_NP, b_GPr, offs=ends_G) for dy_NP, b_GPr in parts], 1)
            dz_NR.mul_(bucket.scale_N1)
            dx_TI[bucket.rows].add_(F.grouped_mm(dz_NR, factors.stack_a, offs=ends_G))
            if bucket.trains:
                bucket.keep_gradients(group, x_TI[bucket.rows], dy_NO, z_NR, dz_NR)

    def add_gradients(self) -> None:
        """Adds what backward gathered to the gradients of the segments that train."""
        for bucket in self._buckets:
            bucket.add_gradients()


class _Bucket:
    """Neighbouring segments whose adapters have one layout. `scale_N1` is each row's alpha / rank."""

    def __init__(self, layout: AdapterLayout, segments: Sequence[Segment]) -> None:
        adapters = [segment.adapter for segment in segments if segment.adapter is not None]
        first, last = segments[0].start, segments[-1].end
        device = adapters[0].compute.device
        self.rows = slice(first, last)
        self.ends_G = torch.tensor([segment.end - first for segment in segments], dtype=torch.int32, device=device)
        lengths = torch.tensor([segment.end - segment.start for segment in segments], device=device)
        scales = torch.tensor([adapter.scale for adapter in adapters], device=device)
        self.scale_N1 = scales.repeat_interleave(lengths, output_size=last - first)[:, None]
        self._layout = layout
        self._segments = segments
        self._adapters: list[Adapter] = adapters
        self._weights = torch.stack([adapter.compute for adapter in adapters])
        self._grads: Tensor | None = None
        self._factors: dict[tuple[int, ...], Factors | None] = {}

    @property
    def trains(self) -> bool:
        return any(segment.trains for segment in self._segments)

    def factors(self, linears: tuple[int, ...]) -> Factors | None:
        """A [G, R, I] and B [G, P, r] of all segments."""
        if linears not in self._factors:
            self._factors[linears] = self._layout.factors(self._weights, linears)
        return self._factors[linears]

    def keep_gradients(self, group: LinearGroup, x_NI: Tensor, dy_NO: Tensor, z_NR: Tensor, dz_NR: Tensor) -> None:
        if self._grads is None:
            self._grads = torch.zeros(self._weights.shape, dtype=torch.float32, device=x_NI.device)
        grads = self._layout.factors(self._grads, group.linears)
        if grads is None:
            raise ValueError(f"no adapter of this layout has the linear layers {group.linears}")
        grads.stack_a.add_(F.grouped_mm(dz_NR.t(), x_NI, offs=self.ends_G))
        for dy_NP, z_Nr, grad_b in zip(group.columns(dy_NO), group.ranks(z_NR), grads.matrices_b, strict=True):
            grad_b.add_(F.grouped_mm(dy_NP.t(), z_Nr, offs=self.ends_G))

    def add_gradients(self) -> None:
        if self._grads is None:
            return
        for segment, adapter, grad in zip(self._segments, self._adapters, self._grads, strict=True):
            if segment.trains:
                adapter.require_grad().add_(grad)
        self._grads = None


def can_group(segments: Sequence[Segment], groups: Sequence[LinearGroup], item_bytes: int) -> bool:
    """Whether grouped products accept these adapters' shapes in these layers (a rank of 3 doesn't fit, for one)."""
    layouts = {segment.adapter.layout for segment in segments if segment.adapter}
    linears = {linear for group in groups for linear in group.linears}
    sizes = {
        size
        for layout in layouts
        for shape, linear in zip(layout.shapes, layout.linears, strict=True)
        if linear in linears
        for size in shape
    }
    totals = {layout.total for layout in layouts}
    return bool(layouts) and all(size * item_bytes % _ALIGNMENT == 0 for size in sizes | totals)
