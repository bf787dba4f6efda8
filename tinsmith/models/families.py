"""Which Hugging Face models can be served: finds the linear layers to adapt, or says why there is no way.

Only what is known to be computed correctly is let through: decoder layers of plain attention and a gated MLP, made of
`nn.Linear`. What a module's structure does not show (a logit scale, say), `loading` finds by comparing results.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from tinsmith.errors import ConfigError

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")
_ROPE_BY_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class Target:
    """A linear layer that adapters may train: its path in the module, its name in checkpoints, its group."""

    path: str
    name: str
    group: str  # attn, mlp or unembed
    inputs: int
    outputs: int


def find_targets(module: Any) -> list[Target]:
    """Every adaptable linear layer, in the order of the module; the unembedding comes last. Raises ConfigError."""
    _check_configuration(module.config)
    targets = [target for index in range(len(module.model.layers)) for target in _layer_targets(module, index)]
    head = module.get_output_embeddings()
    if not _is_plain_linear(head):
        raise ConfigError(f"{type(module).__name__}: its LM head is not a plain linear layer without bias ({head})")
    head_path = next(path for path, child in module.named_modules() if child is head)
    targets.append(Target(head_path, "model.unembed_tokens", "unembed", head.in_features, head.out_features))
    _check_matrices(module, {target.path for target in targets})
    return targets


def _is_plain_linear(head: Any) -> bool:
    return type(head) is nn.Linear and head.bias is None


def _layer_targets(module: Any, index: int) -> Iterator[Target]:
    for part, group, names in (("self_attn", "attn", ATTENTION_LINEARS), ("mlp", "mlp", MLP_LINEARS)):
        prefix = f"model.layers.{index}.{part}"
        parent = getattr(module.model.layers[index], part, None)
        for name in names:
            linear = getattr(parent, name, None)
            if type(linear) is not nn.Linear:
                raise ConfigError(
                    f"{type(module).__name__}: {prefix} has no linear layer {name}; served are models whose layers "
                    f"have self_attn.({', '.join(ATTENTION_LINEARS)}) and mlp.({', '.join(MLP_LINEARS)})"
                )
            path = f"{prefix}.{name}"
            yield Target(path, path, group, linear.in_features, linear.out_features)


def _check_matrices(module: Any, targets: set[str]) -> None:
    embedding = module.get_input_embeddings()
    for path, child in module.named_modules():
        if path in targets or child is embedding:
            continue
        for name, parameter in child.named_parameters(recurse=False):
            if parameter.ndim > 1:
                raise ConfigError(
                    f"{type(module).__name__}: {path}.{name} of shape {tuple(parameter.shape)} belongs to a kind of "
                    f"layer that is not supported (mixture of experts, convolution, state space, …)"
                )


def _check_configuration(config: Any) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind in _ROPE_BY_LENGTH:
        raise ConfigError(
            f"{config.model_type}: rope type {kind!r} changes with the longest sequence of a batch, so one request "
            f"would change another's result"
        )
    layer_types = set(getattr(config, "layer_types", None) or ())
    if unknown := layer_types - {"full_attention", "sliding_attention"}:
        raise ConfigError(f"{config.model_type}: layer types {sorted(unknown)} are not supported")
