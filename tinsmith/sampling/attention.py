"""Attention over the paged cache: stores the new rows' keys and values, then lets every row see its own sequence.

Knows blocks and positions, not requests. Prefill chunks attend one sequence at a time; single rows (decoding) are
gathered into batches of similar length. What pads such a batch is masked, so it never changes a result.

Legend: T rows of the batch, H query heads, G key/value heads, J = H / G, d head dimension, N decoding rows of one
batch, B blocks, S tokens of a block, L tokens of a sequence (padded, for decoding rows).
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.sampling.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class Span:
    """Rows `start` to `start + count` of the batch: positions `past` to `past + count` of the sequence in `blocks`."""

    start: int
    count: int
    past: int
    blocks: Sequence[int]


def padded_length(length: int) -> int:
    """The length to which a decoding sequence is padded: 32, 48, 64, 96, 128, 192, …; it depends on nothing else."""
    power = 32
    while 2 * power < length:
        power *= 2
    return next(bound for bound in (power, power * 3 // 2, 2 * power) if length <= bound)


class PagedAttention:
    """The attention of one forward pass over the rows of `spans`; rows in no span are padding and stay zero."""

    def __init__(self, cache: KVCache, spans: Sequence[Span], rows: int) -> None:
        device = cache.data_L2BSGd.device
        self._cache = cache
        self._slots_T = torch.tensor(_slots(spans, rows, cache), device=device)
        self._chunks = [_Chunk(span, device) for span in spans if span.count > 1]
        by_length: dict[int, list[Span]] = defaultdict(list)
        for span in spans:
            if span.count == 1:
                by_length[padded_length(span.past + 1)].append(span)
        self._decoding = [_Decoding(group, length, cache) for length, group in sorted(by_length.items())]

    def __call__(
        self, layer: int, query_HTd: Tensor, key_GTd: Tensor, value_GTd: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """Returns [T, H, d]."""
        keys, values = self._cache.slots(layer)
        keys.index_copy_(0, self._slots_T, key_GTd.transpose(0, 1))
        values.index_copy_(0, self._slots_T, value_GTd.transpose(0, 1))
        heads, rows, head_dim = query_HTd.shape
        output_THd = query_HTd.new_zeros(rows, heads, head_dim)
        blocks = self._cache.blocks(layer)
        for group in self._decoding:
            group.attend(blocks, query_HTd, output_THd, scaling, window)
        for chunk in self._chunks:
            chunk.attend(blocks, query_HTd, output_THd, scaling, window)
        return output_THd


def _slots(spans: Sequence[Span], rows: int, cache: KVCache) -> list[int]:
    """Where each row's key and value go: an index into `KVCache.slots`."""
    size = cache.block_size
    slots = [cache.scratch_slot] * rows
    for span in spans:
        for offset in range(span.count):
            block, place = divmod(span.past + offset, size)
            slots[span.start + offset] = span.blocks[block] * size + place
    return slots


class _Chunk:
    """Several consecutive rows of one sequence: causal attention over what is cached of it."""

    def __init__(self, span: Span, device: torch.device) -> None:
        self._span = span
        self._total = span.past + span.count
        self._rows = slice(span.start, span.start + span.count)
        self._blocks_B = torch.tensor(span.blocks, device=device)
        self._masks: dict[int | None, Tensor] = {}

    def attend(
        self, blocks: tuple[Tensor, Tensor], query_HTd: Tensor, output_THd: Tensor, scaling: float, window: int | None
    ) -> None:
        key_LGd, value_LGd = (part.index_select(0, self._blocks_B).flatten(0, 1)[: self._total] for part in blocks)
        causal = self._span.past == 0 and (window is None or window >= self._total)
        attended = F.scaled_dot_product_attention(
            query_HTd[None, :, self._rows],
            key_LGd.transpose(0, 1)[None],
            value_LGd.transpose(0, 1)[None],
            attn_mask=None if causal else self._mask(window),
            is_causal=causal,
            scale=scaling,
            enable_gqa=query_HTd.shape[0] != key_LGd.shape[1],
        )
        output_THd[self._rows] = attended[0].transpose(0, 1)

    def _mask(self, window: int | None) -> Tensor:
        """Boolean [count, L]: True where the row may look."""
        if window not in self._masks:
            device = self._blocks_B.device
            position = torch.arange(self._span.past, self._total, device=device)[:, None]
            other = torch.arange(self._total, device=device)
            visible = other <= position
            self._masks[window] = visible if window is None else visible & (other > position - window)
        return self._masks[window]


class _Decoding:
    """Single rows of sequences of similar length, attended as one batch."""

    def __init__(self, spans: Sequence[Span], length: int, cache: KVCache) -> None:
        device = cache.data_L2BSGd.device
        width = -(-length // cache.block_size)
        # A table is filled up with the sequence's own blocks: what is masked must still be finite, and its own is.
        tables = [[*span.blocks[:width], *[span.blocks[-1]] * (width - len(span.blocks))] for span in spans]
        self._blocks_B = torch.tensor(tables, device=device).flatten()
        self._rows_N = torch.tensor([span.start for span in spans], device=device)
        self._newest_N = torch.tensor([span.past for span in spans], device=device)
        self._length = width * cache.block_size
        self._masks: dict[int | None, Tensor] = {}

    def attend(
        self, blocks: tuple[Tensor, Tensor], query_HTd: Tensor, output_THd: Tensor, scaling: float, window: int | None
    ) -> None:
        count = len(self._rows_N)
        key_NGLd, value_NGLd = (
            part.index_select(0, self._blocks_B).view(count, self._length, *part.shape[2:]).transpose(1, 2)
            for part in blocks
        )
        query_NHd = query_HTd.index_select(1, self._rows_N).transpose(0, 1)
        attended_NGJd = F.scaled_dot_product_attention(
            query_NHd.unflatten(1, (key_NGLd.shape[1], -1)),  # a key's J heads are its queries
            key_NGLd,
            value_NGLd,
            attn_mask=self._mask(window, query_HTd.dtype),
            scale=scaling,
        )
        output_THd[self._rows_N] = attended_NGJd.flatten(1, 2)

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive [N, 1, 1, L]: 0 where the row may look, -inf elsewhere."""
        if window not in self._masks:
            position = torch.arange(self._length, device=self._newest_N.device)
            newest_N1 = self._newest_N[:, None]
            visible_NL = position <= newest_N1
            if window is not None:
                visible_NL &= position > newest_N1 - window
            mask_NL = torch.zeros(visible_NL.shape, dtype=dtype, device=position.device)
            self._masks[window] = mask_NL.masked_fill_(~visible_NL, -torch.inf)[:, None, None]
        return self._masks[window]
