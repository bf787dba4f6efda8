"""An adapter's files for those who serve it: PEFT's own form, and the one that vLLM loads.

vLLM reads PEFT's names, but not of every layer: what its published loader (vllm/lora/lora_model.py, peft_helper.py,
model_manager.py, and the models' `embedding_modules` and `is_3d_moe_weight`) would refuse, or pass over in silence, is
refused here with the reason. Knows names and shapes; nothing of checkpoints' paths.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinsmith.errors import UserError
from tinsmith.models.weights import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    adapter_spec,
    peft_targets,
    read_adapter_tensors,
    write_tensors,
)

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be."""

_VLLM_VOCABULARY = 258_048  # tokens: more than that, and LogitsProcessorWithLoRA refuses any adapter


@dataclass(frozen=True, slots=True)
class _Rules:
    """Of one of vLLM's models: whether its LM head takes adapters, and how those of fused experts are written.

    `experts` is `each` (two matrices for every expert's every projection), or `fused` (PEFT's own two pairs).
    """

    head: bool = False
    experts: str = ""


_VLLM = {
    "llama": _Rules(head=True),
    "mistral": _Rules(head=True),
    "qwen2": _Rules(),
    "qwen3": _Rules(head=True),
    "gemma3_text": _Rules(),
    "qwen3_moe": _Rules(head=True, experts="each"),
    "gpt_oss": _Rules(experts="fused"),
}

_LATENT = "it folds the kv_b_proj of latent attention into other products as it loads, where no adapter follows it"
_DELTA = "it stacks the projections of gated delta nets in a way that adapters do not follow"
_REASONS = {"deepseek_v3": _LATENT, "deepseek_v2": _LATENT, "qwen3_next": _DELTA, "qwen3_5_text": _DELTA}
_REASONS |= {"qwen3_5_moe_text": _DELTA, "qwen3_5": _DELTA, "qwen3_5_moe": _DELTA}

_GATE_UP, _DOWN = ".experts.base_layer.", ".experts."


def write_peft(adapter: Path, out: Path, base_name: str) -> None:
    """Writes the adapter of a checkpoint's folder into the folder `out`, as PEFT reads it. Raises UserError."""
    tensors = read_adapter_tensors(adapter)
    modules, parameters = peft_targets(list(tensors))
    _write(adapter, out, tensors, {"target_modules": modules, "target_parameters": parameters}, base_name)


def write_vllm(adapter: Path, out: Path, base_name: str, base_config: Mapping[str, Any]) -> None:
    """The same as vLLM reads it, for a base with this config.json. Raises UserError with the reason if it cannot."""
    rank = adapter_spec(adapter).rank
    vllm_rank(rank)
    tensors = vllm_tensors(read_adapter_tensors(adapter), rank, base_config)
    modules = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors})
    _write(adapter, out, tensors, {"target_modules": modules}, base_name)


def _write(adapter: Path, out: Path, tensors: Mapping[str, Tensor], targets: Mapping[str, Any], base_name: str) -> None:
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    config |= {"target_parameters": None, "base_model_name_or_path": base_name, "inference_mode": True, **targets}
    write_tensors(tensors, out / ADAPTER_FILE)
    (out / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def vllm_rank(rank: int) -> int:
    """The --max-lora-rank that vLLM needs for an adapter. Raises UserError beyond all that it takes."""
    for allowed in VLLM_RANKS:
        if rank <= allowed:
            return allowed
    raise UserError(f"vLLM takes adapters of rank {VLLM_RANKS[-1]} at most, this one has {rank}; {_INSTEAD}")


_INSTEAD = "export a merged model instead (tinsmith export --merged)"


def vllm_tensors(tensors: Mapping[str, Tensor], rank: int, base_config: Mapping[str, Any]) -> dict[str, Tensor]:
    """An adapter in PEFT's form → in vLLM's. Raises UserError with the reason for what vLLM does not load."""
    kind = str(base_config.get("model_type"))
    if kind not in _VLLM:
        reason = _REASONS.get(kind, "how its loader names that model's layers has not been checked")
        raise UserError(f"vLLM loads no such adapter of a {kind!r} model: {reason}; {_INSTEAD}")
    rules = _VLLM[kind]
    _check_head(tensors, base_config, rules)
    written: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".experts." in name and rules.experts == "each":
            written |= dict(_of_each_expert(name, tensor, rank))
        else:
            written[name] = tensor
    return written


def _check_head(tensors: Mapping[str, Tensor], base_config: Mapping[str, Any], rules: _Rules) -> None:
    if not any(".lm_head." in name for name in tensors):
        return
    kind, vocabulary = base_config["model_type"], int(base_config["vocab_size"])
    reason = ""
    if not rules.head:
        reason = f"its {kind!r} model has no LoRA for the LM head"
    elif base_config.get("tie_word_embeddings"):
        reason = "head and embedding are one module there, so an adapter of the head has no place of its own"
    elif vocabulary > _VLLM_VOCABULARY:
        reason = f"the vocabulary has {vocabulary} tokens, {_VLLM_VOCABULARY} are allowed"
    if reason:
        raise UserError(f"vLLM cannot apply this adapter of the LM head: {reason}; {_INSTEAD}, or train_unembed=False")


def _of_each_expert(name: str, tensor: Tensor, rank: int) -> Iterator[tuple[str, Tensor]]:
    """A matrix of a fused layer as one for every expert and projection. A is expert by expert, B rank by rank."""
    prefix, _, suffix = name.partition(_GATE_UP if _GATE_UP in name else _DOWN)
    projections = ("gate_proj", "up_proj") if _GATE_UP in name else ("down_proj",)
    is_a = suffix.startswith("lora_A")
    parts = tensor.split(rank) if is_a else tensor.unflatten(1, (rank, -1)).unbind(2)
    for expert, part in enumerate(parts):
        rows = [part.clone() for _ in projections] if is_a else torch.chunk(part, len(projections))
        for projection, matrix in zip(projections, rows, strict=True):
            yield f"{prefix}.experts.{expert}.{projection}.{suffix}", matrix
