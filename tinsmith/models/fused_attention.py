"""Causal attention of packed sequences on a CUDA device, forward and backward by torch's own kernels, called directly.

Autograd would keep queries and keys that a layer can compute again. Sequences of one length are a batch, for which
cuDNN's kernels are the fastest; it plans for every shape anew, which takes long, and so gets only shapes that come
back. All else runs through flash attention's kernels for ragged sequences. Knows no layers.

Shapes: `T` rows of all sequences, `N` sequences, `L` rows of one, `H` query heads, `G` key/value heads, `d` head
dimension.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

_LEAST_LENGTH = 128  # shorter sequences have nothing to gain

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
    """Of sequences of any lengths."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        self._bounds = bounds.pin_memory().to(device, non_blocking=True)
        self._longest = max(lengths)

    def forward(
        self, query_THd: Tensor, key_TGd: Tensor, value_TGd: Tensor, scale: float
    ) -> tuple[Tensor, list[Tensor]]:
        longest = self._longest
        out_THd, *saved = torch.ops.aten._flash_attention_forward(
            *(query_THd, key_TGd, value_TGd, self._bounds, self._bounds, longest, longest, 0.0, True, False),
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
        longest = self._longest
        gradients: Gradients = torch.ops.aten._flash_attention_backward(
            *(dout_THd, *inputs, out_THd, logsumexp, self._bounds, self._bounds, longest, longest, 0.0, True),
            *(state, unused),
            scale=scale,
        )
        return gradients


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


class AttentionChoice:
    """Chooses the kernels for each pass; knows which shapes have been there before."""

    def __init__(self) -> None:
        self._seen: set[tuple[int, int]] = set()

    def of(self, lengths: Sequence[int], device: torch.device) -> FusedAttention:
        """Deterministic passes always get the same kernels."""
        length, shape = lengths[0], (len(lengths), lengths[0])
        if length < _LEAST_LENGTH or any(other != length for other in lengths):
            return RaggedAttention(lengths, device)
        if torch.are_deterministic_algorithms_enabled() or shape not in self._seen:
            self._seen.add(shape)
            return RaggedAttention(lengths, device)
        return BatchedAttention(length)
