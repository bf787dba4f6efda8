"""The plainest decoder layers: which families have them, what one consists of, and what the modules compute with them.

Whoever computes such layers in their own way, on a CPU or a GPU, for training or for sampling, takes them apart here
and compares results here. Knows no way to compute them, and no tolerance.

Shapes: `T` rows of the probe, `D` hidden size.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinsmith.models.attention import Heads, PackedAttention
from tinsmith.models.lora import LinearGroup, Segment
from tinsmith.models.norms import FrozenRMSNorm

FAMILIES = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
"""Architectures whose layers are known to be no more than `LayerParts`, at any length."""


@dataclass(frozen=True, slots=True)
class LayerParts:
    """Attention and a gated feed-forward network, each behind a norm and added to what came in.

    Queries and keys may have norms of their own, of equal epsilon: over each head, before its rotation. `scaling` is
    the factor of attention's scores; a row sees at most `window` rows.
    """

    before: FrozenRMSNorm
    heads: LinearGroup  # queries, keys, values
    head_norms: tuple[FrozenRMSNorm, FrozenRMSNorm] | None  # of queries and of keys
    out: LinearGroup
    between: FrozenRMSNorm
    gate_up: LinearGroup
    activation: nn.Module
    down: LinearGroup
    width: int  # of a head
    counts: tuple[int, int, int]  # heads of queries, of keys, of values
    scaling: float
    window: int | None

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        return self.heads, self.out, self.gate_up, self.down


def weight_of(norm: FrozenRMSNorm) -> Tensor:
    original: Any = norm.original
    weight: Tensor = original.weight
    return weight


def parts_of(layer: Any, scaling: float, window: int | None = None) -> LayerParts:
    """The parts of a decoder layer of one of `FAMILIES`. Raises ValueError if its heads' norms differ in epsilon."""
    attention, mlp = layer.self_attn, layer.mlp
    heads: LinearGroup = attention.q_proj.group
    query, key, value = (outputs // attention.head_dim for outputs in heads.outputs)
    norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
    if norms is not None and norms[0].eps != norms[1].eps:
        raise ValueError(f"the norms of queries and keys differ in epsilon: {norms[0].eps}, {norms[1].eps}")
    return LayerParts(
        before=layer.input_layernorm,
        heads=heads,
        head_norms=norms,
        out=attention.o_proj.group,
        between=layer.post_attention_layernorm,
        gate_up=mlp.gate_proj.group,
        activation=mlp.act_fn,
        down=mlp.down_proj.group,
        width=attention.head_dim,
        counts=(query, key, value),
        scaling=scaling,
        window=window,
    )


def gates_are_silu(model: Any) -> bool:
    """Whether SiLU gates all feed-forward networks of a base model of `FAMILIES`: kernels for GPUs compute no other.

    Comparing hidden states may not show another function, which makes nearly the same of small numbers.
    """
    x = torch.linspace(-8, 8, 65)
    return all(torch.allclose(layer.mlp.act_fn(x), F.silu(x)) for layer in model.module.model.layers)


class AttentionObserver(PackedAttention):
    """Attention that notes, by layer, the scaling and the window that are asked for."""

    def __init__(self, cu_seqlens: Sequence[int]) -> None:
        super().__init__(cu_seqlens)
        self.calls: dict[int, tuple[float, int | None]] = {}

    def __call__(self, layer: int, heads: Heads) -> Tensor:
        self.calls[layer] = (heads.scaling, heads.window)
        return super().__call__(layer, heads)


class Probe:
    """Short sequences, and what a base model's modules make of them. Made without gradients."""

    def __init__(self, model: Any, lengths: Sequence[int] = (7, 4)) -> None:
        rows = sum(lengths)
        self.tokens_T = (torch.arange(rows) * 7 % model.vocab_size).to(model.device)
        self.positions_T = torch.cat([torch.arange(length) for length in lengths]).to(model.device)
        self.segments = [Segment(None, 0, rows)]
        self.attention = AttentionObserver([0, *itertools.accumulate(lengths)])
        self._expected_TD = model.hidden(self.tokens_T, self.positions_T, self.segments, self.attention).float()
        self.calls = self.attention.calls
        """By layer, the scaling and the window that its attention asks for."""

    def difference(self, hidden_TD: Tensor) -> float:
        """How far these hidden states lie from the modules', as a share of their norm."""
        difference_TD = hidden_TD.float() - self._expected_TD
        return (difference_TD.norm() / self._expected_TD.norm()).item()
