"""RMS normalisation with a frozen weight, as one operation instead of a dozen.

On a GPU PyTorch's fused kernel; on a CPU a backward pass written by hand, which takes half the time of autograd's.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FrozenRMSNorm(nn.Module):
    """Takes the place of a Hugging Face RMS norm: y = x / √(mean(x²) + ε) · weight, over the last dimension.

    `original` keeps the weight; a copy that trains puts it back.
    """

    def __init__(self, original: nn.Module, eps: float) -> None:
        super().__init__()
        self.original = original
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.original.weight
        if x.is_cuda:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        if torch.is_grad_enabled() and x.requires_grad:
            return _RMSNorm.apply(x, weight, self.eps)
        return _normalize(x, self.eps)[0] * weight


def freeze_norm(norm: nn.Module) -> FrozenRMSNorm | None:
    """The replacement of `norm`, or None if `norm` is of another kind (decided by what it computes)."""
    eps = getattr(norm, "variance_epsilon", None)
    weight = getattr(norm, "weight", None)
    if not isinstance(eps, float) or not isinstance(weight, nn.Parameter) or len(list(norm.parameters())) != 1:
        return None
    if len(inspect.signature(norm.forward).parameters) != 1:
        return None  # a gated one
    frozen = FrozenRMSNorm(norm, eps)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(3, *weight.shape, generator=generator).to(weight.device, weight.dtype)
    tolerance = 1e-5 if weight.dtype == torch.float32 else 2e-2
    with torch.no_grad():
        same = torch.allclose(frozen(probe), norm(probe), atol=tolerance, rtol=tolerance)
    return frozen if same else None


def _normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / √(mean(x²) + ε) in the dtype of `x`, and 1 / √(mean(x²) + ε) in fp32."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).to(x.dtype), scale


class _RMSNorm(torch.autograd.Function):
    """dx = s · (g − n · mean(g · n)), where n = x · s is normalised and g = dy · weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normal, scale = _normalize(x, eps)
        ctx.save_for_backward(normal, scale)
        ctx.weight = weight
        return normal * weight

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        normal, scale = ctx.saved_tensors
        inner = (dy * ctx.weight).float()
        overlap = (inner * normal).sum(-1, keepdim=True)
        dx = inner.addcmul_(normal, overlap, value=-1 / dy.shape[-1]).mul_(scale)
        return dx.to(dy.dtype), None, None
