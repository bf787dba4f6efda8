"""The LM head of a full-parameter model that trains on a CUDA device: logprobs of one target for each row.

As `head.py`, with fp32 logits of a chunk of rows at a time. Either forward keeps their gradient, up to each row's
factor, in the narrower dtype of the hidden states; or backward computes the logits again, and takes less memory. The
weight's gradient goes to the model's flat fp32 gradient, past autograd.

Shapes: `T` rows of hidden states, `D` hidden size, `V` vocabulary, `C` rows of a chunk, `N` rows of many chunks.
"""

from typing import Any

import torch
from torch import Tensor

from tinsmith.models.full_kernels import logits_gradient, row_logsumexp
from tinsmith.models.head import CUDA_CHUNK_ELEMENTS, full_product
from tinsmith.models.kernels import softmax_less_one

_CHUNKS = 8  # whose logits' gradients are products at once, since every product adds to all of the weight's gradient
_ROWS = 256  # that a product computes at once: chunks are multiples


def trained_logprobs(
    hidden_TD: Tensor, weight_VD: Tensor, gradient_VD: Tensor, targets_T: Tensor, *, recomputes: bool
) -> Tensor:
    """fp32 [T], differentiable in the hidden states; backward adds the weight's gradient to `gradient_VD`."""
    head = _KeptHead if torch.is_grad_enabled() and not recomputes else _RecomputedHead
    logprobs_T: Tensor = head.apply(hidden_TD, weight_VD, gradient_VD, targets_T)
    return logprobs_T


def add_in_full(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, accumulated in the dtype of `total`: fp32."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, torch.float32, out=total)


def _chunks(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _chunk_rows(vocabulary: int) -> int:
    return -(-CUDA_CHUNK_ELEMENTS // (vocabulary * _ROWS)) * _ROWS


class _KeptHead(torch.autograd.Function):
    """Hidden states → logprobs; keeps [T, V] in the dtype of the hidden states."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, gradient_VD: Tensor, targets_T: Tensor) -> Tensor:
        less_TV = hidden_TD.new_empty(len(hidden_TD), len(weight_VD))
        logprobs_T1 = hidden_TD.new_empty(len(hidden_TD), 1, dtype=torch.float32)
        for chunk in _chunks(len(hidden_TD), _chunk_rows(len(weight_VD))):
            tokens_C, out_CV = targets_T[chunk], less_TV[chunk]
            logits_CV = full_product(hidden_TD[chunk], weight_VD)
            _, logsumexp_C1 = softmax_less_one(logits_CV, tokens_C, hidden_TD.dtype, out_CV)
            torch.sub(logits_CV.gather(1, tokens_C[:, None]), logsumexp_C1, out=logprobs_T1[chunk])
        ctx.save_for_backward(hidden_TD, less_TV)
        ctx.weight_VD, ctx.gradient_VD = weight_VD, gradient_VD
        return logprobs_T1[:, 0]

    @staticmethod
    def backward(ctx: Any, dlogprobs_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, less_TV = ctx.saved_tensors
        factors_T1 = -dlogprobs_T[:, None]
        add_in_full(ctx.gradient_VD, less_TV.t(), (hidden_TD * factors_T1).to(hidden_TD.dtype))
        return (less_TV @ ctx.weight_VD * factors_T1).to(hidden_TD.dtype), None, None, None


class _RecomputedHead(torch.autograd.Function):
    """The same; keeps the hidden states."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, gradient_VD: Tensor, targets_T: Tensor) -> Tensor:
        rows = len(hidden_TD)
        logsumexp_T1 = hidden_TD.new_empty(rows, 1, dtype=torch.float32)
        chosen_T1 = torch.empty_like(logsumexp_T1)
        for chunk in _chunks(rows, _chunk_rows(len(weight_VD))):
            logits_CV = full_product(hidden_TD[chunk], weight_VD)
            logsumexp_T1[chunk] = row_logsumexp(logits_CV)
            torch.gather(logits_CV, 1, targets_T[chunk, None], out=chosen_T1[chunk])
        ctx.save_for_backward(hidden_TD, targets_T, logsumexp_T1)
        ctx.weight_VD, ctx.gradient_VD = weight_VD, gradient_VD
        return (chosen_T1 - logsumexp_T1)[:, 0]

    @staticmethod
    def backward(ctx: Any, dlogprobs_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, targets_T, logsumexp_T1 = ctx.saved_tensors
        weight_VD, dlogprobs_T = ctx.weight_VD, dlogprobs_T.contiguous()
        dhidden_TD = torch.empty_like(hidden_TD)
        size = _chunk_rows(len(weight_VD))
        dlogits_NV = hidden_TD.new_empty(min(_CHUNKS * size, len(hidden_TD)), len(weight_VD))
        for many in _chunks(len(hidden_TD), _CHUNKS * size):
            rows_ND, logsumexp_N1, tokens_N, upstream_N = (
                each[many] for each in (hidden_TD, logsumexp_T1, targets_T, dlogprobs_T)
            )
            part_NV = dlogits_NV[: len(rows_ND)]
            for chunk in _chunks(len(rows_ND), size):
                logits_CV = full_product(rows_ND[chunk], weight_VD)
                logits_gradient(logits_CV, logsumexp_N1[chunk], tokens_N[chunk], upstream_N[chunk], part_NV[chunk])
            torch.mm(part_NV, weight_VD, out=dhidden_TD[many])
            add_in_full(ctx.gradient_VD, part_NV.t(), rows_ND)
        return dhidden_TD, None, None, None
