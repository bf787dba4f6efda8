"""Full-parameter models: a copy of all base weights, trainable as one flat buffer.

Autograd computes the gradients, as for any module; they end up in the flat fp32 gradient. Where the model computes in
a narrower dtype, the module's parameters are a rounded copy of the fp32 master weights.
"""

import copy
from functools import partial

import torch
from torch import Tensor, nn

from tinsmith.models.flat import FlatWeights, Layout
from tinsmith.protocols import ModelSpec

_ALIGNMENT = 8  # numbers: 16 bytes in the narrowest dtype


class FullModel(FlatWeights):
    """A tenant's own module, whose parameters are views of `compute`; tied parameters exist once."""

    def __init__(self, spec: ModelSpec, module: nn.Module) -> None:
        # Those of odd sizes last, so that the others lie where a GPU's grouped products can read them.
        parameters = dict(sorted(module.named_parameters(), key=lambda named: named[1].numel() % _ALIGNMENT != 0))
        layout = Layout(list(parameters), [tuple(parameter.shape) for parameter in parameters.values()])
        dtype = next(iter(parameters.values())).dtype
        flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters.values()])
        super().__init__(layout, flat.float(), dtype)
        self.spec = spec
        self.module = module
        self._parameters = list(parameters.values())
        for parameter, view in zip(self._parameters, layout.views(self.compute), strict=True):
            parameter.data = view
            parameter.requires_grad_(True)

    def frozen_copy(self) -> nn.Module:
        """A module with its own copy of the weights, which needs no gradient."""
        return copy.deepcopy(self.module).requires_grad_(False)

    def _grad_allocated(self, grad: Tensor) -> None:
        for parameter, view in zip(self._parameters, self.layout.views(grad), strict=True):
            if parameter.dtype == grad.dtype:
                parameter.grad = view
            else:
                parameter.register_post_accumulate_grad_hook(partial(_add_to_flat, view))


def _add_to_flat(total: Tensor, parameter: Tensor) -> None:
    if parameter.grad is not None:
        total.add_(parameter.grad)
        parameter.grad = None
