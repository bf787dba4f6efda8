"""Weights as immutable snapshots and as files: PEFT's layout for adapters, Hugging Face's for full models.

Sizes, names, shapes and ranks are checked on reading; what does not fit is refused with UserError.
"""

import json
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tinsmith.errors import UserError
from tinsmith.models.families import EXPERT_PARAMETERS
from tinsmith.models.flat import Layout
from tinsmith.models.loading import BaseModel
from tinsmith.models.lora import Adapter, AdapterLayout
from tinsmith.models.peft_format import (
    check_adapter_config,
    check_names,
    module_of,
    our_name,
    peft_name,
    trained_modules,
)
from tinsmith.protocols import ModelSpec

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
MODEL_FILE = "model.safetensors"
BASE_FILE = "base.json"  # what an adapter's base was; not in its files, whose names and settings others read, too


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """A snapshot of an adapter; nobody writes to it."""

    adapter: Adapter
    base: str

    @property
    def nbytes(self) -> int:
        return self.adapter.nbytes


@dataclass(frozen=True, slots=True)
class FullWeights:
    """A snapshot of a full-parameter model: a module of its own."""

    module: Any

    @property
    def nbytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.module.parameters())


def save_weights(weights: LoraWeights | FullWeights, folder: Path) -> None:
    """Writes a snapshot into an existing folder."""
    if isinstance(weights, LoraWeights):
        save_adapter(weights.adapter, weights.base, folder)
    else:
        save_full(dict(weights.module.named_parameters()), weights.module, folder)


def load_weights(model: BaseModel, folder: Path) -> LoraWeights | FullWeights:
    """Reads what `save_weights` wrote (or PEFT, or Hugging Face), for this base model. Raises UserError."""
    if (folder / ADAPTER_CONFIG).exists():
        spec = adapter_spec(folder)
        layout = model.layout(spec)
        flat = read_adapter(folder, layout).to(model.device)
        return LoraWeights(Adapter(spec, layout, flat, model.dtype), model.folder)
    module = model.full_copy(trainable=False)
    parameters = dict(module.named_parameters())
    full_layout = Layout(list(parameters), [tuple(parameter.shape) for parameter in parameters.values()])
    buffers = read_buffers(folder / MODEL_FILE, module)
    views = full_layout.named_views(read_flat(folder / MODEL_FILE, full_layout, others=buffers))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(views[name])
    replace_buffers(module, buffers)
    return FullWeights(module)


def save_adapter(adapter: Adapter, base: str, folder: Path) -> None:
    """Writes adapter_model.safetensors (fp32), adapter_config.json, and what the base's weights were."""
    tensors = {peft_name(name): view for name, view in adapter.layout.named_views(adapter.weights).items()}
    write_tensors(tensors, folder / ADAPTER_FILE)
    (folder / BASE_FILE).write_text(json.dumps({"fingerprint": adapter.layout.fingerprint}) + "\n")
    modules, parameters = peft_targets(list(tensors))
    alpha = float(adapter.spec.alpha)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.spec.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
        "target_parameters": parameters,
        "inference_mode": True,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def peft_targets(names: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """PEFT's target_modules and target_parameters of the names in an adapter file.

    Beside experts, an MLP's linear layers are named as parameters: as modules, PEFT takes them for the experts'.
    """
    paths = {name.split(".lora_")[0] for name in names}
    modules = {path.rpartition(".")[2] for path in paths}
    if "experts" not in modules:
        return sorted(modules), None
    linears = {path.rpartition(".")[2] for path in paths if ".mlp." in path} - {"experts", "base_layer"}
    parameters = [f"experts.{name}" for name in EXPERT_PARAMETERS] + [f"{name}.weight" for name in sorted(linears)]
    return sorted(modules - linears - {"experts", "base_layer"}), parameters


def save_full(tensors: Mapping[str, Tensor], module: Any, folder: Path) -> None:
    """Writes model.safetensors and config.json, as `from_pretrained` reads them; tied tensors are written once.

    `tensors` are the values of the module's parameters; its buffers are added.
    """
    write_tensors({**tensors, **_saved_buffers(module)}, folder / MODEL_FILE)
    module.config.save_pretrained(folder)


def _saved_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Those that belong to the weights, such as the bias with which a router chooses its experts."""
    saved = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in saved}


def read_buffers(path: Path, module: nn.Module) -> dict[str, Tensor]:
    """What a safetensors file holds for the buffers of `module`. Raises UserError if one is missing or misshapen."""
    buffers = {}
    for name, buffer in _saved_buffers(module).items():
        buffers[name] = read_tensor(path, name)
        if buffers[name].shape != buffer.shape:
            raise UserError(f"{path.name}: {name} has shape {list(buffers[name].shape)}, not {list(buffer.shape)}")
    return buffers


def replace_buffers(module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Writes what `read_buffers` returned."""
    for name, value in buffers.items():
        module.get_buffer(name).copy_(value)


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """One safetensors file; every tensor is written contiguous, from the CPU."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def adapter_spec(folder: Path) -> ModelSpec:
    """Rank, alpha and targets of an adapter folder. The seed is not known any more, and is 0. Raises UserError."""
    config = read_settings(folder)
    with _open(folder / ADAPTER_FILE) as file:
        names = list(_stored_names(file))
    check_names(names, ADAPTER_FILE)
    spec = ModelSpec(rank=config["r"], seed=0, alpha=float(config["lora_alpha"]))
    return replace(
        spec,
        train_attn=any(".self_attn." in name or ".linear_attn." in name for name in names),
        train_mlp=any(".mlp." in name for name in names),
        train_unembed=any(".unembed_tokens." in name for name in names),
    )


def read_adapter(folder: Path, layout: AdapterLayout) -> Tensor:
    """Flat fp32 CPU weights of an adapter folder, written by `save_adapter` or by PEFT. Raises UserError.

    `save_adapter` notes what the base's weights were, and they must be the layout's, if it has any; PEFT does not.
    An adapter of fewer modules than the layout's is zero in the others: it computes, and trains, as if they had none.
    """
    path = folder / ADAPTER_FILE
    modules = trained_modules(_read_json(folder / ADAPTER_CONFIG))
    flat = torch.zeros(layout.total)
    with _open(path) as file:
        stored = _stored_names(file)
        wanted = {name for name in layout.names if name in stored or modules is None or module_of(name) in modules}
        _check_names(path, wanted, stored.keys())
        if (folder / BASE_FILE).exists():
            _check_base(_read_json(folder / BASE_FILE).get("fingerprint"), layout.fingerprint)
        for name, view in layout.named_views(flat).items():
            if name in stored:
                _copy(path, file, stored[name], view)
    return flat


def _check_base(trained_on: str | None, fingerprint: str) -> None:
    if trained_on and fingerprint and trained_on != fingerprint:
        raise UserError(
            f"the adapter was trained on other weights of the base model (fingerprint {trained_on}) than these "
            f"({fingerprint}): serve those again, or take it over to these knowingly, with tinsmith export and import"
        )


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of an adapter folder. Raises UserError for an adapter that computes what we do not."""
    config = _read_json(folder / ADAPTER_CONFIG)
    check_adapter_config(config, ADAPTER_CONFIG)
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises UserError."""
    with _open(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder under PEFT's names, without copies of frozen weights. Raises UserError."""
    read_settings(folder)
    with _open(folder / ADAPTER_FILE) as file:
        return {peft_name(ours): file.get_tensor(name) for ours, name in _stored_names(file).items()}


def _stored_names(file: Any) -> dict[str, str]:
    """The names in an adapter file by those of our layouts."""
    return {ours: name for name in file.keys() if (ours := our_name(name)) is not None}  # noqa: SIM118


def read_flat(path: Path, layout: Layout, *, prefix: str = "", others: Collection[str] = ()) -> Tensor:
    """Flat fp32 CPU weights of a safetensors file that holds exactly the layout's tensors, and `others`.

    With a `prefix`, reads only the names that start with it. Raises UserError.
    """
    flat = torch.empty(layout.total)
    with _open(path) as file:
        found = {name for name in file.keys() if name.startswith(prefix)} - set(others)  # noqa: SIM118
        _check_names(path, {prefix + name for name in layout.names}, found)
        for name, view in layout.named_views(flat).items():
            _copy(path, file, prefix + name, view)
    return flat


def _check_names(path: Path, wanted: Set[str], found: Set[str]) -> None:
    if found != wanted:
        missing, surplus = sorted(wanted - found), sorted(found - wanted)
        raise UserError(f"{path.name} does not fit this model: missing {missing[:3]}, not expected {surplus[:3]}")


def _copy(path: Path, file: Any, name: str, view: Tensor) -> None:
    tensor = file.get_tensor(name)
    if tensor.shape != view.shape:
        raise UserError(f"{path.name}: {name} has shape {list(tensor.shape)}, this model has {list(view.shape)}")
    view.copy_(tensor)


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors file. Raises UserError."""
    with _open(path) as file:
        if name not in file.keys():  # noqa: SIM118
            raise UserError(f"{path.name} has no {name!r}")
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path.name} is missing or not a safetensors file: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} is missing or not JSON: {error}") from error
    return dict(config)
