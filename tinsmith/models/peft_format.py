"""What the settings and names in PEFT's adapter files mean to us, and which of them we can serve.

A setting that changes what an adapter computes, and that we do not compute, is refused: never a wrong result.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from tinsmith.errors import UserError

_UNDERSTOOD = frozenset({"peft_type", "r", "lora_alpha", "target_modules", "target_parameters", "init_lora_weights"})
_HARMLESS = frozenset(
    {
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        *("lora_dropout", "megatron_core", "qalora_group_size", "eva_config", "ensure_weight_tying"),
    }
)
"""Settings that leave what a finished adapter computes as it is. (We train without dropout.)"""

_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Those that leave the base weights alone; the others store an adapter of a changed base."""

_OUR_HEAD, _THEIR_HEAD = "base_model.model.model.unembed_tokens.", "base_model.model.lm_head."
_FROZEN_COPIES = (".lm_head.base_layer.weight", ".embed_tokens.weight", ".lm_head.weight")


def check_adapter_config(config: Mapping[str, Any], file: str) -> None:
    """Raises UserError, with the reason, for an adapter that computes what we do not. `file` is for the message."""
    if config.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{file}: peft_type is {config['peft_type']!r}; only 'LORA' is supported")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise UserError(f"{file}: r and lora_alpha must be positive numbers, not {rank!r} and {alpha!r}")
    if (how := config.get("init_lora_weights")) not in _INITIALISATIONS:
        raise UserError(
            f"{file}: init_lora_weights is {how!r}, which also changes the base weights; convert the adapter with "
            "PEFT's path_initial_model_for_weight_conversion first"
        )
    for name, value in config.items():
        if name not in _UNDERSTOOD | _HARMLESS and value and value != "none":
            raise UserError(
                f"{file}: {name} is {value!r}, which is not supported; adapters are plain LoRA with one rank and alpha"
            )


def trained_modules(config: Mapping[str, Any]) -> frozenset[str] | None:
    """Our names of the modules that have adapters; None if the settings do not list them one by one."""
    modules = config.get("target_modules")
    if config.get("target_parameters") or not isinstance(modules, list):
        return None
    return frozenset("unembed_tokens" if module == "lm_head" else module for module in modules)


def check_names(names: Iterable[str], file: str) -> None:
    """Raises UserError for experts in a form that has no equal in PEFT's, which is ours. `file` is for the message."""
    for name in names:
        if re.search(r"\.experts\.w[123]\.", name):
            raise UserError(
                f"{file}: {name} is of experts whose gate and up projection have an A each (w1 and w3), as Tinker's "
                "hosted service exports them; here, as in PEFT, they are one fused layer with one A. `tinsmith import` "
                "brings them into that form"
            )


def our_name(name: str) -> str | None:
    """The name that our layouts use for a tensor of an adapter file; None for a copy of frozen weights.

    PEFT writes the head and the embedding beside the adapter when it adapts the head.
    """
    if name.endswith(_FROZEN_COPIES):
        return None
    return _OUR_HEAD + name.removeprefix(_THEIR_HEAD) if name.startswith(_THEIR_HEAD) else name


def peft_name(name: str) -> str:
    """The name under which PEFT finds a tensor of our layouts: PEFT passes over what it does not find, silently."""
    return _THEIR_HEAD + name.removeprefix(_OUR_HEAD) if name.startswith(_OUR_HEAD) else name


def module_of(name: str) -> str:
    """The module's own name in a tensor's name: `q_proj` of `….self_attn.q_proj.lora_A.weight`."""
    return name.split(".lora_")[0].rpartition(".")[2]
