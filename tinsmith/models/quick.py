"""The decoder layers of the plainest families in fewer operations, for passes without gradients on a CPU.

There a small model's step is hundreds of short operations and the calls between them. Queries and keys are normalised
and rotated together here, and what is freshly computed is overwritten. Every number is rounded where the original
rounds it. Knows no requests; which families it may stand in for is a list, and checked by comparing results.

The weights are kept once more, in the library's own order: products are faster, and a row has the same bits beside any
number of others. Where the processor has no instructions for bfloat16, that copy is in fp32, which is faster there.

Shapes: `T` rows of a packed batch, `D` hidden size, `O` outputs of a group of linear layers, `H` query heads, `G`
key/value heads, `d` head dimension.
"""

from collections.abc import Sequence
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.models.attention import Attention, Heads
from tinsmith.models.lora import AppliedAdapters, CurrentPass, LinearGroup, Segment
from tinsmith.models.plain_layers import FAMILIES, LayerParts, Probe, parts_of, weight_of

PACKED_SHARE = 1 / 8
"""Of the machine's memory, at most: larger models do without the second copy."""

_PACKED_FOR_ROWS = 64
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # of the final hidden states, as a share of their norm


class QuickLayers:
    """Stands in for a whole base model between its embedding and its head."""

    def __init__(self, module: Any, current: CurrentPass, calls: dict[int, tuple[float, int | None]]) -> None:
        """`calls` has, by layer, the scaling and the window that its attention asks for."""
        self._model = module.model
        self._current = current
        dtype = _product_dtype(module.dtype)
        weights = sum(parameter.numel() for parameter in module.model.layers.parameters())
        self.is_packed = weights * dtype.itemsize <= PACKED_SHARE * psutil.virtual_memory().total
        """Whether a row has the same bits beside any number of others."""
        packed = dtype if self.is_packed else None
        parts = [parts_of(layer, *calls[index]) for index, layer in enumerate(module.model.layers)]
        self._layers = [_Layer(index, part, packed) for index, part in enumerate(parts)]
        norm = module.model.norm
        self._norm = _Norm(weight_of(norm), norm.eps)

    def hidden(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        segments: Sequence[Segment],
        attention: Attention,
        adapters: AppliedAdapters | None = None,
    ) -> Tensor:
        """[T, D] after the final norm, as `BaseModel.hidden`; `adapters` applies those of the segments."""
        self._current.segments = segments
        applied = self._current.adapters() if adapters is None else adapters
        hidden_TD = self._model.embed_tokens(tokens_T)
        rotation = _Rotation(*self._model.rotary_emb(hidden_TD[None], positions_T[None]))
        for layer in self._layers:
            hidden_TD = layer(hidden_TD, rotation, attention, applied)
        return self._norm(hidden_TD)


@torch.no_grad()
def quick_layers(model: Any, current: CurrentPass) -> QuickLayers | None:
    """The quick layers of a loaded base model; None where they would not compute the same."""
    if model.architecture not in FAMILIES or model.device.type != "cpu" or model.dtype not in _TOLERANCES:
        return None
    probe = Probe(model)
    quick = QuickLayers(model.module, current, probe.calls)
    hidden_TD = quick.hidden(probe.tokens_T, probe.positions_T, probe.segments, probe.attention)
    return quick if probe.difference(hidden_TD) <= _TOLERANCES[model.dtype] else None


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """That in which a CPU multiplies matrices of this dtype best."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype if native else torch.float32


class _Layer:
    """One decoder layer: attention and a gated feed-forward network, each behind a norm and added to what came in."""

    def __init__(self, index: int, parts: LayerParts, packed: torch.dtype | None) -> None:
        self._index, self._scaling, self._window = index, parts.scaling, parts.window
        self._attention_norm = _Norm(weight_of(parts.before), parts.before.eps)
        self._mlp_norm = _Norm(weight_of(parts.between), parts.between.eps)
        self._heads, self._out, self._gate_up, self._down = (_Product(group, packed) for group in parts.groups)
        self._activation = parts.activation
        self._width, self._counts = parts.width, parts.counts
        self._head_norm = _head_norm(parts)

    def __call__(
        self, hidden_TD: Tensor, rotation: "_Rotation", attention: Attention, adapters: AppliedAdapters
    ) -> Tensor:
        """Overwrites `hidden_TD`."""
        heads_TO = self._heads(self._attention_norm(hidden_TD), adapters)
        query, key, value = self._counts
        turned, value_TGd = heads_TO.unflatten(1, (-1, self._width)).split([query + key, value], 1)
        turned = rotation.turn(turned if self._head_norm is None else self._head_norm(turned))
        query_HTd, key_GTd = turned.transpose(0, 1).split([query, key])
        heads = Heads(query_HTd, key_GTd, value_TGd.transpose(0, 1), self._scaling, self._window)
        attended_THd = attention(self._index, heads)
        hidden_TD.add_(self._out(attended_THd.flatten(1), adapters))
        gate_TP, up_TP = self._gate_up(self._mlp_norm(hidden_TD), adapters).chunk(2, 1)
        return hidden_TD.add_(self._down(self._activation(gate_TP).mul_(up_TP), adapters))


class _Product:
    """The outputs of a group of linear layers side by side, with their adapters."""

    def __init__(self, group: LinearGroup, packed: torch.dtype | None) -> None:
        """With a copy of the weights of dtype `packed`, or with the group's own."""
        self._group = group
        self._dtype = packed
        if packed is not None:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(group.weight_OI.to(packed), _PACKED_FOR_ROWS)
            self._bias_O = None if group.bias_O is None else group.bias_O.to(packed)

    def __call__(self, x_TI: Tensor, adapters: AppliedAdapters) -> Tensor:
        if self._dtype is None:
            y_TO = F.linear(x_TI, self._group.weight_OI, self._group.bias_O)
        else:
            x = x_TI.to(self._dtype)
            nothing_fused: Any = ("none", [], "")
            y = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias_O, *nothing_fused)
            y_TO = y.to(x_TI.dtype)
        adapters.add(self._group, x_TI, y_TO)
        return y_TO


class _Norm:
    """`FrozenRMSNorm` over the last dimension, where nothing is kept for backward."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._weight = weight
        self._eps = torch.tensor([eps])

    def __call__(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self._eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()
        return (x * scale).to(x.dtype).mul_(self._weight)


def _head_norm(parts: LayerParts) -> _Norm | None:
    """The norms of queries and keys as one, over [T, H + G, d]."""
    if parts.head_norms is None:
        return None
    counted = zip(parts.head_norms, parts.counts, strict=False)
    weights = [weight_of(norm).expand(count, -1) for norm, count in counted]
    return _Norm(torch.cat(weights), parts.head_norms[0].eps)


class _Rotation:
    """Rotary position embedding of one pass, the two halves of a head belonging together."""

    def __init__(self, cos_1Td: Tensor, sin_1Td: Tensor) -> None:
        half = cos_1Td.shape[-1] // 2
        self._half = half
        self._cos_T1d = cos_1Td[0, :, None]
        self._sin_T1d = torch.cat([-sin_1Td[..., :half], sin_1Td[..., half:]], -1)[0, :, None]

    def turn(self, heads: Tensor) -> Tensor:
        """[T, H + G, d], in place."""
        other = heads.roll(self._half, -1).mul_(self._sin_T1d)
        return heads.mul_(self._cos_T1d).add_(other)
