"""LoRA adapters, and linear layers that apply a different adapter to every segment of a packed batch.

The base weight is shared and frozen. An adapter's gradient never passes through autograd leaves: backward adds it
straight into the adapter's flat gradient. Layers that read the same input (q, k and v; gate and up) are one product,
base and adapters alike. Knows nothing of requests, losses or optimizers.

Shapes: `T` rows of the batch, `N` rows of one segment, `I` inputs, `O` outputs and `R` ranks of all layers of a group,
`P` outputs of one of them.
"""

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from tinsmith.models.flat import FlatWeights, Layout
from tinsmith.protocols import ModelSpec

KAIMING_SLOPE = 5**0.5
"""The slope of PEFT's kaiming-uniform initialisation of A: uniform in ±1/√in."""

_MOST_STAGED = 2**24  # numbers: 64 MiB of pinned memory


class AdapterLayout(Layout):
    """The flat layout of every adapter with one rank and set of targets: A and B of each linear layer.

    `linears` holds, for each name, the index of its linear layer, whose A comes before its B. The A matrices of layers
    that read the same input lie one behind the other, so that together they are one matrix: their stack.
    """

    def __init__(
        self,
        names: Sequence[str],
        shapes: Sequence[tuple[int, ...]],
        linears: Sequence[int],
        transposed: Collection[int] = (),
        fingerprint: str = "",
    ) -> None:
        """The matrices at the positions `transposed` lie in the buffer with their columns one after the other.

        `fingerprint` is that of the base's weights, which adapters are trained on; empty if that does not matter.
        """
        super().__init__(names, shapes)
        self.fingerprint = fingerprint
        self.transposed = frozenset(transposed)
        self.linears = tuple(linears)
        self.a_positions = [position for position, linear in enumerate(linears) if linear not in linears[:position]]

    def view(self, flat: Tensor, position: int) -> Tensor:
        if position not in self.transposed:
            return super().view(flat, position)
        rows, columns = self.shapes[position]
        return flat[..., self.starts[position] : self.starts[position + 1]].unflatten(-1, (columns, rows)).mT

    def factors(self, flat: Tensor, linears: Sequence[int]) -> "Factors | None":
        """Views into `flat` ([…, total]) for linear layers that read the same input; None if the adapter has none."""
        if linears[0] not in self.linears:
            return None
        positions = [self.linears.index(linear) for linear in linears]
        if positions != list(range(positions[0], positions[0] + len(linears))):
            raise ValueError(f"the A matrices of the linear layers {linears} are not neighbours")
        rank, columns = self.shapes[positions[0]]
        start = self.starts[positions[0]]
        stack = flat[..., start : start + len(linears) * rank * columns].unflatten(-1, (-1, columns))
        others = [position + self.linears[position + 1 :].index(self.linears[position]) + 1 for position in positions]
        return Factors(stack, tuple(self.view(flat, position) for position in others))


@dataclass(frozen=True, slots=True)
class Factors:
    """An adapter's matrices for a group of linear layers: the stack of all A […, R, I], every B […, P, R / layers]."""

    stack_a: Tensor
    matrices_b: tuple[Tensor, ...]

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """A [R, I] and B [O, R] of the only layer."""
        (matrix_b,) = self.matrices_b
        return self.stack_a, matrix_b


class Adapter(FlatWeights):
    """One tenant's LoRA weights; immutable when used as a snapshot.

    A layer's output gains (x Aᵀ) Bᵀ · scale, with scale = alpha / rank.
    """

    layout: AdapterLayout

    def __init__(self, spec: ModelSpec, layout: AdapterLayout, weights: Tensor, dtype: torch.dtype) -> None:
        super().__init__(layout, weights, dtype)
        self.spec = spec
        self.scale = spec.alpha / spec.rank
        self._factors: dict[tuple[int, ...], Factors | None] = {}
        self._grad_factors: dict[tuple[int, ...], Factors | None] = {}

    def factors(self, linears: tuple[int, ...]) -> Factors | None:
        """A and B of a group of linear layers, in the dtype of the forward pass; None if the adapter has none."""
        if linears not in self._factors:
            self._factors[linears] = self.layout.factors(self.compute, linears)
        return self._factors[linears]

    def grad_factors(self, linears: tuple[int, ...]) -> Factors | None:
        """The places in the flat gradient that belong to `factors(linears)`."""
        if linears not in self._grad_factors:
            self._grad_factors[linears] = self.layout.factors(self.require_grad(), linears)
        return self._grad_factors[linears]

    def pair(self, linear: int) -> tuple[Tensor, Tensor] | None:
        """A and B of a single linear layer, in the dtype of the forward pass; None if the adapter has none."""
        factors = self.factors((linear,))
        return None if factors is None else factors.pair

    def grad_pair(self, linear: int) -> tuple[Tensor, Tensor]:
        """The places in the flat gradient that belong to `pair(linear)`, which must be there."""
        factors = self.grad_factors((linear,))
        if factors is None:
            raise ValueError(f"the adapter has nothing in linear layer {linear}")
        return factors.pair

    def copy(self) -> "Adapter":
        """The same weights in a buffer of their own; no gradient."""
        return Adapter(self.spec, self.layout, self.weights.clone(), self.compute.dtype)


@torch.inference_mode(False)  # in which the threads below never are
def initial_weights(layout: AdapterLayout, seed: int, device: torch.device) -> Tensor:
    """Flat fp32 weights: A kaiming-uniform as in PEFT, B zero. Equal on every device.

    Each A has a random stream of its own, of `seed` and its position in the layout, so that threads draw them at once.
    """
    flat = torch.zeros(layout.total, device=device)
    count = torch.get_num_threads()
    with ThreadPoolExecutor(count) as threads:
        for positions in _batches(layout):
            targets = [layout.view(flat, position) for position in positions]
            drawn = _staged(targets)
            streams = [np.random.SeedSequence([seed, position]).generate_state(1, np.uint64) for position in positions]
            jobs = list(zip(drawn, streams, strict=True))
            # A thread draws many matrices: threads that ask for one at a time wait for Python more than they draw.
            list(threads.map(_draw, [jobs[first::count] for first in range(count)]))
            for target, drawn_RI in zip(targets, drawn, strict=True):
                if drawn_RI is not target:
                    target.copy_(drawn_RI, non_blocking=True)
    return flat


def _batches(layout: AdapterLayout) -> Iterator[list[int]]:
    """The positions of all A, as many at once as may be on their way to a device."""
    batch: list[int] = []
    numbers = 0
    for position in layout.a_positions:
        if batch and numbers + layout.sizes[position] > _MOST_STAGED:
            yield batch
            batch, numbers = [], 0
        batch.append(position)
        numbers += layout.sizes[position]
    if batch:
        yield batch


def _staged(targets: Sequence[Tensor]) -> Sequence[Tensor]:
    """On a CPU the targets; else as many matrices on the host, from where a GPU copies while others are drawn."""
    device, sizes = targets[0].device, [target.numel() for target in targets]
    if device.type == "cpu":
        return targets
    parts = torch.empty(sum(sizes), pin_memory=device.type == "cuda").split(sizes)
    return [part.view(target.shape) for part, target in zip(parts, targets, strict=True)]


def _draw(jobs: Sequence[tuple[Tensor, NDArray[np.uint64]]]) -> None:
    for drawn_RI, stream in jobs:
        generator = torch.Generator().manual_seed(int(stream[0]))
        nn.init.kaiming_uniform_(drawn_RI, KAIMING_SLOPE, generator=generator)


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


class AppliedAdapters(Protocol):
    """How the adapters of a pass are applied to a group of linear layers."""

    def add(self, group: "LinearGroup", x_TI: Tensor, y_TO: Tensor) -> list[Tensor]:
        """Adds all LoRA outputs to `y_TO` in place; returns what `backward` needs."""

    def backward(
        self, group: "LinearGroup", x_TI: Tensor, dy_TO: Tensor, dx_TI: Tensor, saved: Sequence[Tensor]
    ) -> None:
        """Adds to the input's gradient in place, and to the gradients of the adapters that train."""


class SegmentPart(Segment):
    """Some rows of a segment, where they lie in a batch of fewer rows; trains as long as the whole one does."""

    __slots__ = ("_whole",)

    def __init__(self, whole: Segment, start: int, end: int) -> None:
        self._whole = whole
        self.adapter, self.start, self.end = whole.adapter, start, end

    @property
    def trains(self) -> bool:  # type: ignore[override]
        return self._whole.trains


class CurrentPass:
    """What the linear layers of one base model need to know of the forward pass under way.

    `grouped` applies the adapters of `segments` where that is faster than one after the other. `shared` is the product
    that was computed last for a group of layers, until each of them has fetched its part.
    """

    def __init__(self) -> None:
        self.segments: Sequence[Segment] = ()
        self.grouped: tuple[Sequence[Segment], AppliedAdapters] | None = None
        self.shared: _SharedProduct | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "CurrentPass":
        return self

    def adapters(self) -> AppliedAdapters:
        if self.grouped is not None and self.grouped[0] is self.segments:
            return self.grouped[1]
        return AdaptersInTurn(self.segments)


def add_product(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """total += scale · left @ right, where `total` may be of a wider dtype than the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=scale)
    else:
        total.add_(left @ right, alpha=scale)


class AdaptersInTurn:
    """Applies one adapter after the other: fastest on a CPU. What passes by may be in a wider dtype than theirs."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments

    def add(self, group: "LinearGroup", x_TI: Tensor, y_TO: Tensor) -> list[Tensor]:
        """Returns x Aᵀ [N, R] of every segment that has an adapter here."""
        inner = []
        for segment in self._segments:
            factors = segment.adapter.factors(group.linears) if segment.adapter else None
            if segment.adapter is None or factors is None:
                continue
            z_NR = F.linear(segment.rows(x_TI), factors.stack_a.to(x_TI.dtype))
            parts = zip(group.columns(segment.rows(y_TO)), group.ranks(z_NR), factors.matrices_b, strict=True)
            for y_NP, z_Nr, b_Pr in parts:
                y_NP.addmm_(z_Nr, b_Pr.t().to(y_NP.dtype), alpha=segment.adapter.scale)
            inner.append(z_NR)
        return inner

    def backward(
        self, group: "LinearGroup", x_TI: Tensor, dy_TO: Tensor, dx_TI: Tensor, saved: Sequence[Tensor]
    ) -> None:
        remaining = iter(saved)
        for segment in self._segments:
            factors = segment.adapter.factors(group.linears) if segment.adapter else None
            if segment.adapter is None or factors is None:
                continue
            x_NI, dy_NO, z_NR = segment.rows(x_TI), segment.rows(dy_TO), next(remaining)
            dz_NR = torch.empty_like(z_NR)
            for dy_NP, dz_Nr, b_Pr in zip(group.columns(dy_NO), group.ranks(dz_NR), factors.matrices_b, strict=True):
                torch.mm(dy_NP, b_Pr, out=dz_Nr)
            segment.rows(dx_TI).addmm_(dz_NR, factors.stack_a, alpha=segment.adapter.scale)
            if segment.trains:
                _add_gradients(segment.adapter, group, x_NI, dy_NO, z_NR, dz_NR)


def _add_gradients(
    adapter: Adapter, group: "LinearGroup", x_NI: Tensor, dy_NO: Tensor, z_NR: Tensor, dz_NR: Tensor
) -> None:
    grads: Any = adapter.grad_factors(group.linears)
    add_product(grads.stack_a, dz_NR.t(), x_NI, adapter.scale)
    for dy_NP, z_Nr, grad_b in zip(group.columns(dy_NO), group.ranks(z_NR), grads.matrices_b, strict=True):
        add_product(grad_b, dy_NP.t(), z_Nr, adapter.scale)


class LinearGroup:
    """Linear layers that read the same input: their weights lie one below the other, and make one product.

    `linears` holds the layers' indices, `outputs` their numbers of outputs.
    """

    def __init__(self, layers: Sequence[nn.Linear], linears: Sequence[int], current: CurrentPass) -> None:
        self.linears = tuple(linears)
        self.outputs = [layer.out_features for layer in layers]
        self.current = current
        self.weight_OI: Tensor = _stacked([layer.weight for layer in layers])
        biases = [layer.bias for layer in layers if layer.bias is not None]
        if biases and len(biases) < len(layers):
            raise ValueError("either all layers of a group have a bias, or none")
        self.bias_O = _stacked(biases) if biases else None

    def __deepcopy__(self, memo: dict[int, Any]) -> "LinearGroup":
        return self

    def columns(self, y_NO: Tensor) -> Sequence[Tensor]:
        """The outputs [N, P] of each layer."""
        return (y_NO,) if len(self.outputs) == 1 else y_NO.split(self.outputs, 1)

    def ranks(self, z_NR: Tensor) -> Sequence[Tensor]:
        """The part of an adapter's rank space that belongs to each layer."""
        return (z_NR,) if len(self.outputs) == 1 else z_NR.chunk(len(self.outputs), 1)

    def outputs_of(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [..., I] of T rows → [..., P] of every layer."""
        adapters = self.current.adapters()
        if x.requires_grad and torch.is_grad_enabled():
            outputs: tuple[Tensor, ...] = _GroupProduct.apply(x, self, adapters)
            return outputs
        return self.split(self.product(x.view(-1, x.shape[-1]), adapters), x.shape)

    def product(self, x_TI: Tensor, adapters: AppliedAdapters) -> Tensor:
        """[T, O] of all layers side by side, without gradients."""
        y_TO = F.linear(x_TI, self.weight_OI, self.bias_O)
        adapters.add(self, x_TI, y_TO)
        return y_TO

    def split(self, y_TO: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
        """[T, O] → [..., P] of every layer, with the leading dimensions of `shape`."""
        return tuple(y_TP.view(*shape[:-1], -1) for y_TP in self.columns(y_TO))


def _stacked(parameters: Sequence[Tensor]) -> Tensor:
    """The parameters one behind the other in one tensor, of which they become views."""
    if len(parameters) == 1:
        return parameters[0]
    whole = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, whole.split([len(parameter) for parameter in parameters]), strict=True):
        parameter.data = part
    return whole


@dataclass(slots=True)
class _SharedProduct:
    """A group's outputs for the input `x`; those already fetched are None."""

    group: LinearGroup
    x: Tensor
    outputs: list[Tensor | None]


class _GroupProduct(torch.autograd.Function):
    """y = x Wᵀ + b + LoRA per segment, for all layers of a group; dA and dB go to the adapters, dx to autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: LinearGroup, adapters: AppliedAdapters) -> tuple[Tensor, ...]:
        x_TI = x.view(-1, x.shape[-1])
        y_TO = F.linear(x_TI, group.weight_OI, group.bias_O)
        saved = adapters.add(group, x_TI, y_TO)
        ctx.save_for_backward(x_TI, *saved)
        ctx.group, ctx.adapters = group, adapters
        return group.split(y_TO, x.shape)

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, *saved = ctx.saved_tensors
        parts = [part.reshape(len(x_TI), -1) for part in dy]
        dy_TO = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        dx_TI = dy_TO @ ctx.group.weight_OI
        ctx.adapters.backward(ctx.group, x_TI, dy_TO, dx_TI, saved)
        return dx_TI.view(*dy[0].shape[:-1], -1), None, None


class MultiAdapterLinear(nn.Module):
    """Takes the place of an `nn.Linear`: its weight frozen and shared, an adapter per segment of the current pass."""

    def __init__(self, layer: nn.Linear, group: LinearGroup, part: int) -> None:
        """The layer is number `part` of its group."""
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.group = group
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] of T rows → [..., P]."""
        if len(self.group.linears) == 1:
            return self.group.outputs_of(x)[0]
        current = self.group.current
        shared = current.shared
        if shared is None or shared.group is not self.group or shared.x is not x or shared.outputs[self.part] is None:
            shared = current.shared = _SharedProduct(self.group, x, list(self.group.outputs_of(x)))
        output, shared.outputs[self.part] = shared.outputs[self.part], None
        if not any(part is not None for part in shared.outputs):
            current.shared = None
        return output  # type: ignore[return-value]

    def to_linear(self) -> nn.Linear:
        """An ordinary `nn.Linear` around the same parameters."""
        linear = nn.Linear(self.weight.shape[1], self.weight.shape[0], self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear
