"""Causal attention of packed sequences on a CUDA device, forward and backward by torch's own kernels, called directly.

Autograd would keep queries and keys that a layer can compute again. Sequences of one length are a batch, for which
cuDNN's kernels are the fastest; it plans for every shape anew, which takes long, and so gets only shapes that come
back. All else runs through flash attention's kernels for ragged sequences. Knows no layers.

Shapes: `T` rows of all sequences, `N` sequences, `L` rows of one, `S` rows of sequences that continue another, `H`
query heads, `G` key/value heads, `d` head dimension.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tinsmith.models.attention import PackedAttention
from tinsmith.models.attention_kernels import merge_attention
from tinsmith.models.transfer import on_device

_LEAST_LENGTH = 128  # shorter sequences have nothing to gain
_MOST_PLANNED = 64  # shapes: the library never forgets a plan
_MOST_SEEN = 4096  # shapes that are remembered, of which most never come back
_WIDTH_STEP, _MOST_WIDTH = 8, 128  # of heads: what both libraries have kernels for, forward and backward

Gradients = tuple[Tensor, Tensor, Tensor]


class FusedAttention(Protocol):
    """The attention of one pass; `saved` is what backward needs beside inputs and outputs."""

    def forward(
        self, query_THd: Tensor, key_TGd: Tensor, value_TGd: Tensor, scale: float
    ) -> tuple[Tensor, list[Tensor]]:
        """([T, H, d], saved)."""

    def backward(
        self,
        dout_THd: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        out_THd: Tensor,
        saved: Sequence[Tensor],
        scale: float,
    ) -> Gradients:
        """The gradients in queries, keys and values [T, …, d], their last dimension contiguous."""


class RaggedAttention:
    """Of sequences of any lengths, causal; or of each sequence's queries to all of as many other sequences' keys."""

    def __init__(self, lengths: Sequence[int], device: torch.device, key_lengths: Sequence[int] | None = None) -> None:
        """With `key_lengths`, the keys and values are other rows than the queries."""
        self._queries = _Bounds(lengths, device)
        self._keys = self._queries if key_lengths is None else _Bounds(key_lengths, device)
        self._is_causal = key_lengths is None

    def forward(
        self, query_THd: Tensor, key_TGd: Tensor, value_TGd: Tensor, scale: float
    ) -> tuple[Tensor, list[Tensor]]:
        """What is saved begins with the fp32 logsumexps of the scores [H, T]."""
        queries, keys = self._queries, self._keys
        out_THd, *saved = torch.ops.aten._flash_attention_forward(
            *(query_THd, key_TGd, value_TGd, queries.rows_N, keys.rows_N, queries.longest, keys.longest),
            *(0.0, self._is_causal, False),
            scale=scale,
        )
        return out_THd, saved[:3]

    def backward(
        self,
        dout_THd: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        out_THd: Tensor,
        saved: Sequence[Tensor],
        scale: float,
    ) -> Gradients:
        logsumexp, state, unused = saved
        queries, keys = self._queries, self._keys
        gradients: Gradients = torch.ops.aten._flash_attention_backward(
            *(dout_THd, *inputs, out_THd, logsumexp, queries.rows_N, keys.rows_N, queries.longest, keys.longest),
            *(0.0, self._is_causal, state, unused),
            scale=scale,
        )
        return gradients


class _Bounds:
    """Where sequences of these lengths begin and end, on the device."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.rows_N = on_device(np.array([0, *itertools.accumulate(lengths)], np.int32), device)
        self.longest = max(lengths)


class SharedPrefixAttention:
    """Of sequences of which some continue others: their rows attend within their own, then to what they continue.

    The two results are merged by their logsumexps. With what is merged, backward of each part gives that part of the
    whole's gradient.
    """

    def __init__(self, attention: PackedAttention, device: torch.device) -> None:
        lengths = attention.lengths
        starts = [0, *itertools.accumulate(lengths)]
        continued: dict[int, list[int]] = defaultdict(list)
        for number, prefix in enumerate(attention.prefixes or ()):
            if prefix >= 0:
                continued[prefix].append(number)

        def rows_of(sequences: Iterable[int]) -> Tensor:
            rows = [np.arange(starts[number], starts[number + 1]) for number in sequences]
            return on_device(np.concatenate(rows), device)

        self._rows_S = rows_of(itertools.chain.from_iterable(continued.values()))
        self._prefix_rows = rows_of(continued)
        self._own = RaggedAttention(lengths, device)
        query_lengths = [sum(lengths[number] for number in numbers) for numbers in continued.values()]
        self._across = RaggedAttention(query_lengths, device, [lengths[prefix] for prefix in continued])

    def forward(
        self, query_THd: Tensor, key_TGd: Tensor, value_TGd: Tensor, scale: float
    ) -> tuple[Tensor, list[Tensor]]:
        out_THd, own = self._own.forward(query_THd, key_TGd, value_TGd, scale)
        more_SHd, across = self._across.forward(*self._crossing((query_THd, key_TGd, value_TGd)), scale)
        merge_attention(out_THd, own[0], more_SHd, across[0], self._rows_S)
        return out_THd, [*own, *across[1:]]

    def backward(
        self,
        dout_THd: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        out_THd: Tensor,
        saved: Sequence[Tensor],
        scale: float,
    ) -> Gradients:
        own, across = saved[:3], [saved[0].index_select(1, self._rows_S), *saved[3:]]
        gradients = self._own.backward(dout_THd, inputs, out_THd, own, scale)
        dout_SHd, out_SHd = (each.index_select(0, self._rows_S) for each in (dout_THd, out_THd))
        more = self._across.backward(dout_SHd, self._crossing(inputs), out_SHd, across, scale)
        rows = (self._rows_S, self._prefix_rows, self._prefix_rows)
        for gradient, part, where in zip(gradients, more, rows, strict=True):
            gradient.index_add_(0, where, part)
        return gradients

    def _crossing(self, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The queries of sequences that continue others, and those others' keys and values."""
        query_THd, key_TGd, value_TGd = inputs
        key, value = (rows.index_select(0, self._prefix_rows) for rows in (key_TGd, value_TGd))
        return query_THd.index_select(0, self._rows_S), key, value


class BatchedAttention:
    """Of sequences of one length."""

    def __init__(self, length: int) -> None:
        self._length = length

    def _batch(self, rows_THd: Tensor) -> Tensor:
        """[N, H, L, d]."""
        return rows_THd.unflatten(0, (-1, self._length)).transpose(1, 2)

    def forward(
        self, query_THd: Tensor, key_TGd: Tensor, value_TGd: Tensor, scale: float
    ) -> tuple[Tensor, list[Tensor]]:
        inputs = (self._batch(rows) for rows in (query_THd, key_TGd, value_TGd))
        results: Any = torch.ops.aten._scaled_dot_product_cudnn_attention(*inputs, None, True, 0.0, True, scale=scale)
        out, logsumexp, seed, offset = results[0], results[1], results[6], results[7]
        return out.transpose(1, 2).flatten(0, 1), [logsumexp, seed, offset]

    def backward(
        self,
        dout_THd: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        out_THd: Tensor,
        saved: Sequence[Tensor],
        scale: float,
    ) -> Gradients:
        length, batch = self._length, self._batch
        gradients: Any = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *(
                batch(dout_THd),
                *map(batch, inputs),
                batch(out_THd),
                *saved,
                None,
                None,
                None,
                length,
                length,
                0.0,
                True,
            ),
            scale=scale,
        )
        dquery, dkey, dvalue = (gradient.transpose(1, 2).flatten(0, 1) for gradient in gradients)
        return dquery, dkey, dvalue


def can_attend(width: int) -> bool:
    """Whether there are kernels for heads of this width."""
    return width % _WIDTH_STEP == 0 and width <= _MOST_WIDTH


class AttentionChoice:
    """Chooses the kernels for each pass; knows which shapes have been there before."""

    def __init__(self) -> None:
        self._seen: set[tuple[int, int]] = set()
        self._planned: set[tuple[int, int]] = set()

    def of(self, attention: PackedAttention, device: torch.device) -> FusedAttention:
        """Deterministic passes always get the same kernels."""
        if attention.prefixes is not None:
            return SharedPrefixAttention(attention, device)
        lengths = attention.lengths
        length = lengths[0]
        if length < _LEAST_LENGTH or any(other != length for other in lengths):
            return RaggedAttention(lengths, device)
        if torch.are_deterministic_algorithms_enabled() or not self.is_planned((len(lengths), length)):
            return RaggedAttention(lengths, device)
        return BatchedAttention(length)

    def is_planned(self, shape: tuple[int, int]) -> bool:
        """Whether sequences [number, length] run as a batch: from the second time on, the first few such shapes."""
        if shape in self._seen and len(self._planned) < _MOST_PLANNED:
            self._seen.discard(shape)
            self._planned.add(shape)
        if shape in self._planned:
            return True
        if len(self._seen) >= _MOST_SEEN:
            self._seen.clear()
        self._seen.add(shape)
        return False
