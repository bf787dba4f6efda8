"""Trainer and sampler of one served model: found or fetched, loaded, and sized to the memory that there is.

A part of the composition root that needs no database, for benchmarks and tests, too. Imports are inside the functions,
since the command line shares this module with the engine.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tinsmith.config import Settings
from tinsmith.errors import ConfigError
from tinsmith.model_files import count_parameters, model_folder
from tinsmith.served import Served

if TYPE_CHECKING:
    import torch

    from tinsmith.models.loading import BaseModel
    from tinsmith.protocols import Sampler, Trainer
    from tinsmith.sampling.sampler import TorchSampler
    from tinsmith.sizing import Budgets, ModelSizes
    from tinsmith.training.trainer import TorchTrainer

logger = logging.getLogger(__name__)

CPU_RUNNING, DEVICE_RUNNING = 64, 1024  # sequences sampled at once, at most
DETERMINISTIC_TRAIN_TOKENS = {"cpu": 1024, "cuda": 8192}  # of a micro-batch, however much memory is free


@dataclass(frozen=True, slots=True)
class Device:
    """What models are computed on, and how much memory there is to divide."""

    kind: str  # cpu, cuda
    dtype: str  # float32, bfloat16: of a model that says nothing else
    total_bytes: int
    free_bytes: int


def find_device(settings: Settings) -> Device:
    """The device and dtype that the settings name or that there are. Raises ConfigError."""
    import torch

    from tinsmith import sizing

    device, dtype = choose_device(settings.device, settings.dtype)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        free, total = sizing.free_host_memory(), sizing.total_host_memory()
    return Device(device.type, str(dtype).removeprefix("torch."), total, free)


def load_backend(settings: Settings, served: Served, report: Callable[[str], None]) -> "tuple[Trainer, Sampler]":
    """The trainer and the sampler of one served model, sized to the memory that it may use.

    Needs no database: benchmarks and tests use it too. On a GPU, deterministic training needs the variables of
    `engine_environment`. Raises ConfigError.
    """
    report("starting")
    from transformers.utils.logging import disable_progress_bar

    from tinsmith.models.loading import load_base

    disable_progress_bar()  # type: ignore[no-untyped-call]  # `report` says how loading goes
    device, dtype = choose_device(settings.device, served.dtype)
    folder = model_folder(served, report)
    _check_weights(served, folder, device, dtype)
    _bound_memory(served, device)
    model = load_base(
        folder,
        dtype=dtype,
        device=device,
        on_progress=report,
        trust_remote_code=served.trust_remote_code,
        quick=not settings.deterministic,
    )
    if settings.deterministic and device.type == "cuda":
        _make_exact(settings, model, report)
    _choose_threads(settings, served, model)
    report("making room for the cache")
    budgets = _budgets(settings, served, model)
    trainer, sampler = _make(settings, served, model, folder, budgets)
    trainer.warm_up(report)
    sampler.warm_up(report)
    _log_choices(settings, served, model, budgets)
    return trainer, sampler


def _make(
    settings: Settings, served: Served, model: "BaseModel", folder: Path, budgets: "Budgets"
) -> "tuple[TorchTrainer, TorchSampler]":
    from transformers import AutoTokenizer

    from tinsmith.sampling.sampler import TorchSampler, most_prefill_tokens
    from tinsmith.training.trainer import TorchTrainer

    trainer = TorchTrainer(
        model,
        micro_batch_tokens=budgets.train_tokens,
        micro_batch_datums=settings.train_micro_batch_size,
        gradient_checkpointing={"on": True, "off": False}.get(settings.gradient_checkpointing, budgets.kept_tokens),
        max_adapters=settings.max_lora_adapters,
        max_rank=settings.max_lora_rank,
        model_bytes=budgets.model_bytes,
        deterministic=settings.deterministic,
    )
    sampler = TorchSampler(
        model,
        AutoTokenizer.from_pretrained(folder, trust_remote_code=served.trust_remote_code),
        kv_tokens=budgets.kv_tokens,
        max_running=budgets.running,
        prefill_tokens=min(most_prefill_tokens(model.device), budgets.layer_tokens),
        snapshot_bytes=budgets.snapshot_bytes,
        deterministic=settings.deterministic,
        max_rank=settings.max_lora_rank,
    )
    return trainer, sampler


def _make_exact(settings: Settings, model: "BaseModel", report: Callable[[str], None]) -> None:
    """One arithmetic for training and sampling on a GPU. Raises ConfigError where that cannot be."""
    from tinsmith.models.adapter_table import MOST_RANKS  # what both are written in comes with torch for CUDA only
    from tinsmith.models.exact import make_exact

    if settings.max_lora_rank > MOST_RANKS:
        raise ConfigError(f"max_lora_rank is {settings.max_lora_rank}; deterministic on a GPU allows {MOST_RANKS}")
    make_exact(model, report)


def _choose_threads(settings: Settings, served: Served, model: "BaseModel") -> None:
    """As many threads of arithmetic as were asked for, one for a small model, else this engine's part of the cores."""
    import torch

    from tinsmith import sizing

    if settings.threads:
        torch.set_num_threads(settings.threads)
    elif model.parameters < sizing.SMALL_MODEL:
        torch.set_num_threads(1)
    elif served.neighbours:
        torch.set_num_threads(max(1, torch.get_num_threads() // (1 + served.neighbours)))


def _log_choices(settings: Settings, served: Served, model: "BaseModel", budgets: "Budgets") -> None:
    import torch

    logger.info(
        "%s: %s, %.4g M parameters, %s on %s, %d threads; %d adapters of rank %d at most; context %d tokens, "
        "cache %d tokens, training %d tokens at a time",
        served.name,
        model.architecture,
        model.parameters / 1e6,
        str(model.dtype).removeprefix("torch."),
        model.device,
        torch.get_num_threads(),
        settings.max_lora_adapters,
        settings.max_lora_rank,
        model.max_context,
        budgets.kv_tokens,
        budgets.train_tokens,
    )


def choose_device(device: str, dtype: str) -> "tuple[torch.device, torch.dtype]":
    """The device and dtype that the settings name, or for `auto` the GPU in bfloat16, else the CPU in float32."""
    import torch

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ConfigError("device 'cuda' was asked for, but torch finds no GPU; use --device cpu or auto")
    name = ("cuda" if available else "cpu") if device == "auto" else device
    if dtype == "auto":
        dtype = "bfloat16" if name == "cuda" else "float32"
    return torch.device(name), {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def _check_weights(served: Served, folder: Path, device: "torch.device", dtype: "torch.dtype") -> None:
    """Raises ConfigError, before anything is loaded, if the weights are more than the memory that may be used."""
    from tinsmith import sizing

    allowed = min(served.memory_bytes or sys.maxsize, _free_bytes(device))
    need = count_parameters(folder) * dtype.itemsize
    sizing.divide(allowed, {served.name: need}, {})


def _bound_memory(served: Served, device: "torch.device") -> None:
    """Has an engine that asks a GPU for more than its part run out of memory itself, instead of its neighbours."""
    import torch

    if served.memory_bytes and device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, served.memory_bytes / total))


def _free_bytes(device: "torch.device") -> int:
    import torch

    from tinsmith import sizing

    return sizing.free_host_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]


def left_bytes(served: Served, model: "BaseModel") -> int:
    """What is free for a loaded model: all there is, or its engine's part less the weights and their second copy."""
    from tinsmith import sizing

    free = _free_bytes(model.device)
    if not served.memory_bytes:
        return free
    left: int = served.memory_bytes - model.parameters * model.dtype.itemsize
    copied = model.quick.packed_bytes if model.quick else 0
    return min(free, max(left - copied, min(left, sizing.ENGINE_ROOM)))


def _budgets(settings: Settings, served: Served, model: "BaseModel") -> "Budgets":
    """As set, or from free memory; limits the model's context to what can be served. Raises ConfigError."""
    from tinsmith import sizing

    sizes = sizing.ModelSizes(
        kv_numbers=model.cache_shape.numbers,
        activation_bytes=model.activation_bytes,
        layers=model.num_layers,
        hidden=model.config.hidden_size,
        max_context=model.max_context,
        item_bytes=model.dtype.itemsize,
        vocabulary=model.vocab_size,
    )
    on_cpu = model.device.type == "cpu"
    free = left_bytes(served, model)
    running = sizing.running_sequences(model.state_bytes, free, CPU_RUNNING if on_cpu else DEVICE_RUNNING)
    captures = model.fused is not None or model.exact is not None
    captured = sizing.step_bytes(sizes, free, running, settings.kv_cache_tokens) if captures else 0
    free -= captured
    model.max_context = _context(settings, served, sizes, free)
    sizes = replace(sizes, max_context=model.max_context)
    fixed = DETERMINISTIC_TRAIN_TOKENS[model.device.type] if settings.deterministic else 0
    sizing.check_cache(sizes, settings.kv_cache_tokens, free, captured)
    always = settings.gradient_checkpointing == "on"
    fitting = sizing.train_tokens(sizes, free, on_cpu=on_cpu, checkpointing=always)
    kv_tokens = settings.kv_cache_tokens or sizing.kv_cache_tokens(sizes, free, running, on_cpu=on_cpu)
    return sizing.Budgets(
        running=min(running, sizing.useful_sequences(kv_tokens)),
        kv_tokens=kv_tokens,
        layer_tokens=sizing.layer_tokens(sizes, free),
        train_tokens=settings.train_tokens or fixed or fitting,
        kept_tokens=sizing.trainable_tokens(sizes, free, checkpointing=False),
        snapshot_bytes=int(free * sizing.SNAPSHOT_SHARE),
        model_bytes=int(free * sizing.MODEL_SHARE),
    )


def _context(settings: Settings, served: Served, sizes: "ModelSizes", free_bytes: int) -> int:
    """The longest sequence served: as set, or the model's own if memory holds it."""
    from tinsmith import sizing

    made_for = sizes.max_context
    if served.max_context > made_for:
        raise ConfigError(
            f"max_context is {served.max_context}, but {served.name} was made for {made_for} tokens at most"
        )
    fitting = sizing.context_tokens(sizes, free_bytes, checkpointing=settings.gradient_checkpointing != "off")
    if fitting < made_for and not served.max_context:
        logger.warning("memory holds sequences of %d tokens, not of the model's %d", fitting, made_for)
    return served.max_context or fitting
