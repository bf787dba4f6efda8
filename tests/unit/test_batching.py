"""Packing training calls into micro-batches."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tinsmith.models.invariant import LEAST_ROWS
from tinsmith.training.batching import cut, pack, plan
from tinsmith.wire.packing import TrainCall

Shape = tuple[int, int]
CALLS = st.lists(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3)), min_size=1, max_size=6), min_size=1, max_size=5
)


def call_of(shapes: list[Shape], seed: int = 0) -> TrainCall:
    """A call with datums of these lengths and widths, every token and target different."""
    lengths = np.array([length for length, _ in shapes])
    widths = np.array([width for _, width in shapes], np.int32)
    entries = lengths * np.maximum(widths, 1)
    return TrainCall(
        "cross_entropy",
        {},
        False,
        np.arange(lengths.sum(), dtype=np.int32) + 1000 * seed,
        np.cumsum([0, *lengths]),
        np.arange(entries.sum(), dtype=np.int32) + 1000 * seed,
        np.cumsum([0, *entries]),
        widths,
        {},
    )


@given(CALLS, st.integers(1, 60), st.lists(st.sampled_from("ab"), min_size=5, max_size=5))
def test_every_datum_is_in_one_micro_batch_within_the_budget(
    shapes: list[list[Shape]], budget: int, model_ids: list[str]
) -> None:
    calls = [call_of(each) for each in shapes]
    batches = plan(calls, model_ids[: len(calls)], budget)
    cuts = [piece for batch in batches for piece in batch]
    seen = [(piece.call, datum) for piece in cuts for datum in range(piece.first, piece.last)]
    assert seen == [(index, datum) for index, call in enumerate(calls) for datum in range(call.num_datums)]
    for batch in batches:
        assert sum(piece.rows for piece in batch) <= budget or (len(batch) == 1 and batch[0].last - batch[0].first == 1)
    for index, call in enumerate(calls):
        assert [piece for piece in cuts if piece.call == index] == cut(index, call, budget), (
            "cut by its own tokens only"
        )


@given(CALLS, st.integers(1, 60), st.integers(1, 4))
def test_a_micro_batch_has_no_more_datums_than_allowed(shapes: list[list[Shape]], budget: int, most: int) -> None:
    calls = [call_of(each) for each in shapes]
    batches = plan(calls, [str(index) for index in range(len(calls))], budget, most)
    assert max(sum(piece.last - piece.first for piece in batch) for batch in batches) <= most
    seen = [(piece.call, datum) for batch in batches for piece in batch for datum in range(piece.first, piece.last)]
    assert seen == [(index, datum) for index, call in enumerate(calls) for datum in range(call.num_datums)]
    for index, call in enumerate(calls):
        assert [piece for batch in batches for piece in batch if piece.call == index] == cut(index, call, budget, most)


@given(CALLS, st.integers(1, 60))
def test_a_call_of_several_cuts_begins_where_its_model_has_no_rows(shapes: list[list[Shape]], budget: int) -> None:
    calls = [call_of(each) for each in shapes]
    for batch in plan(calls, ["same"] * len(calls), budget):
        assert not any(piece.opens for piece in batch[1:])


@given(CALLS)
def test_a_packed_batch_holds_the_calls_rows_and_targets(shapes: list[list[Shape]]) -> None:
    calls = [call_of(each, seed) for seed, each in enumerate(shapes)]
    [cuts] = plan(calls, [str(index) for index in range(len(calls))], 10**6)
    batch = pack(calls, cuts)
    lengths = [length for each in shapes for length, _ in each]
    rows = batch.row_bounds[-1]
    assert rows == sum(lengths)
    assert len(batch.tokens_T) == max(rows, LEAST_ROWS) == batch.cu_seqlens[-1]
    assert np.array_equal(batch.tokens_T[:rows], np.concatenate([call.tokens_T for call in calls]))
    assert batch.positions_T[:rows].tolist() == [position for length in lengths for position in range(length)]
    assert np.diff(batch.cu_seqlens).tolist()[: len(lengths)] == lengths

    expected_rows = np.repeat(
        np.arange(rows), [max(w, 1) for each in shapes for length, w in each for _ in range(length)]
    )
    actual_rows = np.arange(len(batch.tokens_T)) if batch.rows_U is None else batch.rows_U
    entries = batch.entry_bounds[-1]
    assert actual_rows[:entries].tolist() == expected_rows.tolist()
    assert np.array_equal(batch.targets_U[:entries], np.concatenate([call.targets_M for call in calls]))
    for (start, end), call in zip(itertools.pairwise(batch.entry_bounds), calls, strict=True):
        datums = batch.datum_M[start:end] - batch.datum_M[start]
        assert np.bincount(datums).tolist() == np.diff(call.target_offsets).tolist()


def test_a_cut_takes_its_own_part_of_the_call() -> None:
    call = call_of([(5, 0), (20, 2), (3, 0)])
    pieces = cut(0, call, 24)
    assert [(piece.first, piece.last, piece.opens) for piece in pieces] == [(0, 1, True), (1, 3, False)]
    batch = pack([call], pieces[1:])
    assert batch.tokens_T.tolist() == list(range(5, 28))
    assert batch.targets_U.tolist() == list(range(5, 48))
    assert batch.rows_U is not None
    assert batch.rows_U[[0, 1, 2, 39, 40, 42]].tolist() == [0, 0, 1, 19, 20, 22]
