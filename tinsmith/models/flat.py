"""Many named tensors in one flat buffer, so that a step, a copy, a norm or a save is one large operation.

Knows names, shapes and dtypes; not what the tensors mean.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


class Layout:
    """Names and shapes of the tensors that share a flat buffer, in the order in which they lie there."""

    def __init__(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> None:
        self.names = tuple(names)
        self.shapes = tuple(shapes)
        self.sizes = tuple(torch.Size(shape).numel() for shape in shapes)
        self.starts = (0, *itertools.accumulate(self.sizes))
        self.total = self.starts[-1]

    def views(self, flat: Tensor) -> list[Tensor]:
        """One view into `flat` ([total]) per name."""
        return [self.view(flat, position) for position in range(len(self.names))]

    def view(self, flat: Tensor, position: int) -> Tensor:
        """The tensor at `position`, as a view into `flat` ([…, total])."""
        return flat[..., self.starts[position] : self.starts[position + 1]].unflatten(-1, self.shapes[position])

    def stack(self, flat: Tensor, names: Sequence[str]) -> Tensor:
        """Neighbours, which differ in their first dimension only, one below the other: a view into `flat` ([total])."""
        first = self.names.index(names[0])
        last = first + len(names)
        if self.names[first:last] != tuple(names):
            raise ValueError(f"{list(names)} are not neighbours")
        part = flat[self.starts[first] : self.starts[last]]
        return part.view(-1, *self.shapes[first][1:])

    def named_views(self, flat: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.names, self.views(flat), strict=True))


class FlatWeights:
    """Trainable weights: a flat fp32 master, the copy that the forward pass reads, and a flat fp32 gradient.

    `compute` is the master itself where the model computes in fp32. `grad` is None until the first backward.
    """

    def __init__(self, layout: Layout, weights: Tensor, dtype: torch.dtype) -> None:
        self.layout = layout
        self.weights = weights
        self.compute = weights.to(dtype)
        self.grad: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes + (0 if self.compute is self.weights else self.compute.nbytes)

    def weights_changed(self) -> None:
        """To be called after every write to `weights`."""
        if self.compute is not self.weights:
            self.compute.copy_(self.weights)

    def require_grad(self) -> Tensor:
        """The flat gradient, allocated (zero) on the first call."""
        if self.grad is None:
            self.grad = torch.zeros_like(self.weights)
            self._grad_allocated(self.grad)
        return self.grad

    def _grad_allocated(self, grad: Tensor) -> None:
        """Hands the views of the new gradient buffer to whoever adds to them without asking for it."""
