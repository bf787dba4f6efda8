"""Which Hugging Face models can be served: finds the linear layers to adapt, or says why there is no way.

Only what is known to be computed correctly is let through: decoder layers of an attention (or a gated delta net) and an
MLP (or a mixture of experts), made of `nn.Linear` and fused experts. What a module's structure does not show (a logit
scale, say), `loading` finds by comparing results.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tinsmith.errors import ConfigError
from tinsmith.models.delta_nets import CONVOLUTION, is_delta_net

GROUP_OF_PART = {"self_attn": "attn", "linear_attn": "attn", "mlp": "mlp"}
"""Parts of a decoder layer in which every linear layer is adapted, and the group that their adapters belong to."""

EXPERT_PARAMETERS = {"gate_up_proj": ".base_layer", "down_proj": ""}
"""The parameters of fused experts, in the order of the module, and what PEFT adds to the module's path for each."""

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linear layers of one parent that are applied to the same input, and so can be one product."""

_ROUTERS = ("gate", "router")
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "linear_attention"})
_ROPE_BY_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class Target:
    """A linear layer that adapters may train: its path in the module, its name in checkpoints, its group.

    If `experts` is not 0, the layer is a parameter: the fused linear layers of so many experts.
    """

    path: str
    name: str
    group: str  # attn, mlp or unembed
    inputs: int
    outputs: int
    experts: int = 0

    def shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of A and B, as PEFT saves them: all experts' ranks side by side."""
        ranks = rank * max(1, self.experts)
        return (ranks, self.inputs), (self.outputs, ranks)

    def weight(self, module: nn.Module) -> Tensor:
        """The layer's parameter in a model as it was loaded."""
        return module.get_parameter(self.path if self.experts else f"{self.path}.weight")


def find_targets(module: Any) -> list[Target]:
    """Every adaptable linear layer, in the order of the module; the unembedding comes last. Raises ConfigError."""
    if not isinstance(getattr(getattr(module, "model", None), "layers", None), nn.ModuleList):
        raise ConfigError(f"{type(module).__name__} has no list of decoder layers at model.layers")
    _check_configuration(module.config)
    _check_recurrent_layers(module)
    targets = [target for index in range(len(module.model.layers)) for target in _layer_targets(module, index)]
    head = module.get_output_embeddings()
    if not _is_plain_linear(head):
        raise ConfigError(f"{type(module).__name__}: its LM head is not a plain linear layer without bias ({head})")
    head_path = next(path for path, child in module.named_modules() if child is head)
    targets.append(Target(head_path, "model.unembed_tokens", "unembed", head.in_features, head.out_features))
    experts = {target.path.rpartition(".")[0] for target in targets if target.experts}
    _check_matrices(module, experts | {target.path for target in targets})
    if missing := {*GROUP_OF_PART.values()} - {target.group for target in targets}:
        raise ConfigError(
            f"{type(module).__name__}: no linear layers to adapt ({', '.join(sorted(missing))}); served are models "
            f"whose decoder layers have linear layers in {', '.join(GROUP_OF_PART)}"
        )
    return targets


def _is_plain_linear(head: Any) -> bool:
    return type(head) is nn.Linear and head.bias is None


def _layer_targets(module: Any, index: int) -> Iterator[Target]:
    for part, group in GROUP_OF_PART.items():
        prefix = f"model.layers.{index}.{part}"
        parent = getattr(module.model.layers[index], part, None)
        for name, child in parent.named_modules() if parent is not None else ():
            if type(child) is nn.Linear and not _is_gate(child):
                yield Target(f"{prefix}.{name}", f"{prefix}.{name}", group, child.in_features, child.out_features)
            elif group == "mlp" and _is_experts(child):
                yield from expert_targets(module, f"{prefix}.{name}", child)


def _is_gate(linear: nn.Linear) -> bool:
    """One number per token, as of a shared expert's gate: stays frozen."""
    return linear.out_features == 1


def expert_targets(module: Any, path: str, experts: Any) -> Iterator[Target]:
    """The adaptable parameters of the fused experts at `path`. Raises ConfigError for an unknown kind of experts.

    PEFT adapts a module's parameters by wrapping it once for each, the first one innermost: hence the names.
    """
    _check_experts(module, path, experts)
    for parameter, wrapper in EXPERT_PARAMETERS.items():
        shape = getattr(experts, parameter).shape
        inputs, outputs = shape[1:] if experts.is_transposed else (shape[2], shape[1])
        yield Target(f"{path}.{parameter}", path + wrapper, "mlp", inputs, outputs, shape[0])


def _is_experts(child: nn.Module) -> bool:
    return any(parameter.ndim == 3 for parameter in child.parameters(recurse=False))


def _check_experts(module: Any, path: str, experts: Any) -> None:
    names = {name for name, _ in experts.named_parameters()}
    biases = {f"{name}_bias" for name in EXPERT_PARAMETERS} if getattr(experts, "has_bias", False) else set()
    plain = getattr(experts, "has_gate", False) and not getattr(experts, "has_post_expert_norm", False)
    if names != EXPERT_PARAMETERS.keys() | biases or not plain:
        raise ConfigError(
            f"{type(module).__name__}: {path} is a mixture of experts of an unknown kind ({', '.join(sorted(names))}); "
            f"served are gated experts with {' and '.join(EXPERT_PARAMETERS)} in one tensor each"
        )


def _check_matrices(module: Any, known: set[str]) -> None:
    embedding = module.get_input_embeddings()
    for path, child in module.named_modules():
        if path in known or child is embedding or (type(child) is nn.Linear and _is_gate(child)):
            continue
        for name, parameter in child.named_parameters(recurse=False):
            if parameter.ndim > 1 and not _is_router(module, path) and not _is_convolution(module, path):
                raise ConfigError(
                    f"{type(module).__name__}: {path}.{name} of shape {tuple(parameter.shape)} belongs to a kind of "
                    f"layer that is not supported (mixture of experts, convolution, state space, …)"
                )


def _is_router(module: Any, path: str) -> bool:
    """Whether the submodule chooses among experts beside it."""
    parent, _, name = path.rpartition(".")
    return name in _ROUTERS and hasattr(module.get_submodule(parent), "experts")


def _is_convolution(module: Any, path: str) -> bool:
    """Whether the submodule is the frozen convolution of a delta net."""
    parent, _, name = path.rpartition(".")
    return name == CONVOLUTION and is_delta_net(module.get_submodule(parent))


def _check_recurrent_layers(module: Any) -> None:
    kinds = getattr(module.config, "layer_types", None) or ()
    for index, kind in enumerate(kinds):
        if kind == "linear_attention" and not is_delta_net(getattr(module.model.layers[index], "linear_attn", None)):
            raise ConfigError(
                f"{type(module).__name__}: model.layers.{index} is recurrent in a way that Tinsmith does not know of; "
                f"of recurrent layers, gated delta nets are served"
            )


def _check_configuration(config: Any) -> None:
    for kind in _rope_kinds(getattr(config, "rope_parameters", None) or {}):
        if kind in _ROPE_BY_LENGTH:
            raise ConfigError(
                f"{config.model_type}: rope type {kind!r} changes with the longest sequence of a batch, so one "
                f"request would change another's result"
            )
    layer_types = set(getattr(config, "layer_types", None) or ())
    if unknown := layer_types - _LAYER_TYPES:
        raise ConfigError(f"{config.model_type}: layer types {sorted(unknown)} are not supported")


def _rope_kinds(rope: Mapping[str, Any]) -> Iterator[str]:
    """The rope types of a configuration: one for all layers, or one for each layer type."""
    yield rope.get("rope_type", "default")
    for own in rope.values():
        if isinstance(own, Mapping):
            yield own.get("rope_type", "default")
