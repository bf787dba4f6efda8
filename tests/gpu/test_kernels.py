"""Every kernel against plain torch in float64: on a CUDA device, or in Triton's interpreter (TRITON_INTERPRET=1)."""

import pytest
import torch
from torch import Tensor

from tests.gpu.device import DEVICE
from tinsmith.models import kernels

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3}
EPS = 1e-6
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
HEADS = pytest.mark.parametrize(("heads", "kv_heads", "d"), [(4, 2, 16), (6, 3, 24), (8, 8, 32), (14, 2, 64)])
NORMS = pytest.mark.parametrize("norm", [True, False], ids=["normalised", "plain"])


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def check(ours: Tensor, expected: Tensor) -> None:
    assert (ours.double() - expected).norm() <= TOLERANCE[ours.dtype] * expected.norm()


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.double()


def angles(rows: int, d: int) -> tuple[Tensor, Tensor]:
    angle = random(rows, d // 2).repeat(1, 2)
    return angle.cos(), angle.sin()


def turned(heads_THd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
    low, high = heads_THd.chunk(2, -1)
    return heads_THd * cos_Td.double()[:, None] + torch.cat([-high, low], -1) * sin_Td.double()[:, None]


@DTYPES
def test_a_norm_adds_first(dtype: torch.dtype) -> None:
    x, residual, weight = (
        random(5, 96, dtype=dtype),
        random(96, 5, dtype=dtype).t().contiguous(),
        random(96, dtype=dtype),
    )
    normed, total = kernels.add_rms_norm(x, residual, weight, EPS)
    check(total, x.double() + residual.double())
    check(normed, rms_norm(total, weight))
    normed, total = kernels.add_rms_norm(x, None, weight, EPS)
    assert total is x
    check(normed, rms_norm(x, weight))


@DTYPES
def test_swiglu(dtype: torch.dtype) -> None:
    gate_up = random(3, 2 * 1100, dtype=dtype)
    gate, up = gate_up.double().chunk(2, 1)
    check(kernels.swiglu(gate_up), torch.nn.functional.silu(gate) * up)


@DTYPES
@HEADS
@NORMS
def test_heads_are_normalised_and_turned(heads: int, kv_heads: int, d: int, norm: bool, dtype: torch.dtype) -> None:
    qkv = random(7, (heads + 2 * kv_heads) * d, dtype=dtype)
    weights = (random(d, dtype=dtype), 1 + random(d, dtype=dtype)) if norm else (None, None)
    cos, sin = angles(7, d)
    expected = qkv.double().view(7, -1, d).clone()
    for part, weight in zip((slice(heads), slice(heads, heads + kv_heads)), weights, strict=True):
        normed = expected[:, part] if weight is None else rms_norm(qkv.view(7, -1, d)[:, part], weight)
        expected[:, part] = turned(normed, cos, sin)
    aside = torch.zeros_like(qkv)
    kernels.norm_rope(qkv, cos, sin, *weights, EPS, heads, kv_heads, d, aside)
    assert not aside[:, (heads + kv_heads) * d :].any()
    check(kernels.norm_rope(qkv, cos, sin, *weights, EPS, heads, kv_heads, d), expected.view(7, -1))
    assert torch.equal(aside[:, : (heads + kv_heads) * d], qkv[:, : (heads + kv_heads) * d])


def test_a_softmax_less_one_at_a_token() -> None:
    logits, tokens = 5 * random(3, 5000), torch.tensor([[7], [4999], [0]], device=DEVICE)
    less, logsumexp = kernels.softmax_less_one(logits, tokens, torch.float32)
    check(logsumexp, logits.double().logsumexp(1, keepdim=True))
    check(less, logits.double().softmax(1).scatter_add_(1, tokens, -torch.ones_like(tokens, dtype=torch.float64)))


@DTYPES
def test_a_norm_backward_adds_the_residuals_gradient(dtype: torch.dtype) -> None:
    x, dy, residual = (random(*shape, dtype=dtype).view(6, 80) for shape in ((6, 80), (480,), (80, 6)))
    weight = random(80, dtype=dtype)
    leaf = x.double().requires_grad_()
    rms_norm(leaf, weight).backward(dy.double())
    dx, normed = kernels.rms_norm_backward(dy, x, weight, EPS, residual)
    check(dx, leaf.grad + residual.double())
    check(normed, rms_norm(x, weight))


@DTYPES
@HEADS
@NORMS
def test_heads_backward(heads: int, kv_heads: int, d: int, norm: bool, dtype: torch.dtype) -> None:
    qkv = random(7, (heads + 2 * kv_heads) * d, dtype=dtype)
    weights = (random(d, dtype=dtype), 1 + random(d, dtype=dtype)) if norm else (None, None)
    cos, sin = angles(7, d)
    leaf = qkv.double().requires_grad_()
    query, key, value = leaf.view(7, -1, d).split([heads, kv_heads, kv_heads], 1)
    outputs = [
        turned(part if weight is None else rms_norm(part, weight), cos, sin)
        for part, weight in zip((query, key), weights, strict=True)
    ]
    upstream = [random(*part.shape, dtype=dtype) for part in (query, key, value)]
    torch.autograd.backward([*outputs, value], [part.double() for part in upstream])
    check(kernels.norm_rope_backward(tuple(upstream), qkv, cos, sin, *weights, EPS), leaf.grad)
