"""Turns training calls into packed micro-batches: pure functions of numpy arrays; knows no models.

A call is cut by its own tokens only, and every piece keeps rows of its own, so what a call computes does not depend on
which calls it runs with. What datums of a piece begin with alike can be rows that they share.

Shapes: `T` rows (tokens) of the micro-batch, `U` logprobs to be computed, `M` target entries, `N` datums of a call, `S`
sequences.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tinsmith.models.invariant import LEAST_ROWS
from tinsmith.training.shared_prefixes import Gathering, Group, worth_sharing
from tinsmith.wire.packing import Int32, Int64, TrainCall

MOST_SHARING = 8
"""Tokens of a pass for each row of the budget: keys and values that datums share may be copied for each of them."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Datums `first` to `last` of the call with this index, in groups that share rows."""

    call: int
    first: int
    last: int
    groups: tuple[Group, ...]
    opens: bool  # the first of several cuts of its call

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.groups)

    @property
    def tokens(self) -> int:
        """Of its datums, each of which may see copies of what it shares."""
        return sum(group.tokens for group in self.groups)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The packed rows of some cuts. Rows behind the last cut's are padding, a sequence that nobody asked for.

    Sequence s continues sequence `prefixes_S[s]`, unless that is -1; None if no sequence does. Logprob u is that of
    `targets_U[u]` in row `rows_U[u]`; without `rows_U`, of row u. Entry m is logprob `picks_M[m]`; without `picks_M`,
    logprob m. `row_bounds` and `entry_bounds` delimit the cuts; `datum_M` numbers the datums.
    """

    cuts: tuple[Cut, ...]
    tokens_T: Int64
    positions_T: Int64
    cu_seqlens: list[int]
    prefixes_S: list[int] | None
    rows_U: Int64 | None
    targets_U: Int64
    picks_M: Int64 | None
    datum_M: Int64
    row_bounds: list[int]
    entry_bounds: list[int]


def cut(index: int, call: TrainCall, budget: int, most: int = 0, *, share: bool = False) -> list[Cut]:
    """Consecutive datums of at most `budget` rows, and (unless 0) `most` in number; a longer datum goes alone.

    With `share`, datums that begin alike share rows, if that pays.
    """
    most_N = worth_sharing(call) if share else None
    offsets, bounds, pieces = call.token_offsets, [0], [Gathering(call, most_N)]
    for datum in range(call.num_datums):
        found, seated = pieces[-1].place(datum), datum - bounds[-1]
        is_full = seated == most or offsets[datum + 1] - offsets[bounds[-1]] > MOST_SHARING * budget
        if seated and (is_full or found.rows > budget):
            bounds.append(datum)
            pieces.append(Gathering(call, most_N))
            found = pieces[-1].place(datum)
        pieces[-1].put(found)
    bounds.append(call.num_datums)
    return [
        Cut(index, first, last, piece.groups, len(pieces) > 1 and first == 0)
        for piece, (first, last) in zip(pieces, itertools.pairwise(bounds), strict=True)
    ]


def plan(
    calls: Sequence[TrainCall], model_ids: Sequence[str], budget: int, most: int = 0, *, share: bool = False
) -> list[list[Cut]]:
    """Cuts of all calls, in order, as micro-batches of at most `budget` rows and (unless 0) `most` datums.

    A call of several cuts begins a new micro-batch if the current one already has rows of its model: what the model
    had accumulated before the call is then known exactly, should the call fail later.
    """
    batches: list[list[Cut]] = []
    room = seats = tokens = 0
    for index, call in enumerate(calls):
        for piece in cut(index, call, budget, most, share=share):
            shared = piece.opens and any(model_ids[other.call] == model_ids[index] for other in (batches or [[]])[-1])
            datums = piece.last - piece.first
            if not batches or shared or piece.rows > room or piece.tokens > tokens or (most and datums > seats):
                batches.append([])
                room, seats, tokens = budget, most, MOST_SHARING * budget
            batches[-1].append(piece)
            room -= piece.rows
            seats -= datums
            tokens -= piece.tokens
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
        row_bounds.append(row_bounds[-1] + piece.rows)
        entry_bounds.append(entry_bounds[-1] + len(targets[-1]))
    groups = _renumbered(cuts)
    if (padding := LEAST_ROWS - row_bounds[-1]) > 0:
        filler = np.zeros(padding, np.int32)
        tokens.append(filler)
        targets.append(filler)
        groups.append(Group((sum(map(len, lengths)),), padding))
        lengths.append(np.array([padding]))
        widths.append(np.zeros(1, np.int32))
    sequences = _sequences(np.concatenate(lengths, dtype=np.int64), groups)
    entries_M = _entries(np.concatenate(widths), sequences.datum_K)
    rows_U, targets_U, picks_M = _logprobs(sequences, entries_M, np.concatenate(targets, dtype=np.int64))
    return MicroBatch(
        cuts=tuple(cuts),
        tokens_T=np.concatenate(tokens, dtype=np.int64)[sequences.token_T],
        positions_T=sequences.position_T,
        cu_seqlens=sequences.bounds.tolist(),
        prefixes_S=sequences.prefix_S.tolist() if sequences.shares else None,
        rows_U=rows_U,
        targets_U=targets_U,
        picks_M=picks_M,
        datum_M=sequences.datum_K if entries_M is None else sequences.datum_K[entries_M],
        row_bounds=row_bounds,
        entry_bounds=entry_bounds,
    )


def _renumbered(cuts: Sequence[Cut]) -> list[Group]:
    """The groups of all cuts, their datums numbered throughout."""
    groups: list[Group] = []
    seen = 0
    for piece in cuts:
        shift = seen - piece.first
        groups += (replace(group, datums=tuple(datum + shift for datum in group.datums)) for group in piece.groups)
        seen += piece.last - piece.first
    return groups


@dataclass(frozen=True, slots=True)
class _Sequences:
    """Where tokens become rows, for the `K` tokens of all datums, one datum behind the other.

    Row t holds token `token_T[t]` at `position_T[t]` of its datum; token k is row `row_K[k]`, and of datum
    `datum_K[k]`.
    """

    bounds: Int64
    prefix_S: Int64
    token_T: Int64
    position_T: Int64
    row_K: Int64
    datum_K: Int64

    @property
    def shares(self) -> bool:
        return len(self.row_K) > len(self.token_T)


def _sequences(lengths_N: Int64, groups: Sequence[Group]) -> _Sequences:
    """Each group as a sequence of what its datums share, if they do, and one of what each has of its own."""
    sizes = [len(group.datums) for group in groups]
    order_N = np.concatenate([group.datums for group in groups])  # from here on datums come as groups have them
    length_N, start_N = lengths_N[order_N], (np.cumsum(lengths_N) - lengths_N)[order_N]
    shared_N = np.repeat([group.shared for group in groups], sizes)
    leader_N = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
    # two sequences for each datum: what its group shares, which only the leader of a group that shares has, and its own
    leads_N = leader_N == np.arange(len(order_N))
    size_N2 = np.stack([np.where(leads_N, shared_N, 0), length_N - shared_N], 1)
    first_N2 = np.stack([np.zeros_like(shared_N), shared_N], 1)
    exists = size_N2.ravel() > 0
    number_N2 = (np.cumsum(exists) - 1).reshape(-1, 2)
    size_S = size_N2.ravel()[exists]
    bounds = np.concatenate([[0], np.cumsum(size_S)])
    prefix_N2 = np.stack([np.full(len(order_N), -1), np.where(shared_N > 0, number_N2[leader_N, 0], -1)], 1)
    position_T = np.arange(bounds[-1]) + np.repeat(first_N2.ravel()[exists] - bounds[:-1], size_S)
    # a datum's token is the row of its own sequence, or of its leader's, at the same distance from the beginning
    origin_N2 = np.stack([bounds[number_N2[leader_N, 0]], bounds[number_N2[:, 1]] - shared_N], 1)
    datum_K = np.repeat(np.arange(len(lengths_N)), lengths_N)
    seat_K = np.argsort(order_N)[datum_K]
    place_K = np.arange(len(datum_K)) - start_N[seat_K]
    return _Sequences(
        bounds=bounds,
        prefix_S=prefix_N2.ravel()[exists],
        token_T=position_T + np.repeat(np.repeat(start_N, 2)[exists], size_S),
        position_T=position_T,
        row_K=place_K + origin_N2[seat_K, (place_K >= shared_N[seat_K]).astype(np.int64)],
        datum_K=datum_K,
    )


def _entries(widths_N: Int32, datum_K: Int64) -> Int64 | None:
    """The token of every target entry; None if they are one to one."""
    if not widths_N.any():
        return None
    return np.repeat(np.arange(len(datum_K)), np.maximum(widths_N, 1)[datum_K])


def _logprobs(
    sequences: _Sequences, entries_M: Int64 | None, targets_M: Int64
) -> tuple[Int64 | None, Int64, Int64 | None]:
    """`rows_U`, `targets_U` and `picks_M` of a micro-batch: datums that share a row and its target share a logprob."""
    if not sequences.shares:
        return entries_M, targets_M, None
    rows_M = sequences.row_K if entries_M is None else sequences.row_K[entries_M]
    # sorted by row, then by target
    keys_U, picks_M = np.unique((rows_M << 32) | targets_M, return_inverse=True)
    return keys_U >> 32, keys_U & 0xFFFFFFFF, picks_M
