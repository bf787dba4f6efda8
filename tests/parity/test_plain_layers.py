"""What is asked of layers before kernels stand in for them."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from tinsmith.models.loading import load_base
from tinsmith.models.plain_layers import gates_are_silu


def test_a_gate_other_than_silu_is_noticed_in_any_layer(folders: Callable[[str], Path]) -> None:
    base = load_base(folders("llama"), dtype=torch.float32, device=torch.device("cpu"), on_progress=lambda _: None)
    assert gates_are_silu(base)
    for gate in (nn.GELU(), nn.ReLU()):
        base.module.model.layers[-1].mlp.act_fn = gate
        assert not gates_are_silu(base)
