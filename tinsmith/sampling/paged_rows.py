"""Decoding rows that read the paged cache itself, through the attention function of training and prefill.

Slower than `lanes`, which it stands in for where every row must have the bits that training gives it: on a
deterministic server. Knows blocks and positions, not requests.

Legend: T rows of the batch, N decoding rows of one group, B blocks of each, S = B · block size cached tokens, H query
heads, G key/value heads, d key dimension, e value dimension.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from tinsmith.models.attention import Heads, attend
from tinsmith.sampling.kv_cache import KVCache
from tinsmith.sampling.lanes import Span

_STEP = 64  # tokens; sequences of similar length share a group


class PagedRows:
    """Stands in for `lanes.Lanes`, and keeps nothing from one pass to the next."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache

    def enter(self, spans: Sequence[Span], batch: int) -> list["RowGroup"]:
        """Groups spans of one row each for a pass of `batch` rows."""
        by_length: dict[int, list[Span]] = defaultdict(list)
        for span in spans:
            by_length[span.past // _STEP].append(span)
        return [RowGroup(self._cache, by_length[length], batch) for length in sorted(by_length)]


class RowGroup:
    """Decoding rows of sequences of similar length; `rows_N` and `in_order` as in `lanes.LaneGroup`."""

    def __init__(self, cache: KVCache, spans: Sequence[Span], batch: int) -> None:
        device = cache.keys_LBSGd.device
        self._cache = cache
        # What is masked must still be finite, so the rest of a table is filled up with the sequence's own blocks.
        width = max(len(span.blocks) for span in spans)
        tables = [[*span.blocks, *[span.blocks[-1]] * (width - len(span.blocks))] for span in spans]
        self._tables_NB = torch.tensor(tables, device=device)
        self._newest_N1 = torch.tensor([[span.past] for span in spans], device=device)
        rows = [span.start for span in spans]
        self.rows_N = torch.tensor(rows, device=device)
        self.in_order = rows == list(range(batch))

    def attend(self, place: int, heads: Heads) -> Tensor:
        """[N, H, e]; the new rows' keys and values are in the cache already."""
        keys, values = (part[self._tables_NB].flatten(1, 2).transpose(1, 2) for part in self._cache.blocks(place))
        query_NH1d = heads.query_HTd.index_select(1, self.rows_N).transpose(0, 1)[:, :, None]
        mask_N11S = self._visible(keys.shape[2], heads.window)[:, None, None]
        return attend(query_NH1d, keys, values, heads.scaling, mask_N11S, heads.sinks_H)[:, :, 0]

    def _visible(self, length: int, window: int | None) -> Tensor:
        """Boolean [N, S]: True where the row may look."""
        position = torch.arange(length, device=self._newest_N1.device)
        visible = position <= self._newest_N1
        return visible if window is None else visible & (position > self._newest_N1 - window)
