"""Turns training calls into packed micro-batches: pure functions of numpy arrays; knows no models.

A call is cut by its own tokens only, and every piece keeps rows of its own, so what a call computes does not depend on
which calls it runs with.

Shapes: `T` rows (tokens) of the micro-batch, `M` target entries, `N` datums of a call.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinsmith.models.invariant import LEAST_ROWS
from tinsmith.wire.packing import Int32, Int64, TrainCall


@dataclass(frozen=True, slots=True)
class Cut:
    """Datums `first` to `last` of the call with this index."""

    call: int
    first: int
    last: int
    tokens: int
    opens: bool  # the first of several cuts of its call


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The packed rows of some cuts. Rows behind the last cut's are padding, a sequence that nobody asked for.

    `rows_M` is None if row i has exactly one target, entry i. `row_bounds` and `entry_bounds` delimit the cuts;
    `datum_M` numbers the datums.
    """

    cuts: tuple[Cut, ...]
    tokens_T: Int64
    positions_T: Int64
    cu_seqlens: list[int]
    rows_M: Int64 | None
    targets_M: Int64
    datum_M: Int64
    row_bounds: list[int]
    entry_bounds: list[int]


def cut(index: int, call: TrainCall, budget: int, most: int = 0) -> list[Cut]:
    """Consecutive datums of at most `budget` tokens, and (unless 0) `most` in number; a longer datum goes alone."""
    offsets = call.token_offsets
    bounds = [0]
    while bounds[-1] < call.num_datums:
        first = bounds[-1]
        last = int(np.searchsorted(offsets, offsets[first] + budget, side="right")) - 1
        bounds.append(min(max(last, first + 1), call.num_datums, first + (most or call.num_datums)))
    several = len(bounds) > 2
    return [
        Cut(index, first, last, int(offsets[last] - offsets[first]), several and first == 0)
        for first, last in itertools.pairwise(bounds)
    ]


def plan(calls: Sequence[TrainCall], model_ids: Sequence[str], budget: int, most: int = 0) -> list[list[Cut]]:
    """Cuts of all calls, in order, as micro-batches of at most `budget` tokens and (unless 0) `most` datums.

    A call of several cuts begins a new micro-batch if the current one already has rows of its model: what the model
    had accumulated before the call is then known exactly, should the call fail later.
    """
    batches: list[list[Cut]] = []
    room = seats = 0
    for index, call in enumerate(calls):
        for piece in cut(index, call, budget, most):
            shared = piece.opens and any(model_ids[other.call] == model_ids[index] for other in (batches or [[]])[-1])
            datums = piece.last - piece.first
            if not batches or piece.tokens > room or (most and datums > seats) or shared:
                batches.append([])
                room, seats = budget, most
            batches[-1].append(piece)
            room -= piece.tokens
            seats -= datums
    return batches


def pack(calls: Sequence[TrainCall], cuts: Sequence[Cut]) -> MicroBatch:
    """The arrays of one micro-batch."""
    lengths, widths, tokens, targets = [], [], [], []
    row_bounds, entry_bounds = [0], [0]
    for piece in cuts:
        call, first, last = calls[piece.call], piece.first, piece.last
        lengths.append(np.diff(call.token_offsets[first : last + 1]))
        widths.append(call.widths_N[first:last])
        tokens.append(call.tokens_T[call.token_offsets[first] : call.token_offsets[last]])
        targets.append(call.targets_M[call.target_offsets[first] : call.target_offsets[last]])
        row_bounds.append(row_bounds[-1] + len(tokens[-1]))
        entry_bounds.append(entry_bounds[-1] + len(targets[-1]))
    if (padding := LEAST_ROWS - row_bounds[-1]) > 0:
        filler = np.zeros(padding, np.int32)
        tokens.append(filler)
        targets.append(filler)
        lengths.append(np.array([padding]))
        widths.append(np.zeros(1, np.int32))
    tokens_T = np.concatenate(tokens, dtype=np.int64)
    cu_seqlens, datum_T = _sequences(np.concatenate(lengths))
    rows_M = _target_rows(np.concatenate(widths), datum_T)
    return MicroBatch(
        cuts=tuple(cuts),
        tokens_T=tokens_T,
        positions_T=np.arange(len(tokens_T)) - cu_seqlens[datum_T],
        cu_seqlens=cu_seqlens.tolist(),
        rows_M=rows_M,
        targets_M=np.concatenate(targets, dtype=np.int64),
        datum_M=datum_T if rows_M is None else datum_T[rows_M],
        row_bounds=row_bounds,
        entry_bounds=entry_bounds,
    )


def _sequences(lengths: Int64) -> tuple[Int64, Int64]:
    """Row boundaries of sequences of these lengths, and the sequence number of every row."""
    cu_seqlens = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=cu_seqlens[1:])
    return cu_seqlens, np.repeat(np.arange(len(lengths)), lengths)


def _target_rows(widths: Int32, datum_T: Int64) -> Int64 | None:
    """The row of every target entry; None if they are one to one."""
    if not widths.any():
        return None
    return np.repeat(np.arange(len(datum_T)), np.maximum(widths, 1)[datum_T])
