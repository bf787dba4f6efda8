"""What layers with a recurrent state need to know of a packed pass: which rows are a sequence, and its state so far.

Knows row numbers, segments and states; neither what a layer computes nor what a sequence is for.

Shapes: `T` rows of the pass, `R` rows that belong to a sequence, `N` sequences of a run, `L` rows of one, `D` hidden
size, `C` channels of a convolution, `K` its width.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.models.lora import Segment, SegmentPart


class _LayerStates(NamedTuple):
    """One layer's states in the form of transformers before 5.21."""

    conv_states: tuple[Tensor, ...]
    recurrent_states: tuple[Tensor, ...]
    record_past: bool = False


class RecurrentStates:
    """What N sequences carry over from one pass to the next, by layer; empty before the first.

    To transformers' modules this is a cache: they fetch and replace the states by these methods. (Before 5.21 by
    `has_previous_state` and `layers`, instead of the getters.)
    """

    def __init__(self) -> None:
        self.convolution: dict[int, Tensor] = {}  # [N, C, K]
        self.recurrence: dict[int, Tensor] = {}  # [N, heads, key dimension, value dimension]

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for states in (self.convolution, self.recurrence) for state in states.values())

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.convolution.get(layer_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.recurrence.get(layer_idx)

    def has_previous_state(self, layer_idx: int, state_idx: int = 0) -> bool:
        return layer_idx in self.recurrence

    @property
    def layers(self) -> dict[int, _LayerStates]:
        return {
            layer: _LayerStates((self.convolution[layer],), (recurrence,))
            for layer, recurrence in self.recurrence.items()
        }

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *, conv_kernel_size: int, **_: Any) -> Tensor:
        """Takes the convolution's new inputs [N, C, L]; returns them behind those that they must see."""
        before = self.convolution.get(layer_idx)
        missing = max(0, conv_kernel_size - conv_states.shape[-1])
        inputs = F.pad(conv_states, (missing, 0)) if before is None else torch.cat([before, conv_states], -1)
        self.convolution[layer_idx] = inputs[..., -conv_kernel_size:].clone()
        return inputs

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, **_: Any) -> Tensor:
        self.recurrence[layer_idx] = recurrent_states
        return recurrent_states


@dataclass(frozen=True, slots=True)
class Run:
    """Rows of a pass (ascending) that a layer takes in one call: of so many sequences, equally many of each.

    They go on from `states`, which are replaced; without, they begin at nothing and leave nothing.
    """

    rows: Sequence[int]
    sequences: int = 1
    states: RecurrentStates | None = None


class Recurrence:
    """How recurrent layers take the rows of one pass. Rows that are in no run are padding and stay zero."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self._order = [row for run in runs for row in run.rows]
        self._order_R: Tensor | None = None
        self._parts: tuple[Sequence[Segment], list[list[Segment]]] = ((), [])

    def take(self, x_TD: Tensor) -> list[Tensor]:
        """[N, L, D] of every run."""
        if self._order_R is None and self._order != list(range(len(x_TD))):
            self._order_R = torch.tensor(self._order, device=x_TD.device)
        x_RD = x_TD if self._order_R is None else x_TD.index_select(0, self._order_R)
        parts = x_RD.split([len(run.rows) for run in self.runs])
        return [part.unflatten(0, (run.sequences, -1)) for part, run in zip(parts, self.runs, strict=True)]

    def give(self, outputs: Sequence[Tensor], rows: int) -> Tensor:
        """The inverse of `take`."""
        y_RD = torch.cat([output.flatten(0, 1) for output in outputs]) if len(outputs) > 1 else outputs[0].flatten(0, 1)
        if self._order_R is None:
            return y_RD
        return y_RD.new_zeros(rows, y_RD.shape[1]).index_copy_(0, self._order_R, y_RD)

    def segments(self, whole: Sequence[Segment]) -> list[list[Segment]]:
        """The segments of every run's rows, where `whole` are those of the pass."""
        if self._parts[0] is not whole:
            self._parts = (whole, [_narrow(whole, run.rows) for run in self.runs])
        return self._parts[1]


def _narrow(segments: Sequence[Segment], rows: Sequence[int]) -> list[Segment]:
    parts: list[Segment] = []
    for segment in segments:
        start, end = bisect_left(rows, segment.start), bisect_left(rows, segment.end)
        if start < end:
            parts.append(SegmentPart(segment, start, end))
    return parts
