"""A dense copy of the decoding sequences' keys and values, so that a decoding step need not gather them from blocks.

A sequence that decodes occupies a lane among sequences of similar length. It is copied there once, from the paged
cache; then each step adds one row to both. The paged cache stays the truth: lanes can be forgotten at any time. They
take as much memory again as the running sequences' padded lengths.

Legend: L layers, N lanes in use, G key/value heads, M = N · G, J query heads of each, H = G · J, S padded length, d key
dimension, e value dimension, X all numbers of a layer.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.models.attention import Heads
from tinsmith.sampling.kv_cache import KVCache

_STEADY_STEPS = 8  # without a change, after which lanes are worth sorting


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


def block_tables(spans: Sequence[Span]) -> list[list[int]]:
    """The blocks of each span's sequence, all as many as the longest has."""
    width = max(len(span.blocks) for span in spans)
    return [[*span.blocks, *[0] * (width - len(span.blocks))] for span in spans]


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
        self._device = cache.keys_LBSGd.device
        self._heads = cache.keys_LBSGd.shape[3]
        self._owners: list[int] = []
        self._filled: list[int] = []
        self._rows: list[int] = []
        # One fused kernel is best on a GPU. On a CPU three products in fp32 are, in any dtype of the model, with each
        # key's numbers apart: the lanes are in fp32 then.
        self._fused = cache.keys_LBSGd.is_cuda and cache.keys_LBSGd.dtype != torch.float32
        self._room = self._steady = 0
        self._grow(1)

    def enter(self, spans: Sequence[Span], batch: int) -> None:
        """Lets those leave who are not among `spans`, lets the others in, and prepares one pass."""
        wanted = {span.owner: span for span in spans}
        before = self._owners.copy()
        for lane in reversed(range(len(self._owners))):
            span = wanted.get(self._owners[lane])
            if span is None or span.past != self._filled[lane]:
                self._leave(lane)
        present = set(self._owners)
        entering = [span for span in spans if span.owner not in present]
        self._load(entering)
        rows = [wanted[owner].start for owner in self._owners]
        if entering or self._owners != before:
            self._steady = 0
            self._locate()
        elif self._steady == _STEADY_STEPS and rows != sorted(rows):
            rows = self._settle(rows)
        else:
            self._key_cells += 1 if not self._fused else self._key_dim
            self._value_cells += self._value_dim
            self._newest_N1 += 1
        self._steady += 1
        if rows != self._rows:
            self._rows, self.rows_N = rows, torch.tensor(rows, device=self._device)
        self.in_order = rows == list(range(batch))
        self._filled = [filled + 1 for filled in self._filled]
        self._masks: dict[int | None, Tensor] = {}

    def attend(self, place: int, heads: Heads) -> Tensor:
        """Adds the new row of each sequence; returns [N, H, e], in the order of `rows_N`."""
        lanes = self._lanes_of(place)
        query_NHd, key_NGd, value_NGe = map(self._rows_of, (heads.query_HTd, heads.key_GTd, heads.value_GTe))
        lanes.keys_X.put_(self._key_cells, key_NGd.to(lanes.keys_X.dtype))
        lanes.values_X.put_(self._value_cells, value_NGe.to(lanes.values_X.dtype))
        if self._fused and heads.sinks_H is None:
            return self._attend_fused(lanes, query_NHd, heads)
        key_MdS, value_MSe = lanes.keys_MdS, lanes.values_MSe
        query_MJd = query_NHd.reshape(key_MdS.shape[0], -1, self._key_dim).to(key_MdS.dtype)
        scores = torch.baddbmm(self._mask(heads.window), query_MJd, key_MdS, alpha=heads.scaling)
        if heads.sinks_H is not None:
            sinks = heads.sinks_H.to(scores.dtype).view(-1, scores.shape[1], 1).repeat(len(self._owners), 1, 1)
            scores = torch.cat([scores, sinks], -1)
        weights_MJS = scores.softmax(-1)
        if heads.sinks_H is not None:
            weights_MJS = weights_MJS[..., : self._length]
        return torch.bmm(weights_MJS, value_MSe).view(*query_NHd.shape[:2], -1).to(query_NHd.dtype)

    def _attend_fused(self, lanes: "_Lanes", query_NHd: Tensor, heads: Heads) -> Tensor:
        shape = (len(self._owners), self._heads)
        attended_NGJe = F.scaled_dot_product_attention(
            query_NHd.unflatten(1, (self._heads, -1)),
            lanes.keys_MdS.mT.unflatten(0, shape),
            lanes.values_MSe.unflatten(0, shape),
            attn_mask=self._mask(heads.window).view(*shape, 1, -1),
            scale=heads.scaling,
        )
        return attended_NGJe.flatten(1, 2)

    def _rows_of(self, part_HTd: Tensor) -> Tensor:
        """[N, H, d]: the sequences' rows of the batch, by lane."""
        if self.in_order:
            return part_HTd.transpose(0, 1)
        return part_HTd.index_select(1, self.rows_N).transpose(0, 1)

    @property
    def _keys_LNGSd(self) -> Tensor:
        keys = self._keys_LX.unflatten(1, (self._room, self._heads, *self._key_shape))
        return keys if self._fused else keys.mT

    @property
    def _values_LNGSe(self) -> Tensor:
        return self._values_LX.unflatten(1, (self._room, self._heads, self._length, self._value_dim))

    def _grow(self, lanes: int) -> None:
        """Makes room for so many lanes."""
        data = (self._cache.keys_LBSGd, self._cache.values_LBSGe)
        old = (self._keys_LNGSd, self._values_LNGSe) if self._room else ()
        self._key_dim, self._value_dim = (part.shape[-1] for part in data)
        self._key_shape = (self._length, self._key_dim) if self._fused else (self._key_dim, self._length)
        dtype = data[0].dtype if data[0].is_cuda else torch.float32
        self._keys_LX, self._values_LX = (
            part.new_zeros(part.shape[0], lanes * self._heads * self._length * part.shape[-1], dtype=dtype)
            for part in data
        )
        self._room = lanes
        for part, previous in zip((self._keys_LNGSd, self._values_LNGSe), old, strict=False):
            part[:, : previous.shape[1]] = previous

    def _leave(self, lane: int) -> None:
        """Frees a lane; the last sequence moves into it."""
        owner, filled = self._owners.pop(), self._filled.pop()
        last = len(self._owners)
        if lane != last:
            self._owners[lane], self._filled[lane] = owner, filled
            for part in (self._keys_LNGSd, self._values_LNGSe):
                part[:, lane] = part[:, last]

    def _settle(self, rows: Sequence[int]) -> list[int]:
        """Brings the lanes into the order of their rows in the batch, which spares every layer of a pass two copies."""
        lanes = sorted(range(len(rows)), key=rows.__getitem__)
        self._owners = [self._owners[lane] for lane in lanes]
        self._filled = [self._filled[lane] for lane in lanes]
        for part in (self._keys_LNGSd, self._values_LNGSe):
            part[:, : len(lanes)] = part[:, lanes]
        self._locate()
        return sorted(rows)

    def _load(self, spans: Sequence[Span]) -> None:
        """Copies what is cached of new sequences into further lanes, to their whole length: nothing stale remains."""
        if not spans:
            return
        first, last = len(self._owners), len(self._owners) + len(spans)
        if last > self._room:
            self._grow(max(last, 2 * first))
        size = self._cache.block_size
        width = -(-self._length // size)
        # What is masked must still be finite, so the rest of a table is filled up with the sequence's own blocks.
        tables = [[*span.blocks[:width], *[span.blocks[-1]] * (width - len(span.blocks))] for span in spans]
        index = torch.tensor(tables, device=self._device)
        for lanes, data in ((self._keys_LNGSd, self._cache.keys_LBSGd), (self._values_LNGSe, self._cache.values_LBSGe)):
            data_LNSG = data[:, index].flatten(2, 3)[:, :, : self._length]
            lanes[:, first:last] = data_LNSG.transpose(2, 3)
        self._owners += [span.owner for span in spans]
        self._filled += [span.past for span in spans]

    def _locate(self) -> None:
        """Where the next row of each lane goes, and which lanes the layers look at."""
        used = len(self._owners) * self._heads
        newest = torch.tensor(self._filled, device=self._device)
        self._newest_N1 = newest[:, None]
        heads_M1 = torch.arange(used, device=self._device)[:, None]
        newest_M1 = newest.repeat_interleave(self._heads)[:, None]
        key_d = torch.arange(self._key_dim, device=self._device)
        value_e = torch.arange(self._value_dim, device=self._device)
        self._value_cells = (heads_M1 * self._length + newest_M1) * self._value_dim + value_e
        if self._fused:
            self._key_cells = (heads_M1 * self._length + newest_M1) * self._key_dim + key_d
        else:
            self._key_cells = (heads_M1 * self._key_dim + key_d) * self._length + newest_M1
        self._lanes: dict[int, _Lanes] = {}

    def _lanes_of(self, place: int) -> "_Lanes":
        """Those of a layer."""
        if place not in self._lanes:
            used = len(self._owners)
            keys_MSd = self._keys_LNGSd[place, :used].flatten(0, 1)
            values_MSe = self._values_LNGSe[place, :used].flatten(0, 1)
            self._lanes[place] = _Lanes(self._keys_LX[place], self._values_LX[place], keys_MSd.mT, values_MSe)
        return self._lanes[place]

    def _mask(self, window: int | None) -> Tensor:
        """Additive [M, 1, S]: 0 where the row may look, -inf elsewhere."""
        if window not in self._masks:
            position = torch.arange(self._length, device=self._device)
            visible_NS = position <= self._newest_N1
            if window is not None:
                visible_NS &= position > self._newest_N1 - window
            mask_NS = self._keys_LX.new_zeros(visible_NS.shape).masked_fill_(~visible_NS, -torch.inf)
            self._masks[window] = mask_NS.repeat_interleave(self._heads, 0)[:, None]
        return self._masks[window]


@dataclass(frozen=True, slots=True)
class _Lanes:
    """One layer's: all numbers one after the other, and those of the lanes in use as attention wants them."""

    keys_X: Tensor
    values_X: Tensor
    keys_MdS: Tensor
    values_MSe: Tensor
