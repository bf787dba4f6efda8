"""The LM head: log-probabilities of given targets straight from hidden states, and the logits of a few rows.

Logits are computed in fp32, a chunk of rows at a time: [rows, vocabulary] is never in memory beyond a chunk. Where
nothing of the head is trained, forward computes the hidden states' gradient too, up to each row's factor; otherwise
backward computes the logits again. Trainer and sampler share this file, so their logprobs agree.

Shapes: `T` rows of hidden states, `D` hidden size, `V` vocabulary, `M` targets, `C` rows of a chunk, `N` those of one
segment, `R` rank.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinsmith.models.lora import Adapter, Segment, SegmentPart, add_product

if TYPE_CHECKING:
    from tinsmith.models.exact import ExactLayers

CHUNK_ELEMENTS = 2**23
"""Logits in one chunk: 32 MiB in fp32."""

CUDA_CHUNK_ELEMENTS = 2**26
"""The same on a GPU, which smaller chunks would leave idle: 256 MiB, about 3 % of what 8,192 rows of 150,000 take."""

_VOCABULARY_BLOCK = 8192


_SPARE_COLUMNS = 128
_ALIGNED_RANKS = 8  # what fast kernels want the number of columns to be a multiple of


class SpareColumns:
    """Room beside an unembedding matrix [V, D] for one adapter's B, so that both make one product.

    On a GPU each pass over a chunk's logits costs about as much as their product, and an adapter's product is one.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        """Moves the weight's numbers; what shares the parameter shares them still."""
        self._width = weight.shape[1]
        self._whole = weight.data.new_zeros(weight.shape[0], self._width + _SPARE_COLUMNS)
        self._whole[:, : self._width] = weight.data
        weight.data = self._whole[:, : self._width]

    def hold(self, rank: int) -> bool:
        return rank <= _SPARE_COLUMNS and rank % _ALIGNED_RANKS == 0

    def filled(self, matrix_b: Tensor) -> Tensor:
        """[V, D + R]: the weight, and `matrix_b` until the next call."""
        whole = self._whole[:, : self._width + matrix_b.shape[1]]
        whole[:, self._width :] = matrix_b
        return whole


class HasHead(Protocol):
    """What is asked of a base model: its module, and the index of the head among the adaptable linear layers."""

    module: Any
    head_linear: int
    spare_columns: SpareColumns | None
    exact: "ExactLayers | None"


@dataclass(frozen=True, slots=True)
class _Head:
    """An unembedding matrix [V, D] and the adapters that change it; perhaps with spare columns beside it."""

    weight: Tensor
    linear: int
    segments: Sequence[Segment]
    spare: SpareColumns | None
    exact: "ExactLayers | None"

    def logits(self, hidden_TD: Tensor, start: int, end: int) -> Tensor:
        """fp32 [end - start, V] of rows `start` to `end`."""
        if self.exact is not None:
            parts = (
                Segment(each.adapter, max(each.start, start) - start, min(each.end, end) - start)
                for each in self.segments
            )
            return self.exact.logits_of(
                self.weight, hidden_TD[start:end], [part for part in parts if part.start < part.end]
            )
        if only := self._only(start, end):
            adapter, (matrix_a, matrix_b), spare = only
            hidden_CD = hidden_TD[start:end]
            z_CR = F.linear(hidden_CD, matrix_a).mul_(adapter.scale)
            return full_product(torch.cat([hidden_CD, z_CR], 1), spare.filled(matrix_b))
        logits_CV = full_product(hidden_TD[start:end], self.weight)
        for adapter, (matrix_a, matrix_b), first, last, _ in self._adapted(start, end):
            rows_NV, z_NR = logits_CV[first - start : last - start], F.linear(hidden_TD[first:last], matrix_a)
            if z_NR.is_cuda and z_NR.dtype != torch.float32:
                torch.addmm(rows_NV, z_NR, matrix_b.t(), torch.float32, alpha=adapter.scale, out=rows_NV)
            else:
                rows_NV.add_(full_product(z_NR, matrix_b), alpha=adapter.scale)
        return logits_CV

    def backward(self, hidden_TD: Tensor, dlogits_CV: Tensor, factors_C1: Tensor, start: int) -> Tensor:
        """The gradient [C, D] of rows `start`… from `factors` · `dlogits`; adds to the adapters' gradients."""
        end = start + len(dlogits_CV)
        dhidden_CD, dz_CR = self._inputs_gradient(dlogits_CV, start, end)
        for adapter, (matrix_a, matrix_b), first, last, trains in self._adapted(start, end):
            rows = slice(first - start, last - start)
            rows_NV, rows_ND, factors_N1 = dlogits_CV[rows], hidden_TD[first:last], factors_C1[rows].to(hidden_TD.dtype)
            dz_NR = rows_NV @ matrix_b if dz_CR is None else dz_CR
            dhidden_CD[rows].add_(dz_NR @ matrix_a, alpha=adapter.scale)
            if trains:
                grad_a, grad_b = adapter.grad_pair(self.linear)
                add_product(grad_a, (dz_NR * factors_N1).t(), rows_ND, adapter.scale)
                add_product(grad_b, rows_NV.t(), F.linear(rows_ND, matrix_a) * factors_N1, adapter.scale)
        return dhidden_CD.mul_(factors_C1).to(hidden_TD.dtype)

    def _inputs_gradient(self, dlogits_CV: Tensor, start: int, end: int) -> tuple[Tensor, Tensor | None]:
        """dlogits W [C, D], and dlogits B [C, R] if the rows have one adapter that the spare columns hold."""
        only = self._only(start, end)
        if only is None:
            return _accumulated(dlogits_CV, self.weight), None
        _, (_, matrix_b), spare = only
        dboth = _accumulated(dlogits_CV, spare.filled(matrix_b))
        width = self.weight.shape[1]
        return dboth[:, :width].contiguous(), dboth[:, width:].to(matrix_b.dtype)

    def _only(self, start: int, end: int) -> tuple[Adapter, tuple[Tensor, Tensor], SpareColumns] | None:
        """The adapter of all these rows, if there is just one, and it fits beside the weight.

        Never several: one that is not finite would spoil its neighbours' rows.
        """
        adapted = list(self._adapted(start, end)) if self.spare else []
        if self.spare is None or len(adapted) != 1:
            return None
        adapter, pair, first, last, _ = adapted[0]
        return (adapter, pair, self.spare) if (first, last) == (start, end) and self.spare.hold(len(pair[0])) else None

    @property
    def is_frozen(self) -> bool:
        """Whether no adapter here, and no gradient of the weight, needs the logits' gradient."""
        pairs = (segment.adapter.pair(self.linear) for segment in self.segments if segment.adapter)
        return not self.weight.requires_grad and all(pair is None for pair in pairs)

    def _adapted(self, start: int, end: int) -> Iterator[tuple[Adapter, tuple[Tensor, Tensor], int, int, bool]]:
        """(adapter, its A and B, first row, last row, whether it trains) of the segments between two rows."""
        for segment in self.segments:
            first, last = max(segment.start, start), min(segment.end, end)
            pair = segment.adapter.pair(self.linear) if segment.adapter and first < last else None
            if segment.adapter is not None and pair is not None:
                yield segment.adapter, pair, first, last, segment.trains

    def chunks(self, rows: int) -> Iterator[tuple[int, int]]:
        """Row ranges to compute at once.

        A segment is cut at multiples of the chunk size from its own start, and only whole pieces share a chunk: how
        one tenant's gradient is summed does not depend on its neighbours.
        """
        limit = max(8, (CUDA_CHUNK_ELEMENTS if self.weight.is_cuda else CHUNK_ELEMENTS) // self.weight.shape[0])
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


def full_product(x_CD: Tensor, weight_VD: Tensor) -> Tensor:
    """x Wᵀ as fp32 [C, V], accumulated in fp32 whatever the dtype of the factors."""
    if x_CD.dtype == torch.float32:
        return F.linear(x_CD, weight_VD)
    if x_CD.is_cuda:
        return torch.mm(x_CD, weight_VD.t(), out_dtype=torch.float32)
    blocks = weight_VD.split(_VOCABULARY_BLOCK)
    return torch.cat([F.linear(x_CD.float(), block.float()) for block in blocks], dim=1)


@dataclass(frozen=True, slots=True)
class _Targets:
    """Whose logprobs are wanted: entry i is `tokens_M[i]` in row `rows_M[i]`; rows ascend.

    With `single`, row i has exactly one entry, number i.
    """

    rows_M: Tensor
    tokens_M: Tensor
    single: bool

    def pieces(self, chunks: Iterable[tuple[int, int]]) -> list[tuple[slice, slice]]:
        """The rows of every chunk, and its entries."""
        rows = list(itertools.starmap(slice, chunks))
        if self.single:
            return list(zip(rows, rows, strict=True))
        ends = torch.tensor([part.stop for part in rows], device=self.rows_M.device)
        bounds = [0, *torch.searchsorted(self.rows_M, ends).tolist()]
        return list(zip(rows, itertools.starmap(slice, itertools.pairwise(bounds)), strict=True))

    def cells(self, rows: slice, entries: slice) -> tuple[Tensor, Tensor]:
        """Where a chunk's entries lie in its [C, V]."""
        return self.rows_M[entries] - rows.start, self.tokens_M[entries]

    def sums(self, values_M: Tensor, rows: int) -> Tensor:
        """[T, 1]: the sum of each row's values."""
        return values_M.new_zeros(rows, 1).index_add_(0, self.rows_M, values_M[:, None])

    def firsts(self, rows: int) -> Tensor:
        """[T, 1]: the token of each row's first entry; any token for a row that has none."""
        if self.single:
            return self.tokens_M[:, None]
        first_T = torch.searchsorted(self.rows_M, torch.arange(rows, device=self.rows_M.device))
        return self.tokens_M[first_T.clamp(max=len(self.tokens_M) - 1), None]

    def is_first(self) -> Tensor:
        """[M]: whether an entry is its row's first."""
        return torch.cat([self.rows_M.new_ones(1), self.rows_M.diff()]) > 0


def _logprobs(head: _Head, hidden_TD: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """fp32 logprobs [C, V] of these rows, and what was taken off each row's logits [C, 1]."""
    logits_CV = head.logits(hidden_TD, rows.start, rows.stop)
    normalizers_C1 = logits_CV[:, :1].clone()
    if head.exact is not None:
        logprobs_CV = head.exact.log_softmax(logits_CV)
    else:
        logprobs_CV = torch.log_softmax(logits_CV, 1, out=logits_CV)
    return logprobs_CV, normalizers_C1.sub_(logprobs_CV[:, :1])


def _less_one(logprobs_CV: Tensor, tokens_C1: Tensor, dtype: torch.dtype) -> Tensor:
    """Probabilities, less one at each row's token: minus the gradient in the logits. Overwrites the logprobs."""
    if dtype == torch.float32:
        return logprobs_CV.exp_().scatter_add_(1, tokens_C1, logprobs_CV.new_full(tokens_C1.shape, -1.0))
    less_C1 = logprobs_CV.gather(1, tokens_C1).exp_().sub_(1)  # rounded only after the difference
    result_CV = torch.exp(logprobs_CV, out=torch.empty_like(logprobs_CV, dtype=dtype))
    return result_CV.scatter_(1, tokens_C1, less_C1.to(dtype))


def _logprobs_and_less_one(
    head: _Head, hidden_TD: Tensor, rows: slice, cells: tuple[Tensor, Tensor], tokens_C1: Tensor
) -> tuple[Tensor, Tensor]:
    """The logprobs in some cells of a chunk, and its probabilities less one at each row's token."""
    if hidden_TD.is_cuda and hidden_TD.dtype != torch.float32:
        from tinsmith.models.kernels import softmax_less_one  # what it is written in comes with torch for CUDA only

        logits_CV = head.logits(hidden_TD, rows.start, rows.stop)
        less_CV, logsumexp_C1 = softmax_less_one(logits_CV, tokens_C1, hidden_TD.dtype)
        if head.exact is not None:
            return head.exact.logprobs(logits_CV, *cells), less_CV
        return logits_CV[cells] - logsumexp_C1[cells[0], 0], less_CV
    logprobs_CV, _ = _logprobs(head, hidden_TD, rows)
    return logprobs_CV[cells], _less_one(logprobs_CV, tokens_C1, hidden_TD.dtype)


def _accumulated(dlogits_CV: Tensor, weight_VD: Tensor) -> Tensor:
    """dlogits W as [C, D], in fp32 where the device gives that at no cost."""
    if dlogits_CV.is_cuda and dlogits_CV.dtype != torch.float32:
        return torch.mm(dlogits_CV, weight_VD, out_dtype=torch.float32)
    return dlogits_CV @ weight_VD


class _EarlyGradient(torch.autograd.Function):
    """Hidden states → logprobs of the targets, of a head in which nothing is trained.

    If each row has one target, its gradient is known in forward up to a factor, so that the logits are computed once.
    Backward adds what further targets of a row contribute.
    """

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, head: _Head, targets: _Targets) -> Tensor:
        logprobs_M = targets.tokens_M.new_empty(len(targets.tokens_M), dtype=torch.float32)
        gradient_TD = torch.empty_like(hidden_TD, dtype=torch.float32)
        firsts_T1 = targets.firsts(len(hidden_TD))

        def run(rows: slice, entries: slice) -> None:
            cells = targets.cells(rows, entries)
            logprobs_M[entries], dlogits_CV = _logprobs_and_less_one(head, hidden_TD, rows, cells, firsts_T1[rows])
            gradient_TD[rows] = _accumulated(dlogits_CV, head.weight)

        for rows, entries in targets.pieces(head.chunks(len(hidden_TD))):
            run(rows, entries)
        ctx.save_for_backward(gradient_TD)
        ctx.weight, ctx.targets, ctx.dtype = head.weight, targets, hidden_TD.dtype
        return logprobs_M

    @staticmethod
    def backward(ctx: Any, dlogprobs_M: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_TD,) = ctx.saved_tensors
        targets: _Targets = ctx.targets
        sums_T1 = targets.sums(dlogprobs_M, len(gradient_TD))
        dhidden_TD = gradient_TD * -sums_T1
        if not targets.single:
            further_M = dlogprobs_M - torch.where(targets.is_first(), sums_T1[targets.rows_M, 0], 0.0)
            for start in range(0, len(further_M), len(dhidden_TD)):
                part = slice(start, start + len(dhidden_TD))
                values_MD = further_M[part, None] * ctx.weight[targets.tokens_M[part]]
                dhidden_TD.index_put_((targets.rows_M[part],), values_MD, accumulate=True)
        return dhidden_TD.to(ctx.dtype), None, None


class _LateGradient(torch.autograd.Function):
    """The same of a head that is trained: backward computes the logits again.

    The adapters' gradients are added to theirs; a trainable weight's goes to autograd.
    """

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight: Tensor, head: _Head, targets: _Targets) -> Tensor:
        logprobs_M = targets.tokens_M.new_empty(len(targets.tokens_M), dtype=torch.float32)
        normalizers_T1 = hidden_TD.new_empty(len(hidden_TD), 1, dtype=torch.float32)
        ctx.pieces = targets.pieces(head.chunks(len(hidden_TD)))

        def run(rows: slice, entries: slice) -> None:
            logprobs_CV, normalizers_T1[rows] = _logprobs(head, hidden_TD, rows)
            logprobs_M[entries] = logprobs_CV[targets.cells(rows, entries)]

        for rows, entries in ctx.pieces:
            run(rows, entries)
        ctx.save_for_backward(hidden_TD, normalizers_T1)
        ctx.head, ctx.targets = head, targets
        return logprobs_M

    @staticmethod
    def backward(ctx: Any, dlogprobs_M: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, normalizers_T1 = ctx.saved_tensors
        head: _Head = ctx.head
        dhidden_TD = torch.empty_like(hidden_TD)
        dweight_VD = torch.zeros_like(head.weight) if ctx.needs_input_grad[1] else None
        gradient = _LogitsGradient(ctx.targets, dlogprobs_M, len(hidden_TD))

        def run(rows: slice, entries: slice) -> None:
            logprobs_CV = head.logits(hidden_TD, rows.start, rows.stop).sub_(normalizers_T1[rows])
            dlogits_CV, factors_C1 = gradient.of(logprobs_CV, rows, entries, hidden_TD.dtype)
            dhidden_TD[rows] = head.backward(hidden_TD, dlogits_CV, factors_C1, rows.start)
            if dweight_VD is not None:
                dweight_VD.addmm_(dlogits_CV.t(), hidden_TD[rows] * factors_C1.to(hidden_TD.dtype))

        for rows, entries in ctx.pieces:
            run(rows, entries)
        return dhidden_TD, dweight_VD, None, None


class _LogitsGradient:
    """The gradient in the logits, as a matrix and a factor for each of its rows.

    The factor spares rows of one target a multiplication; rows of several have it in the matrix. A row's bits depend
    on its own targets only.
    """

    def __init__(self, targets: _Targets, dlogprobs_M: Tensor, rows: int) -> None:
        self._targets = targets
        sums_T1 = targets.sums(dlogprobs_M, rows)
        self._factors_T1 = -sums_T1
        if targets.single:
            return
        one_T1 = torch.bincount(targets.rows_M, minlength=rows)[:, None] == 1
        self._factors_T1 = torch.where(one_T1, -sums_T1, -1.0)
        self._weights_T1 = torch.where(one_T1, 1.0, sums_T1)
        self._less_M = -torch.where(one_T1[targets.rows_M, 0], 1.0, dlogprobs_M)

    def of(self, logprobs_CV: Tensor, rows: slice, entries: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(matrix [C, V], factors [C, 1]) of a chunk. Overwrites the logprobs."""
        targets, factors_C1 = self._targets, self._factors_T1[rows]
        if targets.single:
            return _less_one(logprobs_CV, targets.tokens_M[rows, None], dtype), factors_C1
        weighted_CV = logprobs_CV.exp_().mul_(self._weights_T1[rows])
        cells = targets.cells(rows, entries)
        return weighted_CV.index_put_(cells, self._less_M[entries], accumulate=True).to(dtype), factors_C1


def target_logprobs(
    model: HasHead,
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
    head = _head(model, segments, module)
    all_rows_T = torch.arange(len(hidden_TD), device=hidden_TD.device) if rows_M is None else rows_M
    targets = _Targets(all_rows_T, targets_M, single=rows_M is None)
    if head.is_frozen and hidden_TD.requires_grad and torch.is_grad_enabled():
        return _EarlyGradient.apply(hidden_TD, head, targets)
    return _LateGradient.apply(hidden_TD, head.weight, head, targets)


class _Picked(torch.autograd.Function):
    """Rows of hidden states, some of them several times, whose gradients are then added up in fp32."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, rows_U: Tensor) -> Tensor:
        ctx.rows_U, ctx.rows = rows_U, len(hidden_TD)
        return hidden_TD.index_select(0, rows_U)

    @staticmethod
    def backward(ctx: Any, dpicked_UD: Tensor) -> tuple[Tensor | None, ...]:
        sums_TD = dpicked_UD.new_zeros(ctx.rows, dpicked_UD.shape[1], dtype=torch.float32)
        return sums_TD.index_add_(0, ctx.rows_U, dpicked_UD.float()).to(dpicked_UD.dtype), None


def pick_rows(hidden_TD: Tensor, segments: Sequence[Segment], rows_U: Tensor) -> tuple[Tensor, list[Segment]]:
    """The hidden states of some rows [U, D], differentiable, and the segments as they lie in them.

    `rows_U` (int64, ascending) may name a row several times or not at all.
    """
    ends = torch.tensor([segment.end for segment in segments], device=rows_U.device)
    bounds = [0, *torch.searchsorted(rows_U, ends).tolist()]
    parts = [SegmentPart(whole, *part) for whole, part in zip(segments, itertools.pairwise(bounds), strict=True)]
    return _Picked.apply(hidden_TD, rows_U), list(parts)


def logits(model: HasHead, hidden_RD: Tensor, segments: Sequence[Segment], module: nn.Module | None = None) -> Tensor:
    """fp32 [R, V]: all logits of a few rows; not differentiable."""
    with torch.no_grad():
        return _head(model, segments, module).logits(hidden_RD, 0, len(hidden_RD))


def _head(model: HasHead, segments: Sequence[Segment], module: nn.Module | None) -> _Head:
    owner: Any = module if module is not None else model.module
    spare, exact = (model.spare_columns, model.exact) if module is None else (None, None)
    return _Head(owner.get_output_embeddings().weight, model.head_linear, segments, spare, exact)
