"""A trainable model as files, and back: weights, optimizer state, accumulated gradient.

A folder holds what `models/weights.py` describes, and beside it optimizer.safetensors (both moments by tensor name, and
the number of steps) and gradient.safetensors, each only if there is such a state. Everything is fp32.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tinsmith.errors import UserError
from tinsmith.models.flat import Layout
from tinsmith.models.full import FullModel
from tinsmith.models.lora import Adapter
from tinsmith.models.weights import (
    ADAPTER_CONFIG,
    MODEL_FILE,
    adapter_spec,
    read_adapter,
    read_buffers,
    read_flat,
    read_tensor,
    replace_buffers,
    save_adapter,
    save_full,
    write_tensors,
)
from tinsmith.protocols import ModelSpec
from tinsmith.training.optimizers import AdamW
from tinsmith.training.runs import Trainable

OPTIMIZER_FILE = "optimizer.safetensors"
GRADIENT_FILE = "gradient.safetensors"


def save_state(model: Trainable, base: str, folder: Path, *, optimizer: bool, gradient: bool) -> None:
    """Writes into the existing `folder`; see `load_state`."""
    weights = model.weights
    if isinstance(weights, Adapter):
        save_adapter(weights, base, folder)
    else:
        save_full(weights.layout.named_views(weights.weights), weights.module, folder)
    if optimizer:
        write_tensors(_optimizer_tensors(model.optimizer, weights.layout), folder / OPTIMIZER_FILE)
    if gradient and model.accumulated and weights.grad is not None:
        write_tensors(weights.layout.named_views(weights.grad), folder / GRADIENT_FILE)


def load_state(model: Trainable, folder: Path, *, optimizer: bool, gradient: bool) -> None:
    """Replaces the model's state. Raises UserError if the files do not fit the model. What raises changes nothing."""
    weights = model.weights
    layout, device = weights.layout, weights.weights.device
    flat, buffers = _read_weights(model, folder)
    state = _read_optimizer(folder / OPTIMIZER_FILE, layout, device) if optimizer else AdamW()
    has_gradient = gradient and (folder / GRADIENT_FILE).exists()
    grad = read_flat(folder / GRADIENT_FILE, layout) if has_gradient else None
    if grad is not None:
        weights.require_grad()  # now, since there may be no memory for it
    weights.weights.copy_(flat)
    weights.weights_changed()
    if isinstance(weights, FullModel):
        replace_buffers(weights.module, buffers)
    model.optimizer = state
    model.clear_gradient()
    if grad is not None:
        weights.require_grad().copy_(grad)
        model.accumulated = True


def _read_weights(model: Trainable, folder: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """The flat weights, and a full model's buffers."""
    weights = model.weights
    is_lora = (folder / ADAPTER_CONFIG).exists()
    if is_lora != isinstance(weights, Adapter):
        kinds = {True: "a LoRA adapter", False: "a full-parameter model"}
        raise UserError(f"the checkpoint holds {kinds[is_lora]}, this model is {kinds[not is_lora]}")
    if isinstance(weights, Adapter):
        own = weights.spec
        saved = replace(adapter_spec(folder), seed=own.seed, optimizer=own.optimizer)
        if saved != own:
            raise UserError(
                f"the checkpoint's adapter does not fit this model: {_compare(saved, own)}; "
                "create_training_client_from_state makes a model that it fits"
            )
        return read_adapter(folder, weights.layout), {}
    buffers = read_buffers(folder / MODEL_FILE, weights.module)
    return read_flat(folder / MODEL_FILE, weights.layout, others=buffers), buffers


def _compare(saved: ModelSpec, own: ModelSpec) -> str:
    """What a checkpoint's specification has otherwise than the model's own."""
    others = own.to_dict()
    differing = [name for name, value in saved.to_dict().items() if value != others[name]]
    return ", ".join(f"it has {name}={getattr(saved, name)}, not {others[name]}" for name in differing)


def _optimizer_tensors(optimizer: AdamW, layout: Layout) -> dict[str, Tensor]:
    tensors = {"step": torch.tensor(optimizer.step_count)}
    for moment, flat in (("exp_avg", optimizer.exp_avg), ("exp_avg_sq", optimizer.exp_avg_sq)):
        if flat is not None:
            tensors |= {f"{moment}.{name}": view for name, view in layout.named_views(flat).items()}
    return tensors


def _read_optimizer(path: Path, layout: Layout, device: torch.device) -> AdamW:
    if not path.exists():
        raise UserError("the checkpoint has no optimizer state; it was saved for sampling, or without")
    optimizer = AdamW()
    optimizer.step_count = int(read_tensor(path, "step"))
    if optimizer.step_count:
        optimizer.exp_avg = read_flat(path, layout, prefix="exp_avg.").to(device)
        optimizer.exp_avg_sq = read_flat(path, layout, prefix="exp_avg_sq.").to(device)
    return optimizer
