"""Mixtures of experts: fused expert tensors with a LoRA pair for every expert, a different adapter in every segment.

Rows are sorted by expert for the base weights, which all segments share, and by segment and expert for the adapters.
On a CPU an expert's rows are padded to a number from which on a row's product has the same bits in any company. The
router is not adapted; its weights pass gradients on. Knows nothing of requests, losses or optimizers.

Shapes: `T` rows of the batch, `K` experts of each, S = T · K entries, `P` entries sorted by expert and padded, `N`
entries of one segment, `E` experts, `I` inputs, `O` outputs, `R` rank, `D` hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinsmith.models.invariant import LEAST_ROWS
from tinsmith.models.lora import CurrentPass, Segment


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """Which padded rows belong to a segment's entries, sorted by expert, and where each expert's entries end."""

    segment: Segment
    places_N: Tensor
    ends_E: Tensor


class Dispatch:
    """How one layer's entries are sorted: by expert for everyone, and by expert within every adapter's segment."""

    def __init__(self, experts_TK: Tensor, num_experts: int, segments: Sequence[Segment]) -> None:
        self.shape = experts_TK.shape
        width = self.shape[1]
        experts_S = experts_TK.reshape(-1)
        order_S = experts_S.argsort(stable=True)
        counts_E = _counts(experts_S, num_experts)
        padded_E = counts_E.clamp(min=LEAST_ROWS).where(counts_E > 0, 0) if experts_S.device.type == "cpu" else counts_E
        ends_E = padded_E.cumsum(0)
        self.ends_E = ends_E.to(torch.int32)
        self.rows = int(ends_E[-1]) if experts_S.device.type == "cpu" else len(experts_S)
        shift_E = (ends_E - padded_E) - (counts_E.cumsum(0) - counts_E)
        ranks_S = torch.arange(len(experts_S), device=experts_S.device)
        self.places_S = torch.empty_like(ranks_S)
        self.places_S[order_S] = ranks_S + shift_E[experts_S[order_S]]
        self.sources_P = ranks_S.new_zeros(self.rows).index_copy_(0, self.places_S, ranks_S // width)
        self.experts_P = experts_S.new_zeros(self.rows).index_copy_(0, self.places_S, experts_S)
        self.adapted: list[ExpertRows] = []
        for segment in segments:
            if segment.adapter is not None:
                entries = slice(segment.start * width, segment.end * width)
                own_N = experts_S[entries]
                places_N = self.places_S[entries][own_N.argsort(stable=True)]
                own_ends_E = _counts(own_N, num_experts).cumsum(0).to(torch.int32)
                self.adapted.append(ExpertRows(segment, places_N, own_ends_E))

    def spread(self, x_TD: Tensor) -> Tensor:
        """[P, D]: every row of `x_TD` to its experts. What pads them repeats some row."""
        return _Spread.apply(x_TD, self)

    def gather(self, y_PD: Tensor, weights_TK: Tensor) -> Tensor:
        """[T, D]: the experts' outputs of every row, weighted and summed."""
        y_TKD = y_PD.index_select(0, self.places_S).unflatten(0, self.shape)
        return (y_TKD * weights_TK[..., None]).sum(1).to(y_PD.dtype)


def _counts(experts_S: Tensor, num_experts: int) -> Tensor:
    return experts_S.new_zeros(num_experts).scatter_add_(0, experts_S, torch.ones_like(experts_S))


class _Spread(torch.autograd.Function):
    """Copies rows to their experts; the copies' gradients are summed in the order of each row's own experts."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch
        return x_TD.index_select(0, dispatch.sources_P)

    @staticmethod
    def backward(ctx: Any, dx_PD: Tensor) -> tuple[Tensor, None]:
        dispatch: Dispatch = ctx.dispatch
        return dx_PD.index_select(0, dispatch.places_S).unflatten(0, dispatch.shape).sum(1), None


class ExpertPair(NamedTuple):
    """A [E, I, R] and B [E, R, O] of all experts, or the places of their gradients."""

    a_EIR: Tensor
    b_ERO: Tensor


def expert_pair(pair: tuple[Tensor, Tensor] | None, num_experts: int) -> ExpertPair | None:
    """Views into a pair as it is saved: A [E · R, I], expert by expert, and B [O, R · E], rank by rank."""
    if pair is None:
        return None
    a_EIR = pair[0].unflatten(0, (num_experts, -1)).transpose(1, 2)
    return ExpertPair(a_EIR, pair[1].t().unflatten(0, (-1, num_experts)).transpose(0, 1))


def _aligned(matrices: Tensor) -> Tensor:
    """On a GPU `grouped_mm` wants addresses in multiples of 16 bytes; other layers' odd sizes may lie before."""
    return matrices if matrices.data_ptr() % 16 == 0 else matrices.clone()


class ExpertLinear:
    """One fused linear layer of all experts: base weight [E, I, O] (and bias [E, O]) frozen, adapters by segment."""

    def __init__(self, weight_EIO: Tensor, bias_EO: Tensor | None, index: int) -> None:
        self.weight_EIO = weight_EIO
        self.bias_EO = bias_EO
        self.index = index

    def pair(self, segment: Segment) -> ExpertPair | None:
        """The segment's matrices here, where `grouped_mm` can read them."""
        pair = expert_pair(segment.adapter.pair(self.index), len(self.weight_EIO)) if segment.adapter else None
        return pair and ExpertPair(_aligned(pair.a_EIR), _aligned(pair.b_ERO))

    def forward(self, x_PI: Tensor, dispatch: Dispatch) -> tuple[Tensor, list[Tensor]]:
        """[P, O], and x A ([N, R]) of every segment with an adapter here."""
        y_PO = F.grouped_mm(x_PI, self.weight_EIO, offs=dispatch.ends_E)
        if self.bias_EO is not None:
            y_PO.add_(self.bias_EO.index_select(0, dispatch.experts_P))
        inner = []
        for rows in dispatch.adapted:
            pair = self.pair(rows.segment)
            if pair is not None:
                z_NR = F.grouped_mm(x_PI.index_select(0, rows.places_N), pair.a_EIR, offs=rows.ends_E)
                delta_NO = F.grouped_mm(z_NR, pair.b_ERO, offs=rows.ends_E)
                y_PO.index_add_(0, rows.places_N, delta_NO, alpha=rows.segment.adapter.scale)  # type: ignore[union-attr]
                inner.append(z_NR)
        return y_PO, inner

    def backward(self, x_PI: Tensor, dy_PO: Tensor, dispatch: Dispatch, inner: Sequence[Tensor]) -> Tensor:
        """The input's gradient; the adapters' are added to theirs. `inner` is what `forward` returned."""
        dx_PI = F.grouped_mm(dy_PO, self.weight_EIO.transpose(1, 2), offs=dispatch.ends_E)
        remaining = iter(inner)
        for rows in dispatch.adapted:
            pair = self.pair(rows.segment)
            if pair is not None:
                self._rows_backward(rows, pair, x_PI, dy_PO, dx_PI, next(remaining))
        return dx_PI

    def _rows_backward(
        self, rows: ExpertRows, pair: ExpertPair, x_PI: Tensor, dy_PO: Tensor, dx_PI: Tensor, z_NR: Tensor
    ) -> None:
        adapter: Any = rows.segment.adapter
        dy_NO = dy_PO.index_select(0, rows.places_N)
        dz_NR = F.grouped_mm(dy_NO, pair.b_ERO.transpose(1, 2), offs=rows.ends_E)
        dx_NI = F.grouped_mm(dz_NR, pair.a_EIR.transpose(1, 2), offs=rows.ends_E)
        dx_PI.index_add_(0, rows.places_N, dx_NI, alpha=adapter.scale)
        if rows.segment.trains:
            x_NI = x_PI.index_select(0, rows.places_N)
            grad: Any = expert_pair(adapter.grad_pair(self.index), len(self.weight_EIO))
            grad.a_EIR.add_(F.grouped_mm(x_NI.t(), dz_NR, offs=rows.ends_E), alpha=adapter.scale)
            grad.b_ERO.add_(F.grouped_mm(z_NR.t(), dy_NO, offs=rows.ends_E), alpha=adapter.scale)


class _ExpertProduct(torch.autograd.Function):
    """y = x W + b + LoRA, by expert; dA and dB go to the adapters' gradients, dx to autograd."""

    @staticmethod
    def forward(ctx: Any, x_PI: Tensor, linear: ExpertLinear, dispatch: Dispatch) -> Tensor:
        y_PO, inner = linear.forward(x_PI, dispatch)
        ctx.save_for_backward(x_PI, *inner)
        ctx.linear, ctx.dispatch = linear, dispatch
        return y_PO

    @staticmethod
    def backward(ctx: Any, dy_PO: Tensor) -> tuple[Tensor, None, None]:
        x_PI, *inner = ctx.saved_tensors
        return ctx.linear.backward(x_PI, dy_PO.contiguous(), ctx.dispatch, inner), None, None


class MultiAdapterExperts(nn.Module):
    """Takes the place of a Hugging Face module of fused experts, whose frozen parameters and gate `original` keeps."""

    def __init__(self, original: Any, indices: tuple[int, ...], current: CurrentPass) -> None:
        """`indices` are those of gate_up_proj and down_proj among the adaptable layers."""
        super().__init__()
        self.original = original
        self.indices = indices
        self.current = current

    def forward(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Rows, the experts of each, and the weights of these → [T, D]."""
        experts: Any = self.original
        dispatch = Dispatch(experts_TK, experts.num_experts, self.current.segments)
        gate_up_PO = _ExpertProduct.apply(dispatch.spread(x_TD), self._linear("gate_up_proj", 0), dispatch)
        down_PD = _ExpertProduct.apply(experts._apply_gate(gate_up_PO), self._linear("down_proj", 1), dispatch)
        return dispatch.gather(down_PD, weights_TK)

    def _linear(self, name: str, part: int) -> ExpertLinear:
        experts: Any = self.original
        weight = getattr(experts, name)
        weight_EIO = weight if experts.is_transposed else weight.transpose(1, 2)
        bias_EO = getattr(experts, f"{name}_bias") if experts.has_bias else None
        return ExpertLinear(weight_EIO, bias_EO, self.indices[part])
