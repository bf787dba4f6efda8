"""The decoder layers of the plainest families, of a full-parameter model that trains on a CUDA device.

As `fused.py`, but here the weights themselves are trained, and nobody shares them: their gradients are products that
add to the model's flat fp32 gradient, past autograd. The module's parameters are the same numbers, so whoever runs the
module gets the same results.

Shapes: `T` rows of a packed batch, `D` hidden size, `I` inputs and `O` outputs of a product, `P` width of the
feed-forward network.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.models.attention import PackedAttention
from tinsmith.models.flat import Layout
from tinsmith.models.full_head import add_in_full, trained_logprobs
from tinsmith.models.full_kernels import swiglu_backward, trained_norm_backward
from tinsmith.models.fused_attention import AttentionChoice
from tinsmith.models.fused_heads import FusedHeads, Sequences
from tinsmith.models.kernels import add_rms_norm, swiglu
from tinsmith.models.layer_function import through
from tinsmith.models.plain_layers import LayerParts


class Weight:
    """Neighbours in a flat buffer as one tensor, and the place of their gradient once there is a buffer for it."""

    def __init__(self, layout: Layout, flat: Tensor, names: Sequence[str]) -> None:
        self._layout, self._names = layout, names
        self.values = layout.stack(flat, names)
        self.gradient = self.values.new_empty(0)

    def add_gradients_to(self, flat: Tensor) -> None:
        self.gradient = self._layout.stack(flat, self._names)


@dataclass(frozen=True, slots=True)
class _Source:
    """Where weights are found."""

    layout: Layout
    flat: Tensor

    def weight(self, *names: str) -> Weight:
        return Weight(self.layout, self.flat, names)

    def linear(self, prefix: str, *layers: str) -> "_Linear":
        biases = [f"{prefix}.{layer}.bias" for layer in layers]
        has_biases = biases[0] in self.layout.names
        weights = self.weight(*(f"{prefix}.{layer}.weight" for layer in layers))
        return _Linear(weights, self.weight(*biases) if has_biases else None)


@dataclass(frozen=True, slots=True)
class _Pass:
    """What all layers of one pass share."""

    sequences: Sequences
    recomputes: bool  # whether a layer keeps its input only


class FullLayers:
    """Stands in for a full-parameter model's module, from tokens to logprobs.

    `recomputes` says whether backward computes each layer and the logits again, in passes that begin from now on.
    """

    def __init__(self, module: Any, parts: Sequence[LayerParts], layout: Layout, flat: Tensor) -> None:
        """`flat` holds the module's parameters by this layout; `parts` are its layers', of the base model."""
        source = _Source(layout, flat)
        self._rotary = module.model.rotary_emb
        self._embedding = source.weight("model.embed_tokens.weight")
        self._layers = [_Layer(source, number, part) for number, part in enumerate(parts)]
        self._norm = _Norm(source.weight("model.norm.weight"), module.model.norm.variance_epsilon)
        head = "lm_head.weight"
        self._head = source.weight(head) if head in layout.names else self._embedding
        self._attention = AttentionChoice()
        self.recomputes = False

    def add_gradients_to(self, flat: Tensor) -> None:
        """Where backward passes add their gradients, by the same layout."""
        for weight in (self._embedding, self._norm.weight, self._head, *_weights(self._layers)):
            weight.add_gradients_to(flat)

    def hidden(self, tokens_T: Tensor, positions_T: Tensor, attention: PackedAttention) -> Tensor:
        """[T, D] after the final norm; with gradients if autograd is on."""
        hidden_TD = F.embedding(tokens_T, self._embedding.values)
        cos_1Td, sin_1Td = self._rotary(hidden_TD[None], positions_T[None])
        sequences = Sequences(self._attention.of(attention, tokens_T.device), cos_1Td[0], sin_1Td[0])
        this = _Pass(sequences, self.recomputes)
        if torch.is_grad_enabled():
            hidden_TD.requires_grad_(True)
            embedded = self._embedding.gradient
            hidden_TD.register_hook(lambda dhidden_TD: _add_rows(embedded, tokens_T, dhidden_TD))
        for layer in self._layers:
            hidden_TD = through(layer, hidden_TD, this)
        normed_TD: Tensor = _NormFunction.apply(hidden_TD, self._norm)
        return normed_TD

    def logprobs(self, hidden_TD: Tensor, targets_T: Tensor) -> Tensor:
        """fp32 [T] of each row's target."""
        head = self._head
        return trained_logprobs(hidden_TD, head.values, head.gradient, targets_T, recomputes=self.recomputes)


def _weights(layers: Sequence["_Layer"]) -> Iterator[Weight]:
    for layer in layers:
        yield from layer.weights


def _add_rows(total_VD: Tensor, tokens_T: Tensor, rows_TD: Tensor) -> None:
    total_VD.index_add_(0, tokens_T, rows_TD.to(total_VD.dtype))


class _NormFunction(torch.autograd.Function):
    """The norm behind all layers."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, norm: "_Norm") -> Tensor:
        ctx.save_for_backward(x_TD)
        ctx.norm = norm
        return norm(x_TD)

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        (x_TD,) = ctx.saved_tensors
        return ctx.norm.backward(dy_TD.contiguous(), x_TD, None)[0], None


class _Layer:
    """One decoder layer: attention and a gated feed-forward network, each behind a norm and added to what came in."""

    few = 0

    def __init__(self, source: _Source, number: int, parts: LayerParts) -> None:
        prefix = f"model.layers.{number}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        self._before = _Norm(source.weight(f"{prefix}.input_layernorm.weight"), parts.before.eps)
        self._between = _Norm(source.weight(f"{prefix}.post_attention_layernorm.weight"), parts.between.eps)
        self._projections = source.linear(attention, "q_proj", "k_proj", "v_proj")
        self._out = source.linear(attention, "o_proj")
        self._gate_up = source.linear(mlp, "gate_proj", "up_proj")
        self._down = source.linear(mlp, "down_proj")
        norms = parts.head_norms
        self._head_norms = [source.weight(f"{attention}.{name}.weight") for name in ("q_norm", "k_norm") if norms]
        query, key = (norm.values for norm in self._head_norms) if norms else (None, None)
        self._heads = FusedHeads(parts.counts, parts.width, parts.scaling, (query, key), norms[0].eps if norms else 0.0)

    @property
    def weights(self) -> list[Weight]:
        linears = (self._projections, self._out, self._gate_up, self._down)
        inner = [weight for linear in linears for weight in (linear.weight, linear.bias) if weight is not None]
        return [self._before.weight, self._between.weight, *self._head_norms, *inner]

    def forward(self, x_TD: Tensor, this: _Pass) -> tuple[Tensor, list[Tensor]]:
        """(what comes out [T, D], what `backward` needs beside what came in)."""
        saved = self.again(x_TD, (), this)
        _, _, middle_TD, gate_up_TO, *_ = saved
        return self._down(swiglu(gate_up_TO), middle_TD), saved

    def again(self, x_TD: Tensor, few: Sequence[Tensor], this: _Pass) -> list[Tensor]:
        """All that `backward` needs, from what came in; nothing else is kept."""
        heads_TO = self._projections(self._before(x_TD))
        attended_TO, kept = self._heads.forward(heads_TO, this.sequences)
        middle_TD = self._out(attended_TO, x_TD)
        return [heads_TO, attended_TO, middle_TD, self._gate_up(self._between(middle_TD)), *kept]

    def backward(self, dy_TD: Tensor, x_TD: Tensor, saved: Sequence[Tensor], this: _Pass) -> Tensor:
        """The gradient in what came in; what was saved is overwritten."""
        heads_TO, attended_TO, middle_TD, gate_up_TO, *kept = saved
        dmiddle_TD = self._feed_forward_backward(dy_TD, middle_TD, gate_up_TO)
        dattended_TO = self._out.backward(dmiddle_TD)
        self._out.add_gradients(dmiddle_TD, attended_TO)
        gradients = (self._head_norms[0].gradient, self._head_norms[1].gradient) if self._head_norms else None
        dheads_TO = self._heads.backward(dattended_TO, heads_TO, attended_TO, kept, this.sequences, gradients)
        dx_TD, normed_TD = self._before.backward(self._projections.backward(dheads_TO), x_TD, dmiddle_TD)
        self._projections.add_gradients(dheads_TO, normed_TD)
        return dx_TD

    def _feed_forward_backward(self, dy_TD: Tensor, middle_TD: Tensor, gate_up_TO: Tensor) -> Tensor:
        """The gradient [T, D] in what goes into the feed-forward network's norm, and past it."""
        dactive_TP = self._down.backward(dy_TD)
        active_TP = swiglu_backward(gate_up_TO, dactive_TP)
        dgate_up_TO = gate_up_TO
        del dactive_TP
        self._down.add_gradients(dy_TD, active_TP)
        del active_TP
        dnormed_TD = self._gate_up.backward(dgate_up_TO)
        dmiddle_TD, normed_TD = self._between.backward(dnormed_TD, middle_TD, dy_TD)
        self._gate_up.add_gradients(dgate_up_TO, normed_TD)
        return dmiddle_TD


class _Norm:
    """An RMS norm whose weight is trained."""

    def __init__(self, weight: Weight, eps: float) -> None:
        self.weight = weight
        self._eps = eps

    def __call__(self, x_TD: Tensor) -> Tensor:
        return add_rms_norm(x_TD, None, self.weight.values, self._eps)[0]

    def backward(self, dy_TD: Tensor, x_TD: Tensor, residual_TD: Tensor | None) -> tuple[Tensor, Tensor]:
        """(the gradient in x, plus the residual's; the normalised x once more)."""
        weight = self.weight
        return trained_norm_backward(dy_TD, x_TD, weight.values, self._eps, residual_TD, weight.gradient)


class _Linear:
    """One product: the weights [O, I] of linear layers that read the same input, and their biases, if they have any."""

    def __init__(self, weight: Weight, bias: Weight | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x_TI: Tensor, residual_TO: Tensor | None = None) -> Tensor:
        """x Wᵀ + b + the residual [T, O]."""
        bias_O = None if self.bias is None else self.bias.values
        if residual_TO is None:
            return F.linear(x_TI, self.weight.values, bias_O)
        base_TO = residual_TO if bias_O is None else residual_TO + bias_O
        return torch.addmm(base_TO, x_TI, self.weight.values.t())

    def backward(self, dy_TO: Tensor) -> Tensor:
        """The gradient [T, I] in what went in."""
        return dy_TO @ self.weight.values

    def add_gradients(self, dy_TO: Tensor, x_TI: Tensor) -> None:
        add_in_full(self.weight.gradient, dy_TO.t(), x_TI)
        if self.bias is not None:
            self.bias.gradient.add_(dy_TO.sum(0, dtype=self.bias.gradient.dtype))
