"""What vLLM makes of an adapter's folder, by the rules of its published loader: vLLM itself wants a GPU.

The rules come from these files of github.com/vllm-project/vllm (read in November 2026):
`vllm/lora/peft_helper.py` (which settings are read, which refused), `vllm/lora/lora_model.py`
(`check_unexpected_modules`, `from_lora_tensors`), `vllm/lora/utils.py` (`parse_fine_tuned_lora_name`,
`get_supported_lora_modules`, `process_packed_modules_mapping`), `vllm/lora/model_manager.py`
(`_create_merged_loras_inplace`, `_stack_moe_lora_weights`), and from `vllm/model_executor/models/` the attributes
`packed_modules_mapping`, `embedding_modules` and `is_3d_moe_weight` of llama.py, qwen2.py, qwen3.py, qwen3_moe.py,
gpt_oss.py and gemma3.py. Knows nothing of our own code.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

HEADS = {"llama", "mistral", "qwen3", "qwen3_moe"}  # models whose embedding_modules have an lm_head
FUSED_EXPERTS = {"gpt_oss"}  # models with is_3d_moe_weight
REQUIRED = ("r", "lora_alpha", "target_modules")


def vllm_deltas(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """Module → what vLLM adds to its weight: [O, I], of fused experts [E, O, I]. Raises ValueError where vLLM does."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    if missing := [name for name in REQUIRED if name not in settings]:
        raise ValueError(f"Missing required configuration fields: {missing}")
    if settings.get("modules_to_save") or settings.get("use_dora") or settings.get("bias", "none") != "none":
        raise ValueError("unsupported")
    loras: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        _check_expected(name, config)
        if name.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")):
            continue
        module, _, part = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        loras.setdefault(module, {})[part] = tensor
    scale = settings["lora_alpha"] / settings["r"]
    return {module: scale * _delta(module, parts, config) for module, parts in loras.items()}


def expected_modules(config: dict[str, Any]) -> set[str]:
    """The last parts of the names of modules that take adapters."""
    kind = config["model_type"]
    expected = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    if kind in HEADS:
        expected |= {"embed_tokens", "lm_head"}
    if kind in FUSED_EXPERTS:
        expected |= {"experts"}
    elif experts := _num_experts(config):
        projections = ("gate_proj", "up_proj", "down_proj")
        expected |= {f"experts.{expert}.{name}" for expert in range(experts) for name in projections} | {"experts"}
    return expected


def _check_expected(name: str, config: dict[str, Any]) -> None:
    if "base_layer" in name:
        return
    parts = name.split(".")
    if parts[-1] != "weight" or parts[-2] not in ("lora_A", "lora_B"):
        raise ValueError(f"{name} is unsupported LoRA weight")
    module = ".".join(parts[2:-2])
    suffix = module[module.find(".experts") + 1 :] if ".experts" in module else module.rpartition(".")[2]
    if suffix not in expected_modules(config):
        raise ValueError(f"expected target modules in {expected_modules(config)} but received {module}")


def _delta(module: str, parts: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    matrix_a, matrix_b = parts["A"], parts["B"]
    if not module.endswith((".experts", ".experts.base_layer")):
        return matrix_b @ matrix_a
    if config["model_type"] not in FUSED_EXPERTS:
        raise ValueError(f"{module}: fused experts of a model whose experts are loaded one by one are passed over")
    experts = _num_experts(config)
    a_ERI = matrix_a.reshape(experts, -1, matrix_a.shape[-1])
    b_EOR = matrix_b.reshape(matrix_b.shape[0], -1, experts).permute(2, 0, 1)
    return torch.bmm(b_EOR, a_ERI)


def _num_experts(config: dict[str, Any]) -> int:
    return int(config.get("num_local_experts") or config.get("num_experts") or 0)
