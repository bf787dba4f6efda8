"""`--backend-config`: the keys of SkyRL's Tinker server, as settings of ours.

A value that can be honoured becomes a setting; one that a single device cannot honour, and every unknown key, is
refused by name. Knows no more of that system than its published keys.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from tinsmith.errors import ConfigError

Settings = dict[str, Any]


def translate(text: str) -> Settings:
    """The settings that a JSON object of dotted (or nested) keys asks for. Raises ConfigError."""
    settings: Settings = {}
    for key, value in _flat(_parsed(text)).items():
        if key not in _KEYS:
            raise ConfigError(f"backend-config: {key!r} is not known{_hint(key)}; known are {', '.join(_KEYS)}")
        for name, wanted in _KEYS[key](key, value).items():
            settings[name] = wanted if name not in settings else _both(key, name, settings[name], wanted)
    return settings


def merge(given: Mapping[str, Any], translated: Settings) -> Settings:
    """What the command line says beside `--backend-config`. Raises ConfigError where they contradict each other."""
    for name in given.keys() & translated.keys():
        if given[name] != translated[name]:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{option} is {given[name]}, but backend-config says {translated[name]}; give one of them"
            )
    return translated | dict(given)


def check_tensor_parallel(size: int) -> None:
    """Raises ConfigError for what one device cannot do."""
    _one_device("tensor-parallel-size", size)


def _parsed(text: str) -> dict[str, Any]:
    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated = {key for key, _ in pairs if sum(other == key for other, _ in pairs) > 1}
        if repeated:
            raise ConfigError(f"backend-config: {sorted(repeated)[0]!r} is given more than once")
        return dict(pairs)

    try:
        parsed = json.loads(text, object_pairs_hook=without_repeats)
    except ValueError as error:
        raise ConfigError(f"backend-config is no JSON ({error}): {text!r}") from error
    if not isinstance(parsed, dict):
        raise ConfigError(f"backend-config must be a JSON object of keys and values, got {text!r}")
    return parsed


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _whole(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"backend-config: {key} is {value!r}; expected a whole number of at least 1")
    return value


def _one_device(key: str, value: object) -> Settings:
    if _whole(key, value) > 1:
        raise ConfigError(
            f"{key} is {value}, but this version computes on one device, which trains and samples in turns; 1 is what "
            "is possible. Several servers, each with a device of its own (CUDA_VISIBLE_DEVICES) and a port, can share "
            "the work by base model"
        )
    return {}


def _sequences(key: str, value: object) -> Settings:
    return {"train_micro_batch_size": _whole(key, value)}


def _memory(key: str, value: object) -> Settings:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ConfigError(f"backend-config: {key} is {value!r}; expected a fraction above 0 and at most 1")
    return {"memory_fraction": float(value)}


def _same(name: str) -> Callable[[str, object], Settings]:
    return lambda key, value: {name: _whole(key, value)}


_KEYS: dict[str, Callable[[str, object], Settings]] = {
    "trainer.placement.policy_num_gpus_per_node": _one_device,
    "trainer.placement.policy_num_nodes": _one_device,
    "generator.num_inference_engines": _one_device,
    "generator.inference_engine.num_engines": _one_device,
    "generator.inference_engine_tensor_parallel_size": _one_device,
    "generator.inference_engine.tensor_parallel_size": _one_device,
    "trainer.micro_forward_batch_size_per_gpu": _sequences,
    "trainer.micro_train_batch_size_per_gpu": _sequences,
    "generator.gpu_memory_utilization": _memory,
    "generator.inference_engine.gpu_memory_utilization": _memory,
    "max_lora_adapters": _same("max_lora_adapters"),
    "max_lora_rank": _same("max_lora_rank"),
    "tensor_parallel_size": _one_device,
    "train_micro_batch_size": _sequences,
}

_HINTS = {
    "trainer.policy.optimizer_config.": "it comes with every optim_step",
    "trainer.algorithm.": "it comes with every forward_backward",
    "trainer.policy.model.lora.": "it comes with create_model",
    "trainer.policy.model.path": "the model is named on the command line: tinsmith serve MODEL",
}


def _hint(key: str) -> str:
    reason = next((hint for prefix, hint in _HINTS.items() if key.startswith(prefix)), "")
    return f" ({reason})" if reason else ""


def _both(key: str, name: str, first: Any, second: Any) -> Any:
    """One value for a setting that two keys ask for: of two bounds on sequences the smaller one keeps both."""
    if name == "train_micro_batch_size":
        return min(first, second)
    if first != second:
        raise ConfigError(f"backend-config: {key} is {second}, but another key for the same says {first}")
    return first
