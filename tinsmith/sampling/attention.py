"""Attention over the paged cache: stores the new rows' keys and values, then lets every row see its own sequence.

Knows blocks and positions, not requests. Prefill chunks attend one sequence at a time; single rows (decoding) attend
together, in lanes of similar length. What pads a batch is masked, so it never changes a result.

Legend: T rows of the batch, H query heads, G key/value heads, d key dimension, e value dimension, N decoding rows of
one group, B blocks, C rows of a chunk, K cached tokens of its sequence.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tinsmith.models.attention import Heads, attend
from tinsmith.models.recurrence import Recurrence
from tinsmith.sampling.kv_cache import KVCache
from tinsmith.sampling.lanes import Lanes, Span
from tinsmith.sampling.paged_rows import PagedRows
from tinsmith.sampling.recurrent import StateStore


class PagedAttention:
    """The attention of one forward pass over the rows of `spans`; rows in no span are padding and stay zero."""

    def __init__(
        self, cache: KVCache, lanes: Lanes | PagedRows, states: StateStore, spans: Sequence[Span], rows: int
    ) -> None:
        device = cache.keys_LBSGd.device
        self._cache = cache
        self._states = states
        self._spans = spans
        self._recurrence: Recurrence | None = None
        self._slots_T = torch.tensor(_slots(spans, rows, cache), device=device)
        self._chunks = [_Chunk(span, device) for span in spans if span.count > 1]
        self._decoding = lanes.enter([span for span in spans if span.count == 1], rows)

    @property
    def recurrence(self) -> Recurrence:
        """The same spans, each going on from its state."""
        if self._recurrence is None:
            self._recurrence = Recurrence(self._states.runs(self._spans))
        return self._recurrence

    def __call__(self, layer: int, heads: Heads) -> Tensor:
        """Returns [T, H, e]."""
        place = self._cache.places[layer]
        keys, values = self._cache.slots(place)
        # Rounded here if at all: what is seen of a row is always what is cached of it.
        heads.key_GTd, heads.value_GTe = heads.key_GTd.to(keys.dtype), heads.value_GTe.to(values.dtype)
        keys.index_copy_(0, self._slots_T, heads.key_GTd.transpose(0, 1))
        values.index_copy_(0, self._slots_T, heads.value_GTe.transpose(0, 1))
        if self._decoding and self._decoding[0].in_order:
            return self._decoding[0].attend(place, heads)
        count, rows, _ = heads.query_HTd.shape
        output_THe = heads.query_HTd.new_zeros(rows, count, heads.value_GTe.shape[2])
        for group in self._decoding:
            output_THe.index_copy_(0, group.rows_N, group.attend(place, heads))
        blocks = self._cache.blocks(place)
        for chunk in self._chunks:
            chunk.attend(blocks, heads, output_THe)
        return output_THe


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

    def attend(self, blocks: tuple[Tensor, Tensor], heads: Heads, output_THe: Tensor) -> None:
        cached = (part.index_select(0, self._blocks_B).flatten(0, 1)[: self._total] for part in blocks)
        key_KGd, value_KGe = (part.to(heads.query_HTd.dtype) for part in cached)
        window = heads.window
        causal = self._span.past == 0 and (window is None or window >= self._total)
        attended = attend(
            heads.query_HTd[None, :, self._rows],
            key_KGd.transpose(0, 1)[None],
            value_KGe.transpose(0, 1)[None],
            heads.scaling,
            None if causal else self._mask(window),
            heads.sinks_H,
        )
        output_THe[self._rows] = attended[0].transpose(0, 1)

    def _mask(self, window: int | None) -> Tensor:
        """Boolean [C, K]: True where the row may look."""
        if window not in self._masks:
            device = self._blocks_B.device
            position = torch.arange(self._span.past, self._total, device=device)[:, None]
            other = torch.arange(self._total, device=device)
            visible = other <= position
            self._masks[window] = visible if window is None else visible & (other > position - window)
        return self._masks[window]
