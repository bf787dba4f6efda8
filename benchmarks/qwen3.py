"""Random models of Qwen3's architecture for benchmarks, and the clock that times several sides of a comparison.

Knows no adapters and no memory.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.workloads import Sizes
from tinsmith.models.attention import IMPLEMENTATION
from tinsmith.models.families import find_targets
from tinsmith.models.loading import BaseModel, load_base


def write_model(folder: Path, sizes: Sizes, dtype: torch.dtype) -> Path:
    """A model with random weights, in its folder."""
    Qwen3ForCausalLM(_config(sizes, tied=False)).to(dtype).save_pretrained(folder)
    return folder


def random_base(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> BaseModel:
    """A base model with random weights and tied embeddings, made where it is used; it has no folder."""
    module = random_module(sizes, dtype, device).eval().requires_grad_(False)
    module.set_attn_implementation(IMPLEMENTATION)
    return BaseModel("random", module, find_targets(module), device)


def fused_base(sizes: Sizes, device: torch.device) -> BaseModel:
    """A random base model in bfloat16 on a GPU, with the layers that `load_base` gives to one."""
    from tinsmith.models.fused import fused_layers  # needs Triton

    base = random_base(sizes, torch.bfloat16, device)
    layers = fused_layers(base, print)
    if layers is None:
        raise SystemExit("these layers are what is measured")
    base.fuse(layers)
    return base


def random_module(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Qwen3ForCausalLM:
    """The same model as transformers makes it."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with device:
        module = Qwen3ForCausalLM(_config(sizes, tied=True))
    torch.set_default_dtype(default)
    return module


def _config(sizes: Sizes, *, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=32_768,
        rope_theta=1e6,
        tie_word_embeddings=tied,
    )


def load(folder: Path, dtype: torch.dtype, device: torch.device) -> BaseModel:
    return load_base(folder, dtype=dtype, device=device, on_progress=lambda _: None)


def choose_device(name: str) -> tuple[torch.device, torch.dtype, str]:
    """`cpu`, `cuda` or `auto` as a device, the dtype in which it trains, and the accelerator's name for `record`."""
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return torch.device("cuda"), torch.bfloat16, f"1 x {torch.cuda.get_device_name()}"
    return torch.device("cpu"), torch.float32, ""


@dataclass(frozen=True, slots=True)
class Case:
    """One side of a comparison: what is timed, and what comes before it, untimed."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


def interleaved(cases: Mapping[str, Case], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every round, by case; the cases take turns, so that a slow moment meets all of them.

    A first round of each does not count.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, case in cases.items():
            case.prepare()
            elapsed = milliseconds(case.run)
            if number:
                times[name].append(elapsed)
    return times


def milliseconds(action: Callable[[], object]) -> float:
    """How long one call takes, what it started on a GPU included."""
    _wait()
    began = time.perf_counter()
    action()
    _wait()
    return 1000 * (time.perf_counter() - began)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
