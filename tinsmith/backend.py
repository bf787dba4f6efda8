"""Trainer and sampler of one served model: found or fetched, loaded, and sized to the memory that there is.

A part of the composition root that needs no database, for benchmarks and tests, too. Imports are inside the functions,
since the command line shares this module with the engine.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tinsmith.config import EMBEDDED, Settings
from tinsmith.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from tinsmith.models.loading import BaseModel
    from tinsmith.protocols import Sampler, Trainer
    from tinsmith.sizing import Budgets, ModelSizes

logger = logging.getLogger(__name__)

CPU_RUNNING, DEVICE_RUNNING = 64, 256  # sequences sampled at once
DETERMINISTIC_TRAIN_TOKENS = {"cpu": 1024, "cuda": 8192}  # of a micro-batch, however much memory is free
_WEIGHT_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def load_backend(settings: Settings, report: Callable[[str], None]) -> "tuple[Trainer, Sampler]":
    """The trainer and the sampler of the served model, sized to the memory that is free.

    Needs no database: benchmarks and tests use it too. On a GPU, deterministic training needs the variables of
    `engine_environment`. Raises ConfigError.
    """
    report("starting")
    import torch
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from tinsmith import sizing
    from tinsmith.models.loading import load_base
    from tinsmith.sampling.sampler import TorchSampler
    from tinsmith.training.trainer import TorchTrainer

    disable_progress_bar()  # type: ignore[no-untyped-call]  # `report` says how loading goes
    device, dtype = choose_device(settings.device, settings.dtype)
    folder = model_folder(settings, report)
    model = load_base(folder, dtype=dtype, device=device, on_progress=report)
    if settings.threads or model.parameters < sizing.SMALL_MODEL:
        torch.set_num_threads(settings.threads or 1)
    report("making room for the cache")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    budgets = _budgets(settings, model)
    trainer = TorchTrainer(
        model,
        micro_batch_tokens=budgets.train_tokens,
        micro_batch_datums=settings.train_micro_batch_size,
        gradient_checkpointing={"on": True, "off": False}.get(settings.gradient_checkpointing, budgets.kept_tokens),
        max_adapters=settings.max_lora_adapters,
        max_rank=settings.max_lora_rank,
        deterministic=settings.deterministic,
    )
    sampler = TorchSampler(
        model,
        tokenizer,
        kv_tokens=budgets.kv_tokens,
        max_running=budgets.running,
        snapshot_bytes=budgets.snapshot_bytes,
        deterministic=settings.deterministic and device.type == "cpu",
    )
    logger.info(
        "%s: %s, %.4g M parameters, %s on %s, %d threads; %d adapters of rank %d at most; context %d tokens, "
        "cache %d tokens, training %d tokens at a time",
        settings.model,
        model.architecture,
        model.parameters / 1e6,
        str(dtype).removeprefix("torch."),
        device,
        torch.get_num_threads(),
        settings.max_lora_adapters,
        settings.max_lora_rank,
        model.max_context,
        budgets.kv_tokens,
        budgets.train_tokens,
    )
    return trainer, sampler


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


def model_folder(settings: Settings, report: Callable[[str], None]) -> Path:
    """The served model's folder on this machine; a hub model is downloaded first. Raises ConfigError."""
    if settings.model == EMBEDDED:
        from tinsmith.demo import tiny_folder

        return tiny_folder()
    folder = Path(settings.served_name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder} has no config.json; give the folder of a Hugging Face model")
        return folder
    return _download(settings.model, report)


def _download(name: str, report: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    report(f"fetching {name}")
    try:
        return Path(snapshot_download(name, allow_patterns=_WEIGHT_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{name!r} is no folder here, and could not be fetched from the hub: {reason}") from error


def _budgets(settings: Settings, model: "BaseModel") -> "Budgets":
    """As set, or from free memory; limits the model's context to what can be served. Raises ConfigError."""
    import torch

    from tinsmith import sizing

    sizes = sizing.ModelSizes(
        kv_numbers=model.cache_shape.numbers,
        activation_bytes=model.activation_bytes,
        layers=model.num_layers,
        hidden=model.config.hidden_size,
        max_context=model.max_context,
        item_bytes=model.dtype.itemsize,
    )
    on_cpu = model.device.type == "cpu"
    free = sizing.free_host_memory() if on_cpu else torch.cuda.mem_get_info(model.device)[0]
    model.max_context = _context(settings, sizes, free)
    sizes = replace(sizes, max_context=model.max_context)
    running = sizing.running_sequences(model.state_bytes, free, CPU_RUNNING if on_cpu else DEVICE_RUNNING)
    fixed = DETERMINISTIC_TRAIN_TOKENS[model.device.type] if settings.deterministic else 0
    always = settings.gradient_checkpointing == "on"
    fitting = sizing.train_tokens(sizes, free, on_cpu=on_cpu, checkpointing=always)
    return sizing.Budgets(
        running=running,
        kv_tokens=settings.kv_cache_tokens or sizing.kv_cache_tokens(sizes, free, running, on_cpu=on_cpu),
        train_tokens=settings.train_tokens or fixed or fitting,
        kept_tokens=sizing.trainable_tokens(sizes, free, checkpointing=False),
        snapshot_bytes=int(free * sizing.SNAPSHOT_SHARE),
    )


def _context(settings: Settings, sizes: "ModelSizes", free_bytes: int) -> int:
    """The longest sequence served: as set, or the model's own if memory holds it."""
    from tinsmith import sizing

    made_for = sizes.max_context
    if settings.max_context > made_for:
        raise ConfigError(
            f"max_context is {settings.max_context}, but the model was made for {made_for} tokens at most"
        )
    fitting = sizing.context_tokens(sizes, free_bytes, checkpointing=settings.gradient_checkpointing != "off")
    if fitting < made_for and not settings.max_context:
        logger.warning("memory holds sequences of %d tokens, not of the model's %d", fitting, made_for)
    return settings.max_context or fitting
