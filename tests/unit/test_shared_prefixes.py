"""Datums of a call that begin alike: how they are grouped, cut and packed."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tinsmith.models.invariant import LEAST_ROWS
from tinsmith.training.batching import MOST_SHARING, MicroBatch, cut, pack, plan
from tinsmith.training.shared_prefixes import LEAST_SHARED, gathered, most_shared, worth_sharing
from tinsmith.wire.packing import TrainCall

LONG = LEAST_SHARED + 8


def call_of(texts: list[list[int]], widths: list[int] | None = None) -> TrainCall:
    """A call whose targets are the tokens behind, of which there are several different ones where a width says so."""
    widths = widths or [0] * len(texts)
    lengths = np.array([len(text) for text in texts])
    targets = [
        np.repeat([*text[1:], 7], max(width, 1)) + np.tile(np.arange(max(width, 1)), len(text))
        for text, width in zip(texts, widths, strict=True)
    ]
    return TrainCall(
        "cross_entropy",
        {},
        False,
        np.concatenate([np.array(text, np.int32) for text in texts]),
        np.cumsum([0, *lengths]),
        np.concatenate(targets).astype(np.int32),
        np.cumsum([0, *(len(each) for each in targets)]),
        np.array(widths, np.int32),
        {},
    )


def groups_of(texts: list[list[int]]) -> list[tuple[tuple[int, ...], int]]:
    """Datums and shared tokens of every group."""
    call = call_of(texts)
    groups = gathered(call, most_shared(call)).groups
    return [(group.datums, group.shared) for group in groups]


def behind(batch: MicroBatch, row: int) -> list[int]:
    """The tokens that a row of a batch sees, its own last."""
    sequence = int(np.searchsorted(batch.cu_seqlens, row, side="right")) - 1
    own = batch.tokens_T[batch.cu_seqlens[sequence] : row + 1].tolist()
    prefix = -1 if batch.prefixes_S is None else batch.prefixes_S[sequence]
    return own if prefix < 0 else [*behind(batch, batch.cu_seqlens[prefix + 1] - 1), *own]


def test_samples_of_one_prompt_are_a_group_wherever_they_are_and_keep_a_token_of_their_own() -> None:
    prompt, other = list(range(LONG)), list(range(50, 90))
    texts = [[*prompt, 1, 2], [5], [*prompt, 1, 3, 4], other, prompt, [5]]
    assert groups_of(texts) == [((0, 2, 4), LONG - 1), ((1,), 0), ((3,), 0), ((5,), 0)]
    assert groups_of([[*other, 1], [*prompt, 1], [*other, 2], [*prompt, 2]]) == [((0, 2), 40), ((1, 3), LONG)]


def test_a_short_start_or_one_that_saves_little_is_not_shared() -> None:
    short, prompt = list(range(LEAST_SHARED - 1)), list(range(LEAST_SHARED))
    assert not worth_sharing(call_of([[*short, 1], [*short, 2]]))
    assert not worth_sharing(call_of([[*prompt, *range(300)], [*prompt, 5, *range(300)]]))
    assert worth_sharing(call_of([[*prompt, 1], [*prompt, 2]]))


def test_a_datum_that_would_shorten_what_a_large_group_shares_begins_another() -> None:
    prompt = list(range(3 * LEAST_SHARED))
    texts = [*([*prompt, number, 1] for number in range(8)), [*prompt[: LEAST_SHARED + 1], 99, 98]]
    assert groups_of(texts) == [(tuple(range(8)), len(prompt)), ((8,), 0)]


def test_what_all_prompts_begin_with_does_not_keep_samples_of_one_from_sharing_all_of_it() -> None:
    """Neither a sample that is alone of its prompt, nor samples of two prompts by turns."""
    start = list(range(LEAST_SHARED + 3))
    alone, one, other = ([*start, *range(first, first + 200)] for first in (1000, 2000, 3000))
    texts = [[*alone, 1], *([*prompt, number] for number in range(3) for prompt in (one, other))]
    assert groups_of(texts) == [((0,), 0), ((1, 3, 5), len(one)), ((2, 4, 6), len(other))]
    assert groups_of([[*alone, 1], [*one, 1], [*other, 1]]) == [((0, 1, 2), len(start))]


TEXT = st.tuples(st.integers(0, 3), st.integers(0, LONG), st.lists(st.integers(0, 2), min_size=1, max_size=9))
"""One of four prompts, how much of it, and what follows."""


@given(st.lists(TEXT, min_size=1, max_size=9), st.integers(1, 150), st.booleans(), st.data())
def test_every_token_has_a_row_that_sees_what_comes_before_it(
    shapes: list[tuple[int, int, list[int]]], budget: int, wide: bool, data: st.DataObject
) -> None:
    texts = [[100 * prompt + place for place in range(length)] + rest for prompt, length, rest in shapes]
    widths = data.draw(st.lists(st.integers(0, 3), min_size=len(texts), max_size=len(texts))) if wide else None
    call = call_of(texts, widths)
    cuts = cut(0, call, budget, share=True)
    assert [datum for piece in cuts for datum in range(piece.first, piece.last)] == list(range(len(texts)))
    for piece in cuts:
        assert piece.rows <= budget or piece.last - piece.first == 1
        batch = pack([call], [piece])
        assert len(batch.tokens_T) == max(piece.rows, LEAST_ROWS) == batch.cu_seqlens[-1]
        assert batch.positions_T.tolist() == [len(behind(batch, row)) - 1 for row in range(len(batch.tokens_T))]
        picks = np.arange(len(batch.targets_U)) if batch.picks_M is None else batch.picks_M
        rows = np.arange(len(batch.tokens_T)) if batch.rows_U is None else batch.rows_U
        assert (np.diff(rows) >= 0).all()
        entry = 0
        for datum in range(piece.first, piece.last):
            width = max(call.widths_N[datum], 1)
            for place, number in itertools.product(range(len(texts[datum])), range(width)):
                assert behind(batch, rows[picks[entry]]) == texts[datum][: place + 1]
                assert batch.targets_U[picks[entry]] == call.targets_M[call.target_offsets[piece.first] + entry]
                assert batch.datum_M[entry] == datum - piece.first, number
                entry += 1


def test_equal_datums_are_computed_nearly_once() -> None:
    text = list(range(LONG))
    call = call_of([text] * 10)
    [piece] = cut(0, call, 10**6, share=True)
    batch = pack([call], [piece])
    assert piece.rows == LONG - 1 + 10
    assert len(batch.targets_U) - (len(batch.tokens_T) - piece.rows) == LONG - 1 + 10
    assert cut(0, call, 10**6)[0].rows == 10 * LONG


def test_what_datums_share_is_bounded_by_a_multiple_of_the_budget() -> None:
    """Short answers to one long prompt: each takes a row of a pass, and a copy of the prompt's keys and values."""
    texts = [[*range(100), 200 + number] for number in range(300)]
    cuts = cut(0, call_of(texts), 200, share=True)
    assert max(piece.last - piece.first for piece in cuts) == MOST_SHARING * 200 // 101
    assert sum(piece.rows for piece in cuts) == 300 + 100 * len(cuts)


def test_calls_of_one_pass_are_bounded_together_in_what_their_datums_share() -> None:
    """Each has few rows, so that many would fit; but copies of what they share would be many times the budget."""
    calls = [call_of([[*range(100), 200 + number] for number in range(10)])] * 8
    passes = plan(calls, "abcdefgh", 500, share=True)
    assert [sum(piece.rows for piece in cuts) for cuts in passes] == [330, 330, 220]
    assert 3 * calls[0].num_tokens <= MOST_SHARING * 500 < 4 * calls[0].num_tokens
