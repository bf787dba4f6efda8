"""Whose state is where: moved when the company changes, shared by forks, and given up with its sequence."""

import pytest
import torch

from tinsmith.models.recurrence import RecurrentStates, Run
from tinsmith.sampling.lanes import Span
from tinsmith.sampling.recurrent import StateStore


def span(owner: int, start: int, count: int = 1) -> Span:
    return Span(owner, start, count, past=0, blocks=())


def advance(run: Run, values: list[float]) -> None:
    """What a layer does: the convolution's state changes in place once it is there, the recurrence's is replaced."""
    states: RecurrentStates = run.states
    new = torch.tensor(values)[:, None]
    if 3 in states.convolution:
        states.convolution[3].copy_(new)
    else:
        states.convolution[3] = new
    states.recurrence[3] = -new


def held(run: Run) -> list[float]:
    states: RecurrentStates = run.states
    assert torch.equal(states.convolution[3], -states.recurrence[3])
    return states.convolution[3][:, 0].tolist()


def begin(store: StateStore, *owners: int) -> None:
    for run, owner in zip(store.runs([span(owner, owner, 5) for owner in owners]), owners, strict=True):
        assert (run.sequences, run.states.nbytes) == (1, 0)
        advance(run, [float(owner)])


def test_prompts_run_one_by_one_and_single_rows_together() -> None:
    store = StateStore()
    begin(store, 1, 2)
    together, prompt, single = store.runs([span(1, 0), span(7, 1, 3), span(2, 4), span(8, 5)])
    assert (list(together.rows), together.sequences, held(together)) == ([0, 4], 2, [1.0, 2.0])
    assert (list(prompt.rows), prompt.sequences, prompt.states.nbytes) == ([1, 2, 3], 1, 0)
    assert (list(single.rows), single.states.nbytes) == ([5], 0)


def test_a_state_follows_its_sequence_through_changing_company() -> None:
    store = StateStore()
    begin(store, 1, 2, 3)
    for owners in ([1, 2, 3], [1, 2, 3], [3, 1], [1, 2], [2, 3, 1]):
        [run] = store.runs([span(owner, row) for row, owner in enumerate(owners)])
        assert [int(value) for value in held(run)] == owners
        advance(run, [value + 0.01 for value in held(run)])
    [run] = store.runs([span(owner, owner) for owner in (1, 2, 3)])
    assert held(run) == pytest.approx([1.05, 2.04, 3.04])


def test_states_stay_where_they_are_while_the_company_is_the_same() -> None:
    store = StateStore()
    begin(store, 1, 2)
    [first], [second] = (store.runs([span(1, 0), span(2, 1)]) for _ in range(2))
    assert first.states is second.states


def test_a_fork_keeps_the_state_that_its_leader_had() -> None:
    store = StateStore()
    begin(store, 1)
    store.fork(1, 2)
    [run] = store.runs([span(1, 0)])
    advance(run, [9.0])
    [fork] = store.runs([span(2, 0)])
    assert held(fork) == [1.0]
    store.drop(1)
    store.drop(5)
    store.check([2])
    with pytest.raises(AssertionError):
        store.check([1, 2])
