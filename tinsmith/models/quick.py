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

from tinsmith.models.attention import Attention, Heads, PackedAttention
from tinsmith.models.lora import AppliedAdapters, CurrentPass, LinearGroup, Segment
from tinsmith.models.norms import FrozenRMSNorm

FAMILIES = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
"""Architectures whose layers are known to be no more than what is computed here, at any length."""

PACKED_SHARE = 1 / 8
"""Of the machine's memory, at most: larger models do without the second copy."""

_PACKED_FOR_ROWS = 64
_PROBE_LENGTHS = (7, 4)
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # of the final hidden states, which are normalised


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
        self._layers = [_Layer(index, layer, *calls[index], packed) for index, layer in enumerate(module.model.layers)]
        self._norm = _Norm(module.model.norm)

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
    tokens_T = torch.arange(sum(_PROBE_LENGTHS)) % model.vocab_size
    positions_T = torch.cat([torch.arange(length) for length in _PROBE_LENGTHS])
    segments = [Segment(None, 0, len(tokens_T))]
    observer = AttentionObserver([0, _PROBE_LENGTHS[0], len(tokens_T)])
    expected_TD = model.hidden(tokens_T, positions_T, segments, observer)
    quick = QuickLayers(model.module, current, observer.calls)
    hidden_TD = quick.hidden(tokens_T, positions_T, segments, observer)
    tolerance = _TOLERANCES[model.dtype]
    return quick if torch.allclose(hidden_TD, expected_TD, atol=tolerance, rtol=tolerance) else None


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """That in which a CPU multiplies matrices of this dtype best."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype if native else torch.float32


class AttentionObserver(PackedAttention):
    """Attention that notes the scaling and the window of each layer."""

    def __init__(self, cu_seqlens: Sequence[int]) -> None:
        super().__init__(cu_seqlens)
        self.calls: dict[int, tuple[float, int | None]] = {}

    def __call__(self, layer: int, heads: Heads) -> Tensor:
        self.calls[layer] = (heads.scaling, heads.window)
        return super().__call__(layer, heads)


class _Layer:
    """One decoder layer: attention and a gated feed-forward network, each behind a norm and added to what came in."""

    def __init__(self, index: int, layer: Any, scaling: float, window: int | None, packed: torch.dtype | None) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._index, self._scaling, self._window = index, scaling, window
        self._attention_norm, self._mlp_norm = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        self._heads, self._out = _Product(attention.q_proj.group, packed), _Product(attention.o_proj.group, packed)
        self._gate_up, self._down = _Product(mlp.gate_proj.group, packed), _Product(mlp.down_proj.group, packed)
        self._activation = mlp.act_fn
        self._width: int = attention.head_dim
        self._counts = [outputs // self._width for outputs in attention.q_proj.group.outputs]
        self._head_norm = _head_norm(attention, self._counts) if hasattr(attention, "q_norm") else None

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

    def __init__(self, norm: FrozenRMSNorm, weight: Tensor | None = None) -> None:
        original: Any = norm.original
        self._weight: Tensor = original.weight if weight is None else weight
        self._eps = torch.tensor([norm.eps])

    def __call__(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self._eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()
        return (x * scale).to(x.dtype).mul_(self._weight)


def _head_norm(attention: Any, counts: Sequence[int]) -> _Norm:
    """The norms of queries and keys as one, over [T, H + G, d]."""
    norms = (attention.q_norm, attention.k_norm)
    if norms[0].eps != norms[1].eps:
        raise ValueError(f"the norms of queries and keys differ in epsilon: {norms[0].eps}, {norms[1].eps}")
    weights = [norm.original.weight.expand(count, -1) for norm, count in zip(norms, counts, strict=False)]
    return _Norm(norms[0], torch.cat(weights))


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
