"""The decoder layers of the plainest families in fewer operations, for passes without gradients on a CPU.

There a small model's step is hundreds of short operations and the calls between them. Queries and keys are normalised
and rotated together here, and what is freshly computed is overwritten. Knows no requests; which families it may stand
in for is a list, and checked by comparing results.

The weights are kept once more, packed (`models.packed`). Where the processor has no instructions for bfloat16, what a
model in bfloat16 passes from operation to operation is in fp32, which is faster there; only what is cached and what
comes out in the end is rounded.

Shapes: `T` rows of a packed batch, `D` hidden size, `O` outputs of a group of linear layers, `H` query heads, `G`
key/value heads, `d` head dimension.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.models.attention import Attention, Heads
from tinsmith.models.lora import AppliedAdapters, CurrentPass, LinearGroup, Segment
from tinsmith.models.packed import Product, best_dtype, packed_itemsize, packed_product
from tinsmith.models.plain_layers import FAMILIES, LayerParts, Probe, parts_of, weight_of
from tinsmith.sizing import total_host_memory

PACKED_SHARE = 1 / 8
"""Of the memory of the machine or container, at most: larger models do without the second copy."""

_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # of the final hidden states, as a share of their norm
_FEWEST_POSITIONS = 256  # in a table
_VARYING_ROTATIONS = frozenset({"dynamic", "longrope"})  # which depend on a sequence's length


class QuickLayers:
    """Stands in for a whole base model: between its embedding and its head, and for the logits of sampled rows."""

    def __init__(self, model: Any, current: CurrentPass, calls: dict[int, tuple[float, int | None]]) -> None:
        """`calls` has, by layer, the scaling and the window that its attention asks for."""
        self._model, self._current = model.module.model, current
        head = model.module.get_output_embeddings()
        parts = [parts_of(layer, *calls[index]) for index, layer in enumerate(self._model.layers)]
        weights = sum(group.weight_OI.numel() for part in parts for group in part.groups) + head.weight.numel()
        dtype = best_dtype(model.dtype)
        packed_bytes = weights * packed_itemsize(model.dtype, dtype)
        self.is_packed = packed_bytes <= PACKED_SHARE * total_host_memory()
        """Whether a row has the same bits beside any number of others."""
        self.packed_bytes = packed_bytes if self.is_packed else 0
        """That the second copy takes."""
        self._rounded: torch.dtype = model.dtype
        self._dtype: torch.dtype = dtype if self.is_packed else model.dtype
        pack = _Product.packed if self.is_packed else _Product.plain
        self._layers = [_Layer(index, part, pack, self._dtype) for index, part in enumerate(parts)]
        self._norm = _Norm(weight_of(self._model.norm), self._model.norm.eps, self._dtype)
        self._rotations = _Rotations(self._model.rotary_emb, self._dtype)
        group = LinearGroup([head], [model.head_linear], current)
        self._head = _Product.packed(group, torch.float32) if self.is_packed else None

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
        hidden_TD = F.embedding(tokens_T, self._model.embed_tokens.weight).to(self._dtype)
        rotation = self._rotations.of(positions_T)
        for layer in self._layers:
            hidden_TD = layer(hidden_TD, rotation, attention, applied)
        return self._norm(hidden_TD).to(self._rounded)

    def logits(self, hidden_RD: Tensor, adapters: AppliedAdapters) -> Tensor | None:
        """fp32 [R, V] of hidden states as they come out of `hidden`; None if the weights are not packed."""
        return None if self._head is None else self._head(hidden_RD.float(), adapters)


@torch.no_grad()
def quick_layers(model: Any, current: CurrentPass) -> QuickLayers | None:
    """The quick layers of a loaded base model; None where they would not compute the same."""
    if model.architecture not in FAMILIES or model.device.type != "cpu" or model.dtype not in _TOLERANCES:
        return None
    probe = Probe(model)
    quick = QuickLayers(model, current, probe.calls)
    hidden_TD = quick.hidden(probe.tokens_T, probe.positions_T, probe.segments, probe.attention)
    return quick if probe.difference(hidden_TD) <= _TOLERANCES[model.dtype] else None


class _Layer:
    """One decoder layer: attention and a gated feed-forward network, each behind a norm and added to what came in."""

    def __init__(self, index: int, parts: LayerParts, pack: "_Pack", dtype: torch.dtype) -> None:
        self._index, self._scaling, self._window = index, parts.scaling, parts.window
        self._attention_norm = _Norm(weight_of(parts.before), parts.before.eps, dtype)
        self._mlp_norm = _Norm(weight_of(parts.between), parts.between.eps, dtype)
        self._heads, self._out, self._gate_up, self._down = (pack(group, dtype) for group in parts.groups)
        self._activation = parts.activation.forward
        self._width = parts.width
        self._queries, self._keys, _ = parts.counts
        self._head_norm = _head_norm(parts, dtype)

    def __call__(
        self, hidden_TD: Tensor, rotation: "_Rotation", attention: Attention, adapters: AppliedAdapters
    ) -> Tensor:
        """Overwrites `hidden_TD`."""
        heads_THd = self._heads(self._attention_norm(hidden_TD), adapters).view(hidden_TD.shape[0], -1, self._width)
        last = self._queries + self._keys
        turned = heads_THd[:, :last]
        turned = rotation.turn(turned if self._head_norm is None else self._head_norm(turned))
        query_HTd, key_GTd = turned.transpose(0, 1).tensor_split((self._queries,))
        heads = Heads(query_HTd, key_GTd, heads_THd[:, last:].transpose(0, 1), self._scaling, self._window)
        attended_THd = attention(self._index, heads)
        hidden_TD.add_(self._out(attended_THd.flatten(1), adapters))
        gate_TP, up_TP = self._gate_up(self._mlp_norm(hidden_TD), adapters).chunk(2, 1)
        return hidden_TD.add_(self._down(self._activation(gate_TP).mul_(up_TP), adapters))


class _Product:
    """The outputs of a group of linear layers side by side, with their adapters."""

    def __init__(self, group: LinearGroup, product: Product) -> None:
        self._group = group
        self._product = product

    @classmethod
    def packed(cls, group: LinearGroup, dtype: torch.dtype) -> "_Product":
        return cls(group, packed_product(group.weight_OI, group.bias_O, dtype))

    @classmethod
    def plain(cls, group: LinearGroup, dtype: torch.dtype) -> "_Product":
        """With the group's own weights, which are of this dtype."""
        return cls(group, lambda x_TI: F.linear(x_TI, group.weight_OI, group.bias_O))

    def __call__(self, x_TI: Tensor, adapters: AppliedAdapters) -> Tensor:
        y_TO = self._product(x_TI)
        adapters.add(self._group, x_TI, y_TO)
        return y_TO


_Pack = Callable[[LinearGroup, torch.dtype], _Product]


class _Norm:
    """`FrozenRMSNorm` over the last dimension, where nothing is kept for backward."""

    def __init__(self, weight: Tensor, eps: float, dtype: torch.dtype) -> None:
        """For what is in `dtype`."""
        self._weight = weight.detach().to(dtype)
        self._eps = torch.tensor([eps])
        self._share = 1 / weight.shape[-1]

    def __call__(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        normed = x * torch.addcmul(self._eps, norm, norm, value=self._share).rsqrt_()
        return (normed if normed.dtype == self._weight.dtype else normed.to(self._weight.dtype)).mul_(self._weight)


def _head_norm(parts: LayerParts, dtype: torch.dtype) -> _Norm | None:
    """The norms of queries and keys as one, over [T, H + G, d]."""
    if parts.head_norms is None:
        return None
    counted = zip(parts.head_norms, parts.counts, strict=False)
    weights = [weight_of(norm).expand(count, -1) for norm, count in counted]
    return _Norm(torch.cat(weights), parts.head_norms[0].eps, dtype)


class _Rotations:
    """Rotary position embedding, from a table that grows with the positions seen."""

    def __init__(self, rotary: Any, dtype: torch.dtype) -> None:
        self._rotary = rotary
        self._varies = rotary.rope_type in _VARYING_ROTATIONS
        self._some = torch.empty(0, dtype=dtype)
        self._table_S21d = self._computed(torch.arange(0 if self._varies else _FEWEST_POSITIONS))

    def of(self, positions_T: Tensor) -> "_Rotation":
        if self._varies:
            return _Rotation(*self._computed(positions_T).unbind(1))
        most = int(positions_T.max())
        if most >= len(self._table_S21d):
            self._table_S21d = self._computed(torch.arange(1 << most.bit_length()))
        return _Rotation(*self._table_S21d.index_select(0, positions_T).unbind(1))

    def _computed(self, positions_S: Tensor) -> Tensor:
        """Cosines, and sines signed as the first half of a head and the second want them."""
        cos_Sd, sin_Sd = (part[0] for part in self._rotary(self._some, positions_S[None]))
        first, second = sin_Sd.chunk(2, -1)
        return torch.stack([cos_Sd, torch.cat([-first, second], -1)], 1)[:, :, None]


class _Rotation:
    """That of one pass; the two halves of a head belong together."""

    def __init__(self, cos_T1d: Tensor, sin_T1d: Tensor) -> None:
        self._half = cos_T1d.shape[-1] // 2
        self._cos_T1d, self._sin_T1d = cos_T1d, sin_T1d

    def turn(self, heads: Tensor) -> Tensor:
        """[T, H + G, d], in place."""
        other = heads.roll(self._half, -1)
        return heads.mul_(self._cos_T1d).addcmul_(other, self._sin_T1d)
