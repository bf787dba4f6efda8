"""What a decoder layer computes between its projections, forward and backward, for training on a CUDA device.

Queries and keys are normalised (in some families) and rotated, by our own kernels, and attend. What comes in is kept;
what attention reads is computed again. Knows neither projections nor adapters.

Shapes: `T` rows of a packed batch, `H` query heads, `G` key/value heads, `d` head dimension, `O` heads of queries, keys
and values side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tinsmith.models.fused_attention import FusedAttention
from tinsmith.models.kernels import norm_rope, norm_rope_backward


@dataclass(frozen=True, slots=True)
class Sequences:
    """The sequences of one pass: how they attend, and the angles of their positions."""

    attention: FusedAttention
    cos_Td: Tensor
    sin_Td: Tensor


@dataclass(frozen=True, slots=True)
class FusedHeads:
    """The heads of one layer: how many of each kind, of which width, and their norms' weights, if there are any."""

    counts: tuple[int, int, int]  # of queries, of keys, of values
    width: int
    scaling: float
    weights: tuple[Tensor | None, Tensor | None]
    eps: float

    def forward(self, heads_TO: Tensor, sequences: Sequences) -> tuple[Tensor, list[Tensor]]:
        """(what attention gives [T, H · d], what `backward` needs beside it and what came in)."""
        attended_THd, kept = sequences.attention.forward(*self._turned(heads_TO, sequences), self.scaling)
        return attended_THd.flatten(1), kept

    def backward(
        self,
        dattended_TO: Tensor,
        heads_TO: Tensor,
        attended_TO: Tensor,
        kept: Sequence[Tensor],
        sequences: Sequences,
        gradients: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The gradient [T, O] in what came in; those in the norms' weights are added to `gradients`, if given."""
        dattended_THd, attended_THd = (each.unflatten(1, (-1, self.width)) for each in (dattended_TO, attended_TO))
        inputs = self._turned(heads_TO, sequences)
        dinputs = sequences.attention.backward(dattended_THd, inputs, attended_THd, kept, self.scaling)
        del inputs
        angles = sequences.cos_Td, sequences.sin_Td
        return norm_rope_backward(dinputs, heads_TO, *angles, *self.weights, self.eps, gradients)

    def _turned(self, heads_TO: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, d] and keys [T, G, d], normalised and rotated, and values [T, G, d]."""
        (query, key, _), width = self.counts, self.width
        turned_TO = heads_TO.new_empty(heads_TO.shape[0], (query + key) * width)
        angles = sequences.cos_Td, sequences.sin_Td
        norm_rope(heads_TO, *angles, *self.weights, self.eps, query, key, width, turned_TO)
        query_THd, key_TGd = turned_TO.unflatten(1, (-1, width)).split([query, key], 1)
        return query_THd, key_TGd, heads_TO.unflatten(1, (-1, width))[:, query + key :]
