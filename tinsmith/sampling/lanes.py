"""A dense copy of the decoding sequences' keys and values, so that a decoding step need not gather them from blocks.

A sequence that decodes occupies a lane among sequences of similar length. It is copied there once, from the paged
cache; then each step adds one row to both. The paged cache stays the truth: lanes can be forgotten at any time. They
take as much memory again as the running sequences' padded lengths.

Legend: L layers, N lanes in use, G key/value heads, J query heads of each, H = G · J, S padded length, d key
dimension, e value dimension.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.models.attention import Heads
from tinsmith.sampling.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class Span:
    """Rows `start` to `start + count` of the batch: positions `past` to `past + count` of the sequence in `blocks`.

    `owner` names the sequence; another sequence never gets the same number.
    """

    owner: int
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


class Lanes:
    """The lanes of all sequences that decode with one set of base weights, grouped by padded length."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._groups: dict[int, LaneGroup] = {}

    def enter(self, spans: Sequence[Span], batch: int) -> list["LaneGroup"]:
        """Makes exactly these sequences, of one row each, occupy lanes; returns the groups, ready for the pass.

        The pass has `batch` rows.
        """
        by_length: dict[int, list[Span]] = defaultdict(list)
        for span in spans:
            by_length[padded_length(span.past + 1)].append(span)
        self._groups = {
            length: self._groups.get(length) or LaneGroup(self._cache, length) for length in sorted(by_length)
        }
        for length, group in self._groups.items():
            group.enter(by_length[length], batch)
        return list(self._groups.values())


class LaneGroup:
    """Sequences of the same padded length, each in a lane, without gaps.

    `rows_N` are their rows in the batch, by lane; `in_order` says that these are all of its rows, one after the other.
    """

    def __init__(self, cache: KVCache, length: int) -> None:
        self._cache = cache
        self._length = length
        self._heads = cache.keys_LBSGd.shape[3]
        self._owners: list[int] = []
        self._filled: list[int] = []
        # One fused kernel is best on a GPU. On a CPU three products in fp32 are, in any dtype of the model, with each
        # key's numbers apart: the lanes are in fp32 then.
        self._fused = cache.keys_LBSGd.is_cuda and cache.keys_LBSGd.dtype != torch.float32
        self._keys_LNGSd, self._values_LNGSe = self._allocate(1)

    def enter(self, spans: Sequence[Span], batch: int) -> None:
        """Lets those leave who are not among `spans`, lets the others in, and prepares one pass."""
        wanted = {span.owner: span for span in spans}
        for lane in reversed(range(len(self._owners))):
            span = wanted.get(self._owners[lane])
            if span is None or span.past != self._filled[lane]:
                self._leave(lane)
        present = set(self._owners)
        self._load([span for span in spans if span.owner not in present])
        self._prepare([wanted[owner] for owner in self._owners], batch)

    def attend(self, place: int, heads: Heads) -> Tensor:
        """Adds the new row of each sequence; returns [N, H, e], in the order of `rows_N`."""
        count = len(self._owners)
        key_NGSd, value_NGSe = self._keys_LNGSd[place, :count], self._values_LNGSe[place, :count]
        cells = (self._lanes_N, slice(None), self._newest_N)
        key_NGSd[cells] = self._rows(heads.key_GTd).to(key_NGSd.dtype)
        value_NGSe[cells] = self._rows(heads.value_GTe).to(value_NGSe.dtype)
        query_NHd, mask = self._rows(heads.query_HTd), self._mask(heads.window)
        if self._fused and heads.sinks_H is None:
            attended_NGJe = F.scaled_dot_product_attention(
                query_NHd.unflatten(1, (key_NGSd.shape[1], -1)),
                key_NGSd,
                value_NGSe,
                attn_mask=mask.view(count, self._heads, 1, -1),
                scale=heads.scaling,
            )
            return attended_NGJe.flatten(1, 2)
        query, key, value = (part.flatten(0, 1) for part in (query_NHd, key_NGSd.transpose(2, 3), value_NGSe))
        query = query.view(key.shape[0], -1, key.shape[1]).to(key.dtype)
        scores = torch.baddbmm(mask, query, key, alpha=heads.scaling)
        if heads.sinks_H is not None:
            sinks = heads.sinks_H.to(scores.dtype).view(-1, scores.shape[1], 1).repeat(count, 1, 1)
            scores = torch.cat([scores, sinks], -1)
        weights = scores.softmax(-1)[..., : self._length]
        return torch.bmm(weights, value).view(*query_NHd.shape[:2], -1).to(query_NHd.dtype)

    def _rows(self, part_HTd: Tensor) -> Tensor:
        """[N, H, d]: the sequences' rows of the batch, by lane."""
        if self.in_order:
            return part_HTd.transpose(0, 1)
        return part_HTd.index_select(1, self.rows_N).transpose(0, 1)

    def _allocate(self, lanes: int) -> tuple[Tensor, Tensor]:
        layers, _, _, heads, key_dim = self._cache.keys_LBSGd.shape
        value_dim = self._cache.values_LBSGe.shape[-1]
        dtype = self._cache.values_LBSGe.dtype if self._cache.values_LBSGe.is_cuda else torch.float32
        values = self._cache.values_LBSGe.new_zeros(layers, lanes, heads, self._length, value_dim, dtype=dtype)
        if self._fused:
            return values.new_zeros(layers, lanes, heads, self._length, key_dim), values
        return values.new_zeros(layers, lanes, heads, key_dim, self._length).transpose(3, 4), values

    def _leave(self, lane: int) -> None:
        """Frees a lane; the last sequence moves into it."""
        owner, filled = self._owners.pop(), self._filled.pop()
        last = len(self._owners)
        if lane != last:
            self._owners[lane], self._filled[lane] = owner, filled
            for part in (self._keys_LNGSd, self._values_LNGSe):
                part[:, lane] = part[:, last]

    def _load(self, spans: Sequence[Span]) -> None:
        """Copies what is cached of new sequences into further lanes, to their whole length: nothing stale remains."""
        if not spans:
            return
        first, last = len(self._owners), len(self._owners) + len(spans)
        if last > self._keys_LNGSd.shape[1]:
            self._grow(max(last, 2 * first))
        size = self._cache.block_size
        width = -(-self._length // size)
        # What is masked must still be finite, so the rest of a table is filled up with the sequence's own blocks.
        tables = [[*span.blocks[:width], *[span.blocks[-1]] * (width - len(span.blocks))] for span in spans]
        index = torch.tensor(tables, device=self._keys_LNGSd.device)
        for lanes, data in ((self._keys_LNGSd, self._cache.keys_LBSGd), (self._values_LNGSe, self._cache.values_LBSGe)):
            data_LNSG = data[:, index].flatten(2, 3)[:, :, : self._length]
            lanes[:, first:last] = data_LNSG.transpose(2, 3)
        self._owners += [span.owner for span in spans]
        self._filled += [span.past for span in spans]

    def _grow(self, lanes: int) -> None:
        old = (self._keys_LNGSd, self._values_LNGSe)
        self._keys_LNGSd, self._values_LNGSe = self._allocate(lanes)
        for part, previous in zip((self._keys_LNGSd, self._values_LNGSe), old, strict=True):
            part[:, : previous.shape[1]] = previous

    def _prepare(self, spans: Sequence[Span], batch: int) -> None:
        """What every layer of the pass needs: the lanes' batch rows and newest positions."""
        device = self._keys_LNGSd.device
        rows = [span.start for span in spans]
        self.rows_N = torch.tensor(rows, device=device)
        self.in_order = rows == list(range(batch))
        self._newest_N = torch.tensor(self._filled, device=device)
        self._lanes_N = torch.arange(len(spans), device=device)
        self._filled = [span.past + 1 for span in spans]
        self._masks: dict[int | None, Tensor] = {}

    def _mask(self, window: int | None) -> Tensor:
        """Additive [N · G, 1, S]: 0 where the row may look, -inf elsewhere."""
        if window not in self._masks:
            position = torch.arange(self._length, device=self._newest_N.device)
            newest_N1 = self._newest_N[:, None]
            visible_NS = position <= newest_N1
            if window is not None:
                visible_NS &= position > newest_N1 - window
            mask_NS = self._keys_LNGSd.new_zeros(visible_NS.shape).masked_fill_(~visible_NS, -torch.inf)
            self._masks[window] = mask_NS.repeat_interleave(self._heads, 0)[:, None]
        return self._masks[window]
