"""Whether a base model still has the weights that an adapter was trained on: a fingerprint of its linear layers.

A name does not say so: a folder may get other files, a hub name another revision. The same weights have the same
fingerprint in float32 and bfloat16, on any device, however their files are divided.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tinsmith.models.families import Target

_NUMBERS = 256  # of each layer, evenly spaced: training moves most of them, or hardly changes what is computed


@torch.no_grad()
def fingerprint_of(module: Any, targets: Sequence[Target]) -> str:
    """16 hexadecimal digits, of a causal language model as it was loaded and the linear layers in it."""
    numbers = torch.stack([_some_of(target.weight(module)) for target in targets])
    return hashlib.sha256(numbers.cpu().view(torch.int16).numpy().tobytes()).hexdigest()[:16]


def _some_of(weight: Tensor) -> Tensor:
    """bfloat16 [256]; a small matrix's come more than once."""
    index = torch.arange(_NUMBERS, device=weight.device) * (weight.numel() - 1) // (_NUMBERS - 1)
    return weight.flatten()[index].to(torch.bfloat16)
