"""The decoder layers of the plainest families as few operations, forward and backward, for training on a CUDA device.

A layer is one step of autograd, written by hand: matrix products by the library, everything between them by our own
kernels, all tenants' adapters in the same launches. Backward keeps a layer's input, its projections before the norms
and activations, and attention's output; it computes the rest again. Which families the layers may stand in for is a
list, and checked by comparing results.

Shapes: `T` rows of a packed batch, `D` hidden size, `O` outputs of a group of linear layers, `P` width of the
feed-forward network, `R` ranks of all layers of a group, `H` query heads, `G` key/value heads, `d` head dimension.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.models.adapter_table import MOST_RANKS, AdapterPlaces, AdapterTable, trainable_ranks
from tinsmith.models.attention import PackedAttention
from tinsmith.models.full import FullModel
from tinsmith.models.fused_attention import AttentionChoice, can_attend
from tinsmith.models.fused_full import FullLayers
from tinsmith.models.fused_heads import FusedHeads, Sequences
from tinsmith.models.kernels import add_rms_norm, rms_norm_backward
from tinsmith.models.layer_function import through
from tinsmith.models.lora import Adapter, LinearGroup, Segment
from tinsmith.models.norms import FrozenRMSNorm
from tinsmith.models.plain_layers import FAMILIES, LayerParts, Probe, gates_are_silu, parts_of, weight_of

_TOLERANCE = 0.05  # of the final hidden states, as a share of their norm, in bfloat16
_LEAST_CAPABILITY = (8, 0)  # of the device: what the kernels for attention and bfloat16 need


@dataclass(frozen=True, slots=True)
class Pass:
    """What all layers of one pass share."""

    adapters: AdapterTable
    sequences: Sequences
    recomputes: bool  # whether a layer keeps little more than its input


class FusedLayers:
    """Stands in for a base model between its embedding and its final norm.

    `recomputes` says whether backward computes each layer again, in passes that begin from now on.
    """

    def __init__(self, module: Any, scalings: Sequence[float]) -> None:
        """`scalings` are those of each layer's attention scores."""
        self._embedding = module.get_input_embeddings()
        self._rotary = module.model.rotary_emb
        self._norm = module.model.norm
        parts = [parts_of(layer, scaling) for layer, scaling in zip(module.model.layers, scalings, strict=True)]
        self._parts = parts
        self._layers = [_Layer(part) for part in parts]
        self._places = AdapterPlaces([group.linears for layer in self._layers for group in layer.groups])
        self._attention = AttentionChoice()
        self.most_ranks = trainable_ranks(self._embedding.weight.device)
        """Of an adapter that these layers train."""
        self.recomputes = False

    def fits(self, adapters: Iterable[Adapter | None]) -> bool:
        """Whether the kernels are made for these adapters' ranks, and the device has room for them."""
        return all(adapter is None or adapter.spec.rank <= self.most_ranks for adapter in adapters)

    def of_full(self, model: FullModel) -> FullLayers:
        """The same layers with a full-parameter model's weights, which they train."""
        return FullLayers(model.module, self._parts, model.layout, model.compute)

    @property
    def activation_bytes(self) -> int:
        """Of one token: what backward keeps, and a quarter more for what lies beside it for a while."""
        return sum(layer.kept_bytes for layer in self._layers) * 5 // 4

    def hidden(
        self, tokens_T: Tensor, positions_T: Tensor, segments: Sequence[Segment], attention: PackedAttention
    ) -> Tensor:
        """[T, D] after the final norm, as `BaseModel.hidden`."""
        device = tokens_T.device
        hidden_TD: Tensor = self._embedding(tokens_T)
        cos_1Td, sin_1Td = self._rotary(hidden_TD[None], positions_T[None])
        hidden_TD.requires_grad_(torch.is_grad_enabled())
        table = AdapterTable(segments, self._places, device)
        kernels = self._attention.of(attention, device)
        this = Pass(table, Sequences(kernels, cos_1Td[0], sin_1Td[0]), self.recomputes)
        for layer in self._layers:
            hidden_TD = through(layer, hidden_TD, this)
        normed: Tensor = self._norm(hidden_TD)
        return normed


@torch.no_grad()
def fused_layers(model: Any, on_progress: Callable[[str], None]) -> FusedLayers | None:
    """The fused layers of a loaded base model; None, with the reason told, where they would not compute the same."""
    if model.architecture not in FAMILIES or model.dtype != torch.bfloat16:
        return None
    if torch.cuda.get_device_capability(model.device) < _LEAST_CAPABILITY:
        on_progress("training uses the slower layers: this device is older than they are made for")
        return None
    if not gates_are_silu(model):
        on_progress("training uses the slower layers: the gates of its networks are not SiLU")
        return None
    width = model.module.model.layers[0].self_attn.head_dim
    if not can_attend(width):
        on_progress(f"training uses the slower layers: no kernels for attention take heads {width} wide")
        return None
    probe = Probe(model)
    scalings, windows = zip(*(probe.calls[layer] for layer in range(model.num_layers)), strict=True)
    if any(window is not None and window < model.max_context for window in windows):
        on_progress("training uses the slower layers: attention has a window")
        return None
    fused = FusedLayers(model.module, scalings)
    difference = probe.difference(fused.hidden(probe.tokens_T, probe.positions_T, probe.segments, probe.attention))
    if difference <= _TOLERANCE:
        if fused.most_ranks < MOST_RANKS:
            on_progress(f"adapters of ranks above {fused.most_ranks} train through the slower layers on this device")
        return fused
    on_progress(f"training uses the slower layers: the fused ones differ by {100 * difference:.3g} %")
    return None


class _Layer:
    """One decoder layer: attention and a gated feed-forward network, each behind a norm and added to what came in."""

    few = 4  # the adapters' inner products

    def __init__(self, parts: LayerParts) -> None:
        self.groups = parts.groups
        self._before, self._between = _Norm(parts.before), _Norm(parts.between)
        self._projections, self._out, self._gate_up, self._down = parts.groups
        norms = parts.head_norms
        weights = (weight_of(norms[0]), weight_of(norms[1])) if norms else (None, None)
        self._heads = FusedHeads(parts.counts, parts.width, parts.scaling, weights, norms[0].eps if norms else 0.0)

    @property
    def kept_bytes(self) -> int:
        """Of one token: the layer's input, all products but the last, attention's output and its fp32 logsumexp."""
        products = sum(sum(group.outputs) for group in self.groups)
        inner = sum(len(group.linears) for group in self.groups) * MOST_RANKS
        numbers = products + self._out.weight_OI.shape[1] + inner
        return numbers * self._out.weight_OI.itemsize + 4 * self._heads.counts[0]

    def forward(self, x_TD: Tensor, this: Pass) -> tuple[Tensor, list[Tensor]]:
        """(what comes out [T, D], what `backward` needs beside what came in)."""
        normed_TD = self._before(x_TD)
        heads_z = this.adapters.inner_of_inputs(self._projections, normed_TD)
        heads_TO = adapted_product(self._projections, normed_TD, heads_z, this.adapters)
        attended_TO, kept = self._heads.forward(heads_TO, this.sequences)
        out_z = this.adapters.inner_of_inputs(self._out, attended_TO)
        middle_TD = adapted_product(self._out, attended_TO, out_z, this.adapters, x_TD)
        normed_TD = self._between(middle_TD)
        gate_up_z = this.adapters.inner_of_inputs(self._gate_up, normed_TD)
        gate_up_TO = F.linear(normed_TD, self._gate_up.weight_OI, self._gate_up.bias_O)
        active_TP, down_z = this.adapters.swiglu((self._gate_up, self._down), gate_up_TO, gate_up_z)
        y_TD = adapted_product(self._down, active_TP, down_z, this.adapters, middle_TD)
        inner = [heads_z, out_z, gate_up_z, down_z]
        return y_TD, [*inner, heads_TO, attended_TO, middle_TD, gate_up_TO, *kept]

    def again(self, x_TD: Tensor, few: Sequence[Tensor], this: Pass) -> list[Tensor]:
        """All that `backward` needs, from what came in and the first few of it; what comes out is not computed."""
        heads_z, out_z, *_ = few
        heads_TO = adapted_product(self._projections, self._before(x_TD), heads_z, this.adapters)
        attended_TO, kept = self._heads.forward(heads_TO, this.sequences)
        middle_TD = adapted_product(self._out, attended_TO, out_z, this.adapters, x_TD)
        gate_up_TO = F.linear(self._between(middle_TD), self._gate_up.weight_OI, self._gate_up.bias_O)
        return [*few, heads_TO, attended_TO, middle_TD, gate_up_TO, *kept]

    def backward(self, dy_TD: Tensor, x_TD: Tensor, saved: Sequence[Tensor], this: Pass) -> Tensor:
        """The gradient in what came in; what was saved is overwritten."""
        heads_z, out_z, gate_up_z, down_z, heads_TO, attended_TO, middle_TD, gate_up_TO, *kept = saved
        dmiddle_TD = self._feed_forward_backward(dy_TD, middle_TD, gate_up_TO, (gate_up_z, down_z), this)
        table = this.adapters
        dout_z = table.inner_of_gradient(self._out, dmiddle_TD)
        dattended_TO = _product_backward(self._out, dmiddle_TD, dout_z, table)
        table.add_gradients(self._out, attended_TO, out_z, dmiddle_TD, dout_z)
        dheads_TO = self._heads.backward(dattended_TO, heads_TO, attended_TO, kept, this.sequences)
        del dattended_TO
        dheads_z = table.inner_of_gradient(self._projections, dheads_TO)
        dnormed_TD = _product_backward(self._projections, dheads_TO, dheads_z, table)
        dx_TD, normed_TD = self._before.backward(dnormed_TD, x_TD, dmiddle_TD)
        table.add_gradients(self._projections, normed_TD, heads_z, dheads_TO, dheads_z)
        return dx_TD

    def _feed_forward_backward(
        self, dy_TD: Tensor, middle_TD: Tensor, gate_up_TO: Tensor, inner: tuple[Tensor, Tensor], this: Pass
    ) -> Tensor:
        """The gradient [T, D] in what goes into the feed-forward network's norm, and past it."""
        table, (gate_up_z, down_z) = this.adapters, inner
        ddown_z = table.inner_of_gradient(self._down, dy_TD)
        dactive_TP = dy_TD @ self._down.weight_OI
        groups = (self._gate_up, self._down)
        active_TP, dgate_up_z = table.swiglu_backward(groups, gate_up_TO, gate_up_z, dactive_TP, ddown_z)
        dgate_up_TO = gate_up_TO
        table.add_gradients(self._down, active_TP, down_z, dy_TD, ddown_z)
        del active_TP, dactive_TP
        dnormed_TD = _product_backward(self._gate_up, dgate_up_TO, dgate_up_z, table)
        dmiddle_TD, normed_TD = self._between.backward(dnormed_TD, middle_TD, dy_TD)
        table.add_gradients(self._gate_up, normed_TD, gate_up_z, dgate_up_TO, dgate_up_z)
        return dmiddle_TD


class _Norm:
    """A frozen RMS norm."""

    def __init__(self, norm: FrozenRMSNorm) -> None:
        self._weight_D = weight_of(norm)
        self._eps = norm.eps

    def __call__(self, x_TD: Tensor) -> Tensor:
        return add_rms_norm(x_TD, None, self._weight_D, self._eps)[0]

    def backward(self, dy_TD: Tensor, x_TD: Tensor, residual_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(the gradient in x, plus the residual's; the normalised x once more)."""
        return rms_norm_backward(dy_TD, x_TD, self._weight_D, self._eps, residual_TD)


def adapted_product(
    group: LinearGroup, x_TI: Tensor, z_TR: Tensor, adapters: AdapterTable, residual_TO: Tensor | None = None
) -> Tensor:
    """x Wᵀ + b + z Bᵀ + the residual [T, O], for z [T, R] of `AdapterTable.inner_of_inputs`.

    The adapters come first: the library's product adds to what is there, which costs less than adding to its result.
    """
    base_TO = residual_TO
    if group.bias_O is not None:
        base_TO = group.bias_O.expand(x_TI.shape[0], -1) if residual_TO is None else residual_TO + group.bias_O
    return adapters.outputs(group, z_TR, base_TO).addmm_(x_TI, group.weight_OI.t())


def _product_backward(group: LinearGroup, dy_TO: Tensor, dz_TR: Tensor, adapters: AdapterTable) -> Tensor:
    """The gradient [T, I] in what went in."""
    return adapters.gradient_of_inputs(group, dz_TR).addmm_(dy_TO, group.weight_OI)
