"""Gated delta nets in packed passes: a layer with a recurrent state runs one sequence after the other.

Its convolution and its recurrence would carry over from one packed sequence to the next, so the layer's own forward is
called once for every sequence (or for many of one row each), while all other layers see the whole pass.

Shapes: `T` rows of the pass, `N` sequences of a run, `L` rows of one, `D` hidden size.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from tinsmith.errors import ConfigError
from tinsmith.models.attention import ATTENTION_KEYWORD
from tinsmith.models.lora import CurrentPass
from tinsmith.models.recurrence import Recurrence, RecurrentStates

CONVOLUTION = "conv1d"
"""The frozen part of a delta net that is neither a linear layer nor a vector."""

_PROBE_CUTS = (5, 1, 1, 4)
_PROBE_TOLERANCE = {torch.float32: 1e-2}
_PROBE_TOLERANCE_LOW_PRECISION = 0.25
_CHUNK = 64
"""Rows that the recurrence takes at once."""


class SequenceBySequence:
    """The forward of a delta net in packed passes; takes the place of the method on one module."""

    def __init__(self, layer: Any, current: CurrentPass) -> None:
        self.layer = layer
        self.current = current

    def __call__(self, hidden_states: Tensor, **keywords: Any) -> Tensor:
        """[1, T, D] → [1, T, D], of the pass's sequences."""
        recurrence: Recurrence = keywords[ATTENTION_KEYWORD].recurrence
        whole, outputs = self.current.segments, []
        try:
            inputs = recurrence.take(hidden_states.squeeze(0))
            for run, segments, input_NLD in zip(recurrence.runs, recurrence.segments(whole), inputs, strict=True):
                self.current.segments = segments
                outputs.append(type(self.layer).forward(self.layer, input_NLD, cache_params=run.states))
        finally:
            self.current.segments = whole
        return recurrence.give(outputs, hidden_states.shape[1])[None]


def is_delta_net(module: Any) -> bool:
    """Whether a module is of the structure that is known here: Qwen3-Next's, or Qwen3.5's."""
    return (
        isinstance(getattr(module, CONVOLUTION, None), nn.Conv1d)
        and all(hasattr(module, name) for name in ("A_log", "dt_bias", "norm", "out_proj", "layer_idx"))
        and "cache_params" in inspect.signature(type(module).forward).parameters
    )


def run_by_sequence(layer: Any, current: CurrentPass) -> int:
    """Makes a delta net fit for packed passes; returns the bytes of one sequence's state.

    Raises ConfigError if its states are not the ones known here.
    """
    states = _check_states(layer)
    layer.forward = SequenceBySequence(layer, current)
    return states.nbytes


def activation_bytes(layer: Any) -> int:
    """Of one token: what backward keeps of the recurrence, which is computed in fp32.

    Several copies of queries, keys and values, a chunk's products of keys, and a state for every chunk.
    """
    widths, state = layer.head_k_dim + layer.head_v_dim, layer.head_k_dim * layer.head_v_dim
    return 4 * int(layer.num_v_heads * (8 * widths + 4 * _CHUNK + 2 * state // _CHUNK))


@torch.no_grad()
def _check_states(layer: Any) -> RecurrentStates:
    """One sequence in pieces, each from the last one's state, must come out as in one; returns its state."""
    weight = layer.out_proj.weight
    generator = torch.Generator().manual_seed(0)
    x_1LD = torch.randn(1, sum(_PROBE_CUTS), len(weight), generator=generator).to(weight.device, weight.dtype)
    states = RecurrentStates()
    pieces = [layer(piece, cache_params=states) for piece in x_1LD.split(_PROBE_CUTS, 1)]
    whole = layer(x_1LD)
    difference = ((torch.cat(pieces, 1) - whole).float().norm() / whole.float().norm().clamp(min=1e-30)).item()
    allowed = _PROBE_TOLERANCE.get(weight.dtype, _PROBE_TOLERANCE_LOW_PRECISION)
    if not difference <= allowed:
        raise ConfigError(
            f"{type(layer).__name__} keeps its state in a way that Tinsmith does not know of: in pieces, results "
            f"differ by {difference:.3g} of their norm, {allowed:.3g} is allowed"
        )
    return states
