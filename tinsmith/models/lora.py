"""LoRA adapters, and linear layers that apply a different adapter to every segment of a packed batch.

The base weight is shared and frozen. An adapter's gradient never passes through autograd leaves: backward adds it
straight into the adapter's flat gradient. Knows nothing of requests, losses or optimizers.

Shapes: `T` rows of the batch, `N` rows of one segment, `I` inputs, `O` outputs, `R` rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinsmith.models.flat import FlatWeights, Layout
from tinsmith.protocols import ModelSpec

KAIMING_SLOPE = 5**0.5
"""The slope of PEFT's kaiming-uniform initialisation of A: uniform in ±1/√in."""


class AdapterLayout(Layout):
    """The flat layout of every adapter with one rank and set of targets: A and B of each linear layer in turn.

    `linears` holds the index of the linear layer that each (A, B) pair belongs to.
    """

    def __init__(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]], linears: Sequence[int]) -> None:
        super().__init__(names, shapes)
        self.linears = tuple(linears)
        self.num_linears = max(linears) + 1

    def pairs(self, flat: Tensor) -> list[tuple[Tensor, Tensor] | None]:
        """(A [R, I], B [O, R]) by index of the linear layer; None where the adapter has none."""
        views = self.views(flat)
        pairs: list[tuple[Tensor, Tensor] | None] = [None] * self.num_linears
        for position, linear in enumerate(self.linears):
            pairs[linear] = (views[2 * position], views[2 * position + 1])
        return pairs


class Adapter(FlatWeights):
    """One tenant's LoRA weights; immutable when used as a snapshot.

    A layer's output gains (x Aᵀ) Bᵀ · scale, with scale = alpha / rank.
    """

    layout: AdapterLayout

    def __init__(self, spec: ModelSpec, layout: AdapterLayout, weights: Tensor, dtype: torch.dtype) -> None:
        super().__init__(layout, weights, dtype)
        self.spec = spec
        self.scale = spec.alpha / spec.rank
        self.pairs = layout.pairs(self.compute)
        self.grad_pairs: list[tuple[Tensor, Tensor] | None] = []

    def pair(self, linear: int) -> tuple[Tensor, Tensor] | None:
        """A and B of the linear layer with this index, in the dtype of the forward pass."""
        return self.pairs[linear] if linear < len(self.pairs) else None

    def copy(self) -> "Adapter":
        """The same weights in a buffer of their own; no gradient."""
        return Adapter(self.spec, self.layout, self.weights.clone(), self.compute.dtype)

    def _grad_allocated(self, grad: Tensor) -> None:
        self.grad_pairs = self.layout.pairs(grad)


def initial_weights(layout: AdapterLayout, seed: int) -> Tensor:
    """Flat fp32 weights on the CPU: A kaiming-uniform as in PEFT, B zero.

    One generator, seeded by `seed`, draws the A matrices one after the other, in the layout's order.
    """
    flat = torch.zeros(layout.total)
    generator = torch.Generator().manual_seed(seed)
    for matrix_a in layout.views(flat)[::2]:
        nn.init.kaiming_uniform_(matrix_a, a=KAIMING_SLOPE, generator=generator)
    return flat


@dataclass(slots=True)
class Segment:
    """Rows `start` to `end` of a packed batch, and the adapter they pass through (None: the base model).

    Segments are sorted, contiguous and cover all rows. Backward adds to the adapter's gradient while `trains` holds.
    """

    adapter: Adapter | None
    start: int
    end: int
    trains: bool = True

    def rows(self, batch: Tensor) -> Tensor:
        """The segment's part of a tensor over all rows."""
        return batch if self.end - self.start == batch.shape[0] else batch[self.start : self.end]


class CurrentPass:
    """What the linear layers of one base model need to know of the forward pass under way."""

    def __init__(self) -> None:
        self.segments: Sequence[Segment] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "CurrentPass":
        return self


def add_product(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """total += scale · left @ right, where `total` may be of a wider dtype than the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=scale)
    else:
        total.add_(left @ right, alpha=scale)


def add_adapters(x_TI: Tensor, y_TO: Tensor, segments: Sequence[Segment], linear: int) -> list[Tensor]:
    """Adds each segment's LoRA output to `y_TO` in place; returns x Aᵀ ([N, R]) of every segment that has one."""
    inner = []
    for segment in segments:
        adapter = segment.adapter
        pair = adapter.pair(linear) if adapter else None
        if adapter is None or pair is None:
            continue
        x_NI, y_NO = segment.rows(x_TI), segment.rows(y_TO)
        z_NR = F.linear(x_NI, pair[0])
        y_NO.addmm_(z_NR, pair[1].t(), alpha=adapter.scale)
        inner.append(z_NR)
    return inner


class _MultiAdapterProduct(torch.autograd.Function):
    """y = x Wᵀ + b + LoRA per segment; dA and dB go to the adapters' gradients, dx to autograd."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, segments: Sequence[Segment], linear: int
    ) -> Tensor:
        x_TI = x.view(-1, x.shape[-1])
        y_TO = F.linear(x_TI, weight_OI, bias_O)
        inner = add_adapters(x_TI, y_TO, segments, linear)
        ctx.save_for_backward(x_TI, *inner)
        ctx.weight, ctx.segments, ctx.linear = weight_OI, segments, linear
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, *inner = ctx.saved_tensors
        dy_TO = dy.reshape(-1, dy.shape[-1])
        dx_TI = dy_TO @ ctx.weight
        remaining = iter(inner)
        for segment in ctx.segments:
            adapter = segment.adapter
            pair = adapter.pair(ctx.linear) if adapter else None
            if pair is None:
                continue
            dy_NO, z_NR = segment.rows(dy_TO), next(remaining)
            dz_NR = dy_NO @ pair[1]
            segment.rows(dx_TI).addmm_(dz_NR, pair[0], alpha=adapter.scale)
            if segment.trains:
                grad_a, grad_b = adapter.grad_pairs[ctx.linear]
                add_product(grad_a, dz_NR.t(), segment.rows(x_TI), adapter.scale)
                add_product(grad_b, dy_NO.t(), z_NR, adapter.scale)
        return dx_TI.view(*dy.shape[:-1], -1), None, None, None, None


class MultiAdapterLinear(nn.Module):
    """Takes the place of an `nn.Linear`: its weight frozen and shared, an adapter per segment of the current pass."""

    def __init__(self, linear: nn.Linear, index: int, current: CurrentPass) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.index = index
        self.current = current

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] of T rows → [..., O]."""
        segments = self.current.segments
        if x.requires_grad and torch.is_grad_enabled():
            return _MultiAdapterProduct.apply(x, self.weight, self.bias, segments, self.index)
        y = F.linear(x, self.weight, self.bias)
        add_adapters(x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1]), segments, self.index)
        return y

    def to_linear(self) -> nn.Linear:
        """An ordinary `nn.Linear` around the same parameters."""
        linear = nn.Linear(self.weight.shape[1], self.weight.shape[0], self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear
