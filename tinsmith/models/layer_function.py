"""A decoder layer as one step of autograd, for layers whose backward pass is written by hand.

The gradients of what is trained go past autograd: a layer adds them where they belong. Knows nothing of what a layer
computes.

Shapes: `T` rows of a packed batch, `D` hidden size.
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor


class LayerPass(Protocol):
    """What all layers of one pass share."""

    @property
    def recomputes(self) -> bool:
        """Whether backward computes each layer again."""


Pass = TypeVar("Pass", bound=LayerPass, contravariant=True)


class TrainedLayer(Protocol[Pass]):
    """One decoder layer."""

    few: int
    """How much of what backward needs, from its beginning, is kept even where the layer is computed again."""

    def forward(self, x_TD: Tensor, this: Pass) -> tuple[Tensor, list[Tensor]]:
        """(what comes out [T, D], what `backward` needs beside what came in)."""

    def again(self, x_TD: Tensor, few: Sequence[Tensor], this: Pass) -> list[Tensor]:
        """All that `backward` needs, from what came in and the first few of it."""

    def backward(self, dy_TD: Tensor, x_TD: Tensor, saved: Sequence[Tensor], this: Pass) -> Tensor:
        """The gradient in what came in; what was saved may be overwritten."""


def through(layer: TrainedLayer[Pass], x_TD: Tensor, this: Pass) -> Tensor:
    """What comes out of the layer [T, D]; with a gradient if what comes in has one."""
    y_TD: Tensor = _LayerFunction.apply(x_TD, layer, this)
    return y_TD


class _LayerFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, layer: TrainedLayer[Any], this: LayerPass) -> Tensor:
        y_TD, saved = layer.forward(x_TD, this)
        ctx.save_for_backward(x_TD, *(saved[: layer.few] if this.recomputes else saved))
        ctx.layer, ctx.this = layer, this
        return y_TD

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, *saved = ctx.saved_tensors
        layer, this = ctx.layer, ctx.this
        if this.recomputes:
            saved = layer.again(x_TD, saved, this)
        return layer.backward(dy_TD.contiguous(), x_TD, saved, this), None, None
