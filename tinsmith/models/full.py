"""Full-parameter models: a copy of all base weights, trainable as one flat buffer.

Autograd computes the gradients, as for any module, or layers that take the module's place do; they end up in the flat
fp32 gradient. Where the model computes in a narrower dtype, the module's parameters are a rounded copy of the fp32
master weights.
"""

import copy
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tinsmith.models.families import SAME_INPUT
from tinsmith.models.flat import FlatWeights, Layout
from tinsmith.protocols import ModelSpec

if TYPE_CHECKING:
    from tinsmith.models.fused_full import FullLayers

_ALIGNMENT = 8  # numbers: 16 bytes in the narrowest dtype


class FullModel(FlatWeights):
    """A tenant's own module, whose parameters are views of `compute`; tied parameters exist once."""

    def __init__(self, spec: ModelSpec, module: nn.Module) -> None:
        parameters = _in_order(dict(module.named_parameters()))
        layout = Layout(list(parameters), [tuple(parameter.shape) for parameter in parameters.values()])
        dtype = next(iter(parameters.values())).dtype
        flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters.values()])
        super().__init__(layout, flat.float(), dtype)
        self.spec = spec
        self.module = module
        self.layers: FullLayers | None = None
        """What trains in place of the module's layers, if anything; the module has the same weights."""
        self._parameters = list(parameters.values())
        for parameter, view in zip(self._parameters, layout.views(self.compute), strict=True):
            parameter.data = view
            parameter.requires_grad_(True)

    def frozen_copy(self) -> nn.Module:
        """A module with its own copy of the weights, which needs no gradient."""
        return copy.deepcopy(self.module).requires_grad_(False)

    def fuse(self, layers: "FullLayers") -> None:
        """From now on the model is trained through these layers, made of its module, layout and `compute`."""
        self.layers = layers
        if self.grad is not None:
            layers.add_gradients_to(self.grad)

    def _grad_allocated(self, grad: Tensor) -> None:
        if self.layers is not None:
            self.layers.add_gradients_to(grad)
        for parameter, view in zip(self._parameters, self.layout.views(grad), strict=True):
            if parameter.dtype == grad.dtype:
                parameter.grad = view
            else:
                parameter.register_post_accumulate_grad_hook(partial(_add_to_flat, view))


def _add_to_flat(total: Tensor, parameter: Tensor) -> None:
    if parameter.grad is not None:
        total.add_(parameter.grad)
        parameter.grad = None


def _in_order(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Those of layers that read the same input side by side, so that they make one product.

    Those of odd sizes come last, so that the others lie where a GPU's products can read them.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in parameters:
        groups.setdefault(_group(name), []).append(name)

    def is_odd(names: Iterable[str]) -> bool:
        return any(parameters[name].numel() % _ALIGNMENT for name in names)

    return {name: parameters[name] for names in sorted(groups.values(), key=is_odd) for name in names}


def _group(name: str) -> tuple[str, ...]:
    owner, _, kind = name.rpartition(".")
    parent, _, layer = owner.rpartition(".")
    siblings = next((names for names in SAME_INPUT if layer in names), (layer,))
    return parent, *siblings, kind
