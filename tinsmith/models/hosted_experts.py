"""Adapters of mixtures of experts as Tinker's hosted service exports them, brought into PEFT's form.

There gate (w1), up (w3) and down projection (w2) have a pair each, A [E, R, I] and B [E, O, R], of which all experts
may share one (E is 1). In PEFT's form gate and up are one fused layer with one A: theirs are put one below the other.
So the rank doubles, in every layer (the others are filled with zeros), and alpha with it: the scale, and what the
adapter computes, stay.

Shapes: `E` experts, `R` rank there and `Q` here, `I` inputs, `O` outputs.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.errors import UserError
from tinsmith.models.experts import MultiAdapterExperts
from tinsmith.models.loading import BaseModel
from tinsmith.models.peft_format import our_name, peft_name
from tinsmith.models.weights import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    peft_targets,
    read_settings,
    read_tensors,
    write_tensors,
)

_GATE, _DOWN, _UP = ".experts.w1.", ".experts.w2.", ".experts.w3."


def has_hosted_experts(names: Iterable[str]) -> bool:
    return any(part in name for name in names for part in (_GATE, _DOWN, _UP))


def fuse_hosted_experts(tensors: Mapping[str, Tensor], experts: int, *, concatenated: bool) -> dict[str, Tensor]:
    """The tensors under PEFT's names, of twice the rank.

    `experts` is how many a layer has; `concatenated` says that a fused layer's outputs are first those of the gate,
    then those of the up projection, and not by turns. Raises KeyError for a layer without one of its projections.
    """
    fused: dict[str, Tensor] = {}
    for raw, tensor in tensors.items():
        name = raw.replace(".attn.", ".self_attn.")
        if _GATE in name:
            fused |= _gate_and_up(name, tensors, raw, experts, concatenated)
        elif _DOWN in name:
            fused[name.replace(_DOWN, ".experts.")] = _flat(_wide(_each(tensor, experts), name), name)
        elif _UP not in name:
            fused[name] = _wide(tensor, name)
    return fused


def _gate_and_up(
    name: str, tensors: Mapping[str, Tensor], raw: str, experts: int, concatenated: bool
) -> Iterator[tuple[str, Tensor]]:
    gate, up = (_each(tensors[raw.replace(_GATE, part)], experts) for part in (_GATE, _UP))
    if ".lora_A." in name:
        both = torch.cat([gate, up], 1)
    else:
        gate, up = F.pad(gate, (0, up.shape[2])), F.pad(up, (gate.shape[2], 0))
        both = torch.cat([gate, up], 1) if concatenated else torch.stack([gate, up], 2).flatten(1, 2)
    yield name.replace(_GATE, ".experts.base_layer."), _flat(both, name)


def _each(tensor: Tensor, experts: int) -> Tensor:
    return tensor.expand(experts, -1, -1)


def _wide(tensor: Tensor, name: str) -> Tensor:
    """Of twice the rank, the new half zero: A […, Q, I], B […, O, Q]."""
    if ".lora_A." in name:
        return F.pad(tensor, (0, 0, 0, tensor.shape[-2]))
    return F.pad(tensor, (0, tensor.shape[-1]))


def _flat(matrices: Tensor, name: str) -> Tensor:
    """All experts' matrices as PEFT saves them: A [E · Q, I], expert by expert; B [O, Q · E], rank by rank."""
    if ".lora_A." in name:
        return matrices.flatten(0, 1)
    return matrices.permute(1, 2, 0).flatten(1)


def adopt_hosted(model: BaseModel, folder: Path, spare: Path) -> Path:
    """`folder`, or, if its adapter has such experts, `spare`, which is made and gets the same adapter in PEFT's form.

    Raises UserError. That the result fits the base model, whoever loads it finds out.
    """
    layers = [child.original for child in model.module.modules() if isinstance(child, MultiAdapterExperts)]
    tensors = read_tensors(folder / ADAPTER_FILE)
    if not layers or not has_hosted_experts(tensors):
        return folder
    config = read_settings(folder)
    experts = max(target.experts for target in model.targets)
    try:
        fused = fuse_hosted_experts(tensors, experts, concatenated=bool(layers[0].is_concatenated))
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{ADAPTER_FILE}: its experts (w1, w2, w3) do not belong together: {error}") from error
    named = {peft_name(ours): tensor for name, tensor in fused.items() if (ours := our_name(name)) is not None}
    modules, parameters = peft_targets(list(named))
    config |= {"r": 2 * config["r"], "lora_alpha": 2 * config["lora_alpha"]}
    spare.mkdir()
    write_tensors(named, spare / ADAPTER_FILE)
    targets = {"target_modules": modules, "target_parameters": parameters}
    (spare / ADAPTER_CONFIG).write_text(json.dumps(config | targets))
    return spare
