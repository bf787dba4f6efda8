"""The recurrent states of running sequences, for models that have layers without keys and values.

A state is all that such a layer keeps of a sequence: it cannot be cut, so cached prefixes are of no use to it. States
of sequences that run together lie side by side; they are moved only when the company changes. Knows spans, not
requests.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinsmith.models.recurrence import RecurrentStates, Run
from tinsmith.sampling.lanes import Span


@dataclass(slots=True, eq=False)
class _Batch:
    """States side by side. `owners` is empty once somebody else needs them as they are."""

    owners: tuple[int, ...]
    states: RecurrentStates


class StateStore:
    """Which sequence (named by its span's `owner`) has which state."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[_Batch, int]] = {}

    def runs(self, spans: Sequence[Span]) -> list[Run]:
        """How recurrent layers take these spans: single rows of known sequences together, the others one by one.

        The pass must go through all recurrent layers; the states are then those after it.
        """
        decoding = [span for span in spans if span.count == 1 and span.owner in self._held]
        runs = []
        if decoding:
            states = self._enter(tuple(span.owner for span in decoding))
            runs.append(Run([span.start for span in decoding], len(decoding), states))
        runs += [
            Run(range(span.start, span.start + span.count), 1, self._enter((span.owner,)))
            for span in spans
            if span not in decoding
        ]
        return runs

    def fork(self, owner: int, new: int) -> None:
        """Another sequence goes on from the state of this one."""
        if owner in self._held:
            batch, row = self._held[owner]
            batch.owners = ()
            self._held[new] = (batch, row)

    def drop(self, owner: int) -> None:
        """Unknown sequences are ignored."""
        self._held.pop(owner, None)

    def check(self, owners: Collection[int]) -> None:
        """Raises AssertionError unless exactly these sequences have a state."""
        assert self._held.keys() == set(owners), f"states of {sorted(self._held)}, wanted of {sorted(owners)}"

    def _enter(self, owners: tuple[int, ...]) -> RecurrentStates:
        """The states of these sequences side by side; empty for one that has none."""
        held = [self._held[owner] for owner in owners if owner in self._held]
        if held and held[0][0].owners == owners and all(batch is held[0][0] for batch, _ in held):
            return held[0][0].states
        batch = _Batch(owners, _gather(held))
        self._held |= {owner: (batch, row) for row, owner in enumerate(owners)}
        return batch.states


def _gather(held: Sequence[tuple[_Batch, int]]) -> RecurrentStates:
    states = RecurrentStates()
    for layer in held[0][0].states.convolution if held else ():
        states.convolution[layer] = _rows([(batch.states.convolution[layer], row) for batch, row in held])
        states.recurrence[layer] = _rows([(batch.states.recurrence[layer], row) for batch, row in held])
    return states


def _rows(parts: Sequence[tuple[Tensor, int]]) -> Tensor:
    """These rows of these tensors, in a tensor of their own."""
    return torch.stack([tensor[row] for tensor, row in parts])
