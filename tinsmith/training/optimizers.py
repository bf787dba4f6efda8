"""AdamW with gradient clipping on one flat buffer: PyTorch's arithmetic, one model's state.

Shapes: everything is flat, [total], fp32.
"""

import math

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from tinsmith.errors import UserError
from tinsmith.protocols import AdamParams


class AdamW:
    """The state of one model's optimizer: both moments (None before the first step) and the number of steps."""

    def __init__(self) -> None:
        self.step_count = 0
        self.exp_avg: Tensor | None = None
        self.exp_avg_sq: Tensor | None = None

    def step(self, weights: Tensor, grad: Tensor, params: AdamParams) -> float:
        """Clips `grad`, updates `weights` in place, and returns the gradient's norm before clipping.

        As `torch.nn.utils.clip_grad_norm_` and `torch.optim.AdamW`. Raises UserError, and changes nothing but `grad`,
        if the norm is not finite.
        """
        norm = clip_grad_norm(grad, params.grad_clip_norm)
        if self.exp_avg is None or self.exp_avg_sq is None:
            self.exp_avg, self.exp_avg_sq = torch.zeros_like(weights), torch.zeros_like(weights)
        adamw(
            [weights],
            [grad],
            [self.exp_avg],
            [self.exp_avg_sq],
            [],
            [weights.new_full((), self.step_count)],
            fused=True,
            amsgrad=False,
            beta1=params.beta1,
            beta2=params.beta2,
            lr=params.learning_rate,
            weight_decay=params.weight_decay,
            eps=params.eps,
            maximize=False,
        )
        self.step_count += 1
        return norm


def clip_grad_norm(grad: Tensor, max_norm: float) -> float:
    """Scales `grad` in place down to `max_norm` (0: leaves it) and returns its norm before. Raises UserError."""
    norm = torch.linalg.vector_norm(grad).item()
    if not math.isfinite(norm):
        raise UserError(f"the accumulated gradient is not finite (norm {norm}): it was cleared, weights are unchanged")
    coefficient = max_norm / (norm + 1e-6)
    if max_norm > 0 and coefficient < 1:
        grad.mul_(coefficient)
    return norm
