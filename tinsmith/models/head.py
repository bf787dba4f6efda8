"""The LM head: log-probabilities of given targets straight from hidden states, and the logits of a few rows.

Logits are computed in fp32, a chunk of rows at a time, and computed again in backward: [rows, vocabulary] is never in
memory beyond a chunk. Trainer and sampler share this file, so their logprobs agree.

Shapes: `T` rows of hidden states, `D` hidden size, `V` vocabulary, `M` targets, `C` rows of a chunk, `R` rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinsmith.models.lora import Segment, add_product

if TYPE_CHECKING:
    from tinsmith.models.loading import BaseModel

CHUNK_ELEMENTS = 2**24
"""Logits in one chunk: 64 MiB in fp32."""

_VOCABULARY_BLOCK = 8192


@dataclass(frozen=True, slots=True)
class _Head:
    """An unembedding matrix [V, D] and the adapters that change it."""

    weight: Tensor
    linear: int
    segments: Sequence[Segment]

    def logits(self, hidden_TD: Tensor, start: int, end: int) -> Tensor:
        """fp32 [end - start, V] of rows `start` to `end`."""
        logits_CV = _product(hidden_TD[start:end], self.weight)
        for segment, first, last in _within(self.segments, start, end):
            pair = segment.adapter.pair(self.linear) if segment.adapter else None
            if pair is not None:
                delta_NV = _product(F.linear(hidden_TD[first:last], pair[0]), pair[1])
                logits_CV[first - start : last - start].add_(delta_NV, alpha=segment.adapter.scale)  # type: ignore[union-attr]
        return logits_CV

    def backward(self, hidden_TD: Tensor, dlogits_CV: Tensor, start: int, dhidden_TD: Tensor) -> None:
        """Writes the gradient of rows `start`… to `dhidden_TD`, and adds to the adapters' gradients."""
        end = start + len(dlogits_CV)
        torch.mm(dlogits_CV, self.weight, out=dhidden_TD[start:end])
        for segment, first, last in _within(self.segments, start, end):
            adapter = segment.adapter
            pair = adapter.pair(self.linear) if adapter else None
            if adapter is None or pair is None:
                continue
            rows_NV, rows_ND = dlogits_CV[first - start : last - start], hidden_TD[first:last]
            dz_NR = rows_NV @ pair[1]
            dhidden_TD[first:last].addmm_(dz_NR, pair[0], alpha=adapter.scale)
            if segment.trains:
                grad_a, grad_b = adapter.grad_pairs[self.linear]  # type: ignore[misc]
                add_product(grad_a, dz_NR.t(), rows_ND, adapter.scale)
                add_product(grad_b, rows_NV.t(), F.linear(rows_ND, pair[0]), adapter.scale)

    def chunks(self, rows: int) -> Iterator[tuple[int, int]]:
        """Row ranges to compute at once.

        A segment is cut at multiples of the chunk size from its own start, and only whole pieces share a chunk: how
        one tenant's gradient is summed does not depend on its neighbours.
        """
        limit = max(8, CHUNK_ELEMENTS // self.weight.shape[0])
        start = end = 0
        for segment in self.segments:
            for first in range(segment.start, segment.end, limit):
                last = min(first + limit, segment.end)
                if last - start > limit:
                    yield start, end
                    start = first
                end = last
        if end != rows:
            raise ValueError(f"segments cover {end} rows of {rows}")
        yield start, end


def _within(segments: Sequence[Segment], start: int, end: int) -> Iterator[tuple[Segment, int, int]]:
    for segment in segments:
        first, last = max(segment.start, start), min(segment.end, end)
        if first < last:
            yield segment, first, last


def _product(x_CD: Tensor, weight_VD: Tensor) -> Tensor:
    """x Wᵀ as fp32 [C, V], accumulated in fp32 whatever the dtype of the factors."""
    if x_CD.dtype == torch.float32:
        return F.linear(x_CD, weight_VD)
    if x_CD.is_cuda:
        return torch.mm(x_CD, weight_VD.t(), out_dtype=torch.float32)
    blocks = weight_VD.split(_VOCABULARY_BLOCK)
    return torch.cat([F.linear(x_CD.float(), block.float()) for block in blocks], dim=1)


class _TargetLogprobs(torch.autograd.Function):
    """Hidden states → logprobs of the targets. The gradient of a trainable weight goes to autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight: Tensor,
        head: _Head,
        rows_M: Tensor,
        targets_M: Tensor,
    ) -> Tensor:
        logprobs_M = torch.empty(len(targets_M), dtype=torch.float32, device=hidden_TD.device)
        normalizers_T = torch.empty(len(hidden_TD), dtype=torch.float32, device=hidden_TD.device)
        ctx.chunks = []
        for start, end in head.chunks(len(hidden_TD)):
            first, last = torch.searchsorted(rows_M, torch.tensor([start, end], device=rows_M.device)).tolist()
            ctx.chunks.append((start, end, first, last))
            logits_CV = head.logits(hidden_TD, start, end)
            torch.logsumexp(logits_CV, 1, out=normalizers_T[start:end])
            rows = rows_M[first:last]
            logprobs_M[first:last] = logits_CV[rows - start, targets_M[first:last]] - normalizers_T[rows]
        ctx.save_for_backward(hidden_TD, normalizers_T, rows_M, targets_M)
        ctx.head = head
        return logprobs_M

    @staticmethod
    def backward(ctx: Any, dlogprobs_M: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, normalizers_T, rows_M, targets_M = ctx.saved_tensors
        head: _Head = ctx.head
        dhidden_TD = torch.empty_like(hidden_TD)
        dweight_VD = torch.zeros_like(head.weight) if ctx.needs_input_grad[1] else None
        dlogprobs_T = torch.zeros_like(normalizers_T).index_add_(0, rows_M, dlogprobs_M)
        for start, end, first, last in ctx.chunks:
            logits_CV = head.logits(hidden_TD, start, end)
            dlogits_CV = logits_CV.sub_(normalizers_T[start:end, None]).exp_().mul_(-dlogprobs_T[start:end, None])
            cells = (rows_M[first:last] - start, targets_M[first:last])
            dlogits_CV.index_put_(cells, dlogprobs_M[first:last], accumulate=True)
            dlogits_CV = dlogits_CV.to(hidden_TD.dtype)
            head.backward(hidden_TD, dlogits_CV, start, dhidden_TD)
            if dweight_VD is not None:
                dweight_VD.addmm_(dlogits_CV.t(), hidden_TD[start:end])
        return dhidden_TD, dweight_VD, None, None, None


def target_logprobs(
    model: "BaseModel",
    hidden_TD: Tensor,
    segments: Sequence[Segment],
    rows_M: Tensor | None,
    targets_M: Tensor,
    module: nn.Module | None = None,
) -> Tensor:
    """log p(targets_M[i] | hidden row rows_M[i]) in fp32, differentiable.

    `rows_M` (int64, ascending) may name a row several times or not at all; None means one target for each row in
    order. `targets_M` is int64. `module` is a full-parameter model's own, instead of the shared base.
    """
    if rows_M is None:
        rows_M = torch.arange(len(hidden_TD), device=hidden_TD.device)
    head = _head(model, segments, module)
    return _TargetLogprobs.apply(hidden_TD, head.weight, head, rows_M, targets_M)


def logits(
    model: "BaseModel", hidden_RD: Tensor, segments: Sequence[Segment], module: nn.Module | None = None
) -> Tensor:
    """fp32 [R, V]: all logits of a few rows; not differentiable."""
    with torch.no_grad():
        return _head(model, segments, module).logits(hidden_RD, 0, len(hidden_RD))


def _head(model: "BaseModel", segments: Sequence[Segment], module: nn.Module | None) -> _Head:
    owner: Any = module if module is not None else model.module
    return _Head(owner.get_output_embeddings().weight, model.head_linear, segments)
