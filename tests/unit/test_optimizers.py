"""AdamW and clipping on a flat buffer against PyTorch's on separate tensors."""

import pytest
import torch

from tinsmith.errors import UserError
from tinsmith.protocols import AdamParams
from tinsmith.training.optimizers import AdamW, clip_grad_norm

SHAPES = [(3, 5), (7,), (1, 1), (16, 9)]


def pieces(flat: torch.Tensor) -> list[torch.Tensor]:
    parts = flat.split([torch.Size(shape).numel() for shape in SHAPES])
    return [part.view(shape) for part, shape in zip(parts, SHAPES, strict=True)]


def random_flat(seed: int) -> torch.Tensor:
    return torch.randn(
        sum(torch.Size(shape).numel() for shape in SHAPES), generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize(
    "params",
    [
        AdamParams(),
        AdamParams(learning_rate=0.02, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.3, grad_clip_norm=0.7),
        AdamParams(learning_rate=0.02, weight_decay=0.1, grad_clip_norm=1000.0),
        AdamParams(learning_rate=0.0, beta1=0.0, beta2=0.0, eps=1e-8),
    ],
)
def test_steps_equal_torchs_adamw_with_clipping(params: AdamParams) -> None:
    flat = random_flat(0)
    tensors = [torch.nn.Parameter(piece.clone()) for piece in pieces(flat)]
    theirs = torch.optim.AdamW(
        tensors,
        lr=params.learning_rate,
        betas=(params.beta1, params.beta2),
        eps=params.eps,
        weight_decay=params.weight_decay,
        foreach=False,
    )
    ours = AdamW()
    for step in range(1, 6):
        grad = random_flat(step) * step
        for tensor, piece in zip(tensors, pieces(grad), strict=True):
            tensor.grad = piece.clone()
        expected_norm = torch.nn.utils.clip_grad_norm_(tensors, params.grad_clip_norm or float("inf"))
        theirs.step()
        assert ours.step(flat, grad, params) == pytest.approx(expected_norm.item(), rel=1e-6)
    assert ours.step_count == 5
    for tensor, piece in zip(tensors, pieces(flat), strict=True):
        torch.testing.assert_close(piece, tensor.data, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_gradient_that_is_not_finite_changes_neither_weights_nor_moments(value: float) -> None:
    weights, optimizer = random_flat(0), AdamW()
    optimizer.step(weights, random_flat(1), AdamParams())
    before = [tensor.clone() for tensor in (weights, optimizer.exp_avg, optimizer.exp_avg_sq)]
    grad = random_flat(2)
    grad[11] = value
    with pytest.raises(UserError, match="not finite"):
        optimizer.step(weights, grad, AdamParams(grad_clip_norm=1.0))
    assert optimizer.step_count == 1
    for tensor, old in zip((weights, optimizer.exp_avg, optimizer.exp_avg_sq), before, strict=True):
        assert torch.equal(tensor, old)


def test_clipping_shortens_long_gradients_only() -> None:
    grad = torch.tensor([3.0, 4.0])
    assert clip_grad_norm(grad, 0.0) == 5.0
    assert grad.tolist() == [3.0, 4.0]
    assert clip_grad_norm(grad, 6.0) == 5.0
    assert grad.tolist() == [3.0, 4.0]
    assert clip_grad_norm(grad, 1.0) == 5.0
    assert grad.norm().item() == pytest.approx(1.0, rel=1e-6)
