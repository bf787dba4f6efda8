"""Attention over packed sequences, and how a Hugging Face module comes to call ours.

Every forward pass brings an `Attention` object along (a keyword argument that transformers hands down to the attention
function), so there is no state between passes. Knows no adapters and no requests.

Shapes: `H` query heads, `G` key/value heads, `T` rows of all sequences, `L` rows of one, `K` keys, `d` dimension of
queries and keys, `e` dimension of values.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from tinsmith.errors import ConfigError
from tinsmith.models.recurrence import Recurrence, Run

IMPLEMENTATION = "tinsmith"
ATTENTION_KEYWORD = "tinsmith_attention"

_HARMLESS_KEYWORDS = frozenset(
    {"position_ids", "cache_position", "use_cache", "is_causal", "output_attentions", "output_hidden_states"}
)


@dataclass(slots=True)
class Heads:
    """What one layer asks of attention.

    `scaling` is the scores' factor. A row sees at most `window` rows, its own included; a sink is one more score of
    every row of its query head, with a value of zero.
    """

    query_HTd: Tensor
    key_GTd: Tensor
    value_GTe: Tensor
    scaling: float
    window: int | None = None
    sinks_H: Tensor | None = None


class Attention(Protocol):
    """What a forward pass is given; called once per layer with attention."""

    @property
    def recurrence(self) -> Recurrence:
        """The same sequences, for layers that have a recurrent state instead."""

    def __call__(self, layer: int, heads: Heads) -> Tensor:
        """Returns [T, H, e]. A row sees itself and what precedes it in its sequence."""


class PackedAttention:
    """Causal attention within each of the packed sequences whose row boundaries are `cu_seqlens` ([0, …, T]).

    Rows of sequence s also see all of an earlier sequence, `prefixes[s]`, which it continues, unless that is -1. That
    one continues none.
    """

    def __init__(self, cu_seqlens: Sequence[int], prefixes: Sequence[int] | None = None) -> None:
        self._cu_seqlens = cu_seqlens
        self._recurrence: Recurrence | None = None
        self.lengths = [end - start for start, end in itertools.pairwise(cu_seqlens)]
        self.prefixes = prefixes
        self._masks: dict[tuple[int, int, int | None, torch.dtype], Tensor | None] = {}

    @property
    def recurrence(self) -> Recurrence:
        """Every sequence from its beginning."""
        if self.prefixes is not None:
            raise ValueError("a recurrent state cannot be continued by several sequences")
        if self._recurrence is None:
            self._recurrence = Recurrence([Run(range(*bounds)) for bounds in itertools.pairwise(self._cu_seqlens)])
        return self._recurrence

    def __call__(self, layer: int, heads: Heads) -> Tensor:
        # Split, not sliced: a slice's gradient is as long as the whole, so that n slices would cost n² in backward.
        wholes = (heads.query_HTd[None], heads.key_GTd[None], heads.value_GTe[None])
        queries, keys, values = (whole.split(self.lengths, dim=2) for whole in wholes)
        outputs = []
        for number, query in enumerate(queries):
            key, value = keys[number], values[number]
            if self.prefixes is not None and (prefix := self.prefixes[number]) >= 0:
                key, value = torch.cat([keys[prefix], key], 2), torch.cat([values[prefix], value], 2)
            mask = self._mask(query, key.shape[2], heads.window)
            attended = attend(query, key, value, heads.scaling, mask, heads.sinks_H)
            outputs.append(attended.squeeze(0).transpose(0, 1))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _mask(self, query: Tensor, keys: int, window: int | None) -> Tensor | None:
        """`_band`: one for all layers and all sequences of a size, since backward keeps it."""
        size = (query.shape[2], keys, window, query.dtype)
        if size not in self._masks:
            self._masks[size] = _band(query, keys, window)
        return self._masks[size]


def attend(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None, sinks_H: Tensor | None
) -> Tensor:
    """[N, H, L, e], of a query [N, H, L, d], keys [N, G, K, d] and values [N, G, K, e] of N sequences.

    `mask` is [L, K] or [N, 1, L, K]: boolean, or what is added to the scores; None means causal, with L = K.
    """
    width, extra = value.shape[-1], 0
    if sinks_H is not None:
        query, key, value, mask, extra = _with_sinks(query, key, value, scaling, mask, sinks_H)
    if value.shape[-1] < key.shape[-1]:
        # The kernels that hold no [L, K] matrix want values as wide as the keys.
        value = F.pad(value, (0, key.shape[-1] - value.shape[-1]))
    gqa = query.shape[1] != key.shape[1]
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=gqa
    )
    return output if output.shape[2:] == (query.shape[2] - extra, width) else output[:, :, extra:, :width]


def _with_sinks(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None, sinks_H: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int]:
    """The sinks as a first key: in dimensions of its own, one for each query head that shares it.

    Without a mask a first query comes along, so that every row sees one key more; returns how many to drop, too.
    """
    heads, key_heads = query.shape[1], key.shape[1]
    sharing = heads // key_heads
    own = torch.eye(sharing, dtype=query.dtype, device=query.device).repeat(key_heads, 1)
    query = torch.cat([query, own[None, :, None].expand(*query.shape[:3], -1)], -1)
    sinks = F.pad((sinks_H.to(key.dtype) / scaling).view(1, key_heads, 1, sharing), (key.shape[-1], 0))
    key = torch.cat([sinks.expand(len(key), -1, -1, -1), F.pad(key, (0, sharing))], 2)
    value = F.pad(value, (0, 0, 1, 0))
    if mask is not None:
        return query, key, value, F.pad(mask, (1, 0), value=mask.dtype == torch.bool), 0
    return F.pad(query, (0, 0, 1, 0)), key, value, None, 1


def _band(query: Tensor, keys: int, window: int | None) -> Tensor | None:
    """[L, K] for `attend`: where one of the last rows may see a key row. None: it's just causal.

    On a CPU not boolean, of which torch would make a copy of numbers, and keep that, for every layer; each library for
    GPUs has its own way to hide.
    """
    rows = query.shape[2]
    earlier = keys - rows
    if not earlier and (window is None or rows <= window):
        return None
    seen = torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril(earlier)
    seen = seen if window is None else seen.triu(earlier + 1 - window)
    return seen if seen.is_cuda else query.new_zeros(rows, keys).masked_fill_(~seen, -torch.inf)


@dataclass(frozen=True, slots=True)
class CacheShape:
    """The keys and values that one token leaves behind: in which layers, of how many heads, and how wide."""

    layers: tuple[int, ...]
    heads: int
    key_dim: int
    value_dim: int

    @property
    def numbers(self) -> int:
        """Of one token, in all layers."""
        return len(self.layers) * self.heads * (self.key_dim + self.value_dim)


class ShapeRecorder(PackedAttention):
    """Attention within one sequence that notes what it is given."""

    def __init__(self, rows: int) -> None:
        super().__init__([0, rows])
        self._seen: dict[int, tuple[int, int, int]] = {}

    def __call__(self, layer: int, heads: Heads) -> Tensor:
        self._seen[layer] = (heads.key_GTd.shape[0], heads.key_GTd.shape[2], heads.value_GTe.shape[2])
        return super().__call__(layer, heads)

    def cache_shape(self) -> CacheShape:
        """Raises ConfigError unless all layers are alike."""
        shapes = set(self._seen.values())
        if len(shapes) != 1:
            raise ConfigError(
                f"layers of one size of keys and values can be served; these have (heads, key dimension, value "
                f"dimension) {sorted(shapes)}"
            )
        return CacheShape(tuple(self._seen), *shapes.pop())


def _delegate(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer, with [1, heads, T, d]; passes on to the pass's own `Attention`."""
    attention: Attention | None = keywords.pop(ATTENTION_KEYWORD, None)
    if attention is None:
        raise ConfigError(f"{type(module).__name__} does not hand keyword arguments to its attention function")
    unknown = [name for name, given in keywords.items() if given is not None and name not in _HARMLESS_KEYWORDS]
    if unknown or dropout or attention_mask is not None:
        what = ", ".join(unknown) or ("dropout" if dropout else "attention_mask")
        raise ConfigError(f"{type(module).__name__} asks for attention with {what}, which Tinsmith cannot do")
    heads = Heads(query.squeeze(0), key.squeeze(0), value.squeeze(0), scaling, sliding_window, s_aux)
    output_THd = attention(module.layer_idx, heads)  # type: ignore[arg-type]
    return output_THd[None], None


# No mask function is registered beside it: transformers then makes no masks at all.
AttentionInterface.register(IMPLEMENTATION, _delegate)
