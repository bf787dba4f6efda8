"""Kernels for training all weights of the plainest decoder layers, for CUDA devices: what frozen weights do not need.

Written in Triton, as `kernels.py`. Gradients of weights are added to fp32 tensors; each is summed in one order,
whatever the device does at the same time. Knows no layers.

Shapes: `T` rows of a packed batch, `D` hidden size, `P` width of the feed-forward network, `C` rows of a chunk of
logits, `V` vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinsmith.models.kernels import VOCABULARY_BLOCK, gated_gradients, logsumexp, warps_for
from tinsmith.models.launch import Kernel, blocks, power_of_two

_COLUMNS = 1024  # of the feed-forward network that one program computes
_NORM_ROWS = 16  # that one program sums


def swiglu_backward(gate_up_TP: Tensor, dout_TP: Tensor) -> Tensor:
    """silu(gate) · up [T, P] once more, of [T, 2 P], which is overwritten with its gradient."""
    rows, width = dout_TP.shape
    out_TP = torch.empty_like(dout_TP)
    grid = (rows, blocks(width, _COLUMNS))
    _SWIGLU_BACKWARD(grid, (gate_up_TP, dout_TP, out_TP), (gate_up_TP.stride(0), width), (), (_COLUMNS,))
    return out_TP


def trained_norm_backward(
    dy_TD: Tensor, x_TD: Tensor, weight_D: Tensor, eps: float, residual_TD: Tensor | None, gradient_D: Tensor
) -> tuple[Tensor, Tensor]:
    """(the gradient in x, plus the residual's; the normalised x once more); adds to the gradient in the weight.

    All are contiguous.
    """
    rows, width = x_TD.shape
    dx_TD, normed_TD = torch.empty_like(x_TD), torch.empty_like(x_TD)
    programs, block = blocks(rows, _NORM_ROWS), power_of_two(width)
    parts_ND = gradient_D.new_empty(programs, width)
    tensors = (dy_TD, x_TD, weight_D, x_TD if residual_TD is None else residual_TD, dx_TD, normed_TD, parts_ND)
    constants = (residual_TD is not None, _NORM_ROWS, block)
    _TRAINED_NORM_BACKWARD((programs,), tensors, (width,), (rows, eps), constants, warps_for(block))
    gradient_D.add_(parts_ND.sum(0))
    return dx_TD, normed_TD


def row_logsumexp(logits_CV: Tensor) -> Tensor:
    """[C, 1], of fp32 logits."""
    rows, width = logits_CV.shape
    logsumexp_C1 = logits_CV.new_empty(rows, 1)
    _ROW_LOGSUMEXP((rows,), (logits_CV, logsumexp_C1), (logits_CV.stride(0), width), (), (VOCABULARY_BLOCK,))
    return logsumexp_C1


def logits_gradient(
    logits_CV: Tensor, logsumexp_C1: Tensor, tokens_C: Tensor, upstream_C: Tensor, out_CV: Tensor
) -> None:
    """Writes the gradient in fp32 logits of each row's token's logprob times the row's `upstream`; rounded once."""
    rows, width = logits_CV.shape
    tensors = (logits_CV, out_CV, logsumexp_C1, tokens_C, upstream_C)
    sizes = (logits_CV.stride(0), out_CV.stride(0), width)
    _LOGITS_GRADIENT((rows, blocks(width, VOCABULARY_BLOCK)), tensors, sizes, (), (VOCABULARY_BLOCK,))


@triton.jit
def _swiglu_backward(gate_up_ptr, dout_ptr, out_ptr, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate_ptrs = gate_up_ptr + row * stride + columns
    gate = tl.load(gate_ptrs, inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + width, inside, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + row * width + columns, inside, other=0.0).to(tl.float32)
    out, dgate, dup = gated_gradients(gate, up, dout)
    tl.store(out_ptr + row * width + columns, out, inside)
    tl.store(gate_ptrs, dgate, inside)
    tl.store(gate_ptrs + width, dup, inside)


@triton.jit(do_not_specialize=["rows"])
def _trained_norm_backward(
    dy_ptr,
    x_ptr,
    weight_ptr,
    residual_ptr,
    dx_ptr,
    normed_ptr,
    parts_ptr,
    width,
    rows,
    eps,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + columns, columns < width, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for number in range(ROWS):
        row = (tl.program_id(0) * ROWS + number).to(tl.int64)
        start = row * width
        inside = (columns < width) & (row < rows)
        x = tl.load(x_ptr + start + columns, inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + start + columns, inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x) / width + eps)
        normal = x * scale
        inner = dy * weight
        dx = scale * (inner - normal * (tl.sum(inner * normal) / width))
        if ADD:
            dx += tl.load(residual_ptr + start + columns, inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + start + columns, dx, inside)
        tl.store(normed_ptr + start + columns, normal * weight, inside)
        total += dy * normal
    tl.store(parts_ptr + tl.program_id(0).to(tl.int64) * width + columns, total, columns < width)


@triton.jit
def _row_logsumexp(logits_ptr, logsumexp_ptr, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tl.store(logsumexp_ptr + row, logsumexp(logits_ptr + row * stride, width, BLOCK))


@triton.jit
def _logits_gradient(
    logits_ptr, out_ptr, logsumexp_ptr, tokens_ptr, upstream_ptr, stride, out_stride, width, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    logits = tl.load(logits_ptr + row * stride + columns, inside, other=0.0)
    one = tl.where(columns == tl.load(tokens_ptr + row), 1.0, 0.0)
    gradient = (one - tl.exp(logits - tl.load(logsumexp_ptr + row))) * tl.load(upstream_ptr + row)
    tl.store(out_ptr + row * out_stride + columns, gradient, inside)


_SWIGLU_BACKWARD = Kernel(_swiglu_backward)
_TRAINED_NORM_BACKWARD = Kernel(_trained_norm_backward)
_ROW_LOGSUMEXP = Kernel(_row_logsumexp, warps=8)
_LOGITS_GRADIENT = Kernel(_logits_gradient, warps=8)
